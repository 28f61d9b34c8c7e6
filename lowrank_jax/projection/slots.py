"""The slots of the projection transformation: a frozen, validated record without any logic of an update."""

from __future__ import annotations

import dataclasses
import zlib
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_jax.checks import check_integer, check_number
from lowrank_jax.matrices import ResolvedView
from lowrank_jax.optim import inner as inner_lib
from lowrank_jax.projection.batches import each
from lowrank_jax.projection.projectors.base import Projector
from lowrank_jax.projection.refresh_schedules import Clock, Every
from lowrank_jax.projection.residuals import Discard, Residual
from lowrank_jax.projection.transports import Keep
from lowrank_jax.resolution import Report, Views, check_side, resolve


@dataclasses.dataclass(frozen=True, kw_only=True)
class Projection:
    """The slots of `scale_by_projection`, validated.

    >>> import lowrank_jax as lrx
    >>> lrx.Projection(projector=lrx.projectors.svd(rank=8)).clock
    Every(when='before', period=200, phase=0, first=True)
    """

    projector: Projector
    inner: Any = dataclasses.field(default_factory=inner_lib.Adam)
    clock: Clock = Every(period=200)
    transport: Any = Keep()
    residual: Residual = Discard()
    scale: Any = 1.0
    side: Any = "paper"
    tie: str = "rows"
    views: Views = Views()
    plain: Any = None
    guard: bool = True
    clip_norm: Any = None
    seed: Any = 0

    def __post_init__(self):
        kinds = {"projector": Projector, "clock": Clock, "residual": Residual, "views": Views}
        for name, kind in kinds.items():
            if not isinstance(getattr(self, name), kind):
                raise ValueError(
                    f"{name}={getattr(self, name)!r} must be one of lrx.{_ROOMS[name]}"
                )
        if not callable(self.transport) or not hasattr(self.transport, "moves"):
            raise ValueError(f"transport={self.transport!r} must be one of lrx.transports")
        object.__setattr__(self, "inner", inner_lib.as_inner(self.inner))
        object.__setattr__(
            self, "plain", self.inner if self.plain is None else inner_lib.as_inner(self.plain)
        )
        check_side(self.side, self.tie)
        check_number("clip_norm", self.clip_norm, above=0, otherwise="None for no clipping")
        check_number("scale", self.scale)
        check_integer("seed", self.seed, at_least=-(2**31))
        no_first = isinstance(self.clock, Every) and not self.clock.first
        if no_first and "grad" in self.projector.needs:
            raise ValueError(
                f"clock: first=False leaves {type(self.projector).__name__} without a basis from "
                "data until the first due step; use first=True, or a random or given projector"
            )

    def report(self, params: Any, shardings: Any = None) -> Report:
        """What is projected, at which rank, and what is not and why."""
        return resolve(
            params,
            self.views,
            rank=self.projector.rank_for,
            side=self.side,
            tie=self.tie,
            shardings=shardings,
        )

    def phase(self, view: ResolvedView) -> int:
        """A number of the leaf alone, the same in every process: the CRC32 of its path."""
        return zlib.crc32(view.path.encode())

    def keys(self, view: ResolvedView, step: jax.Array, layers: jax.Array) -> jax.Array:
        """One key for each matrix of a leaf, from the seed, the CRC32 of the path, the step and the
        layer's number."""
        key = jax.random.fold_in(
            jax.random.key(jnp.asarray(self.seed, jnp.int32)), self.phase(view)
        )
        key = jax.random.fold_in(key, step)
        return each(lambda layer: jax.random.fold_in(key, layer), view.batch)(layers)

    @property
    def reads_params(self) -> bool:
        return self.inner.reads_params or "param" in self.projector.needs


_ROOMS = {"projector": "projectors", "clock": "clocks", "residual": "residuals", "views": "Views"}
