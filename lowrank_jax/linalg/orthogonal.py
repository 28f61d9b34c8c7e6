"""Orthonormal columns: Householder QR, Cholesky-QR2, their safe combination, and Newton-Schulz.

Householder QR is unconditionally stable but slow in batches (LAPACK column by column on CPU, long
programs on TPU). Cholesky-QR2 (Yamamoto et al. 2015) is two Gram matrices and two triangular
inverses. Newton-Schulz (Muon, Jordan et al. 2024) is matrix products only and gives an approximate
polar factor. Shapes: x (..., s, r) with s >= r; every QR here has diag(R) >= 0, which makes the
factor of a full-rank x unique.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lowrank_jax import sharding
from lowrank_jax.linalg import _lapack
from lowrank_jax.linalg._common import Array, as_matrix, product, transpose
from lowrank_jax.typing import ArrayLike, DTypeLike, Scalar

MUON = (3.4445, -4.7750, 2.0315)
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def _as_tall(x: ArrayLike) -> Array:
    x = as_matrix(x)
    rows, cols = x.shape[-2:]
    if rows < cols:
        raise ValueError(
            f"x has {rows} rows and {cols} cols; {cols} orthonormal columns need rows >= cols"
        )
    return x


def _gram(x: Array) -> Array:
    return product(transpose(x), x)


def qr_orthonormal(x: ArrayLike) -> Array:
    """The Q (..., s, r) of the Householder QR x = Q R with diag(R) >= 0.

    Orthonormal for every finite x, zero and rank-deficient ones included. Raises ValueError when s
    < r.

    >>> import jax.numpy as jnp
    >>> (qr_orthonormal(jnp.array([[-3.0, 1.0], [0.0, 2.0]])).round(4) + 0).tolist()
    [[-1.0, 0.0], [0.0, 1.0]]
    """
    q, r = _lapack.qr(_as_tall(x))
    diagonal = jnp.diagonal(r, axis1=-2, axis2=-1)
    return q * jnp.where(diagonal < 0, -1, 1).astype(q.dtype)[..., None, :]


def _cholesky_pass(x: Array, shift: float = 0.0) -> Array:
    """x L^-T with L L^T = x^T x + shift I. The explicit inverse is a product, faster than a solve
    of s rows."""
    gram = _gram(x)
    identity = jnp.broadcast_to(jnp.eye(gram.shape[-1], dtype=x.dtype), gram.shape)
    return product(x, transpose(_lapack.inverse_cholesky(gram + shift * identity)))


def cholesky_qr2(x: ArrayLike) -> Array:
    """The Q (..., s, r) of x = Q R, diag(R) > 0, by Cholesky-QR2; fast, and wrong or NaN on
    rank-deficient x.

    Columns are first scaled to unit norm, which removes bad scaling (a warm power step's columns
    have the squared singular values as norms). The first Gram matrix is shifted by r * machine
    epsilon, which keeps its factorisation alive up to a condition number of about 1e4 in float32;
    both leave Q as it is in exact arithmetic, since scaling, shift and second pass only change R.
    :func:`orthonormalize` checks the result. Raises ValueError when s < r.

    >>> import jax.numpy as jnp
    >>> q = cholesky_qr2(jnp.array([[3.0, 1.0], [4.0, 1.0], [0.0, 1.0]]))
    >>> bool(jnp.allclose(q.T @ q, jnp.eye(2), atol=1e-6))
    True
    """
    x = _unit_columns(_as_tall(x))
    return _cholesky_pass(_cholesky_pass(x, shift=x.shape[-1] * float(jnp.finfo(x.dtype).eps)))


def _unit_columns(x: Array) -> Array:
    """x with its columns over their norms; zero columns stay."""
    largest = jnp.max(jnp.abs(x), axis=-2, keepdims=True)
    x = x / jnp.where(largest == 0, 1, largest)  # so that squares neither overflow nor underflow
    norm = jnp.sqrt(jnp.sum(x * x, axis=-2, keepdims=True))
    return x / jnp.where(norm == 0, 1, norm)


@jax.custom_jvp
def _orthonormalize(x: Array) -> Array:
    if sharding.divides():
        return _checked_cholesky(x, _completed)
    return lax.platform_dependent(
        x, tpu=qr_orthonormal, default=lambda x: _checked_cholesky(x, qr_orthonormal)
    )


def _checked_cholesky(x: Array, otherwise: Callable[[Array], Array]) -> Array:
    q = cholesky_qr2(x)
    error = jnp.abs(_gram(q) - jnp.eye(q.shape[-1], dtype=q.dtype))
    good = jnp.all(error < 1000 * jnp.finfo(q.dtype).eps)  # about 1e-4; NaN compares false
    return lax.cond(good, lambda x, q: q, lambda x, q: otherwise(x), x, q)


def _completed(x: Array) -> Array:
    """Orthonormal columns of any finite x by Gram matrices alone: its rows may be divided over
    devices.

    Noise of 10 machine epsilons in each entry stands in for what x does not span. The shift exceeds
    what rounding does to a Gram matrix, and each shifted pass divides the condition number by up to
    1 / sqrt(shift) (Fukaya et al. 2020, whose shift bounds the worst case and is larger).
    """
    eps = float(jnp.finfo(x.dtype).eps)
    q = _unit_columns(x)
    q = _unit_columns(q + 10 * eps * jax.random.normal(jax.random.key(0), x.shape[-2:], x.dtype))
    shift = (x.shape[-1] + 4 * math.sqrt(x.shape[-2])) * eps
    return _cholesky_pass(
        lax.fori_loop(0, 4, lambda _, q: _unit_columns(_cholesky_pass(q, shift)), q)
    )


@_orthonormalize.defjvp
def _orthonormalize_jvp(primals, tangents):
    # With W = dx R^-1 and A = the strictly lower part of Q^T W: dQ = Q (A - A^T - Q^T W) + W.
    (x,), (dx,) = primals, tangents
    q = _orthonormalize(x)
    weighted = _lapack.solve_from_right(product(transpose(q), x), dx)
    inner = product(transpose(q), weighted)
    lower = jnp.tril(inner, -1)
    return q, product(q, lower - transpose(lower) - inner) + weighted


def orthonormalize(x: ArrayLike) -> Array:
    """Orthonormal columns (..., s, r) spanning those of x, x = Q R with diag(R) >= 0: Cholesky-QR2,
    QR when it fails.

    One scalar test over the whole stack (everything finite and orthonormal to 1000 machine
    epsilons, 1e-4 in float32) decides by ``lax.cond``, so a good stack never pays for Householder
    QR; under ``vmap`` the cond becomes a select and both are paid: pass the stack itself. TPU
    programs hold Householder QR alone, which compiles to a third. Inside ``lrx.meshes.use`` of
    several devices the rows of x may be divided, and QR would gather them on every device: there
    Gram matrices do all, and noise stands in for what x does not span. Zero and rank-deficient x
    give orthonormal columns everywhere (the spare ones complete the basis). Non-finite x gives
    non-finite columns. Differentiable where x has full rank. Raises ValueError when s < r.

    >>> import jax.numpy as jnp
    >>> q = orthonormalize(jnp.ones((2, 4, 3)))  # rank one
    >>> bool(jnp.allclose(jnp.swapaxes(q, -1, -2) @ q, jnp.eye(3), atol=1e-5))
    True
    """
    return _orthonormalize(_as_tall(x))


def newton_schulz(
    x: ArrayLike,
    steps: int = 5,
    coefficients: tuple[float, float, float] | tuple[tuple[float, float, float], ...] = MUON,
    eps: float = 1e-8,
    compute_dtype: Any = None,
    margin: Scalar = 1.0,
) -> Array:
    """Muon's Newton-Schulz iteration: singular values of x (..., m, n) moved towards 1, singular
    vectors kept.

    Y = x / (margin ||x||_F + eps), then ``steps`` times Y <- a Y + (b A + c A A) Y with A = Y Y^T, on the
    orientation with fewer rows. Steps and coefficients are Muon's (Jordan et al. 2024): steep at 0,
    hence values end in about [0.7, 1.2], not at 1; (1.5, -0.5, 0) converges to 1, slowly. Triples in
    ``coefficients`` are one a step, the last of them for what steps remain: ``POLAR_EXPRESS`` (Amsel
    et al. 2025) ends nearer to 1, and wants ``margin=1.02``.
    ``compute_dtype`` (default: float32, float64 for a float64 x) sets the dtype of the iteration,
    bfloat16 in the original; the result is cast back by the package's rule. In a lower dtype every
    operation rounds, inside and outside of jit alike, as in PyTorch: x itself, its norm, both
    products, and each of a Y, b A and c A A before their sum; coefficients are not rounded. Zero x
    gives zeros.

    >>> import jax.numpy as jnp
    >>> newton_schulz(
    ...     jnp.diag(jnp.array([2.0, 1.0])), steps=20, coefficients=(1.5, -0.5, 0.0)
    ... ).round(4).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    x = as_matrix(x)
    if steps < 1:
        raise ValueError(f"steps={steps} must be at least 1; Muon uses 5")
    by_step: Any = coefficients if isinstance(coefficients[0], tuple) else (coefficients,)
    tall = x.shape[-2] > x.shape[-1]
    y = transpose(x) if tall else x
    rounded, times = _arithmetic(x.dtype, compute_dtype)
    y = rounded(y)
    norm = rounded(jnp.linalg.norm(y, axis=(-2, -1), keepdims=True))
    y = rounded(y / rounded(margin * norm + eps))
    for step in range(steps):
        a, b, c = by_step[min(step, len(by_step) - 1)]
        gram = times(y, transpose(y))
        quartic = rounded(c * times(gram, gram))
        polynomial = rounded(rounded(b * gram) + quartic)
        y = rounded(rounded(a * y) + times(polynomial, y))
    return transpose(y) if tall else y


def _arithmetic(
    own: Any, dtype: DTypeLike
) -> tuple[Callable[[Array], Array], Callable[..., Array]]:
    """`(rounded, times)`: arrays of the dtype `own` rounded to a lower one, and their product.

    A cast to the lower dtype and back may round or not: compilers keep what it would drop.
    """
    if dtype is None or jnp.finfo(dtype).nmant >= jnp.finfo(own).nmant:
        return (lambda x: x), product
    low = jnp.finfo(dtype)

    def rounded(x):
        return lax.reduce_precision(x, exponent_bits=low.nexp, mantissa_bits=low.nmant)

    def times(a, b):
        # the operands have the lower dtype's values, so that accelerators multiply in it
        return rounded(product(a.astype(dtype), b.astype(dtype)).astype(own))

    return rounded, times
