"""NorMuon against a float64 reference written from its Algorithm 1, in (out, in) layout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_jax as lrx
from tests.projection.oracles.test_dion import drawn, trained
from tests.projection.oracles.test_muon import momentum_steps, orthogonal

STEPS, RATE, DECAY, MU = 6, 0.02, 0.1, 0.8


def normalized(o, v, b2, rms):
    """The orthonormal step with like outputs, and the energies of these."""
    v = b2 * v + (1 - b2) * np.mean(o**2, axis=1)
    d = o / (np.sqrt(v)[:, None] + 1e-8)
    norm = np.linalg.norm(o) if rms is None else rms * np.sqrt(o.size)
    return norm * d / np.linalg.norm(d), v


def normuon(w, grads, nesterov, b2, rms, scale):
    """The weight `(m, n)` after all steps."""
    v = np.zeros(len(w))
    for x in momentum_steps(grads, MU, nesterov):
        d, v = normalized(orthogonal(x), v, b2, rms)
        w = (1 - RATE * DECAY) * w - RATE * scale * d
    return w


FORMS = {
    "paper": ({}, False, 0.95, 0.2, lambda m, n: 1),
    "its code": (
        {"nesterov": True, "rms": None, "scale": lrx.scales.fan_ratio(least=1.0)},
        True,
        0.95,
        None,
        lambda m, n: np.sqrt(max(1, m / n)),
    ),
    "dion's code": (
        {"rms": None, "scale": lrx.scales.fan_ratio(), "neuron_decay": 0.5},
        False,
        0.5,
        None,
        lambda m, n: np.sqrt(m / n),
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(9, 5), (5, 9), (6, 6)])
def test_normuon_is_numpys(shape, form):
    options, nesterov, b2, rms, scale = FORMS[form]
    weight, grads = drawn(*shape), drawn(STEPS, *shape, seed=1)
    # outputs of very different sizes, which the iteration leaves different
    grads = grads * np.logspace(-1, 1, shape[0])[:, None]
    tx = lrx.normuon(RATE, momentum=MU, weight_decay=DECAY, **options)
    got, _ = trained(tx, weight, grads)
    want = normuon(weight, grads, nesterov, b2, rms, scale(*shape))
    np.testing.assert_allclose(got - weight, want - weight, rtol=2e-3, atol=2e-5)


def test_each_matrix_of_a_stack_has_energies_of_its_own():
    weight, grads = drawn(2, 6, 4), drawn(STEPS, 2, 6, 4, seed=1)
    views = lrx.Views(stacked=("kernel",))
    tx = lrx.normuon(RATE, momentum=MU, weight_decay=DECAY, views=views)
    got, state = trained(tx, weight, grads)
    for layer in range(2):
        want = normuon(weight[layer], grads[:, layer], False, 0.95, 0.2, 1)
        np.testing.assert_allclose(got[layer], want, rtol=2e-3, atol=2e-5)
    assert state.projection.matrices["kernel"].residual.shape == (2, 6)


def test_outputs_without_a_gradient_stay():
    """And a matrix without one, as at the first step of a layer that nothing reads."""
    tx = lrx.normuon(RATE, weight_decay=0.0)
    params = {"kernel": jnp.ones((4, 3))}
    grad = jnp.asarray(drawn(4, 3), jnp.float32).at[:, 1].set(0)
    state, update = tx.init(params), jax.jit(tx.update)
    for g in (0 * grad, grad):
        updates, state = update({"kernel": g}, state, params)
        assert jnp.all(jnp.isfinite(updates["kernel"]))
        np.testing.assert_array_equal(updates["kernel"] != 0, g != 0)
    size = np.sqrt(np.mean(np.square(updates["kernel"])))
    np.testing.assert_allclose(size, 0.2 * RATE, rtol=1e-5)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"neuron_decay": 1.0}, r"neuron_normalized: b=1\.0 must be"),
        ({"rms": 0.0}, r"neuron_normalized: rms=0\.0 must be .*None for the norm it had"),
        ({"momentum": 1.0}, r"newton_schulz: momentum=1\.0"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        lrx.normuon(RATE, **options)
    with pytest.raises(ValueError, match=r"neuron_normalized: eps=-1\.0 must be"):
        lrx.residuals.neuron_normalized(eps=-1.0)
