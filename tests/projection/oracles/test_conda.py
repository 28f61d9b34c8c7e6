"""Conda against a float64 reference written from its algorithm, in (in, out) layout."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_jax as lrx

STEPS, RATE, EVERY, B2, EPS, DECAY = 8, 0.02, 3, 0.99, 1e-8, 0.1


def conda(w, grads, b1=0.9, scale=0.25):
    """The weight `(s, k)`, s the smaller, after all steps: the momentum lies as the gradients do."""
    m, v = np.zeros_like(w), np.zeros_like(w)
    for t, g in enumerate(grads):
        m = b1 * m + (1 - b1) * g
        if t % EVERY == 0:
            p = np.linalg.svd(m)[0]
        v = B2 * v + (1 - B2) * (p.T @ g) ** 2
        correction = np.sqrt(1 - B2 ** (t + 1)) / (1 - b1 ** (t + 1))
        w = w - RATE * scale * correction * p @ (p.T @ m / (np.sqrt(v) + EPS))
        w = w - RATE * DECAY * w
    return w


@pytest.mark.parametrize("shape, options", [((4, 7), {}), ((7, 4), {"b1": 0.6, "scale": 0.5})])
def test_conda_is_numpys_on_both_sides(shape, options):
    generator = np.random.default_rng(0)
    weight, grads = generator.normal(size=shape), generator.normal(size=(STEPS, *shape))
    tx = lrx.conda(RATE, refresh_every=EVERY, weight_decay=DECAY, **options)
    params = {"kernel": jnp.asarray(weight, jnp.float32)}
    state, update = tx.init(params), jax.jit(tx.update)
    for grad in grads:
        updates, state = update({"kernel": jnp.asarray(grad, jnp.float32)}, state, params)
        params = optax.apply_updates(params, updates)
    flip = (lambda x: x) if shape[0] < shape[1] else np.transpose
    want = flip(conda(flip(weight), [flip(g) for g in grads], **options))
    np.testing.assert_allclose(params["kernel"] - weight, want - weight, rtol=1e-3, atol=2e-5)


def test_a_decay_of_the_momentum_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"svd: momentum=1\.0 must be .*None for the gradient"):
        lrx.projectors.svd(rank=4, momentum=1.0)
    svd = lrx.projectors.svd(rank=4, momentum=0.9)
    tx = lrx.scale_by_projection(svd, inner=optax.scale_by_rms())
    with pytest.raises(ValueError, match="0 registered first moments"):
        tx.init({"kernel": jnp.ones((8, 12))})
