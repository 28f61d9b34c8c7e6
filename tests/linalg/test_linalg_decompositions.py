"""SVDs, range finder and power step, against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from lowrank_jax import linalg

KEY = jax.random.key(0)
TRUNCATED = jax.jit(linalg.truncated_svd, static_argnames="rank")
RANDOMIZED = jax.jit(
    linalg.randomized_svd, static_argnames=("rank", "oversample", "power_iterations")
)
RANGE = jax.jit(linalg.range_finder, static_argnames=("rank", "power_iterations"))
POWER = jax.jit(linalg.power_step)
OF_PRODUCT = jax.jit(linalg.svd_of_product, static_argnames="rank")


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def with_spectrum(rows, cols, spectrum, seed=0):
    u, v = (np.linalg.qr(normal(n, len(spectrum), seed=seed + n))[0] for n in (rows, cols))
    return ((u * spectrum) @ v.T).astype(np.float32)


def projection_error(basis, x):
    """||x - P P^T x||_F / ||x||_F in float64."""
    basis, x = np.asarray(basis, np.float64), np.asarray(x, np.float64)
    return np.linalg.norm(x - basis @ (np.swapaxes(basis, -1, -2) @ x)) / np.linalg.norm(x)


def largest_entries(basis):
    basis = np.asarray(basis)
    return np.take_along_axis(basis, np.argmax(np.abs(basis), axis=-2, keepdims=True), axis=-2)


def test_canonical_signs_takes_the_first_of_ties_and_leaves_zeros():
    basis = np.array([[1.0, -2.0, 0.0, 3.0], [-4.0, 2.0, 0.0, 1.0]], np.float32)
    np.testing.assert_array_equal(
        linalg.canonical_signs(basis), [[-1.0, 2.0, 0.0, 3.0], [4.0, -2.0, 0.0, 1.0]]
    )
    np.testing.assert_array_equal(
        linalg.canonical_signs(np.stack([basis, -basis]))[1], linalg.canonical_signs(basis)
    )


@pytest.mark.parametrize("shape", [(7, 4), (4, 7), (5, 5), (2, 3, 6, 4)])
def test_truncated_svd_is_numpy_cut_and_sign_canonical(shape):
    x = normal(*shape)
    u, s, vt = TRUNCATED(x.astype(np.float32), rank=3)
    u0, s0, vt0 = (part for part in np.linalg.svd(x, full_matrices=False))
    assert (u.shape, s.shape, vt.shape) == (
        (*shape[:-1], 3),
        (*shape[:-2], 3),
        (*shape[:-2], 3, shape[-1]),
    )
    np.testing.assert_allclose(s, s0[..., :3], atol=1e-5)
    np.testing.assert_allclose(
        (u * s[..., None, :]) @ vt, (u0[..., :3] * s0[..., None, :3]) @ vt0[..., :3, :], atol=1e-4
    )
    assert (largest_entries(u) > 0).all()
    flipped = TRUNCATED(-x.astype(np.float32), rank=3)
    np.testing.assert_allclose(flipped[0], u, atol=1e-5)
    np.testing.assert_allclose(flipped[2], -vt, atol=1e-5)


def test_randomized_svd_recovers_a_decaying_spectrum():
    x = np.stack(
        [
            with_spectrum(30, 20, 2.0 ** -np.arange(12)),
            with_spectrum(30, 20, 3.0 ** -np.arange(12), seed=9),
        ]
    )
    got, want = RANDOMIZED(x, 4, KEY), TRUNCATED(x, 4)
    for a, b, tolerance in zip(got, want, (1e-3, 1e-4, 1e-3), strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, atol=tolerance)


def test_randomized_svd_options_matter_and_full_rank_is_exact():
    x = with_spectrum(32, 48, np.arange(1, 33) ** -0.5)
    best = projection_error(TRUNCATED(x, 5)[0], x)
    errors = [
        projection_error(RANDOMIZED(x, 5, KEY, oversample, iterations)[0], x)
        for oversample, iterations in ((0, 0), (8, 0), (8, 1))
    ]
    assert errors[0] > errors[1] > errors[2] >= best - 1e-6
    assert errors[2] < 1.02 * best
    x = x[:6, :7]
    u, s, vt = RANDOMIZED(x, 6, KEY, power_iterations=0)
    np.testing.assert_allclose((u * s) @ vt, x, atol=1e-6)


def test_range_finder_needs_no_svd_and_its_iterations_help():
    x = with_spectrum(32, 48, np.arange(1, 33) ** -0.5)
    errors = [projection_error(RANGE(x, 5, KEY, iterations), x) for iterations in (0, 3)]
    best = projection_error(TRUNCATED(x, 5)[0], x)
    assert errors[0] > errors[1] >= best - 1e-6
    assert errors[1] < 1.02 * best
    jaxpr = str(jax.make_jaxpr(lambda x: linalg.range_finder(x, 6, KEY))(x))
    assert "svd" not in jaxpr
    assert "eigh" not in jaxpr
    assert "svd" in str(jax.make_jaxpr(lambda x: RANDOMIZED(x, 6, KEY))(x))


@pytest.mark.parametrize(("m", "q", "n"), [(9, 3, 7), (3, 5, 4), (6, 5, 2)])
def test_svd_of_product_is_the_svd_of_the_product_and_never_forms_it(m, q, n):
    a, b = normal(2, m, q, seed=1), normal(2, q, n, seed=2)
    limit = min(m, q, n)
    u, s, vt = OF_PRODUCT(a.astype(np.float32), b.astype(np.float32))
    assert (u.shape, s.shape, vt.shape) == ((2, m, limit), (2, limit), (2, limit, n))
    np.testing.assert_allclose(s, np.linalg.svd(a @ b, compute_uv=False)[:, :limit], atol=2e-5)
    np.testing.assert_allclose((u * s[:, None]) @ vt, a @ b, atol=2e-5)
    np.testing.assert_allclose(
        np.swapaxes(u, 1, 2) @ u, np.broadcast_to(np.eye(limit), (2, limit, limit)), atol=2e-5
    )
    assert (largest_entries(u) > 0).all()
    first = OF_PRODUCT(a[0].astype(np.float32), b[0].astype(np.float32), 1)
    for got, want in zip(first, (u[0, :, :1], s[0, :1], vt[0, :1]), strict=True):
        np.testing.assert_allclose(got, want, atol=2e-5)
    equations = jax.make_jaxpr(linalg.svd_of_product)(a[0], b[0]).eqns
    shapes = {value.aval.shape for equation in equations for value in equation.outvars}
    assert m == limit or n == limit or (m, n) not in shapes


def test_svd_of_a_zero_deficient_and_low_precision_product():
    b = np.outer(np.ones(3), np.arange(5.0)).astype(np.float32)
    for a in (
        np.zeros((6, 3), np.float32),
        np.outer(np.arange(6.0), np.ones(3)).astype(np.float32),
    ):
        u, s, vt = OF_PRODUCT(a, b)
        np.testing.assert_allclose((u * s) @ vt, a @ b, atol=1e-4)
        np.testing.assert_allclose(u.T @ u, np.eye(3), atol=1e-5)
        np.testing.assert_array_equal(s[1:] < 1e-4, True)
    a = jnp.asarray(normal(6, 3), jnp.bfloat16)
    for got, want in zip(OF_PRODUCT(a, b), OF_PRODUCT(a.astype(jnp.float32), b), strict=True):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_svd_of_product_errors():
    with pytest.raises(
        ValueError, match=r"a of shape \(4, 3\) and b of shape \(2, 5\) do not multiply"
    ):
        linalg.svd_of_product(jnp.ones((4, 3)), jnp.ones((2, 5)))
    with pytest.raises(
        ValueError, match=r"rank=4 must lie in \[1, 3\], where 3 is the smallest of m, q and n"
    ):
        linalg.svd_of_product(jnp.ones((4, 3)), jnp.ones((3, 5)), 4)
    with pytest.raises(ValueError, match=r"b has shape \(3,\)"):
        linalg.svd_of_product(jnp.ones((4, 3)), jnp.ones(3))


def test_power_step_formula_and_convergence():
    x, basis = normal(2, 9, 12, seed=1), np.linalg.qr(normal(2, 9, 3, seed=2))[0]
    q, r = np.linalg.qr(x @ (np.swapaxes(x, -1, -2) @ basis))
    want = q * np.sign(np.diagonal(r, axis1=-2, axis2=-1))[:, None, :]
    np.testing.assert_allclose(
        POWER(x.astype(np.float32), basis.astype(np.float32)), want, atol=2e-5
    )
    spectral = with_spectrum(16, 20, 2.0 ** -np.arange(16))
    basis = jnp.asarray(np.linalg.qr(normal(16, 4))[0], jnp.float32)
    for _ in range(8):
        basis = POWER(spectral, basis)
    np.testing.assert_allclose(linalg.canonical_signs(basis), TRUNCATED(spectral, 4)[0], atol=1e-3)


def test_power_step_survives_tiny_and_deficient_inputs():
    x, basis = normal(9, 12).astype(np.float32), np.linalg.qr(normal(9, 3))[0].astype(np.float32)
    np.testing.assert_allclose(POWER(1e-30 * x, basis), POWER(x, basis), atol=1e-4)
    rank_one = np.outer(np.arange(9.0), np.ones(12)).astype(np.float32)
    for deficient in (np.zeros_like(x), rank_one):
        q = POWER(deficient, basis)
        np.testing.assert_allclose(q.T @ q, np.eye(3), atol=1e-4)
    assert projection_error(POWER(rank_one, basis), rank_one) < 1e-5


def test_power_step_gradient():
    with jax.enable_x64(True):
        x, basis = jnp.asarray(normal(5, 6)), jnp.asarray(np.linalg.qr(normal(5, 2))[0])
        check_grads(POWER, (x, basis), order=1, modes=("fwd", "rev"), rtol=1e-5)


FACTORS = {
    "truncated_svd": lambda x: linalg.truncated_svd(x, 2),
    "randomized_svd": lambda x: linalg.randomized_svd(x, 2, KEY, power_iterations=0),
    "range_finder": lambda x: (linalg.range_finder(x, 2, KEY),),
    "power_step": lambda x: (linalg.power_step(x, x[..., :2]),),
}


@pytest.mark.parametrize("name", FACTORS)
def test_zero_deficient_nan_and_low_precision(name):
    function = FACTORS[name]
    jitted = jax.jit(function)
    deficient = np.outer(np.arange(6.0), np.arange(5.0)).astype(np.float32)
    for x in (np.zeros((6, 5), np.float32), deficient):
        basis = np.asarray(jitted(x)[0])
        np.testing.assert_allclose(basis.T @ basis, np.eye(2), atol=1e-4)
        assert all(np.isfinite(part).all() for part in jitted(x))
    assert np.isnan(np.asarray(jitted(np.full((6, 5), np.nan, np.float32))[0])).any()
    low = jnp.asarray(normal(6, 5), jnp.bfloat16)
    for got, want in zip(jitted(low), jitted(low.astype(jnp.float32)), strict=True):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("name", FACTORS)
def test_stack_equals_members_and_vmap(name):
    x, function = normal(2, 6, 5).astype(np.float32), jax.jit(FACTORS[name])
    stacked, mapped = jax.jit(lambda x: (FACTORS[name](x), jax.vmap(FACTORS[name])(x)))(x)
    members = [jnp.stack(parts) for parts in zip(*map(function, x), strict=True)]
    for a, b, c in zip(stacked, mapped, members, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
        np.testing.assert_allclose(a, c, atol=2e-5)
    if name == "truncated_svd":
        for a, b in zip(stacked, FACTORS[name](x), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5)
    shapes = jax.eval_shape(FACTORS[name], jax.ShapeDtypeStruct(x.shape, x.dtype))
    assert [part.shape for part in stacked] == [part.shape for part in shapes]


@pytest.mark.parametrize(
    "function",
    [
        linalg.truncated_svd,
        lambda x, r: linalg.range_finder(x, r, KEY),
        lambda x, r: linalg.randomized_svd(x, r, KEY),
    ],
)
def test_errors_name_the_rank(function):
    x = jnp.ones((4, 6))
    for rank in (0, 5):
        with pytest.raises(ValueError, match=rf"rank={rank} must lie in \[1, 4\]"):
            function(x, rank)
    for rank in (2.0, True):
        with pytest.raises(TypeError, match=f"rank={rank} must be a Python int"):
            function(x, rank)
    with pytest.raises(TypeError, match="static under jit"):
        jax.jit(function)(x, 2)
    with pytest.raises(ValueError, match="x has shape"):
        function(jnp.ones(4), 1)


def test_other_errors():
    x = jnp.ones((4, 6))
    with pytest.raises(ValueError, match="basis has 3 rows and x has 4"):
        linalg.power_step(x, jnp.ones((3, 2)))
    with pytest.raises(ValueError, match="power_iterations=-1"):
        linalg.range_finder(x, 2, KEY, -1)
    with pytest.raises(ValueError, match="oversample=-1"):
        linalg.randomized_svd(x, 2, KEY, -1)
