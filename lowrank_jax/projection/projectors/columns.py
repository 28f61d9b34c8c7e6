"""The coordinate axes themselves: r entries of the shrunk dimension."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from lowrank_jax import linalg, sharding
from lowrank_jax.projection.projectors.base import IndexProjector
from lowrank_jax.projection.projectors.random import per_matrix


@dataclasses.dataclass(frozen=True, kw_only=True)
class Columns(IndexProjector):
    """r coordinates of the shrunk dimension: `down` gathers, `up` scatters (FRUGAL `columns`).

    Args:
      select: "random" (uniform without replacement), "l1" or "l2" (largest norm of the gradient),
        or given indices; given ones that are past the shrunk dimension are left out, and `rank` is
        their number.
      rank: fractions round down, as in FRUGAL's code.
      round_up: fractions round up, as in Dion2's.

    Raises:
      ValueError: for an unknown selection, or given indices that are negative or repeat.
    """

    select: Any = "random"
    round_up: bool = False
    of_rows: ClassVar[bool] = True

    def __post_init__(self):
        if isinstance(self.select, str):
            super().__post_init__()
            if self.select not in ("random", "l1", "l2"):
                raise ValueError(
                    f"columns: select={self.select!r} must be 'random', 'l1', 'l2' or given indices"
                )
            return
        indices = tuple(int(index) for index in np.ravel(self.select))
        if len(set(indices)) != len(indices) or min(indices, default=-1) < 0:
            raise ValueError(
                f"columns: select={indices} must be distinct indices >= 0, and at least one"
            )
        if self.rank != 1.0:
            raise ValueError(
                f"columns: rank={self.rank!r} beside the indices select={indices}, whose number is "
                "the rank; leave rank out"
            )
        object.__setattr__(self, "select", tuple(sorted(indices)))

    @property
    def reads(self):
        return frozenset({"key"} if self.select == "random" else {"target"} if self.moves else ())

    @property
    def moves(self):
        return isinstance(self.select, str)

    def _round(self, size):
        return math.ceil(size) if self.round_up else math.floor(size)

    def rank_for(self, path, shrunk, kept):
        if isinstance(self.select, str):
            return super().rank_for(path, shrunk, kept)
        inside = sum(index < shrunk for index in self.select)
        if not inside:
            raise ValueError(
                f"columns: no index of {self.select} is below {shrunk}, the shrunk dimension of "
                f"{path!r}"
            )
        return inside

    def init(self, view, keys):
        if isinstance(self.select, str):
            return super().init(view, keys)
        indices = jnp.asarray(self.select[: view.rank], jnp.int32)
        indices = jnp.array(jnp.broadcast_to(indices, (*view.batch, view.rank)))
        spec = None if view.spec is None else (*view.spec[:-2], None)
        return sharding.reshard(indices, spec), ()

    def refresh(self, view, basis, memory, inputs):
        if self.select != "random":
            return linalg.top_rows(inputs.target, view.rank, self.select), memory
        draw = lambda key: linalg.random_rows(key, view.shrunk, view.rank)  # noqa: E731
        return per_matrix(draw, inputs.key), memory

    def structure(self):
        return Columns()

    def thin(self, view, basis, x, axis):
        return x if axis != view.side else jnp.take(x, basis, axis=-1)

    def down(self, view, basis, x):
        x = sharding.reshard(x, sharding.low_spec(view.spec))
        return linalg.gather_rows(x.astype(jnp.float32), basis)

    def up(self, view, basis, low):
        return sharding.reshard(linalg.scatter_rows(low, basis, view.shrunk), view.spec)

    def rest(self, view, basis, target, low):
        # as a mask (..., s, 1), not as a difference of numbers that should be equal
        selected = linalg.scatter_rows(jnp.ones((*basis.shape, 1), bool), basis, view.shrunk)
        selected = sharding.reshard(
            selected, None if view.spec is None else (*view.spec[:-1], None)
        )
        return jnp.where(selected, 0, target)

    def rounding(self, view, target):
        return jnp.zeros((), jnp.float32)


columns = Columns
