"""Truncated and randomized SVD with canonical signs, and the cheap subspace iterations that replace
them.

On TPU a full SVD compiles to a program of hundreds of megabytes; :func:`range_finder` and
:func:`power_step` need products and Cholesky factors only. Shapes: x (..., s, k), left basis (...,
s, r).
"""

import jax
import jax.numpy as jnp
from jax import lax

from lowrank_jax.linalg import _lapack
from lowrank_jax.linalg._common import Array, as_matrix, check_rank, divide, product, transpose
from lowrank_jax.linalg.orthogonal import orthonormalize
from lowrank_jax.typing import ArrayLike


def _column_signs(basis: Array) -> Array:
    """(..., 1, r) of +-1: the sign of each column's entry of largest magnitude, the first such
    entry on ties."""
    row = jnp.argmax(jnp.abs(basis), axis=-2, keepdims=True)
    largest = jnp.take_along_axis(basis, row, axis=-2)
    return jnp.where(largest < 0, -1, 1).astype(basis.dtype)


def canonical_signs(basis: ArrayLike) -> Array:
    """Each column of basis (..., s, r) times +-1, so that its entry of largest magnitude (first on
    ties) is positive.

    Singular vectors are defined up to sign; without a convention two correct runs part at the first
    refresh.

    >>> import jax.numpy as jnp
    >>> canonical_signs(jnp.array([[1.0, 2.0], [-3.0, -2.0]])).tolist()
    [[-1.0, 2.0], [3.0, -2.0]]
    """
    basis = as_matrix(basis, "basis")
    return basis * _column_signs(basis)


def _sign_and_cut(u: Array, s: Array, vt: Array, rank: int) -> tuple[Array, Array, Array]:
    u = u[..., :rank]
    s = s[..., :rank]
    vt = vt[..., :rank, :]
    # u_i v_iᵀ stays as it is where both change sign
    signs = _column_signs(u)
    return u * signs, s, vt * transpose(signs)


def truncated_svd(x: ArrayLike, rank: int) -> tuple[Array, Array, Array]:
    """The ``rank`` leading singular triplets of x (..., m, n): u (..., m, r), s (..., r)
    descending, vt (..., r, n).

    Exact (LAPACK or the backend's full SVD, then cut); u has canonical signs and vt the matching
    ones, so that (u * s) @ vt is the best approximation of that rank. Non-finite x gives NaN.
    Raises ValueError unless 1 <= rank <= min(m, n).

    >>> import jax.numpy as jnp
    >>> u, s, vt = truncated_svd(jnp.array([[0.0, -3.0], [1.0, 0.0]]), rank=1)
    >>> u.tolist(), s.tolist(), vt.tolist()
    ([[1.0], [0.0]], [3.0], [[0.0, -1.0]])
    """
    x = as_matrix(x)
    rank = check_rank(rank, min(x.shape[-2:]))
    u, s, vt = _lapack.svd(x)
    return _sign_and_cut(u, s, vt, rank)


def power_step(x: ArrayLike, basis: ArrayLike) -> Array:
    """One warm block power step for the left singular subspace: orthonormalize(x (x^T basis)).

    x (..., s, k), basis (..., s, r), result (..., s, r). From a near-converged basis one step
    tracks a slowly moving subspace; columns approach single singular vectors in descending order. A
    zero x gives some orthonormal basis.

    >>> import jax.numpy as jnp
    >>> power_step(jnp.diag(jnp.array([3.0, 0.0])), jnp.array([[0.6], [0.8]])).tolist()
    [[1.0], [0.0]]
    """
    x, basis = as_matrix(x), as_matrix(basis, "basis")
    if x.shape[-2] != basis.shape[-2]:
        raise ValueError(
            f"basis has {basis.shape[-2]} rows and x has {x.shape[-2]}; a left basis of x has the "
            "rows of x"
        )
    low = product(transpose(basis), x)  # (..., r, k)
    size = lax.stop_gradient(jnp.max(jnp.abs(low), axis=(-2, -1), keepdims=True))
    # Without the scaling, x^2 of tiny gradients underflows.
    return orthonormalize(product(x, transpose(divide(low, size))))


