"""Natural GaLore against a float64 reference that inverts whole Fisher matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_jax as lrx

STEPS, RATE, SCALE, RANK, EVERY, DECAY, B1, B2, EPS = 8, 0.02, 0.25, 2, 3, 0.1, 0.9, 0.999, 1e-6


def vectors(x):
    """Leading left singular vectors whose largest entry is positive, and the right ones that belong
    to them."""
    u, _, vt = np.linalg.svd(x)
    u, v = u[:, :RANK], vt.T[:, :RANK]
    signs = np.sign(u[np.argmax(np.abs(u), axis=0), np.arange(RANK)])
    return u * signs, v * signs


def natural_galore(w, grads, history, damping, both):
    """The weight `(s, k)` after all steps, s the smaller."""
    seen, m, v = [], 0.0, 0.0
    for t, g in enumerate(grads):
        if t % EVERY == 0:
            p, q = vectors(g)
            q = q if both else np.eye(g.shape[1])
        r = (p.T @ g @ q).ravel()
        seen = [*seen, r][-history:]
        fisher = damping * np.eye(r.size) + sum(np.outer(x, x) for x in seen)
        natural = np.linalg.solve(fisher, r)
        m, v = B1 * m + (1 - B1) * natural, B2 * v + (1 - B2) * natural**2
        correction = np.sqrt(1 - B2 ** (t + 1)) / (1 - B1 ** (t + 1))
        direction = (correction * m / (np.sqrt(v) + EPS)).reshape(RANK, -1)
        w = (w - RATE * SCALE * p @ direction @ q.T) * (1 - RATE * DECAY)
    return w


@pytest.mark.parametrize("shape", [(4, 6), (6, 4)])
@pytest.mark.parametrize("history, damping, both", [(3, 0.01, False), (2, 1e-3, True)])
def test_natural_galore_is_numpys(shape, history, damping, both):
    generator = np.random.default_rng(0)
    weight, grads = generator.normal(size=shape), 3 * generator.normal(size=(STEPS, *shape))
    tx = lrx.natural_galore(
        RATE,
        rank=RANK,
        refresh_every=EVERY,
        history=history,
        damping=damping,
        weight_decay=DECAY,
        proj_type="full" if both else "std",
    )
    params = {"kernel": jnp.asarray(weight, jnp.float32)}
    state, update = tx.init(params), jax.jit(tx.update)
    for grad in grads:
        updates, state = update({"kernel": jnp.asarray(grad, jnp.float32)}, state, params)
        params = optax.apply_updates(params, updates)
    flip = np.transpose if shape[0] > shape[1] else lambda x: x
    want = flip(natural_galore(flip(weight), [flip(g) for g in grads], history, damping, both))
    np.testing.assert_allclose(params["kernel"] - weight, want - weight, rtol=2e-3, atol=5e-5)


def test_gradients_that_repeat_stay_finite():
    """Twenty equal and large columns, which float32 cannot tell from one."""
    stage = lrx.inner.fisher_preconditioned(inner=optax.identity(), history=20, damping=1e-3)
    g = 1e4 * jax.random.normal(jax.random.key(0), (4, 8))
    state = stage.init(g)
    for _ in range(25):
        direction, _, state = stage.update(g, state)
    want = g / (20 * jnp.sum(g**2))
    assert jnp.linalg.norm(direction - want) < 0.1 * jnp.linalg.norm(want)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"history": 0}, "fisher_preconditioned: history=0 must be .*at least 1"),
        ({"damping": 0.0}, r"fisher_preconditioned: damping=0\.0 must be"),
        ({"proj_type": "both"}, "proj_type='both' must be one of"),
        ({"b2": 1.0}, r"b2=1\.0"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        lrx.natural_galore(1e-2, rank=4, **options)
