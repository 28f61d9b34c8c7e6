"""COAP against a float64 reference written from its equations, in (in, out) layout."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_jax as lrx

STEPS, RATE, RANK, EVERY, B1, B2, EPS = 10, 0.02, 3, 2, 0.9, 0.999, 1e-6


def objective(p, m, x):
    """What the basis loses of x, times its distance from the momentum."""
    whole = p @ m
    size = np.linalg.norm(whole, axis=0) * np.linalg.norm(x, axis=0)
    cosine = np.mean(np.sum(whole * x, axis=0) / size)
    return np.mean((p @ p.T @ x - x) ** 2) * (1 - cosine)


def slope(p, m, x, step=1e-6):
    """Its gradient by p, by central differences."""
    found = np.zeros_like(p)
    for at in np.ndindex(p.shape):
        shift = np.zeros_like(p)
        shift[at] = step
        found[at] = (objective(p + shift, m, x) - objective(p - shift, m, x)) / (2 * step)
    return found


def coap(w, grads, first, step_size, recalibrate):
    """The weight `(s, k)`, s the smaller, after all steps, from a first basis."""
    p, m, v = first, np.zeros((RANK, w.shape[1])), np.zeros((RANK, w.shape[1]))
    for t, g in enumerate(grads):
        if t > 0 and t % (EVERY * recalibrate) == 0:
            q = np.linalg.qr(g.T @ p)[0]
            p = np.linalg.svd(g @ q, full_matrices=False)[0]
            p = p * np.sign(p[np.abs(p).argmax(0), np.arange(RANK)])
        elif t > 0 and t % EVERY == 0:
            d = slope(p, m, g)
            p = p - step_size * d * min(1, 1 / np.linalg.norm(d))
        r = p.T @ g
        m, v = B1 * m + (1 - B1) * r, B2 * v + (1 - B2) * r**2
        correction = np.sqrt(1 - B2 ** (t + 1)) / (1 - B1 ** (t + 1))
        w = w - RATE * 0.25 * correction * p @ (m / (np.sqrt(v) + EPS))
        w = w * (1 - RATE * 0.1)
    return w


@pytest.mark.parametrize("shape, size, step", [((5, 8), 1.0, 0.1), ((8, 5), 6.0, 0.3)])
def test_coap_is_numpys_on_both_sides(shape, size, step):
    """Of small gradients, and of large ones, whose steps are clipped."""
    generator = np.random.default_rng(0)
    weight, grads = generator.normal(size=shape), size * generator.normal(size=(STEPS, *shape))
    options = {"refresh_every": EVERY, "step_size": step, "recalibrate_every": 3}
    tx = lrx.coap(RATE, rank=RANK, weight_decay=0.1, **options)
    params = {"kernel": jnp.asarray(weight, jnp.float32)}
    state, update = tx.init(params), jax.jit(tx.update)
    first = None
    for grad in grads:
        updates, state = update({"kernel": jnp.asarray(grad, jnp.float32)}, state, params)
        params = optax.apply_updates(params, updates)
        basis = np.asarray(state.projection.matrices["kernel"].basis, np.float64)
        first = basis if first is None else first
    flip = (lambda x: x) if shape[0] < shape[1] else np.transpose
    # the first basis is drawn: it lies near the leading singular vectors, and is orthonormal
    u = np.linalg.svd(flip(grads[0]))[0][:, :RANK]
    np.testing.assert_allclose(first.T @ first, np.eye(RANK), atol=1e-5)
    assert np.linalg.norm(u.T @ first) ** 2 > 2
    want = flip(coap(flip(weight), [flip(g) for g in grads], first, step, 3))
    np.testing.assert_allclose(params["kernel"] - weight, want - weight, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"step_size": -0.1}, r"correlated: step_size=-0\.1 must be .*at least 0"),
        ({"recalibrate_every": 0}, "correlated: recalibrate_every=0 must be .*at least 1"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        lrx.coap(1e-2, rank=4, **options)
