"""The leading singular vectors of the gradient, on one side or on both."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from lowrank_jax import linalg, sharding
from lowrank_jax.checks import check_number
from lowrank_jax.matrices import ResolvedView
from lowrank_jax.optim.inner import debias
from lowrank_jax.projection.projectors.base import StoredProjector, mixed, thin_product
from lowrank_jax.projection.transports import DenseChange
from lowrank_jax.typing import Scalar


def singular_vectors(view: ResolvedView, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The leading `u (..., s, r)` and `v (..., k, r)`, with the signs that are canonical for u.

    A matrix that lies row by row in memory is factored as its transpose: LAPACK reads column by
    column, and XLA would otherwise copy every gradient on every step, due or not, to have it ready
    for the refresh.
    """
    if view.side == "cols":
        u, _, vt = linalg.truncated_svd(x, view.rank)
        return u, jnp.swapaxes(vt, -1, -2)
    v, _, ut = linalg.truncated_svd(jnp.swapaxes(x, -1, -2), view.rank)
    u = jnp.swapaxes(ut, -1, -2)
    signed = linalg.canonical_signs(u)
    # 1 or -1, (..., 1, r): v turns where u does
    signs = jnp.sum(signed * u, axis=-2, keepdims=True).round()
    return signed, v * signs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Svd(StoredProjector):
    """The r leading singular vectors of the gradient, with canonical signs (GaLore).

    Exact and slow: on CPU an SVD costs some forty normal steps, on TPU minutes of compilation;
    `power`, `randomized` and `dct` are the fast alternatives.

    Args:
      momentum: None, or the decay b1 of the first moment, whose singular vectors are taken then, as
        it is after this step: of `b1 up(m) + (1 - b1) G` (Conda).
    """

    momentum: Scalar | None = None
    of_range: ClassVar[bool] = True
    decomposes: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        check_number(
            "svd: momentum", self.momentum, at_least=0, below=1, otherwise="None for the gradient"
        )

    @property
    def reads(self):
        of_moment = set() if self.momentum is None else {"momentum", "step"}
        return frozenset({"target"} | of_moment)

    def refresh(self, view, basis, memory, inputs):
        target = inputs.target
        if self.momentum is not None:
            # m̂ has (1 - b1^t) in front, and the average to come (1 - b1^(t + 1))
            seen = debias(self.momentum, inputs.step)
            share = self.momentum * seen / debias(self.momentum, inputs.step + 1)
            target = mixed(self.columns(view, basis), inputs.momentum, target, share)
        left, _ = singular_vectors(view, target)
        return self.store(view, left), memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class TwoSidedSvd(StoredProjector):
    """Both sides: `R = PᵀGQ (r, r)` with the leading left and right singular vectors (GaLore
    `full`)."""

    of_range: ClassVar[bool] = True
    reads: ClassVar[frozenset[str]] = frozenset({"target"})
    decomposes: ClassVar[bool] = True

    def structure(self):
        return TwoSidedSvd(dtype=jnp.dtype(self.dtype))

    def init(self, view, keys):
        shape = (*view.batch, view.kept, view.rank)
        right = jnp.broadcast_to(jnp.eye(view.kept, view.rank), shape)
        left, memory = super().init(view, keys)
        return (left, self.store(view, right)), memory

    def refresh(self, view, basis, memory, inputs):
        sides = singular_vectors(view, inputs.target)
        return tuple(self.store(view, side) for side in sides), memory

    def thin(self, view, basis, x, axis):
        left, right = basis
        own = left if axis == view.side else right
        return thin_product(x, self.columns(view, own))

    def down(self, view, basis, x):
        left, right = (self.columns(view, side) for side in basis)
        # Pᵀ x Q, (..., r, r)
        one_sided = jnp.einsum("...sr,...sk->...rk", left, x.astype(jnp.float32))
        low = jnp.einsum("...rk,...kq->...rq", one_sided, right)
        return sharding.reshard(low, self.low_spec(view))

    def up(self, view, basis, low):
        left, right = (self.columns(view, side) for side in basis)
        # P low Qᵀ
        one_sided = jnp.einsum("...rq,...kq->...rk", low, right)
        x = jnp.einsum("...sr,...rk->...sk", left, one_sided)
        return sharding.reshard(x, view.spec)

    def rounding(self, view, target):
        # columns are mixed too, so the error follows the norm of the matrix
        of_columns = super().rounding(view, target)
        return jnp.sqrt(jnp.sum(jnp.square(of_columns), axis=-1, keepdims=True))

    def overlap(self, view, old, new):
        before = [self.columns(view, side) for side in old]
        after = [self.columns(view, side) for side in new]
        pairs = zip(before, after, strict=True)
        left, right = (jnp.einsum("...sr,...sq->...rq", b, a) for a, b in pairs)
        return DenseChange(left, right)

    def low_shape(self, view):
        return (view.rank, view.rank)

    def low_spec(self, view):
        return sharding.unsharded_spec(view.spec)

    def basis_bytes(self, view):
        return self.matrix_bytes(view, view.shrunk + view.kept)


svd = Svd


svd_two_sided = TwoSidedSvd
