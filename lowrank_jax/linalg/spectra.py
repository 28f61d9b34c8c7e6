"""Numbers that say how low-rank a matrix is and how good a basis: for analysis, not for the
training step."""

import jax.numpy as jnp
from jax.scipy.special import xlogy

from lowrank_jax.linalg._common import Array, as_array, as_matrix, divide, product, transpose
from lowrank_jax.typing import ArrayLike


def effective_rank(s: ArrayLike) -> Array:
    """exp of the entropy of the singular values s (..., n) divided by their sum (Roy & Vetterli
    2007); in [1, n].

    Zero when every singular value is zero.

    >>> import jax.numpy as jnp
    >>> effective_rank(jnp.array([[2.0, 2.0, 0.0], [0.0, 0.0, 0.0]])).round(5).tolist()
    [2.0, 0.0]
    """
    s = as_array(s)
    total = jnp.sum(s, axis=-1, keepdims=True)
    share = divide(s, total)
    # -sum p log p, with 0 log 0 = 0
    entropy = -jnp.sum(xlogy(share, share), axis=-1)
    return jnp.where(total[..., 0] == 0, 0, jnp.exp(entropy))


def rank_for_energy(s: ArrayLike, energy: float) -> Array:
    """The smallest k with s_1^2 + ... + s_k^2 >= energy * (s_1^2 + ... + s_n^2), s (..., n)
    descending; int32 (...).

    At least 1, also of zero singular values. Raises ValueError unless 0 < energy <= 1.

    >>> import jax.numpy as jnp
    >>> rank_for_energy(jnp.array([[3.0, 2.0, 1.0], [2.0, 0.0, 0.0]]), 0.9).tolist()
    [2, 1]
    """
    if not 0 < energy <= 1:
        raise ValueError(
            f"energy={energy} must lie in (0, 1]: the share of the squared singular values that is "
            "kept"
        )
    s = as_array(s)
    # relative to the largest, whose square neither overflows nor underflows
    relative = divide(s, jnp.max(s, axis=-1, keepdims=True))
    kept = jnp.cumsum(jnp.square(relative), axis=-1)
    wanted = energy * kept[..., -1:]
    # as many as fall short, and the one that reaches it: at least 1, at most n
    return 1 + jnp.sum(kept[..., :-1] < wanted, axis=-1, dtype=jnp.int32)


def _unit_scale(x: Array) -> Array:
    # Ratios of squared norms do not change, and squares neither overflow nor underflow.
    return divide(x, jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True))


def stable_rank(x: ArrayLike) -> Array:
    """||x||_F^2 / ||x||_2^2 of x (..., m, n), in [1, min(m, n)]; zero for a zero matrix. Costs
    singular values.

    >>> import jax.numpy as jnp
    >>> float(stable_rank(jnp.diag(jnp.array([2.0, 2.0, 1.0]))))
    2.25
    """
    singular = jnp.linalg.svd(_unit_scale(as_matrix(x)), compute_uv=False)
    squares = jnp.square(singular)
    return divide(jnp.sum(squares, axis=-1), squares[..., 0])


def explained_variance(x: ArrayLike, basis: ArrayLike) -> Array:
    """||P^T x||_F^2 / ||x||_F^2 for x (..., s, k) and an orthonormal basis P (..., s, r); 0/0
    counts as 0.

    >>> import jax.numpy as jnp
    >>> float(explained_variance(jnp.array([[3.0], [3.0]]), jnp.array([[1.0], [0.0]])))
    0.5
    """
    x = _unit_scale(as_matrix(x))
    # PᵀX (..., r, k): with orthonormal P its norm is that of P PᵀX
    low = product(transpose(as_matrix(basis, "basis")), x)
    explained = jnp.sum(low * low, axis=(-2, -1))
    return divide(explained, jnp.sum(x * x, axis=(-2, -1)))


def principal_angles(p: ArrayLike, q: ArrayLike) -> Array:
    """Cosines (..., min(r, t)), descending, of the principal angles between orthonormal p (..., s,
    r), q (..., s, t).

    They are the singular values of p^T q, cut at 1: all ones when one subspace contains the other.

    >>> import jax.numpy as jnp
    >>> principal_angles(jnp.eye(3)[:, :2], jnp.eye(3)[:, 1:]).tolist()
    [1.0, 0.0]
    """
    # pᵀq (..., r, t)
    overlap = product(transpose(as_matrix(p, "p")), as_matrix(q, "q"))
    cosines = jnp.linalg.svd(overlap, compute_uv=False)
    return jnp.minimum(cosines, 1)
