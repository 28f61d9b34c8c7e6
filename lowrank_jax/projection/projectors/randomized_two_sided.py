"""Singular vectors of both sides from a random sketch of the gradient."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from lowrank_jax import linalg
from lowrank_jax.checks import check_integer
from lowrank_jax.projection.projectors.random import normal
from lowrank_jax.projection.projectors.svd import TwoSidedSvd


def _transposed(x: jax.Array) -> jax.Array:
    return jnp.swapaxes(x, -1, -2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomizedTwoSided(TwoSidedSvd):
    """`svd_two_sided` by a randomised SVD of `p = r + oversample` directions (TSR-Adam).

        Q = qr(G Ω)                        Gaussian Ω (k, p)
        Q = qr(G qr(GᵀQ))                  iterations times
        U S Vᵀ = svd(QᵀG)                  (p, k)
        P = Q U[:, :r], on the right V[:, :r]

    Signs are canonical for P.

    Args:
      iterations: of the power method, 1 in TSR-Adam's code.
      oversample: directions beyond r, 5 in TSR-Adam's code; of p never more than s or k.

    >>> RandomizedTwoSided(rank=4).oversample
    5
    """

    iterations: int = 1
    oversample: int = 5
    reads: ClassVar[frozenset[str]] = frozenset({"target", "key"})

    def __post_init__(self):
        super().__post_init__()
        check_integer("randomized_two_sided: iterations", self.iterations, at_least=0)
        check_integer("randomized_two_sided: oversample", self.oversample, at_least=0)

    def refresh(self, view, basis, memory, inputs):
        # of tiny gradients squares would underflow
        size = jnp.max(jnp.abs(inputs.target), axis=(-2, -1), keepdims=True)
        target = inputs.target / jnp.where(size > 0, size, 1)

        width = min(view.rank + self.oversample, view.shrunk, view.kept)
        left = linalg.orthonormalize(target @ normal(inputs.key, (view.kept, width)))
        for _ in range(self.iterations):
            right = linalg.orthonormalize(_transposed(target) @ left)
            left = linalg.orthonormalize(target @ right)

        # QᵀG, (..., p, k)
        u, _, vt = linalg.truncated_svd(_transposed(left) @ target, view.rank)
        own = left @ u
        signed = linalg.canonical_signs(own)
        # 1 or -1, (..., 1, r): the right vectors turn where the left ones do
        signs = jnp.sum(signed * own, axis=-2, keepdims=True).round()
        return (self.store(view, signed), self.store(view, _transposed(vt) * signs)), memory


randomized_two_sided = RandomizedTwoSided
