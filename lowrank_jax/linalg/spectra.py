"""Numbers that say how low-rank a matrix is and how good a basis: for analysis, not for the
training step."""

from typing import Any

import jax.numpy as jnp
from jax.scipy.special import xlogy

from lowrank_jax.linalg._common import Array, as_array, as_matrix, divide, product, transpose
from lowrank_jax.typing import Pytree


def effective_rank(s: Any) -> Array:
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
    return jnp.where(total[..., 0] == 0, 0, jnp.exp(-jnp.sum(xlogy(share, share), axis=-1)))


def rank_for_energy(s: Any, energy: float) -> Array:
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
    kept = jnp.cumsum(jnp.square(divide(s, jnp.max(s, axis=-1, keepdims=True))), axis=-1)
    return 1 + jnp.sum(kept[..., :-1] < energy * kept[..., -1:], axis=-1, dtype=jnp.int32)


def _unit_scale(x: Array) -> Array:
    # Ratios of squared norms do not change, and squares neither overflow nor underflow.
    return divide(x, jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True))


def stable_rank(x: Any) -> Array:
    """||x||_F^2 / ||x||_2^2 of x (..., m, n), in [1, min(m, n)]; zero for a zero matrix. Costs
    singular values.

    >>> import jax.numpy as jnp
    >>> float(stable_rank(jnp.diag(jnp.array([2.0, 2.0, 1.0]))))
    2.25
    """
    squares = jnp.square(jnp.linalg.svd(_unit_scale(as_matrix(x)), compute_uv=False))
    return divide(jnp.sum(squares, axis=-1), squares[..., 0])


def explained_variance(x: Any, basis: Pytree) -> Array:
    """||P^T x||_F^2 / ||x||_F^2 for x (..., s, k) and an orthonormal basis P (..., s, r); 0/0
    counts as 0.

    >>> import jax.numpy as jnp
    >>> float(explained_variance(jnp.array([[3.0], [3.0]]), jnp.array([[1.0], [0.0]])))
    0.5
    """
    x = _unit_scale(as_matrix(x))
    low = product(transpose(as_matrix(basis, "basis")), x)
    return divide(jnp.sum(low * low, axis=(-2, -1)), jnp.sum(x * x, axis=(-2, -1)))


def principal_angles(p: Any, q: Any) -> Array:
    """Cosines (..., min(r, t)), descending, of the principal angles between orthonormal p (..., s,
    r), q (..., s, t).

    They are the singular values of p^T q, cut at 1: all ones when one subspace contains the other.

    >>> import jax.numpy as jnp
    >>> principal_angles(jnp.eye(3)[:, :2], jnp.eye(3)[:, 1:]).tolist()
    [1.0, 0.0]
    """
    cosines = jnp.linalg.svd(
        product(transpose(as_matrix(p, "p")), as_matrix(q, "q")), compute_uv=False
    )
    return jnp.minimum(cosines, 1)
