"""OwLore against a float64 reference of GaLore on the layers that are drawn; its draws and weights."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_jax as lrx

L, STEPS, PERIOD, REFRESH, RANK, RATE, DECAY = 4, 11, 5, 3, 2, 0.02, 0.1
B1, B2, EPS = 0.9, 0.999, 1e-6
WEIGHTS = (0.4, 0.0, 0.3, 0.3)


class GaLore:
    """Of one matrix, whose shorter side is the first; afresh at a draw."""

    def __init__(self):
        self.t, self.m, self.v = 0, 0.0, 0.0

    def step(self, w, g):
        if self.t % REFRESH == 0:
            self.p = np.linalg.svd(g)[0][:, :RANK]
            # the sign that the library gives: the largest entry of a vector is above zero
            largest = np.argmax(np.abs(self.p), axis=0)
            self.p = self.p * np.sign(self.p[largest, np.arange(RANK)])
        self.t += 1
        low = self.p.T @ g
        self.m, self.v = B1 * self.m + (1 - B1) * low, B2 * self.v + (1 - B2) * low**2
        correction = np.sqrt(1 - B2**self.t) / (1 - B1**self.t)
        w = w - RATE * 0.5 * correction * self.p @ (self.m / (np.sqrt(self.v) + EPS))
        return w * (1 - RATE * DECAY)


@pytest.mark.parametrize("turned", [False, True])
def test_owlore_is_numpys_galore_on_what_is_drawn(turned):
    generator = np.random.default_rng(0)
    flip = (lambda x: np.swapaxes(x, -1, -2)) if turned else (lambda x: x)
    weight = generator.normal(size=(L, 5, 7))
    grads = generator.normal(size=(STEPS, L, 5, 7))
    tx = lrx.owlore(
        RATE, rank=RANK, active=2, period=PERIOD, refresh_every=REFRESH, scale=0.5,
        weights=WEIGHTS, weight_decay=DECAY, views=lrx.Views(stacked=("kernel",)),
    )  # fmt: skip
    params = {"kernel": jnp.asarray(flip(weight), jnp.float32)}
    state, update, want, drawn = tx.init(params), jax.jit(tx.update), weight.copy(), []
    for step, grad in enumerate(grads):
        given = {"kernel": jnp.asarray(flip(grad), jnp.float32)}
        updates, state = update(given, state, params)
        params = optax.apply_updates(params, updates)
        drawn.append([int(x) for x in state.projection.sampler[str(L)]])
        if step % PERIOD == 0:
            own = {layer: GaLore() for layer in drawn[-1]}
        for layer in drawn[-1]:
            want[layer] = own[layer].step(want[layer], grad[layer])
        np.testing.assert_allclose(
            params["kernel"] - flip(weight), flip(want - weight), rtol=1e-3, atol=2e-5
        )
    assert 1 not in np.ravel(drawn)  # whose weight is zero
    assert len({tuple(slots) for slots in drawn}) > 1


def test_layers_are_drawn_by_their_weights():
    """Without replacement: the first of two by weight, the second by weight of those left."""
    weights, draws = np.array([4.0, 2.0, 1.0, 1.0]), 4000
    sampler = lrx.samplers.lisa(active=2, weights=weights)
    draw = jax.jit(jax.vmap(lambda number: sampler.draw(number, L, jax.random.key(0))))
    found = collections.Counter(map(tuple, np.asarray(draw(jnp.arange(draws))).tolist()))
    p = weights / weights.sum()
    for a in range(L):
        for b in range(a + 1, L):
            want = p[a] * p[b] / (1 - p[a]) + p[b] * p[a] / (1 - p[b])
            assert abs(found[a, b] / draws - want) < 4 * np.sqrt(want / draws)


def test_outlier_ratios_are_shares_of_all_entries_of_a_layer():
    generator = np.random.default_rng(1)
    shapes = {"up": (3, 4, 6), "down": (3, 6, 4)}
    kernels = {name: generator.standard_cauchy(size=shape) for name, shape in shapes.items()}
    norms = {name: generator.uniform(1, 2, size=shape[:2]) for name, shape in shapes.items()}
    got = lrx.samplers.outlier_ratios(kernels, norms, threshold=3.0)
    for layer in range(3):
        score = np.concatenate(
            [(np.abs(kernels[n][layer]) * norms[n][layer][:, None]).ravel() for n in shapes]
        )
        np.testing.assert_allclose(got[layer], np.mean(score > 3 * score.mean()), rtol=1e-6)
    assert len(set(np.asarray(got).tolist())) > 1


@pytest.mark.parametrize(
    "weights, message",
    [
        ((1.0, -1.0), r"lisa: weights=\(1.0, -1.0\): give finite numbers"),
        ((1.0, np.nan), "give finite numbers"),
        ((1.0, 0.0, 0.0), "above 0 for 1 layers, and active=2 are drawn"),
        ((1.0, 1.0, 1.0), "weights are of 3 layers, and the tree has matrices of 4"),
    ],
)
def test_weights_that_cannot_be_are_refused(weights, message):
    def made():
        views = lrx.Views(stacked=(".*",))
        tx = lrx.owlore(1e-2, rank=2, active=2, weights=weights, views=views)
        return tx.init({"kernel": jnp.ones((4, 5, 7))})

    with pytest.raises(ValueError, match=message):
        made()


def test_kernels_and_norms_have_the_same_names():
    with pytest.raises(ValueError, match="outlier_ratios: kernels of .'up'. and norms of .'down'."):
        lrx.samplers.outlier_ratios({"up": jnp.ones((1, 2, 3))}, {"down": jnp.ones((1, 2))})
