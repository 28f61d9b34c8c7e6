"""Dion3 against a float64 reference written from its rule, in (out, in) layout."""

import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_jax as lrx
from tests.projection.oracles.test_dion import drawn, trained
from tests.projection.oracles.test_dion2 import polar
from tests.projection.oracles.test_normuon import normalized

STEPS, RATE, DECAY, MU = 8, 0.02, 0.1, 0.8


def dion3(w, grads, fraction, b2=0.95, order=1, steps=5, scale=None):
    """The weight `(m, n)` after all steps, and the energies."""
    m, n = w.shape
    scale = np.sqrt(m / n) if scale is None else scale
    momentum, v = np.zeros_like(w), np.zeros(m)
    for g in grads:
        momentum = momentum + g
        sizes = np.linalg.norm(momentum, ord=order, axis=1)
        rows = np.argsort(-sizes)[: int(np.ceil(fraction * m))]
        step, v[rows] = normalized(polar(momentum[rows], steps), v[rows], b2, None)
        momentum[rows] *= MU
        w = (1 - RATE * DECAY) * w
        w[rows] -= RATE * scale * step
    return w, v


def build(**options):
    return lrx.dion3(RATE, momentum=MU, weight_decay=DECAY, **options)


@pytest.mark.parametrize(
    "shape, options, given",
    [
        ((6, 9), {}, {"fraction": 0.25}),
        ((9, 6), {}, {"fraction": 0.25}),
        (
            (7, 7),
            {"rank": 0.5, "select": "l2", "neuron_decay": 0.5},
            {"fraction": 0.5, "order": 2, "b2": 0.5},
        ),
        (
            (9, 5),
            {"rank": 6, "steps": 3, "scale": 0.3},
            {"fraction": 0.6, "steps": 3, "scale": 0.3},
        ),
    ],
)
def test_dion3_is_numpys(shape, options, given):
    """Rows are outputs whatever the shape, and may be more than the inputs."""
    weight, grads = drawn(*shape), drawn(STEPS, *shape, seed=1)
    got, state = trained(build(**options), weight, grads)
    want, energies = dion3(weight, grads, **given)
    np.testing.assert_allclose(got - weight, want - weight, rtol=2e-3, atol=2e-5)
    found = state.projection.matrices["kernel"].residual
    np.testing.assert_allclose(found, energies, rtol=2e-3, atol=1e-6)


def test_each_matrix_of_a_stack_selects_its_own_outputs():
    weight, grads = drawn(2, 6, 8), drawn(STEPS, 2, 6, 8, seed=1)
    got, _ = trained(build(views=lrx.Views(stacked=("kernel",))), weight, grads)
    for layer in range(2):
        want, _ = dion3(weight[layer], grads[:, layer], 0.25)
        np.testing.assert_allclose(got[layer], want, rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize(
    "options, match",
    [
        ({"rank": 7}, r"rank=7 exceeds 6"),
        ({"select": "largest"}, r"columns: select='largest' must be"),
        ({"neuron_decay": 1.0}, r"neuron_normalized: b=1\.0 must be"),
        ({"rank": 2, "projector": lrx.projectors.dct(rank=2)}, "both fix the rank"),
    ],
)
def test_what_cannot_be_is_refused(options, match):
    with pytest.raises(ValueError, match=match):
        lrx.dion3(RATE, **options).init({"kernel": jnp.ones((4, 6))})
