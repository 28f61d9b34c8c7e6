"""Row selection and spectral statistics, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from lowrank_jax import linalg


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


@pytest.mark.parametrize(("norm", "order"), [("l1", 1), ("l2", 2)])
@pytest.mark.parametrize("shape", [(7, 3), (2, 3, 5, 4)])
def test_scores_and_top_rows(norm, order, shape):
    x = normal(*shape)
    scores = np.linalg.norm(x, ord=order, axis=-1)
    np.testing.assert_allclose(linalg.row_scores(x.astype(np.float32), norm), scores, rtol=1e-5)
    got = jax.jit(lambda x: linalg.top_rows(x, 3, norm))(x.astype(np.float32))
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, np.sort(np.argsort(-scores, axis=-1)[..., :3], axis=-1))


def test_l1_and_l2_choose_differently_and_ties_take_the_first():
    x = np.array([[3.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]], np.float32)
    assert linalg.top_rows(x, 1, "l1").tolist() == [1]
    assert linalg.top_rows(x, 1, "l2").tolist() == [0]
    assert linalg.top_rows(np.zeros((5, 2), np.float32), 3).tolist() == [0, 1, 2]


def test_top_rows_of_nan_are_valid_and_distinct():
    x = np.full((4, 2), np.nan, np.float32)
    assert linalg.top_rows(x, 4).tolist() == [0, 1, 2, 3]


def test_scores_of_bfloat16_are_summed_in_float32():
    x = jnp.full((1, 4096), 0.01, jnp.bfloat16)
    scores = linalg.row_scores(x)
    assert scores.dtype == jnp.float32
    np.testing.assert_allclose(scores, 4096 * np.asarray(x, np.float64)[0, 0], rtol=1e-5)


def test_random_rows_are_uniform_sorted_and_distinct():
    rows = np.asarray(linalg.random_rows(jax.random.key(0), s=6, rank=2, batch=(1500, 2)))
    assert rows.shape == (1500, 2, 2)
    assert rows.dtype == np.int32
    assert (rows[..., 0] < rows[..., 1]).all()
    pairs = np.bincount((rows[..., 0] * 6 + rows[..., 1]).ravel(), minlength=36)
    counts = pairs[pairs > 0]
    assert counts.shape == (15,)
    assert np.abs(counts - 200).max() < 5 * np.sqrt(200)
    np.testing.assert_array_equal(rows, linalg.random_rows(jax.random.key(0), 6, 2, (1500, 2)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32])
def test_gather_and_scatter(dtype):
    x = jnp.asarray(np.arange(2 * 3 * 5 * 2).reshape(2, 3, 5, 2), dtype)
    indices = linalg.random_rows(jax.random.key(1), 5, 3, (2, 3))
    low = linalg.gather_rows(x, indices)
    np.testing.assert_array_equal(
        low, np.take_along_axis(np.asarray(x), np.asarray(indices)[..., None], axis=-2)
    )
    full = jax.jit(lambda low, indices: linalg.scatter_rows(low, indices, 5))(low, indices)
    chosen = (np.asarray(indices)[..., None] == np.arange(5)).any(axis=-2)
    np.testing.assert_array_equal(full, np.where(chosen[..., None], np.asarray(x), 0))
    assert low.dtype == full.dtype == dtype
    shared = jnp.array([0, 4])
    np.testing.assert_array_equal(linalg.gather_rows(x, shared), x[..., np.array([0, 4]), :])
    np.testing.assert_array_equal(
        linalg.scatter_rows(x[..., :2, :], shared, 5)[..., 4, :], x[..., 1, :]
    )


def test_scatter_is_the_transpose_of_gather():
    x, indices = jnp.asarray(normal(2, 5, 3), jnp.float32), jnp.array([[0, 3], [1, 2]])
    low, pullback = jax.vjp(lambda x: linalg.gather_rows(x, indices), x)
    np.testing.assert_array_equal(pullback(low)[0], linalg.scatter_rows(low, indices, 5))
    check_grads(
        lambda low: linalg.scatter_rows(low, indices, 5), (low,), order=1, modes=("rev",), rtol=1e-2
    )


def test_effective_rank():
    s = np.abs(normal(2, 6))
    share = s / s.sum(-1, keepdims=True)
    want = np.exp(-(share * np.log(share)).sum(-1))
    function = jax.jit(linalg.effective_rank)
    np.testing.assert_allclose(function(s.astype(np.float32)), want, rtol=1e-5)
    edges = np.stack([np.ones(6), np.zeros(6)]).astype(np.float32)
    np.testing.assert_allclose(function(edges), [6, 0], rtol=1e-6)
    np.testing.assert_array_equal(function(4 * np.eye(6, dtype=np.float32)[:2]), [1, 1])
    assert jax.eval_shape(linalg.effective_rank, jnp.ones(4, jnp.bfloat16)).dtype == jnp.float32


@pytest.mark.parametrize("energy", [0.3, 0.9, 1.0])
def test_rank_for_energy_is_the_smallest_that_keeps_enough(energy):
    s = -np.sort(-np.abs(normal(2, 3, 6)), axis=-1)
    s[0, 0, 4:] = 0
    want = np.ones((2, 3), int)
    for index in np.ndindex(2, 3):
        squares = s[index] ** 2
        while squares[: want[index]].sum() < energy * squares.sum() * (1 - 1e-12):
            want[index] += 1
    got = jax.jit(linalg.rank_for_energy, static_argnums=1)(s.astype(np.float32), energy)
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(
        linalg.rank_for_energy((1e-30 * s).astype(np.float32), energy), want
    )


def test_rank_for_energy_edges():
    assert linalg.rank_for_energy(jnp.zeros(4), 1.0) == 1
    assert linalg.rank_for_energy(jnp.ones(1), 0.5) == 1
    for energy in (0.0, 1.5):
        with pytest.raises(ValueError, match=rf"energy={energy} must lie in \(0, 1\]"):
            linalg.rank_for_energy(jnp.ones(4), energy)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (2, 5, 5)])
@pytest.mark.parametrize("scale", [1.0, 1e-30])
def test_stable_rank_and_explained_variance(shape, scale):
    x = normal(*shape)
    squares = np.linalg.svd(x, compute_uv=False) ** 2
    low = (scale * x).astype(np.float32)
    np.testing.assert_allclose(
        linalg.stable_rank(low), squares.sum(-1) / squares[..., 0], rtol=1e-4
    )
    basis = np.linalg.svd(x)[0][..., :2].astype(np.float32)
    np.testing.assert_allclose(
        linalg.explained_variance(low, basis), squares[..., :2].sum(-1) / squares.sum(-1), rtol=1e-4
    )


def test_spectral_edges():
    zero, basis = np.zeros((2, 4, 3), np.float32), np.eye(4, dtype=np.float32)[:, :2]
    both = jax.jit(lambda x: (linalg.stable_rank(x), linalg.explained_variance(x, basis)))
    np.testing.assert_array_equal(both(zero), np.zeros((2, 2)))
    assert np.isnan(both(zero * np.nan)).all()
    assert np.isfinite(
        jax.jit(jax.grad(lambda x: linalg.explained_variance(x, basis)))(zero[0])
    ).all()


def test_principal_angles_are_the_cosines():
    angles = np.array([0.1, 0.7, 1.2])
    p, q = np.zeros((6, 3)), np.zeros((6, 3))
    p[:3] = np.eye(3)
    q[:3], q[3:] = np.diag(np.cos(angles)), np.diag(np.sin(angles))
    rotation = np.linalg.qr(normal(6, 6))[0]
    p, q = (rotation @ p).astype(np.float32), (rotation @ q).astype(np.float32)
    np.testing.assert_allclose(linalg.principal_angles(p, q), np.cos(angles), atol=1e-6)
    inside = linalg.principal_angles(np.stack([p, p]), np.stack([p, p])[..., :2])
    np.testing.assert_allclose(inside, np.ones((2, 2)), atol=1e-6)
    assert inside.max() <= 1


def test_errors():
    x = jnp.ones((4, 3))
    with pytest.raises(ValueError, match="norm='l0' is unknown; choose one of 'l1', 'l2'"):
        linalg.row_scores(x, "l0")
    with pytest.raises(
        ValueError, match=r"rank=5 must lie in \[1, 4\], where 4 is the number of rows"
    ):
        linalg.top_rows(x, 5)
    with pytest.raises(ValueError, match="rank=0"):
        linalg.random_rows(jax.random.key(0), 4, 0)
    with pytest.raises(ValueError, match="low has 4 rows but indices names 2"):
        linalg.scatter_rows(x, jnp.arange(2), 8)
    for call in (
        linalg.stable_rank,
        linalg.row_scores,
        lambda x: linalg.gather_rows(x, jnp.arange(2)),
    ):
        with pytest.raises(ValueError, match=r"x has shape \(3,\)"):
            call(jnp.ones(3))
