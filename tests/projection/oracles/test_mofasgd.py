"""MoFaSGD against a float64 reference written from its equations, on whole matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_jax as lrx

STEPS, RATE, BETA, DECAY = 6, 0.02, 0.9, 0.1


def mofasgd(w, grads, rank, scale=1.0):
    """The weight after all steps: every momentum is decomposed whole."""
    kept, p, q = 0.0, np.eye(w.shape[0]), np.eye(w.shape[1])
    for g in grads:
        m = BETA * kept + p @ g + g @ q - p @ g @ q  # at first all of g
        u, s, vt = np.linalg.svd(m, full_matrices=False)
        u, v = u[:, :rank], vt[:rank].T
        kept, p, q = (u * s[:rank]) @ v.T, u @ u.T, v @ v.T
        w = (1 - RATE * DECAY) * w - RATE * scale * u @ v.T
    return w


@pytest.mark.parametrize("shape, rank", [((9, 6), 2), ((4, 6), 3)])
def test_mofasgd_is_numpys(shape, rank):
    """Also where twice the rank exceeds the shorter side."""
    generator = np.random.default_rng(0)
    weight, grads = generator.normal(size=shape), generator.normal(size=(STEPS, *shape))
    options = {"rank": rank, "momentum": BETA, "weight_decay": DECAY, "scale": 0.5}
    tx = lrx.mofasgd(RATE, **options)
    params = {"kernel": jnp.asarray(weight, jnp.float32)}
    state, update = tx.init(params), jax.jit(tx.update)
    for grad in grads:
        updates, state = update({"kernel": jnp.asarray(grad, jnp.float32)}, state, params)
        params = optax.apply_updates(params, updates)
    want = mofasgd(weight, grads, rank, 0.5)
    np.testing.assert_allclose(params["kernel"] - weight, want - weight, rtol=1e-3, atol=2e-5)


def test_matrices_of_a_stack_start_by_themselves_and_rounding_has_no_direction():
    inner = lrx.inner.factored_momentum(rank=2)
    generator = np.random.default_rng(1)
    g = jnp.asarray(generator.normal(size=(2, 4, 6)), jnp.float32)
    view = lrx.resolution.resolve(
        {"kernel": g}, lrx.Views(stacked=("kernel",)), rank=lambda *_: 2
    ).projected[0]
    _, _, state = inner.update(g, inner.init(g, view), view=view)
    # one of the two starts again
    state = state._replace(count=jnp.array([0, 1]))
    direction, _, _ = inner.update(2 * g, state, view=view)
    u, _, vt = np.linalg.svd(g[0], full_matrices=False)
    np.testing.assert_allclose(direction[0], u[:, :2] @ vt[:2], atol=1e-5)
    # of a matrix of rank one, and of none
    one = jnp.outer(jnp.arange(1.0, 5.0), jnp.ones(6))
    direction, _, _ = inner.update(one, inner.init(one))
    np.testing.assert_allclose(direction, one / jnp.linalg.norm(one), atol=3e-2)
    assert np.linalg.svd(direction)[1].max() < 1.001
    direction, _, _ = inner.update(0 * one, inner.init(one))
    np.testing.assert_array_equal(direction, 0)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rank": 0}, "factored_momentum: rank=0 must be a positive integer, or a fraction"),
        ({"rank": 1.5}, r"factored_momentum: rank=1\.5 must be"),
        ({"rank": 2, "momentum": 1.0}, r"factored_momentum: momentum=1\.0 must be"),
        ({"rank": 2, "scale": "x"}, "factored_momentum: scale='x' must be"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        lrx.mofasgd(1e-2, **options)
    inner = lrx.inner.factored_momentum(rank=5)
    with pytest.raises(ValueError, match="rank=5 exceeds the shorter side"):
        inner.init(jnp.ones((4, 8)))
    with pytest.raises(ValueError, match="is no matrix"):
        inner.init(jnp.ones(8))
