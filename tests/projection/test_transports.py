"""Moment transports against NumPy, on dense and on index bases."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_jax as lrx
from lowrank_jax.projection.transports import DenseChange, IndexChange, SameBasis

ADAM = lrx.inner.adam()
RNG = np.random.default_rng(0)


def _state(count=3, rank=3, kept=5):
    mean, square = RNG.normal(size=(2, rank, kept))
    state = ADAM.init(jnp.zeros((rank, kept)))
    return state._replace(
        count=jnp.int32(count),
        mu=jnp.asarray(mean, jnp.float32),
        nu=jnp.asarray(square**2 + mean**2, jnp.float32),
    )


def _orthogonal(size):
    return np.linalg.qr(RNG.normal(size=(size, size)))[0].astype(np.float32)


TRANSPORTS = [lrx.transports.keep(), lrx.transports.rotate(), lrx.transports.ldadam()]


@pytest.mark.parametrize("transport", TRANSPORTS, ids=lambda t: type(t).__name__)
@pytest.mark.parametrize(
    "change",
    [DenseChange(jnp.eye(3)), DenseChange(jnp.eye(3), jnp.eye(5)), SameBasis(),
     IndexChange.between(jnp.array([0, 3, 7]), jnp.array([0, 3, 7]))],
    ids=["dense", "two-sided", "same", "index"],
)  # fmt: skip
def test_the_same_basis_changes_nothing(transport, change):
    state = _state()
    moved = transport.move(ADAM, state, ADAM.init(state.mu), change)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), moved, state)
    unseen = ADAM.init(state.mu)
    jax.tree.map(
        np.testing.assert_array_equal, transport.move(ADAM, unseen, unseen, change), unseen
    )


def test_reset():
    state = _state()
    fresh = ADAM.init(state.mu)
    jax.tree.map(
        np.testing.assert_array_equal, lrx.transports.reset().move(ADAM, state, fresh, None), fresh
    )
    kept = lrx.transports.reset(count=False).move(ADAM, state, fresh, None)
    assert int(kept.count) == 3
    assert not np.any(kept.mu)
    assert not np.any(kept.nu)


def test_rotate():
    state, c = _state(), _orthogonal(3)
    moved = lrx.transports.rotate().move(ADAM, state, None, DenseChange(jnp.asarray(c)))
    np.testing.assert_allclose(moved.mu, c @ np.asarray(state.mu), atol=1e-5)
    np.testing.assert_allclose(moved.nu, np.abs(c @ np.asarray(state.nu)), atol=1e-5)
    assert int(moved.count) == 3


def test_ldadam():
    state, c = _state(), _orthogonal(3)
    moved = lrx.transports.ldadam().move(ADAM, state, None, DenseChange(jnp.asarray(c)))
    m, v = np.asarray(state.mu, np.float64), np.asarray(state.nu, np.float64)
    mean, square = m / (1 - 0.9**3), v / (1 - 0.999**3)
    expected = (1 - 0.999**3) * np.abs(c**2 @ (square - mean**2) + (c @ mean) ** 2)
    np.testing.assert_allclose(moved.nu, expected, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(moved.mu, c @ m, atol=1e-5)


def test_indices_gather_what_survives():
    low = jnp.arange(6.0).reshape(3, 2)
    change = IndexChange.between(jnp.array([1, 4, 6]), jnp.array([0, 4, 6]))
    np.testing.assert_array_equal(change.apply(low), [[0, 0], [2, 3], [4, 5]])
    old, new = np.eye(8)[:, [1, 4, 6]], np.eye(8)[:, [0, 4, 6]]
    np.testing.assert_array_equal(change.apply(low), new.T @ old @ np.asarray(low))
    np.testing.assert_array_equal(change.apply_squared(low), change.apply(low))


def test_overlap_of_every_projector_is_the_product_of_its_bases():
    view = lrx.explain(lrx.galore(0.1, rank=3), {"kernel": jnp.ones((8, 10))}).projected[0]
    low = jnp.asarray(RNG.normal(size=(3, 10)), jnp.float32)
    keys = jax.random.key(0), jax.random.key(1)
    for projector in (
        lrx.projectors.dct2(rank=3),
        lrx.projectors.columns(rank=3),
        lrx.projectors.random(rank=3),
    ):
        old, new = (projector.init(view, key)[0] for key in keys)
        if not isinstance(projector, lrx.projectors.random):
            old, new = jnp.array([1, 2, 5]), jnp.array([0, 2, 5])
        dense = [
            np.asarray(projector.up(view, basis, jnp.eye(3, 10)))[:, :3] for basis in (old, new)
        ]
        expected = dense[1].T @ dense[0] @ np.asarray(low)
        np.testing.assert_allclose(
            projector.overlap(view, old, new).apply(low), expected, atol=1e-5
        )


def test_an_unregistered_moment_is_an_error_that_names_it():
    factored = lrx.scale_by_projection(
        lrx.projectors.svd(rank=4),
        inner=optax.scale_by_factored_rms(min_dim_size_to_factor=1),
        transport=lrx.transports.rotate(),
    )
    with pytest.raises(
        ValueError, match=r"rotate does not know how to move \.v_row \(factored\).*register_moments"
    ):
        factored.init({"kernel": jnp.ones((8, 10))})
