"""Decompositions of stacks that cannot wait for each other for ever on a CPU.

jaxlib's LAPACK calls split a stack over XLA's thread pool and wait for the parts. The calls
themselves may run on that pool, so as many of them at once as it has threads (two matrices on two
cores, or eight fake devices) block every thread and wait for parts that none is left to run. A call
on one matrix uses no other thread.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lowrank_jax import sharding

# Calls of less work than this stay on their own thread. jaxlib splits from 2e5 operations on; a
# full SVD is the dearest call, about 32 m n min(m, n).
_ON_ONE_THREAD = 2e5 / 32


def matrix_by_matrix(decompose: Callable[..., Any]) -> Callable[..., Any]:
    """`decompose` of stacks `(..., m, n)` with equal leading axes; on a CPU it is given one matrix
    at a time.

    A stack that is divided on an explicit mesh goes through in one call, as does every stack on
    other platforms.

    >>> import jax.numpy as jnp
    >>> matrix_by_matrix(jnp.linalg.cholesky)(jnp.broadcast_to(4 * jnp.eye(64), (3, 64, 64)))[
    ...     2, 5, 5
    ... ]
    Array(2., dtype=float32)
    """

    @functools.wraps(decompose)
    def run(*stacks: jax.Array) -> Any:
        *lead, rows, cols = stacks[0].shape
        count = math.prod(lead)
        spec = sharding.explicit_spec(stacks[0]) or ()
        if count <= 1 or count * rows * cols * min(rows, cols) < _ON_ONE_THREAD or any(spec):
            return decompose(*stacks)

        def loop(*stacks):
            flat = [x.reshape(count, *x.shape[len(lead) :]) for x in stacks]
            found = lax.map(lambda matrices: decompose(*matrices), tuple(flat))
            return jax.tree.map(lambda x: x.reshape(*lead, *x.shape[1:]), found)

        return lax.platform_dependent(*stacks, cpu=loop, default=decompose)

    return run


@matrix_by_matrix
def svd(x: jax.Array) -> Any:
    """The thin SVD `(u, s, vt)`."""
    return jnp.linalg.svd(x, full_matrices=False)


@matrix_by_matrix
def qr(x: jax.Array) -> Any:
    """The thin QR `(q, r)`."""
    return jnp.linalg.qr(x)


@matrix_by_matrix
def eigh(x: jax.Array) -> Any:
    """Eigenvalues, ascending, and eigenvectors of symmetric matrices."""
    return jnp.linalg.eigh(x)


@matrix_by_matrix
def inverse_cholesky(x: jax.Array) -> jax.Array:
    """`L⁻¹` of `x = L Lᵀ`; NaN where x is not positive definite."""
    lower = jnp.linalg.cholesky(x, symmetrize_input=False)
    identity = jnp.broadcast_to(jnp.eye(x.shape[-1], dtype=x.dtype), x.shape)
    return lax.linalg.triangular_solve(lower, identity, left_side=True, lower=True)


@matrix_by_matrix
def solve_from_right(upper: jax.Array, x: jax.Array) -> jax.Array:
    """`x upper⁻¹` of upper triangular matrices."""
    return lax.linalg.triangular_solve(upper, x, left_side=False, lower=False)


@matrix_by_matrix
def solve(a: jax.Array, b: jax.Array) -> jax.Array:
    """`a⁻¹ b` of square matrices a `(..., n, n)`, b `(..., n, m)`."""
    return jnp.linalg.solve(a, b)
