"""Subspace iteration of both sides at once, two thin products a refresh."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from lowrank_jax import sharding
from lowrank_jax.projection.batches import each
from lowrank_jax.projection.projectors.random import normal, structured
from lowrank_jax.projection.projectors.randomized import range_of
from lowrank_jax.projection.projectors.svd import TwoSidedSvd


def _following(new: jax.Array, old: jax.Array) -> jax.Array:
    """The vectors of `new`, each with the sign that it has along the one of `old`."""
    along = jnp.sum(new * old, axis=-2, keepdims=True)
    return new * jnp.where(along < 0, -1.0, 1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AlternatingTwoSided(TwoSidedSvd):
    """Two-sided bases without a full gradient: `P <- qr(G Q)` and `Q <- qr(GᵀP)`, with P and Q of
    the refresh before.

    Over two refreshes each side makes a power step by `G Gᵀ`. Both products are thin, so that
    projected backprop delivers them and devices need sum up no more than `(s + k) r` numbers of a
    matrix; at the first refresh what they multiply is Gaussian. Signs follow the old bases.

    >>> AlternatingTwoSided(rank=4).reads == {"sketch", "step", "key"}
    True
    """

    reads: ClassVar[frozenset[str]] = frozenset({"sketch", "step", "key"})
    decomposes: ClassVar[bool] = False

    def init(self, view, keys):
        others = each(lambda key: jax.random.fold_in(key, 1), view.batch)(keys)
        left = structured(keys, view.shrunk, view.rank)
        right = structured(others, view.kept, view.rank)
        return (self.store(view, left), self.store(view, right)), ()

    def sketch_basis(self, view, basis, memory, inputs):
        left, right = (self.columns(view, side) for side in basis)
        first = inputs.step == 0
        # one draw for both sides, (s + k, r)
        drawn = normal(inputs.key, (view.shrunk + view.kept, view.rank))
        own = sharding.sharded_like(drawn[..., : view.shrunk, :], left)
        other = sharding.sharded_like(drawn[..., view.shrunk :, :], right)
        return jnp.where(first, other, right), jnp.where(first, own, left)

    def refresh(self, view, basis, memory, inputs):
        left, right = (self.columns(view, side) for side in basis)
        # G Q (..., s, r) and PᵀG (..., r, k)
        of_left, of_right = inputs.sketch
        new = (range_of(of_left), range_of(jnp.swapaxes(of_right, -1, -2)))
        signed = (_following(new[0], left), _following(new[1], right))
        return tuple(self.store(view, side) for side in signed), memory


alternating_two_sided = AlternatingTwoSided
