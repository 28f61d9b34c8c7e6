"""The Cayley transform of skew-symmetric matrices, by elimination without pivots.

    R = (I - Q)(I + Q)^-1 = 2 (I + Q)^-1 - I,   Q = -Qᵀ,   R orthogonal

LAPACK takes one small matrix after the other; here every matrix of a stack takes the same b steps
at once. No pivots are needed: of I + Q and of all its Schur complements

    S = I + Q22 + Q12ᵀ (I + Q11)^-1 Q12

the symmetric part is at least I, so every pivot is at least 1. One Newton step then takes away what
the elimination rounds where Q is large.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lowrank_jax.linalg._common import as_matrix
from lowrank_jax.typing import ArrayLike


def cayley(q: ArrayLike) -> jax.Array:
    """`(I - Q)(I + Q)^-1` of skew-symmetric `q (..., b, b)`: orthogonal, without the eigenvalue -1.

    Differentiable any number of times, forwards and backwards. Only for skew-symmetric matrices:
    others may meet a pivot of 0.

    >>> import jax.numpy as jnp
    >>> cayley(jnp.array([[0.0, 1.0], [-1.0, 0.0]])).tolist()
    [[0.0, -1.0], [1.0, 0.0]]
    """
    q = as_matrix(q)
    eye = jnp.eye(q.shape[-1], dtype=q.dtype)
    return 2 * _inverse(eye + q) - eye


@jax.custom_jvp
def _inverse(a: jax.Array) -> jax.Array:
    """`a^-1` of `a (..., b, b)` whose symmetric part is positive definite: Gauss-Jordan, and one
    Newton step."""
    # x <- x (2 I - a x) squares what the elimination left of I - a x
    x = jax.lax.fori_loop(0, a.shape[-1], _eliminated, a)
    return x + _product(x, jnp.eye(a.shape[-1], dtype=a.dtype) - _product(a, x))


def _eliminated(k: jax.Array, a: jax.Array) -> jax.Array:
    """Step k of the elimination, in place: row and column k of the inverse stand where those of a
    stood."""
    here = jnp.arange(a.shape[-1]) == k
    row, column = (jax.lax.dynamic_index_in_dim(a, k, axis, keepdims=True) for axis in (-2, -1))
    pivot = jax.lax.dynamic_index_in_dim(row, k, -1, keepdims=True)
    row = row / pivot
    rest = jnp.where(here[:, None], row, a - column * row)
    return jnp.where(here, jnp.where(here[:, None], 1 / pivot, -column / pivot), rest)


@_inverse.defjvp
def _inverse_jvp(primals, tangents):
    """`d(a^-1) = -a^-1 da a^-1`."""
    (a,), (da,) = primals, tangents
    x = _inverse(a)
    return x, -_product(_product(x, da), x)


def _product(x: jax.Array, y: jax.Array) -> jax.Array:
    """`x @ y` of stacks, in their own precision also where the platform's default is a lower
    one."""
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)
