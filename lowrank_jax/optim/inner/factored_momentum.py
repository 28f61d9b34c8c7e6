"""A momentum that is kept as its leading singular triples: the inner transformation of MoFaSGD."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lowrank_jax import linalg, sharding
from lowrank_jax.checks import check_number, check_static, is_integer
from lowrank_jax.optim import scales
from lowrank_jax.optim.inner.base import Inner
from lowrank_jax.reprs import show
from lowrank_jax.typing import Scalar

NOISE = 1e-5
"""Singular values below this share of the largest are rounding, and have no direction."""


class FactoredMomentumState(NamedTuple):
    """State of `factored_momentum`: int32 count, and the triples `left (..., m, r)`, `values (...,
    r)` and `right (..., r, n)` of the momentum."""

    count: Any
    left: jax.Array
    values: jax.Array
    right: jax.Array

    def __repr__(self) -> str:
        return show(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FactoredMomentum(Inner):
    """The leading singular triples of a momentum, moved by thin products, and a step along all of
    them of one size (MoFaSGD).

    With `M = U S Vᵀ` of rank r, and at the first step the singular triples of G,

        M <- [b M + G - (I - U Uᵀ) G (I - V Vᵀ)]_r      [.]_r: the nearest matrix of rank r
        direction = U Vᵀ

    where what stands in brackets has rank 2 r: `[U, G V] [U^T (b M + G) - UᵀG V Vᵀ; Vᵀ]`. Singular
    values that are rounding of the others step by less, down to nothing.

    Args:
      rank: r, an integer, or a fraction of the shorter side.
      momentum: b, .95.
      scale: factor on the direction, a number or one of `lrx.scales`.

    Raises:
      ValueError: for a rank that is not of this kind, a momentum outside [0, 1); at `init` for a
        leaf that is no matrix, or shorter than the rank.

    >>> import jax.numpy as jnp
    >>> inner = FactoredMomentum(rank=1)
    >>> g = jnp.diag(jnp.array([4.0, -2.0]))
    >>> direction, scale, state = inner.update(g, inner.init(g))
    >>> print(direction, scale)
    [[1. 0.]
     [0. 0.]] 1.0
    """

    rank: int | float
    momentum: Scalar = 0.95
    scale: Scalar | scales.Scale = 1.0
    batched = True
    decomposes = True

    def __post_init__(self):
        check_static("factored_momentum: rank", self.rank)
        is_fraction = isinstance(self.rank, float) and 0 < self.rank <= 1
        if not (is_fraction or (is_integer(self.rank) and self.rank >= 1)):
            raise ValueError(
                f"factored_momentum: rank={self.rank!r} must be a positive integer, or a fraction in "
                "(0, 1] of the shorter side"
            )
        check_number("factored_momentum: momentum", self.momentum, at_least=0, below=1)
        scales.check_factor("factored_momentum: scale", self.scale, or_scale=True)

    def _rank(self, shape: tuple[int, ...]) -> int:
        shorter = min(shape[-2:]) if len(shape) > 1 else 0
        rank = int(self.rank) if is_integer(self.rank) else max(1, round(self.rank * shorter))
        if rank > shorter:
            raise ValueError(
                f"factored_momentum: rank={rank} exceeds the shorter side of a leaf of shape {shape}; "
                f"give at most {shorter}"
                if shorter
                else f"factored_momentum: a leaf of shape {shape} is no matrix; give plain leaves "
                "another inner transformation, plain=lrx.inner.adam()"
            )
        return rank

    def init(self, tree, view=None):
        rank = self._rank(tree.shape)
        *batch, m, n = tree.shape
        spec = sharding.unsharded_spec(sharding.explicit_spec(tree))

        def zeros(*shape):
            own = None if spec is None else (*spec[: len(batch)], *[None] * len(shape))
            return sharding.zeros((*batch, *shape), jnp.float32, own)

        count = jnp.zeros(() if view is None else view.batch, jnp.int32)
        return FactoredMomentumState(count, zeros(m, rank), zeros(rank), zeros(rank, n))

    def update(self, grads, state, *, view=None, params=None, **extra):
        del params, extra
        own = sharding.explicit_spec(grads)
        g = sharding.reshard(grads.astype(jnp.float32), sharding.unsharded_spec(own))
        rank = state.values.shape[-1]

        def moved():
            # rank 2 r, as a product of thin matrices
            u, v = state.left, jnp.swapaxes(state.right, -1, -2)
            seen = jnp.swapaxes(u, -1, -2) @ g
            kept = self.momentum * state.values[..., None] * state.right
            lower = kept + seen - (seen @ v) @ state.right
            columns = jnp.concatenate([u, g @ v], axis=-1)
            rows = jnp.concatenate([lower, state.right], axis=-2)
            return linalg.svd_of_product(columns, rows, rank)

        def first():
            fresh, later = linalg.truncated_svd(g, rank), moved()
            is_first = state.count == 0

            def chosen(new, old):
                flags = is_first.reshape(*is_first.shape, *[1] * (new.ndim - is_first.ndim))
                return jnp.where(flags, new, old)

            return tuple(map(chosen, fresh, later))

        left, values, right = jax.lax.cond(jnp.any(state.count == 0), first, moved)
        # 1 for what is there, and for rounding its share of what that is
        least = jnp.maximum(NOISE * values[..., :1], 1e-30)
        ones = values / jnp.maximum(values, least)
        direction = sharding.reshard((left * ones[..., None, :]) @ right, own)
        factor = scales.factor(self.scale, view)
        scale = jnp.full(state.count.shape, factor, jnp.float32)
        return direction, scale, FactoredMomentumState(state.count + 1, left, values, right)


factored_momentum = FactoredMomentum
