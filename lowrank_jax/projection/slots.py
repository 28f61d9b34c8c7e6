"""The slots of the projection transformation: a frozen, validated record without any logic of an update."""

from __future__ import annotations

import dataclasses
import zlib
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_jax import deprecations
from lowrank_jax.checks import check_integer, check_number
from lowrank_jax.matrices import ResolvedView
from lowrank_jax.optim import inner as inner_lib
from lowrank_jax.optim import scales
from lowrank_jax.projection.batches import each
from lowrank_jax.projection.projectors.base import Projector
from lowrank_jax.projection.refresh_schedules import Every, RefreshSchedule
from lowrank_jax.projection.residuals import Discard, Residual
from lowrank_jax.projection.samplers import All, Sampler
from lowrank_jax.projection.state import READABLE
from lowrank_jax.projection.targets import Gradient, Target
from lowrank_jax.projection.transports import Keep, Transport
from lowrank_jax.reprs import Short
from lowrank_jax.resolution import Report, Views, check_side, resolve
from lowrank_jax.typing import Pytree, Scalar


@deprecations.options("lrx.projection.Projection")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Projection(Short):
    """The slots of `scale_by_projection`, validated; that function says what each is.

    Raises:
      ValueError: for slots that do not fit together; it names field, value and remedy.

    >>> import lowrank_jax as lrx
    >>> lrx.projection.Projection(projector=lrx.projectors.svd(rank=8)).refresh_schedule
    Every(period=200)
    """

    projector: Projector
    inner: Any = dataclasses.field(default_factory=inner_lib.Adam)
    refresh_schedule: RefreshSchedule = Every(period=200)
    transport: Transport = Keep()
    target: Target = Gradient()
    residual: Residual = Discard()
    sampler: Sampler = All()
    scale: Scalar = 1.0
    side: Any = "paper"
    tie: str = "rows"
    views: Views = Views()
    plain: Any = None
    guard: bool = True
    clip_norm: Any = None
    seed: Scalar = 0

    def __post_init__(self):
        self._take_old_spelling()
        for name, (kind, room) in _KINDS.items():
            if not isinstance(getattr(self, name), kind):
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of lrx.{room}")
        object.__setattr__(self, "inner", inner_lib.as_inner(self.inner))
        plain = self.inner if self.plain is None else inner_lib.as_inner(self.plain)
        object.__setattr__(self, "plain", plain)
        check_side(self.side, self.tie)
        check_number("clip_norm", self.clip_norm, above=0, otherwise="None for no clipping")
        scales.check_factor("scale", self.scale, or_scale=True)
        check_integer("seed", self.seed, at_least=-(2**31))
        self._check_pairs()

    def _take_old_spelling(self) -> None:
        """A target that is given as a residual rule, as before targets were a slot."""
        if not isinstance(self.residual, Target):
            return
        if type(self.target) is not Gradient:
            raise ValueError(
                f"residual={self.residual!r} is a target, and target={self.target!r} is given too; "
                "give one of them, as target="
            )
        object.__setattr__(self, "target", self.residual)
        object.__setattr__(self, "residual", Discard())

    def _check_pairs(self) -> None:
        """Refuses slots that do not fit together."""
        projector, schedule, name = self.projector, self.refresh_schedule, type(self.projector)
        unknown = projector.reads - READABLE
        if unknown or projector.sees - {"low", "target"}:
            raise ValueError(
                f"projector {name.__name__}: reads={set(projector.reads)} must name fields of "
                f"lrx.projectors.RefreshInputs, and sees={set(projector.sees)} 'low' or 'target'"
            )
        if not schedule.first and "target" in projector.reads:
            raise ValueError(
                f"refresh_schedule={schedule!r}: first=False leaves {name.__name__} with the basis "
                "of its init, which saw no data, until the first due step; use first=True, or a "
                "projector whose refresh reads no target, such as lrx.projectors.random or given"
            )
        if "change" in schedule.reads and projector.moves and not projector.orthonormal:
            raise ValueError(
                f"refresh_schedule {type(schedule).__name__} reads cosines of basis vectors, and "
                f"bases of {name.__name__} are not orthonormal; use a projector such as "
                "lrx.projectors.svd, or lrx.refresh_schedules.every"
            )
        if schedule.reads and not schedule.per_layer:
            raise ValueError(
                f"refresh_schedule {type(schedule).__name__}: reads={set(schedule.reads)} is of "
                "single matrices; set per_layer, or leave it empty"
            )
        if schedule.per_layer and schedule.sliced:
            raise ValueError(
                f"refresh_schedule {type(schedule).__name__}: per_layer decides layer by layer, and "
                "slice gives each step its layers; implement one of them"
            )
        if projector.of_layers and self.sampler.samples:
            raise ValueError(
                f"projector {name.__name__}: the layers of a stack differ by their numbers, and "
                f"{type(self.sampler).__name__} moves them from slot to slot; take another rank "
                "schedule, or no sampler"
            )
        if self.clip_norm is not None and self.target.accumulates:
            raise ValueError(
                f"clip_norm={self.clip_norm}: {type(self.target).__name__} sums gradients up, and "
                "a clipped sum is not a sum of clipped gradients; chain "
                "optax.clip_by_global_norm before the optimizer"
            )

    @property
    def keeps_gradient(self) -> bool:
        """Whether a step is made of the full target: its norm is what `clip_norm` clips."""
        return self.residual.reads_target or self.target.reads_gradient

    @property
    def uses_gradient(self) -> bool:
        """Whether the update of a leaf reads the full target, for the step or for a memory."""
        return self.keeps_gradient or "target" in self.projector.sees

    @property
    def reads_gradient(self) -> bool:
        """Whether every step needs the full gradient, so that it cannot come projected."""
        return self.uses_gradient or "captured" in self.refresh_schedule.reads

    @property
    def reads_params(self) -> bool:
        """Whether a step needs the parameters."""
        return self.inner.reads_params or "param" in self.projector.reads

    @property
    def reads_learning_rate(self) -> bool:
        """Whether a step needs `update(..., learning_rate=)`, which recipes pass."""
        return "learning_rate" in self.projector.reads

    @property
    def starts_before(self) -> bool:
        """Whether a first basis is made before the first update, and all others after one."""
        return self.projector.starts_before and self.refresh_schedule.when == "after"

    @property
    def follows_basis(self) -> bool:
        """Whether a refresh changes more than the basis and the moments."""
        return self.target.follows_basis or self.residual.follows_basis

    def report(self, params: Pytree, shardings: Pytree = None) -> Report:
        """What is projected, at which rank, and what is not and why."""
        report = resolve(
            params,
            self.views,
            rank=self.projector.rank_for,
            side=self.side,
            tie=self.tie,
            shardings=shardings,
        )
        return self.sampler.restricted(report)

    def phase(self, view: ResolvedView) -> int:
        """A number of the leaf alone, the same in every process: the CRC32 of its path."""
        return zlib.crc32(view.path.encode())

    def keys(self, view: ResolvedView, step: Scalar, layers: jax.Array) -> jax.Array:
        """One key for each matrix of a leaf, from the seed, the CRC32 of the path, the step and the
        layer's number."""
        key = jax.random.fold_in(
            jax.random.key(jnp.asarray(self.seed, jnp.int32)), self.phase(view)
        )
        key = jax.random.fold_in(key, step)
        return each(lambda layer: jax.random.fold_in(key, layer), view.batch)(layers)

    clock = deprecations.attribute("lrx.projection.Projection", "clock")


_KINDS: dict[str, tuple[type, str]] = {
    "projector": (Projector, "projectors"),
    "refresh_schedule": (RefreshSchedule, "refresh_schedules"),
    "transport": (Transport, "transports"),
    "target": (Target, "targets"),
    "residual": (Residual, "residuals"),
    "sampler": (Sampler, "samplers"),
    "views": (Views, "Views"),
}
