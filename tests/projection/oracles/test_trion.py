"""Trion against a float64 reference written from its rule with SciPy's DCT, in (out, in) layout."""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.fft

import lowrank_jax as lrx
from tests.projection.oracles.test_dion import drawn, trained
from tests.projection.oracles.test_muon import orthogonal

STEPS, RATE, DECAY, RANK, MU = 9, 0.02, 0.1, 3, 0.8

SCALES = {
    "kj": (lrx.scales.fan_ratio(least=1.0), lambda m, n: np.sqrt(max(1, m / n))),
    "kimi": (lrx.scales.rms(0.2), lambda m, n: 0.2 * np.sqrt(max(m, n))),
    "dion": (lrx.scales.fan_ratio(), lambda m, n: np.sqrt(m / n)),
    "none": (1.0, lambda m, n: 1.0),
}


def trion(w, grads, factor, kind=None):
    """The weight after all steps; the official vectors where no kind is given."""
    m, n = w.shape
    right = m >= n
    matrix = scipy.fft.dct(np.eye(min(m, n)), type=2, norm="ortho", axis=0)  # rows: DCT-II
    columns = right if kind is None else kind == 3
    basis = matrix if columns else matrix.T  # vectors as columns
    momentum = np.zeros_like(w)
    for g in grads:
        momentum = momentum + g
        seen = momentum @ basis if right else basis.T @ momentum
        chosen = np.argsort(-np.abs(seen).sum(0 if right else 1))[:RANK]
        p = basis[:, chosen]
        if right:
            low = momentum @ p
            momentum = momentum - (1 - MU) * low @ p.T
            step = orthogonal(low) @ p.T
        else:
            low = p.T @ momentum
            momentum = momentum - (1 - MU) * p @ low
            step = p @ orthogonal(low)
        w = (1 - RATE * DECAY) * w - RATE * factor(m, n) * step
    return w


def build(**options):
    return lrx.trion(RATE, rank=RANK, momentum=MU, weight_decay=DECAY, **options)


@pytest.mark.parametrize(
    "shape, scale, kind",
    [
        ((12, 7), "kj", None),
        ((7, 12), "kj", None),
        ((9, 9), "kimi", None),
        ((7, 12), "dion", 3),
        ((12, 7), "none", 2),
    ],
)
def test_trion_is_numpys(shape, scale, kind):
    given, factor = SCALES[scale]
    weight, grads = drawn(*shape), drawn(STEPS, *shape, seed=4)
    options = {} if kind is None else {"kind": kind}
    got, _ = trained(build(scale=given, **options), weight, grads)
    want = trion(weight, grads, factor, kind)
    np.testing.assert_allclose(got - weight, want - weight, rtol=2e-3, atol=5e-5)


def test_leaves_that_are_no_matrices_take_adamw_at_their_own_rate():
    params = {"kernel": jnp.ones((6, 5)), "bias": jnp.ones(5)}
    tx = build(plain_learning_rate=3e-4)
    updates, _ = tx.update(params, tx.init(params), params)
    # the first step of Adam is the sign
    np.testing.assert_allclose(updates["bias"], -3e-4 * (1 + DECAY), rtol=1e-5)


@pytest.mark.parametrize("kind", [1, (3,), (3, 4), "3"])
def test_a_kind_is_two_or_three_or_a_pair(kind):
    with pytest.raises(ValueError, match=r"dct: kind=.* must be the number 2 or 3, or a pair"):
        build(kind=kind)
