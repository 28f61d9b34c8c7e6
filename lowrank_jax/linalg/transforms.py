"""Fixed orthonormal bases: DCT-II, DCT-III and Hadamard, as matrices, as fast transforms, and as
chosen columns.

With C[i, j] = sqrt(2/d) cos(i (2j+1) pi / (2d)), row 0 times sqrt(1/2), a *basis* Q (d, d) has the
basis vectors as columns: kind 3 is Q = C and kind 2 is Q = C^T. The transform of x is Q^T x, hence
kind 2 is the orthonormal DCT-II (``scipy.fft.dct(x, type=2, norm="ortho")``) and kind 3 the
DCT-III, its inverse. DCT-AdamW (arXiv 2505.17967) writes Q = C for its matmul path ("dct3") and
computes a DCT-II in its FFT path ("dct2"): two different bases.
"""

import functools
import math

import jax.numpy as jnp
from jax import lax

from lowrank_jax.linalg._common import (
    Array,
    as_array,
    check_axis,
    check_choice,
    product,
    working_dtype,
)
from lowrank_jax.typing import ArrayLike, DTypeLike

_KINDS = (2, 3)
# i (2j+1) < 2 d^2 must fit uint32, unless 4d divides 2^32 and wrapping is exact.
_SMALL_DCT = 512
_LARGEST_DCT = math.isqrt(2**31)


def dct_columns(indices: ArrayLike, d: int, kind: int, dtype: DTypeLike = jnp.float32) -> Array:
    """The columns ``indices`` (..., r) of the DCT basis Q of size d, as (..., d, r), from r
    integers and no table.

    i (2j+1) is reduced modulo 4d in uint32, folded by symmetry to an angle in [-pi/2, pi/2] and
    given to one sine, so the error is about 1e-7 sqrt(2/d) for every d. (A lookup in a cosine table
    of length 4d is as fast on CPU, five times less accurate, and needs a gather, which TPUs do
    slowly.) Indices must lie in [0, d). Raises ValueError for another kind, for d < 1, and for d
    above 46340 that is no power of two, whose products overflow uint32.

    >>> import jax.numpy as jnp
    >>> dct_columns(jnp.array([0, 2]), d=4, kind=2).round(3).tolist()
    [[0.5, 0.5], [0.5, -0.5], [0.5, -0.5], [0.5, 0.5]]
    """
    check_choice("kind", kind, _KINDS)
    if d < 1 or (d > _LARGEST_DCT and d & (d - 1)):
        raise ValueError(
            f"d={d} must be in [1, {_LARGEST_DCT}] or a power of two; pad or split the dimension"
        )
    working = working_dtype(dtype)
    frequency = jnp.asarray(indices).astype(jnp.uint32)[..., None, :]
    position = lax.broadcasted_iota(jnp.uint32, (d, 1), 0)
    if kind == 3:
        frequency, position = position, frequency
    # the angle pi i (2j+1) / 2d in units of pi / 2d, modulo a turn of 4d
    turns = frequency * (2 * position + 1)
    phase = (turns % jnp.uint32(4 * d)).astype(jnp.int32)
    # cos(pi m / 2d) = sin(pi (|m - 2d| - d) / 2d) for m in [0, 4d)
    quarter = jnp.abs(phase - 2 * d) - d
    first, others = math.sqrt(1 / d), math.sqrt(2 / d)
    scale = jnp.where(frequency == 0, first, others).astype(working)
    cosine = jnp.sin(quarter.astype(working) * (math.pi / (2 * d)))
    return (scale * cosine).astype(dtype)


def dct_matrix(d: int, kind: int, dtype: DTypeLike = jnp.float32) -> Array:
    """The DCT basis Q (d, d) whose columns are the basis vectors: C for kind 3, C^T for kind 2.

    >>> (dct_matrix(4, kind=2).T @ dct_matrix(4, kind=2)).round(5).diagonal().tolist()
    [1.0, 1.0, 1.0, 1.0]
    """
    return dct_columns(lax.iota(jnp.uint32, d), d, kind, dtype)


