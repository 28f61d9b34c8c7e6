"""The norm-growth limiter: what replaces a gradient may grow by little from one step to the next."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lowrank_jax.typing import Scalar

TINY = 1e-8


def limited(x: jax.Array, previous: jax.Array, growth: Scalar) -> tuple[jax.Array, jax.Array]:
    """`x` shrunk so that `|x| <= growth |previous|`, and its norm for the next step (Fira, APOLLO, RACS).

    A previous norm of zero does not limit, so that one zero gradient at the start does not silence
    a matrix; a norm that overflows is not remembered, so that it limits nothing that comes later.

    Args:
      x: `(batch..., s, k)`.
      previous: `(batch...)`, the norm that this returned a step ago; zeros at the start.
      growth: the largest factor in a step, 1.01 in these papers.
    """
    norm = norms(x, (-2, -1))[..., 0, 0]
    excess = jnp.maximum(norm / (previous + TINY), growth) / growth
    excess = jnp.where(previous > 0, excess, 1.0)
    after = norm / excess
    return x / excess[..., None, None], jnp.where(jnp.isfinite(after), after, previous)


def norms(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Euclidean norms along the axes, which stay with size 1."""
    return jnp.sqrt(jnp.sum(jnp.square(x), axis=axes, keepdims=True))
