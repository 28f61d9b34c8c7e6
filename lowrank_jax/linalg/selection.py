"""Choosing rows: scores, the best or random ones, and moving between all s rows and the r chosen.

The subspace of r chosen rows of x (..., s, k) has columns of the identity as basis; its state is r
integers. Index arrays are int32, sorted, (..., r). Gathers and scatters keep the dtype of what they
move.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from lowrank_jax.linalg._common import Array, as_matrix, check_choice, check_rank, require_matrix
from lowrank_jax.typing import ArrayLike


def row_scores(x: ArrayLike, norm: str = "l1") -> Array:
    """The l1 or l2 norm of each row of x (..., s, k), as (..., s).

    l1 is DCT-AdamW's default for ranking coefficients; choosing by l2 minimises the projection
    error.

    >>> import jax.numpy as jnp
    >>> (
    ...     row_scores(jnp.array([[3.0, -4.0], [1.0, 0.0]])).tolist(),
    ...     row_scores(jnp.array([[3.0, -4.0]]), "l2").tolist(),
    ... )
    ([7.0, 1.0], [5.0])
    """
    check_choice("norm", norm, ("l1", "l2"))
    x = as_matrix(x)
    if norm == "l1":
        return jnp.sum(jnp.abs(x), axis=-1)
    return jnp.sqrt(jnp.sum(x * x, axis=-1))


def top_rows(x: ArrayLike, rank: int, norm: str = "l1") -> Array:
    """Sorted int32 indices (..., r) of the ``rank`` rows of x (..., s, k) with the largest norm;
    ties take the first.

    A row with NaN ranks first; indices are always valid and distinct. Raises ValueError unless 1 <=
    rank <= s.

    >>> import jax.numpy as jnp
    >>> top_rows(jnp.array([[1.0], [-3.0], [0.0], [2.0]]), rank=2).tolist()
    [1, 3]
    """
    return top_scores(row_scores(x, norm), rank)


def top_scores(scores: ArrayLike, rank: int) -> Array:
    """Sorted int32 indices (..., r) of the ``rank`` largest of scores (..., s), as :func:`top_rows`
    of its own scores.

    >>> import jax.numpy as jnp
    >>> top_scores(jnp.array([1.0, 3.0, 0.0, 2.0]), rank=2).tolist()
    [1, 3]
    """
    scores = jnp.asarray(scores)
    rank = check_rank(rank, scores.shape[-1], what="the number of rows")
    _, best = jax.lax.top_k(scores, rank)
    # by number, not by score: the subspace is the same, and gathers read forwards
    return jnp.sort(best.astype(jnp.int32), axis=-1)


def random_rows(key: Array, s: int, rank: int, batch: tuple[int, ...] = ()) -> Array:
    """Sorted int32 indices (*batch, r) of ``rank`` of s rows, uniform without replacement,
    independent over batch.

    >>> import jax
    >>> random_rows(jax.random.key(0), s=3, rank=3).tolist()
    [0, 1, 2]
    """
    rank = check_rank(rank, s, what="the number of rows")
    # the largest of s independent draws: each set of r rows is as likely
    draws = jax.random.uniform(key, (*batch, s))
    _, chosen = jax.lax.top_k(draws, rank)
    return jnp.sort(chosen.astype(jnp.int32), axis=-1)


def _batched(function: Callable[..., Array], axes: int) -> Callable[..., Array]:
    """The function of one matrix, for stacks with this many batch axes."""
    for _ in range(axes):
        function = jax.vmap(function)
    return function


def gather_rows(x: ArrayLike, indices: ArrayLike) -> Array:
    """The rows ``indices`` (..., r) of x (..., s, k), as (..., r, k); indices without batch axes
    serve the stack.

    >>> import jax.numpy as jnp
    >>> gather_rows(jnp.array([[1.0], [2.0], [3.0]]), jnp.array([0, 2])).tolist()
    [[1.0], [3.0]]
    """
    x, indices = require_matrix(x), jnp.asarray(indices)
    indices = jnp.broadcast_to(indices, (*x.shape[:-2], indices.shape[-1]))
    return _batched(lambda x, rows: x[rows], x.ndim - 2)(x, indices)


def scatter_rows(low: ArrayLike, indices: ArrayLike, s: int) -> Array:
    """Zeros (..., s, k) with rows ``indices`` (..., r), distinct, set to low (..., r, k): gather's
    transpose.

    Raises ValueError when low has another number of rows than there are indices.

    >>> import jax.numpy as jnp
    >>> scatter_rows(jnp.array([[5.0]]), jnp.array([1]), s=3).tolist()
    [[0.0], [5.0], [0.0]]
    """
    low, indices = require_matrix(low, "low"), jnp.asarray(indices)
    if low.shape[-2] != indices.shape[-1]:
        raise ValueError(
            f"low has {low.shape[-2]} rows but indices names {indices.shape[-1]}; give one index "
            "per row"
        )
    indices = jnp.broadcast_to(indices, low.shape[:-1])

    def scatter(low, rows):
        # a gather by the inverse index: columns of low may be sharded
        numbers = jnp.arange(rows.size, dtype=jnp.int32)
        # (s,): which row of low belongs there, -1 for none
        empty = jnp.full((s,), -1, jnp.int32)
        slots = empty.at[rows].set(numbers, unique_indices=True)
        filled = (slots >= 0)[:, None]
        return jnp.where(filled, low[jnp.maximum(slots, 0)], 0)

    return _batched(scatter, low.ndim - 2)(low, indices)