def _reals(turns: Array, d: int, dtype: DTypeLike) -> tuple[Array, Array]:
    angle = turns.astype(dtype) * (math.pi / (2 * d))
    return jnp.cos(angle), jnp.sin(angle)


def _scales(d: int, first: float, others: float, dtype: DTypeLike) -> Array:
    """`(d,)`: what the first coefficient is multiplied by, and the others."""
    is_first = lax.iota(jnp.int32, d) == 0
    return jnp.where(is_first, first, others).astype(dtype)


def _fft_dct2(x: Array) -> Array:
    # Makhoul 1980: with v = even entries, then odd ones reversed, and U_k = exp(-i pi k / 2d)
    # FFT(v)_k, the unnormalised DCT-II is 2 Re U_k, and -2 Im U_k is its entry d - k: half a
    # spectrum is enough.
    d = x.shape[-1]
    even, odd = x[..., ::2], x[..., 1::2]
    v = jnp.concatenate([even, odd[..., ::-1]], axis=-1)
    spectrum = jnp.fft.rfft(v)

    # U_k for k = 0 ... d // 2
    cos, sin = _reals(lax.iota(jnp.int32, d // 2 + 1), d, x.dtype)
    real = spectrum.real * cos + spectrum.imag * sin
    negative_imaginary = spectrum.real * sin - spectrum.imag * cos

    # entries from d down to the middle, of which that of k = 0 and d / 2 are there already
    mirrored = negative_imaginary[..., 1 : (d + 1) // 2][..., ::-1]
    values = jnp.concatenate([real, mirrored], axis=-1)
    return values * _scales(d, math.sqrt(1 / d), math.sqrt(2 / d), x.dtype)


def _fft_dct3(x: Array) -> Array:
    # The steps of _fft_dct2 undone in reverse order: FFT(v)_k = exp(i pi k / 2d) (y_k - i y_{d-k})
    # with y_d = 0.
    d = x.shape[-1]
    y = x * _scales(d, math.sqrt(d), math.sqrt(d / 2), x.dtype)
    y_d = jnp.zeros_like(y[..., :1])
    mirrored = jnp.concatenate([y_d, y[..., :0:-1]], axis=-1)

    # half a spectrum, the rest of which is its mirror image
    half = d // 2 + 1
    cos, sin = _reals(lax.iota(jnp.int32, half), d, x.dtype)
    real, imaginary = y[..., :half], -mirrored[..., :half]
    turned_real = real * cos - imaginary * sin
    turned_imaginary = real * sin + imaginary * cos
    v = jnp.fft.irfft(lax.complex(turned_real, turned_imaginary), n=d)

    # even entries come first, then odd ones reversed; the last even one has no partner if d is odd
    split = (d + 1) // 2
    even, odd = v[..., :split], v[..., split:][..., ::-1]
    pairs = jnp.stack([even[..., : d // 2], odd], axis=-1)
    flat = pairs.reshape(*x.shape[:-1], d // 2 * 2)
    return jnp.concatenate([flat, even[..., d // 2 :]], axis=-1)


def dct(x: ArrayLike, kind: int, axis: int = -2, method: str = "auto") -> Array:
    """Q^T x along ``axis``: the coefficients of x in the DCT basis of that kind, all d of them.

    ``method="fft"`` is O(d log d) (Makhoul's real FFT), ``"matmul"`` forms Q from its formula and
    multiplies; ``"auto"`` is matmul on TPU, a matrix machine, and up to d = 512 on CPU, where it
    takes two thirds of the FFT's time (measured on two cores); fft elsewhere.
    Both agree to rounding and are linear, hence differentiable. Raises ValueError for an unknown
    kind, axis or method.

    >>> import jax.numpy as jnp
    >>> dct(jnp.ones((4, 1)), kind=2).round(5).tolist()
    [[2.0], [0.0], [0.0], [0.0]]
    """
    check_choice("kind", kind, _KINDS)
    check_choice("method", method, ("auto", "fft", "matmul"))
    x = as_array(x)
    axis = check_axis(axis, x.ndim)
    if method == "auto":
        options = {"kind": kind, "axis": axis}
        matmul = functools.partial(dct, method="matmul", **options)
        fft = functools.partial(dct, method="fft", **options)
        on_cpu = matmul if x.shape[axis] <= _SMALL_DCT else fft
        return lax.platform_dependent(x, tpu=matmul, cpu=on_cpu, default=fft)
    if method == "fft":
        transform = _fft_dct2 if kind == 2 else _fft_dct3
        last = jnp.moveaxis(x, axis, -1)
        return jnp.moveaxis(transform(last), -1, axis)
    # Q^T x, or x Q where the axis is the last one
    basis = dct_matrix(x.shape[axis], kind, x.dtype)
    if axis == x.ndim - 1:
        return product(x, basis)
    rows = jnp.moveaxis(x, axis, -2)
    return jnp.moveaxis(product(basis.T, rows), -2, axis)


def idct(x: ArrayLike, kind: int, axis: int = -2, method: str = "auto") -> Array:
    """Q x along ``axis``, the inverse of :func:`dct` of the same kind (which is the dct of the
    other kind).

    >>> import jax.numpy as jnp
    >>> idct(dct(jnp.arange(3.0), kind=3, axis=0), kind=3, axis=0).round(5).tolist()
    [0.0, 1.0, 2.0]
    """
    check_choice("kind", kind, _KINDS)
    return dct(x, 5 - kind, axis, method)


def _check_power_of_two(d: int, name: str) -> None:
    if d < 1 or d & (d - 1):
        larger = 1 << max(d, 1).bit_length()
        raise ValueError(
            f"{name}={d} is no power of two, as Hadamard needs; zero-pad to {larger} or use a DCT "
            "basis"
        )


def hadamard_columns(indices: ArrayLike, d: int, dtype: DTypeLike = jnp.float32) -> Array:
    """The columns ``indices`` (..., r) of the orthonormal Sylvester-Hadamard matrix, as (..., d,
    r).

    H[i, j] = (-1)^popcount(i & j) / sqrt(d). Raises ValueError unless d is a power of two.

    >>> import jax.numpy as jnp
    >>> hadamard_columns(jnp.array([3]), d=4).tolist()
    [[0.5], [-0.5], [-0.5], [0.5]]
    """
    _check_power_of_two(d, "d")
    column = jnp.asarray(indices).astype(jnp.uint32)[..., None, :]
    row = lax.broadcasted_iota(jnp.uint32, (d, 1), 0)
    odd = lax.population_count(column & row) & 1
    positive = 1 / math.sqrt(d)
    return jnp.where(odd == 1, -positive, positive).astype(dtype)


def hadamard_matrix(d: int, dtype: DTypeLike = jnp.float32) -> Array:
    """The orthonormal Sylvester-Hadamard matrix (d, d), symmetric and its own inverse; d a power of
    two.

    >>> hadamard_matrix(4)[:, 1].tolist()
    [0.5, -0.5, 0.5, -0.5]
    """
    return hadamard_columns(lax.iota(jnp.uint32, d), d, dtype)


def hadamard_transform(x: ArrayLike, axis: int = -2) -> Array:
    """H x along ``axis`` by log2(d) butterflies; orthonormal and its own inverse.

    Raises ValueError unless the axis has power-of-two length.

    >>> import jax.numpy as jnp
    >>> hadamard_transform(jnp.array([[1.0], [0.0], [0.0], [1.0]])).tolist()
    [[1.0], [0.0], [0.0], [1.0]]
    """
    x = as_array(x)
    axis = check_axis(axis, x.ndim)
    shape, d = x.shape, x.shape[axis]
    _check_power_of_two(d, f"the length of axis {axis}")
    before, after = shape[:axis], shape[axis + 1 :]
    # one bit of the index after the other: entries that differ in it give their sum and difference
    for bit in range(d.bit_length() - 1):
        x = x.reshape(*before, d >> (bit + 1), 2, 1 << bit, *after)
        low, high = jnp.split(x, 2, axis=axis + 1)
        x = jnp.concatenate([low + high, low - high], axis=axis + 1)
    return x.reshape(shape) * (1 / math.sqrt(d))
