"""Fixed bases of which r vectors are chosen: DCT, Hadamard, and the coordinate axes themselves.

The state is r indices; the vectors are regenerated from them at every use, never stored and never a
d x d constant.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from lowrank_jax import kernels, linalg, sharding
from lowrank_jax.checks import is_integer
from lowrank_jax.projection.projectors.base import BasisProjector, IndexProjector
from lowrank_jax.projection.projectors.random import per_matrix


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformProjector(IndexProjector, BasisProjector):
    """The r vectors of an orthonormal transform on which the gradient is largest.

    Args:
      norm: the score of a transformed row, "l1" (DCT-AdamW's default) or "l2" (which minimises the
        projection error).
    """

    norm: str = "l1"
    needs: ClassVar[frozenset[str]] = frozenset({"grad"})
    of_rows: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        if self.norm not in ("l1", "l2"):
            raise ValueError(f"{type(self).__name__}: norm={self.norm!r} must be 'l1' or 'l2'")

    def _transform(self, x):
        raise TypeError(f"{type(self).__name__} does not implement _transform")

    def refresh(self, view, basis, evidence):
        return linalg.top_rows(self._transform(evidence.grad), view.rank, self.norm)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dct(TransformProjector):
    """The r best vectors of the orthonormal DCT (DCT-AdamW, Trion).

    Args:
      kind: 3, the columns of the DCT-II matrix (the official code's default path, "dct3"), or 2,
        its rows (its Makhoul path, "dct2").
      products: "xla", or "kernel": a refresh takes its scores from `lrx.kernels.dct_scores`, on a
        TPU where the shrunk dimension is a multiple of 128 from 2048 on, with XLA's scores to
        rounding. Inside `lrx.meshes.use` of several devices each scores its own columns. Where an
        explicit mesh divides a matrix, XLA's product stays. No device has timed it.
    """

    kind: int = 3
    products: str = "xla"

    def __post_init__(self):
        super().__post_init__()
        if not is_integer(self.kind) or self.kind not in (2, 3):
            raise ValueError(
                f"dct: kind={self.kind!r} must be the number 2 or 3 "
                "(under optax.inject_hyperparams name it in static_args)"
            )
        if self.products not in ("xla", "kernel"):
            raise ValueError(f"dct: products={self.products!r} must be 'xla' or 'kernel'")

    def _transform(self, x):
        return linalg.dct(x, self.kind, axis=-2)

    def refresh(self, view, basis, evidence):
        if self.products == "xla" or any(view.spec or ()):
            return super().refresh(view, basis, evidence)
        x, axis = evidence.grad, -2
        if view.side == "cols":  # a transpose of the leaf, which the kernel reads as the leaf lies
            x, axis = jnp.swapaxes(x, -2, -1), -1
        return linalg.top_scores(kernels.dct_scores(x, self.kind, self.norm, axis), view.rank)

    def structure(self):
        return Dct(kind=self.kind)

    def columns(self, view, basis):
        return linalg.dct_columns(basis, view.shrunk, self.kind)


def dct2(**options: Any) -> Dct:
    """`dct(kind=2)`."""
    return Dct(kind=2, **options)


def dct3(**options: Any) -> Dct:
    """`dct(kind=3)`."""
    return Dct(kind=3, **options)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hadamard(TransformProjector):
    """The r best vectors of the Sylvester-Hadamard basis; the shrunk dimension must be a power of
    two."""

    def rank_for(self, path, shrunk):
        if shrunk & (shrunk - 1):
            raise ValueError(
                f"hadamard: the shrunk dimension {shrunk} of {path!r} is not a power of two; use "
                "dct"
            )
        return super().rank_for(path, shrunk)

    def _transform(self, x):
        return linalg.hadamard_transform(x, axis=-2)

    def structure(self):
        return Hadamard()

    def columns(self, view, basis):
        return linalg.hadamard_columns(basis, view.shrunk)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Columns(IndexProjector):
    """r coordinates of the shrunk dimension: `down` gathers, `up` scatters (FRUGAL `columns`).

    Args:
      select: "random" (uniform without replacement), "l1" or "l2" (largest norm of the gradient),
        or given indices; given ones that are past the shrunk dimension are left out, and `rank` is
        their number.
      rank: fractions round down, as in FRUGAL's code.

    Raises:
      ValueError: for an unknown selection, or given indices that are negative or repeat.
    """

    select: Any = "random"
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
        object.__setattr__(self, "select", tuple(sorted(indices)))

    @property
    def needs(self):
        return frozenset({"key"} if self.select == "random" else {"grad"} if self.moves else ())

    @property
    def moves(self):
        return isinstance(self.select, str)

    def _round(self, size):
        return math.floor(size)

    def rank_for(self, path, shrunk):
        if isinstance(self.select, str):
            return super().rank_for(path, shrunk)
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
        return sharding.reshard(indices, None if view.spec is None else (*view.spec[:-2], None))

    def refresh(self, view, basis, evidence):
        if self.select == "random":
            return per_matrix(
                lambda key: linalg.random_rows(key, view.shrunk, view.rank), evidence.key
            )
        return linalg.top_rows(evidence.grad, view.rank, self.select)

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


dct = Dct
hadamard = Hadamard
columns = Columns
