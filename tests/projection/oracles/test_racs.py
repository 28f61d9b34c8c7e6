"""RACS against a float64 reference written from its Algorithm 1."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_jax as lrx

STEPS, RATE, DECAY = 7, 0.02, 0.1


def racs(w, grads, b, alpha, limiter, iterations):
    """The weight `(m, n)` after all steps."""
    s_t, q_t, phi = np.zeros(w.shape[1]), np.zeros(w.shape[0]), 0.0
    for t, g in enumerate(grads):
        q = np.ones(w.shape[0])
        for _ in range(iterations):
            s = np.diag(g.T @ np.diag(q) @ g) / np.linalg.norm(np.diag(q)) ** 2
            q = np.diag(g @ np.diag(s) @ g.T) / np.linalg.norm(np.diag(s)) ** 2
        s_t, q_t = b * s_t + (1 - b) * s, b * q_t + (1 - b) * q
        scaled = np.diag(q_t**-0.5) @ g @ np.diag(s_t**-0.5)
        eta = limiter / max(np.linalg.norm(scaled) / phi, limiter) if t > 0 and limiter else 1.0
        phi = eta * np.linalg.norm(scaled)
        w = (1 - RATE * DECAY) * w - RATE * eta * alpha * scaled
    return w


@pytest.mark.parametrize(
    "shape, options",
    [
        ((5, 8), {}),
        ((8, 5), {"b": 0.5, "scale": 0.3, "limiter": None, "iterations": 1}),
        ((8, 5), {"b": 0.5, "scale": 0.3, "limiter": 1.2}),
    ],
)
def test_racs_is_numpys(shape, options):
    """Gradients so small that fourth powers of them underflow, and ever larger ones."""
    generator = np.random.default_rng(0)
    sizes = 1e-12 * 1.5 ** np.arange(STEPS)[:, None, None]
    weight, grads = generator.normal(size=shape), sizes * generator.normal(size=(STEPS, *shape))
    tx = lrx.racs(RATE, weight_decay=DECAY, **options)
    params = {"kernel": jnp.asarray(weight, jnp.float32)}
    state, update = tx.init(params), jax.jit(tx.update)
    for grad in grads:
        updates, state = update({"kernel": jnp.asarray(grad, jnp.float32)}, state, params)
        params = optax.apply_updates(params, updates)
    own = {"b": 0.9, "scale": 0.05, "limiter": 1.01, "iterations": 5} | options
    flip = (lambda x: x) if shape[0] < shape[1] else np.transpose
    want = racs(
        flip(weight),
        [flip(g) for g in grads],
        own["b"],
        own["scale"],
        own["limiter"],
        own["iterations"],
    )
    np.testing.assert_allclose(params["kernel"] - weight, flip(want) - weight, rtol=1e-3, atol=2e-5)


def test_rows_that_never_had_a_gradient_stay():
    inner = lrx.inner.row_column_scaled()
    g = jnp.array([[1.0, 2.0, 0.0], [0.0, 0.0, 0.0]])
    for gradient in (0 * g, g):
        direction, _, state = inner.update(gradient, inner.init(g))
        assert jnp.all(jnp.isfinite(direction))
        np.testing.assert_array_equal(direction != 0, gradient != 0)
        assert state.rows[1] == 0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"b": 1.0}, r"row_column_scaled: b=1\.0 must be"),
        ({"iterations": 0}, "row_column_scaled: iterations=0 must be .*at least 1"),
        ({"limiter": 0.5}, r"row_column_scaled: limiter=0\.5 must be .*None for no limit"),
        ({"scale": "x"}, "row_column_scaled: scale='x' must be"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        lrx.racs(1e-2, **options)
    with pytest.raises(ValueError, match="is no matrix"):
        lrx.inner.row_column_scaled().init(jnp.ones(8))