def range_finder(x: ArrayLike, rank: int, key: Array, power_iterations: int = 1) -> Array:
    """Orthonormal basis (..., m, r) of an approximate leading left subspace of x (..., m, n),
    without an SVD.

    Q = orthonormalize(x W) with a Gaussian W (n, r), then ``power_iterations`` times Z =
    orthonormalize(x^T Q), Q = orthonormalize(x Z) (Halko, Martinsson & Tropp 2011, algorithm 4.4).
    One W serves the whole stack, so a stack equals its matrices one by one. One iteration is the
    usual choice for slowly decaying spectra such as gradients'. Raises ValueError unless 1 <= rank
    <= min(m, n).

    >>> import jax, jax.numpy as jnp
    >>> x = jnp.outer(jnp.arange(4.0), jnp.arange(3.0))
    >>> basis = range_finder(x, rank=1, key=jax.random.key(0))
    >>> bool(jnp.allclose(basis @ (basis.T @ x), x, atol=1e-5))
    True
    """
    x = as_matrix(x)
    rank = check_rank(rank, min(x.shape[-2:]))
    if power_iterations < 0:
        raise ValueError(
            f"power_iterations={power_iterations} must be at least 0; 1 is the default"
        )
    test = jax.random.normal(key, (x.shape[-1], rank), x.dtype)
    basis = orthonormalize(product(x, test))
    for _ in range(power_iterations):
        # orthonormal after each product: columns would all turn to the first singular vector
        right = orthonormalize(product(transpose(x), basis))
        basis = orthonormalize(product(x, right))
    return basis


def randomized_svd(
    x: ArrayLike, rank: int, key: Array, oversample: int = 8, power_iterations: int = 1
) -> tuple[Array, Array, Array]:
    """Approximate :func:`truncated_svd` from a random range of r + oversample columns: u, s, vt
    with canonical signs.

    Q = range_finder(x, p), Z = orthonormalize(x^T Q), then the exact SVD of the p x p core Q^T x Z
    with p = min(rank + oversample, m, n). The only SVD is of the core, whatever m and n.
    ``oversample=8`` lies in the 5 to 10 that Halko, Martinsson & Tropp (2011, section 1.3)
    recommend. Raises ValueError unless 1 <= rank <= min(m, n).

    >>> import jax, jax.numpy as jnp
    >>> x = jnp.diag(jnp.array([5.0, 2.0, 0.1, 0.0]))
    >>> randomized_svd(x, rank=2, key=jax.random.key(0))[1].round(4).tolist()
    [5.0, 2.0]
    """
    x = as_matrix(x)
    rank = check_rank(rank, min(x.shape[-2:]))
    if oversample < 0:
        raise ValueError(f"oversample={oversample} must be at least 0; 8 is the default")
    columns = min(rank + oversample, *x.shape[-2:])
    left = range_finder(x, columns, key, power_iterations)
    projected = product(transpose(x), left)  # XᵀQ (..., n, p)
    right = orthonormalize(projected)
    # QᵀX Z (..., p, p) holds what X does between the two subspaces
    core = product(transpose(projected), right)
    u, s, vt = _lapack.svd(core)
    return _sign_and_cut(product(left, u), s, product(vt, transpose(right)), rank)


def svd_of_product(
    a: ArrayLike, b: ArrayLike, rank: int | None = None
) -> tuple[Array, Array, Array]:
    """The SVD of a @ b, a (..., m, q), b (..., q, n), without the product: u (..., m, p), s (...,
    p), vt (..., p, n).

    a = Qa Ra and b^T = Qb Rb, then the SVD of the core Ra Rb^T, at most q x q: O((m + n) q^2 +
    q^3), the compression of LoRA-Squeeze. p = min(q, m, n), or ``rank`` if that is given; u has
    canonical signs. Raises ValueError for shapes that do not multiply, and unless 1 <= rank <=
    min(q, m, n).

    >>> import jax.numpy as jnp
    >>> u, s, vt = svd_of_product(jnp.array([[3.0], [4.0]]), jnp.array([[2.0, 0.0]]))
    >>> u.round(4).tolist(), s.round(4).tolist(), vt.round(4).tolist()
    ([[0.6], [0.8]], [10.0], [[1.0, 0.0]])
    """
    a, b = as_matrix(a, "a"), as_matrix(b, "b")
    if a.shape[:-2] != b.shape[:-2] or a.shape[-1] != b.shape[-2]:
        raise ValueError(f"a of shape {a.shape} and b of shape {b.shape} do not multiply")
    limit = min(a.shape[-1], a.shape[-2], b.shape[-1])
    rank = limit if rank is None else check_rank(rank, limit, what="the smallest of m, q and n")
    left, core_left = _lapack.qr(a)
    right, core_right = _lapack.qr(transpose(b))
    # (..., at most q, at most q): a b = Qa (Ra Rbᵀ) Qbᵀ
    core = product(core_left, transpose(core_right))
    u, s, vt = _lapack.svd(core)
    return _sign_and_cut(product(left, u), s, product(vt, transpose(right)), rank)
