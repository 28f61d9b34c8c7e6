"""Q-GaLore against a float64 reference with codes of its own, and its int8 weights."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_jax as lrx
from tests.projection.oracles.codes import dynamic

STEPS, RATE, SCALE, RANK, B1, B2, EPS, DECAY = 14, 0.02, 0.25, 3, 0.9, 0.95, 1e-8, 0.1
QUEUE, THRESHOLD, FACTOR, PERIOD, BLOCK = 2, 0.6, 3, 1, 5


def affine(x):
    """Rows in 16 steps between their ends."""
    low, high = x.min(axis=1, keepdims=True), x.max(axis=1, keepdims=True)
    step = (high - low) / 15
    return low + step * np.round((x - low) / step)


def q_galore(w, grads):
    """The weight `(s, k)` after all steps, and the steps at which the basis moved."""
    p, seen, moved, due, period = None, [], [], 0, PERIOD
    m, v = np.zeros((RANK, w.shape[1])), np.zeros((RANK, w.shape[1]))
    for t, g in enumerate(grads):
        if t == due:
            new = np.linalg.svd(g)[0][:, :RANK]
            new = affine(new * np.sign(new[np.argmax(np.abs(new), axis=0), np.arange(RANK)]))
            seen += [] if p is None else [abs(new[:, 0] @ p[:, 0])]
            if len(seen) >= QUEUE and np.mean(seen[-QUEUE:]) >= THRESHOLD:
                period = int(FACTOR * period)
            p, due = new, t + period
            moved.append(t)
        r = p.T @ g
        m, v = B1 * m + (1 - B1) * r, B2 * v + (1 - B2) * r**2
        unbiased = m / (1 - B1 ** (t + 1)), v / (1 - B2 ** (t + 1))
        w = w - RATE * SCALE * p @ (unbiased[0] / (np.sqrt(unbiased[1]) + EPS))
        w = w - RATE * DECAY * w
        m, v = dynamic(m, BLOCK, signed=True), dynamic(v, BLOCK, signed=False)
    return w, moved


def test_q_galore_is_numpys_with_layers_that_move_apart():
    generator = np.random.default_rng(0)
    weight, noise = generator.normal(size=(2, 6, 10)), generator.normal(size=(STEPS, 2, 6, 10))
    # the first layer keeps its leading direction, up to a sign, and the second has none
    still = np.outer(generator.normal(size=6), generator.normal(size=10))
    signs = (-1.0) ** np.arange(STEPS)
    noise[:, 0] += 3 * signs[:, None, None] * still
    adam = lrx.inner.adam(b1=B1, b2=B2, eps=EPS)
    tx = lrx.q_galore(
        RATE,
        rank=RANK,
        refresh_every=PERIOD,
        queue=QUEUE,
        threshold=THRESHOLD,
        factor=FACTOR,
        weight_decay=DECAY,
        inner=lrx.inner.stored8(inner=adam, minimum=0, block=BLOCK),
        views=lrx.Views(stacked=("kernel",)),
    )
    params = {"kernel": jnp.asarray(weight, jnp.float32)}
    state, update = tx.init(params), jax.jit(tx.update)
    moved = [[], []]
    for t, grad in enumerate(noise):
        before = state.projection.matrices["kernel"].refresh_schedule["refreshes"]
        updates, state = update({"kernel": jnp.asarray(grad, jnp.float32)}, state, params)
        params = optax.apply_updates(params, updates)
        after = state.projection.matrices["kernel"].refresh_schedule["refreshes"]
        for layer in np.flatnonzero(np.asarray(after != before)):
            moved[layer].append(t)
    for layer in range(2):
        want, steps = q_galore(weight[layer], noise[:, layer])
        assert moved[layer] == steps
        got = params["kernel"][layer] - weight[layer]
        np.testing.assert_allclose(got, want - weight[layer], rtol=1e-3, atol=2e-5)
    assert len(moved[0]) < len(moved[1])


def test_weights_in_8_bits_move_by_less_than_a_step_of_their_codes():
    """Their mean moves as that of float32 weights, one of 32 equal entries of a unit vector a step."""
    w = jax.random.normal(jax.random.key(0), (32, 128))
    params, grads = (
        {"kernel": lrx.linalg.quantize_blocks(w, "linear")},
        {"kernel": jnp.ones_like(w)},
    )
    start = params["kernel"].dequantize()
    fused = lrx.fused(lrx.q_galore(4e-4, rank=1, scale=0.5), rounding="stochastic")
    state, step = fused.init(params), jax.jit(fused.step)
    for _ in range(20):
        params, state = step(params, grads, state)
    moved = float(jnp.mean(params["kernel"].dequantize() - start))
    assert params["kernel"].codes.dtype == jnp.int8
    np.testing.assert_allclose(moved, -20 * 4e-4 * 0.5 / np.sqrt(32), rtol=0.3)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"queue": 0}, "lazy: queue=0"),
        ({"threshold": -1.0}, r"lazy: threshold=-1\.0"),
        ({"factor": 0.5}, r"lazy: factor=0\.5"),
        ({"refresh_every": 0}, "period=0"),
        ({"b2": 1.0}, r"b2=1\.0"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        lrx.q_galore(1e-2, rank=4, **options)
