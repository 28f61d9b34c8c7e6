"""QR, Cholesky-QR2, their combination and Newton-Schulz, against NumPy in float64."""

import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from lowrank_jax import linalg


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def oracle_q(x):
    q, r = np.linalg.qr(np.asarray(x, np.float64))
    return q * np.where(np.diagonal(r, axis1=-2, axis2=-1) < 0, -1, 1)[..., None, :]


def with_condition(rows, cols, condition, seed=0):
    u, v = oracle_q(normal(rows, cols, seed=seed)), oracle_q(normal(cols, cols, seed=seed + 1))
    return ((u * np.geomspace(1, 1 / condition, cols)) @ v.T).astype(np.float32)


def orthogonality_error(q):
    q = np.asarray(q, np.float64)
    return np.abs(np.swapaxes(q, -1, -2) @ q - np.eye(q.shape[-1])).max()


QR, CHOLESKY, ORTHONORMALIZE = map(
    jax.jit, (linalg.qr_orthonormal, linalg.cholesky_qr2, linalg.orthonormalize)
)
ALL, SAFE = (QR, CHOLESKY, ORTHONORMALIZE), (QR, ORTHONORMALIZE)


@pytest.mark.parametrize("shape", [(9, 4), (6, 6), (2, 3, 7, 2), (5, 1)])
def test_equals_numpy_qr_with_positive_diagonal(shape):
    x = normal(*shape, seed=3)
    for q in jax.jit(lambda x: [function(x) for function in ALL])(x.astype(np.float32)):
        np.testing.assert_allclose(q, oracle_q(x), atol=2e-5)


@pytest.mark.parametrize("function", SAFE)
def test_deficient_inputs_still_give_orthonormal_columns(function):
    x = normal(4, 8, 5).astype(np.float32)
    x[0] = 0
    x[1, :, 3] = x[1, :, 0]
    x[2, :, 2] = 0
    assert orthogonality_error(function(x)) < 1e-4
    q = np.asarray(function(x))[1, :, :3]
    np.testing.assert_allclose(q, oracle_q(x[1, :, :3]), atol=1e-4)


def test_cholesky_qr2_alone_fails_where_orthonormalize_does_not():
    x = np.ones((6, 3), np.float32)
    assert not orthogonality_error(CHOLESKY(x)) < 1e-2
    assert orthogonality_error(ORTHONORMALIZE(x)) < 1e-4


def test_cholesky_path_holds_to_condition_1e4_and_ignores_column_scale():
    x = with_condition(96, 24, 1e4)
    assert orthogonality_error(CHOLESKY(x)) < 1e-4
    scale = np.geomspace(1e-25, 1e25, 24).astype(np.float32)
    q = CHOLESKY(normal(96, 24).astype(np.float32) * scale)
    np.testing.assert_allclose(q, oracle_q(normal(96, 24)), atol=2e-5)


def test_ill_conditioned_stack_falls_back_and_keeps_its_good_member():
    x = np.stack([with_condition(40, 12, 1e7), with_condition(40, 12, 3)])
    q = ORTHONORMALIZE(x)
    assert orthogonality_error(q) < 1e-4
    np.testing.assert_allclose(q[1], oracle_q(x[1]), atol=1e-5)


def test_stack_equals_members_vmap_and_jit():
    x = normal(2, 7, 3).astype(np.float32)
    q = ORTHONORMALIZE(x)
    for other in (
        linalg.orthonormalize(x),
        jax.jit(jax.vmap(linalg.orthonormalize))(x),
        jnp.stack([ORTHONORMALIZE(member) for member in x]),
    ):
        np.testing.assert_allclose(q, other, atol=1e-6)


