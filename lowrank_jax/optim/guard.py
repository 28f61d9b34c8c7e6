"""The guard: which steps are accepted, and how a skipped one leaves everything as it was."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lowrank_jax.typing import Pytree, Scalar


def energy(x: jax.Array) -> jax.Array:
    """Sum of squares in float32."""
    return jnp.sum(jnp.square(x.astype(jnp.float32)))


# The largest sum of squares of gradients that a step accepts. A norm of 2^40, about 1e12, leaves
# room for what a state makes of an accepted gradient later: a product of three such numbers, as of
# a moment and the two factors that move it, and the square of fed-back errors that add up to many
# gradients are finite in float32. Beyond it a step could be accepted after which none ever is
# again.
LARGEST = 2.0**80


def all_finite(arrays: list[jax.Array]) -> jax.Array:
    """Scalar: every array is finite, and the sum of all squares is within `LARGEST`."""
    total = sum((energy(x) for x in arrays), jnp.zeros(()))
    return total <= LARGEST  # NaN compares false


def where_finite(new: Pytree, old: Pytree, judged: Pytree, axes: int) -> Pytree:
    """`new` of the matrices whose `judged` arrays are finite, else `old`: what a decomposition that
    failed would leave behind stays for ever.

    Args:
      new, old: trees of arrays with `axes` batch axes in front.
      judged: likewise; codes and indices are always finite.
      axes: their number.
    """
    fine: Scalar = True
    for leaf in jax.tree.leaves(judged):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            of_matrix = tuple(range(axes, leaf.ndim))
            fine = fine & jnp.all(jnp.isfinite(leaf), axis=of_matrix)
    if not isinstance(fine, jax.Array):
        return new

    def keep(a, b):
        # (batch...) over the axes of a matrix
        by_matrix = fine.reshape(*fine.shape, *[1] * (a.ndim - axes))
        return jnp.where(by_matrix, a, b)

    return jax.tree.map(keep, new, old)


def select(ok: jax.Array, new: Pytree, old: Pytree) -> Pytree:
    """`new` where ok, else `old`, leaf by leaf."""
    return jax.tree.map(lambda a, b: jnp.where(ok, a, b), new, old)
