"""DCT and Hadamard bases against SciPy, and against the formula in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.fft
import scipy.linalg
from jax.test_util import check_grads

from lowrank_jax import linalg

SIZES = [1, 2, 5, 8, 9]
DCT = jax.jit(linalg.dct, static_argnames=("kind", "axis", "method"))
HADAMARD = jax.jit(linalg.hadamard_transform, static_argnames="axis")


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def oracle_columns(indices, d, kind):
    """Columns of C (kind 3) or C^T (kind 2) with exact integer reduction and float64 cosines."""
    indices = np.asarray(indices, np.int64)[..., None, :]
    position = np.arange(d, dtype=np.int64)[:, None]
    frequency, sample = (position, indices) if kind == 3 else (indices, position)
    values = np.sqrt(2 / d) * np.cos(np.pi * (frequency * (2 * sample + 1) % (4 * d)) / (2 * d))
    return values * np.where(frequency == 0, np.sqrt(0.5), 1)


@pytest.mark.parametrize("d", [5, 7, 64, 4096, 32768, 46340, 65536])
def test_dct_columns_equal_the_float64_formula(d):
    indices = np.unique(np.array([0, 1, d // 3, d // 2, d - 2, d - 1]))
    both = jax.jit(lambda i: [linalg.dct_columns(i, d, kind) for kind in (2, 3)])(
        indices.astype(np.int32)
    )
    for kind, got in zip((2, 3), both, strict=True):
        want = oracle_columns(indices, d, kind)
        np.testing.assert_allclose(np.asarray(got, np.float64), want, atol=1.5e-7 * np.sqrt(2 / d))


@pytest.mark.parametrize("kind", [2, 3])
def test_dct_matrix_columns_and_orthogonality(kind):
    matrix = linalg.dct_matrix(64, kind)
    np.testing.assert_allclose(matrix, oracle_columns(np.arange(64), 64, kind), atol=1e-7)
    np.testing.assert_allclose(matrix.T @ matrix, np.eye(64), atol=1e-6)
    np.testing.assert_allclose(matrix, linalg.dct_matrix(64, 5 - kind).T, atol=0)
    indices = jnp.asarray(normal(2, 3, 6).argsort(-1), jnp.int32)
    stacked = linalg.dct_columns(indices, 64, kind)
    assert stacked.shape == (2, 3, 64, 6)
    np.testing.assert_array_equal(stacked[1, 2], matrix[:, indices[1, 2]])
    np.testing.assert_array_equal(
        jax.vmap(lambda i: linalg.dct_columns(i, 64, kind))(indices), stacked
    )


def test_column_dtypes():
    indices = jnp.array([1, 3])
    for function, arguments in ((linalg.dct_columns, (8, 2)), (linalg.hadamard_columns, (8,))):
        low, full = function(indices, *arguments, jnp.bfloat16), function(indices, *arguments)
        assert (low.dtype, full.dtype) == (jnp.bfloat16, jnp.float32)
        np.testing.assert_array_equal(low, full.astype(jnp.bfloat16))
    with jax.enable_x64(True):
        np.testing.assert_allclose(
            linalg.dct_columns(indices, 7, 3, jnp.float64),
            oracle_columns(indices, 7, 3),
            atol=1e-15,
        )


def test_no_constant_of_the_size_of_the_basis_in_the_program():
    for function in (linalg.dct_columns, linalg.hadamard_columns):
        arguments = (512, 3) if function is linalg.dct_columns else (512,)
        compiled = (
            jax.jit(lambda i, f=function, a=arguments: f(i, *a)).lower(jnp.arange(4)).compile()
        )
        assert len(compiled.as_text()) < 20_000
    transform = (
        jax.jit(lambda x: linalg.dct(x, 2, method="matmul")).lower(jnp.ones((512, 4))).compile()
    )
    assert len(transform.as_text()) < 20_000


CASES = [(kind, method) for kind in (2, 3) for method in ("fft", "matmul")]


@pytest.mark.parametrize("d", SIZES)
def test_dct_equals_scipy(d):
    x = normal(2, d, 3)
    results = jax.jit(lambda x: [linalg.dct(x, kind, method=method) for kind, method in CASES])(
        x.astype(np.float32)
    )
    for (kind, _), got in zip(CASES, results, strict=True):
        np.testing.assert_allclose(
            got, scipy.fft.dct(x, type=kind, norm="ortho", axis=-2), atol=2e-6
        )


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_axes_inverse_and_basis(axis):
    x = normal(6, 7, 5).astype(np.float32)

    @jax.jit
    def there_and_back(x):
        there = [linalg.dct(x, kind, axis, method) for kind, method in CASES]
        return there, [
            linalg.idct(y, kind, axis, method)
            for y, (kind, method) in zip(there, CASES, strict=True)
        ]

    for (kind, _), y, back in zip(CASES, *there_and_back(x), strict=True):
        np.testing.assert_allclose(
            y, scipy.fft.dct(x, type=kind, norm="ortho", axis=axis), atol=3e-6
        )
        np.testing.assert_allclose(back, x, atol=3e-6)
        basis = oracle_columns(np.arange(x.shape[axis]), x.shape[axis], kind)
        want = np.moveaxis(np.tensordot(basis.T, x, axes=(1, axis)), 0, axis)
        np.testing.assert_allclose(y, want, atol=3e-6)


@pytest.mark.parametrize("kind", [2, 3])
def test_fft_equals_matmul_at_a_real_size_and_in_low_precision(kind):
    x = normal(2, 344, 8).astype(np.float32)
    fft, matmul = (
        jax.jit(lambda x, m=m: linalg.dct(x, kind, method=m))(x) for m in ("fft", "matmul")
    )
    np.testing.assert_allclose(fft, matmul, atol=1e-5)
    np.testing.assert_allclose(fft, linalg.dct(x, kind, method="fft"), atol=1e-5)
    low = jnp.asarray(x, jnp.bfloat16)
    assert DCT(low, kind).dtype == jnp.float32
    np.testing.assert_allclose(DCT(low, kind), DCT(low.astype(jnp.float32), kind), atol=1e-6)


@pytest.mark.parametrize("method", ["fft", "matmul"])
@pytest.mark.parametrize("kind", [2, 3])
def test_dct_gradient_in_float64(kind, method):
    with jax.enable_x64(True):
        x = jnp.asarray(normal(5, 2))
        check_grads(
            jax.jit(lambda x: jnp.sin(DCT(x, kind, method=method))),
            (x,),
            order=2,
            modes=("rev",),
            rtol=1e-5,
        )
        np.testing.assert_allclose(
            DCT(x, kind, method=method),
            scipy.fft.dct(np.asarray(x), type=kind, norm="ortho", axis=0),
            atol=1e-14,
        )


@pytest.mark.parametrize("d", [1, 2, 8, 64])
def test_hadamard_equals_scipy(d):
    want = scipy.linalg.hadamard(d) / np.sqrt(d)
    np.testing.assert_allclose(
        jax.jit(linalg.hadamard_matrix, static_argnums=0)(d), want, atol=1e-7
    )
    indices = np.random.default_rng(0).integers(0, d, size=(2, 3))
    columns = linalg.hadamard_columns(jnp.asarray(indices, jnp.int32), d)
    np.testing.assert_allclose(columns, np.moveaxis(want[:, indices], 0, 1), atol=1e-7)
    x = normal(2, d, 3)
    np.testing.assert_allclose(HADAMARD(x.astype(np.float32)), want @ x, atol=3e-6)
    np.testing.assert_allclose(
        HADAMARD(np.swapaxes(x, 1, 2).astype(np.float32), axis=-1),
        np.swapaxes(x, 1, 2) @ want,
        atol=3e-6,
    )


def test_hadamard_transforms_of_jax_and_dtype():
    x = jnp.asarray(normal(3, 8, 2), jnp.float32)
    eager = linalg.hadamard_transform(x)
    np.testing.assert_allclose(jax.jit(linalg.hadamard_transform)(x), eager, atol=1e-6)
    np.testing.assert_allclose(jax.vmap(linalg.hadamard_transform)(x), eager, atol=1e-6)
    np.testing.assert_allclose(linalg.hadamard_transform(eager), x, atol=1e-6)
    assert linalg.hadamard_transform(x.astype(jnp.bfloat16)).dtype == jnp.float32
    check_grads(linalg.hadamard_transform, (x,), order=1, modes=("rev",), rtol=1e-2)
    assert jax.eval_shape(linalg.hadamard_transform, x).shape == x.shape


def test_errors():
    x = jnp.ones((6, 4))
    for call in (linalg.dct, linalg.idct):
        with pytest.raises(ValueError, match="kind=1 is unknown; choose one of 2, 3"):
            call(x, 1)
    with pytest.raises(ValueError, match="method='slow'"):
        linalg.dct(x, 2, method="slow")
    with pytest.raises(ValueError, match="axis=2 is out of range"):
        linalg.dct(x, 2, axis=2)
    with pytest.raises(ValueError, match="axis=-2 is out of range"):
        linalg.dct(jnp.ones(4), 2)
    with pytest.raises(ValueError, match="kind=4"):
        linalg.dct_columns(jnp.arange(2), 8, 4)
    for d in (0, 46341):
        with pytest.raises(ValueError, match=f"d={d} must be in"):
            linalg.dct_columns(jnp.arange(2), d, 2)
    with pytest.raises(ValueError, match="length of axis 0=6 is no power of two, .* zero-pad to 8"):
        linalg.hadamard_transform(x)
    with pytest.raises(ValueError, match="d=12 is no power of two"):
        linalg.hadamard_matrix(12)