def conditions(jaxpr):
    """Conditions on data anywhere inside; choices between platforms do not count."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "cond" and not equation.params.get("branches_platforms"):
            found.append(equation)
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            found += conditions(inner)
    return found


def test_one_cond_decides_for_the_whole_stack():
    stack = jnp.ones((3, 8, 2))
    assert len(conditions(jax.make_jaxpr(linalg.orthonormalize)(stack).jaxpr)) == 1
    assert not conditions(
        jax.make_jaxpr(jax.vmap(linalg.orthonormalize))(stack).jaxpr
    )  # the docstring warns of it


@pytest.mark.parametrize("function", SAFE)
def test_nan_gives_nan_and_returns(function):
    assert np.isnan(np.asarray(function(np.full((6, 3), np.nan, np.float32)))).any()


def test_derivative_is_that_of_qr_also_on_the_fallback_path():
    with jax.enable_x64(True):
        x = jnp.asarray(normal(2, 6, 3))
        check_grads(ORTHONORMALIZE, (x,), order=1, modes=("fwd", "rev"), atol=1e-6, rtol=1e-6)
        bad = jnp.asarray(with_condition(6, 3, 1e7).astype(np.float64))
        ours = jax.jvp(ORTHONORMALIZE, (bad,), (x[0],))[1]
        theirs = jax.jvp(QR, (bad,), (x[0],))[1]
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-3 * np.abs(theirs).max())


@pytest.mark.parametrize("function", ALL)
def test_dtypes_and_errors(function):
    x = jnp.asarray(normal(6, 3), jnp.bfloat16)
    assert function(x).dtype == jnp.float32
    np.testing.assert_allclose(function(x), oracle_q(x.astype(np.float32)), atol=1e-5)
    assert jax.eval_shape(function, jax.ShapeDtypeStruct((2, 6, 3), jnp.float16)).shape == (2, 6, 3)
    with jax.enable_x64(True):
        assert orthogonality_error(function(jnp.asarray(normal(6, 3)))) < 1e-13
    with pytest.raises(ValueError, match="rows >= cols"):
        function(x.T)
    with pytest.raises(ValueError, match=r"x has shape \(3,\)"):
        function(jnp.ones(3))
    with pytest.raises(TypeError, match="complex"):
        function(jnp.ones((3, 2), jnp.complex64))


def oracle_newton_schulz(x, steps, coefficients):
    a, b, c = coefficients
    u, s, vt = np.linalg.svd(np.asarray(x, np.float64), full_matrices=False)
    s = s / np.sqrt(np.sum(s * s, axis=-1, keepdims=True))
    for _ in range(steps):
        s = a * s + b * s**3 + c * s**5
    return (u * s[..., None, :]) @ vt


MUON = (3.4445, -4.7750, 2.0315)


@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (5, 5), (2, 6, 3)])
@pytest.mark.parametrize("steps", [1, 5])
def test_newton_schulz_is_the_polynomial_of_the_singular_values(shape, steps):
    x = normal(*shape)
    np.testing.assert_allclose(
        jax.jit(linalg.newton_schulz, static_argnums=1)(x.astype(np.float32), steps),
        oracle_newton_schulz(x, steps, MUON),
        atol=2e-4,
    )


def test_newton_schulz_options():
    x = normal(4, 6).astype(np.float32)
    cubic = linalg.newton_schulz(x, 40, (1.5, -0.5, 0.0))
    assert orthogonality_error(cubic.T) < 1e-5
    # one triple a step, and the last of them for the rest
    nearest = np.linalg.svd(x, full_matrices=False)
    polar = linalg.newton_schulz(x, 8, linalg.POLAR_EXPRESS, margin=1.02)
    assert np.abs(polar - nearest[0] @ nearest[2]).max() < 0.1
    by_step = linalg.newton_schulz(x, 3, (MUON, (1.5, -0.5, 0.0)), margin=1.1, eps=0.0)
    start = linalg.newton_schulz(x, 1, MUON, margin=1.1, eps=0.0)
    want = linalg.newton_schulz(
        start, 2, (1.5, -0.5, 0.0), margin=1 / np.linalg.norm(start), eps=0.0
    )
    np.testing.assert_allclose(by_step, want, atol=1e-5)
    low = linalg.newton_schulz(x, compute_dtype=jnp.bfloat16)
    full = linalg.newton_schulz(x)
    assert low.dtype == jnp.float32
    assert 1e-4 < np.abs(low - full).max() < 1e-1
    assert np.abs(linalg.newton_schulz(x, eps=1e6)).max() < 0.5 * np.abs(full).max()
    np.testing.assert_array_equal(linalg.newton_schulz(np.zeros((3, 5), np.float32)), 0)
    assert linalg.newton_schulz(jnp.asarray(x, jnp.float16)).dtype == jnp.float32
    with pytest.raises(ValueError, match="steps=0"):
        linalg.newton_schulz(x, steps=0)


def test_newton_schulz_rounds_every_operation_to_a_lower_dtype():
    """As PyTorch does in bfloat16; compiled, in a stack and eagerly alike."""

    def bf16(x):
        return np.asarray(x, np.float32).astype(jnp.bfloat16).astype(np.float32)

    def oracle(x, a, b, c):
        y = bf16(x)
        y = bf16(y / bf16(bf16(np.sqrt(np.sum(np.square(y, dtype=np.float64)))) + 1e-8))
        for _ in range(5):
            gram = bf16(y @ y.T)
            polynomial = bf16(bf16(b * gram) + bf16(c * bf16(gram @ gram)))
            y = bf16(bf16(a * y) + bf16(polynomial @ y))
        return y

    x = normal(3, 4, 6).astype(np.float32)
    expected = np.stack([oracle(matrix, *MUON) for matrix in x])
    function = functools.partial(linalg.newton_schulz, compute_dtype=jnp.bfloat16)
    for run in (function, jax.jit(function), jax.jit(jax.vmap(function))):
        np.testing.assert_array_equal(run(x), expected)


def test_newton_schulz_transforms():
    x = normal(2, 5, 3)
    with jax.enable_x64(True):
        check_grads(
            jax.jit(lambda x: linalg.newton_schulz(x, 2)),
            (jnp.asarray(x),),
            order=1,
            modes=("rev",),
            rtol=1e-5,
        )
    x = x.astype(np.float32)
    eager = linalg.newton_schulz(x)
    np.testing.assert_allclose(jax.jit(linalg.newton_schulz)(x), eager, atol=1e-5)
    np.testing.assert_allclose(jax.jit(jax.vmap(linalg.newton_schulz))(x), eager, atol=1e-5)
