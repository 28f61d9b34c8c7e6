"""Dion2 against a float64 reference written from its algorithm, in (out, in) layout."""

import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_jax as lrx
from tests.projection.oracles.test_dion import drawn, trained

STEPS, RATE, DECAY, MU = 8, 0.02, 0.1, 0.8
POLAR = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def polar(x, steps=5):
    """Polar Express of the singular values."""
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    s = s / (1.02 * np.linalg.norm(s) + 1e-8)
    for a, b, c in POLAR[:steps]:
        s = a * s + b * s**3 + c * s**5
    return (u * s) @ vt


def dion2(w, grads, fraction, order=1, steps=5, scale=None):
    """The weight `(m, n)` after all steps."""
    m, n = w.shape
    if m > n:
        scale = np.sqrt(m / n) if scale is None else scale
        return dion2(w.T, [g.T for g in grads], fraction, order, steps, scale).T
    scale = np.sqrt(m / n) if scale is None else scale
    momentum = np.zeros_like(w)
    for g in grads:
        momentum = momentum + g
        sizes = np.linalg.norm(momentum, ord=order, axis=1)
        rows = np.argsort(-sizes)[: int(np.ceil(fraction * m))]
        step = polar(momentum[rows], steps)
        momentum[rows] *= MU
        w = (1 - RATE * DECAY) * w
        w[rows] -= RATE * scale * step
    return w


def build(**options):
    return lrx.dion2(RATE, momentum=MU, weight_decay=DECAY, **options)


@pytest.mark.parametrize(
    "shape, options, given",
    [
        ((6, 9), {}, {"fraction": 0.25}),
        ((9, 6), {}, {"fraction": 0.25}),
        ((7, 7), {"rank": 0.5, "select": "l2"}, {"fraction": 0.5, "order": 2}),
        ((9, 5), {"rank": 2, "steps": 3}, {"fraction": 0.4, "steps": 3}),
        ((5, 9), {"scale": 0.3, "rank": 1.0}, {"fraction": 1.0, "scale": 0.3}),
    ],
)
def test_dion2_is_numpys(shape, options, given):
    """Two of six rows by the default quarter: fractions round up."""
    weight, grads = drawn(*shape), drawn(STEPS, *shape, seed=1)
    got, _ = trained(build(**options), weight, grads)
    want = dion2(weight, grads, **given)
    np.testing.assert_allclose(got - weight, want - weight, rtol=2e-3, atol=2e-5)


def test_each_matrix_of_a_stack_selects_its_own_rows():
    weight, grads = drawn(2, 6, 8), drawn(STEPS, 2, 6, 8, seed=1)
    views = lrx.Views(stacked=("kernel",))
    got, state = trained(build(views=views), weight, grads)
    for layer in range(2):
        want = dion2(weight[layer], grads[:, layer], 0.25)
        np.testing.assert_allclose(got[layer], want, rtol=2e-3, atol=2e-5)
    chosen = state.projection.matrices["kernel"].basis
    assert chosen.shape == (2, 2)
    assert np.any(chosen[0] != chosen[1])


def test_a_random_choice_moves_other_rows():
    weight, grads = drawn(8, 12), drawn(1, 8, 12, seed=1)
    moved = []
    for seed in (0, 1, 2):
        tx = lrx.dion2(RATE, select="random", weight_decay=0.0, seed=seed)
        got, state = trained(tx, weight, grads)
        rows = np.flatnonzero(np.any(got != weight.astype(np.float32), axis=1))
        np.testing.assert_array_equal(rows, state.projection.matrices["kernel"].basis)
        moved.append(tuple(rows))
    assert len(set(moved)) > 1


@pytest.mark.parametrize(
    "options, match",
    [
        ({"rank": 7}, r"rank=7 exceeds 4"),
        ({"select": "largest"}, r"columns: select='largest' must be"),
        ({"momentum": 1.0}, r"momentum: mu=1.0"),
        ({"clip_norm": 1.0}, r"clip_norm=1.0: Momentum sums gradients up"),
        ({"rank": 2, "projector": lrx.projectors.dct(rank=2)}, "both fix the rank"),
        ({"inner": "polar"}, "inner"),
    ],
)
def test_what_cannot_be_is_refused(options, match):
    with pytest.raises((ValueError, TypeError), match=match):
        lrx.dion2(RATE, **options).init({"kernel": jnp.ones((4, 6))})
    with pytest.raises(ValueError, match=r"orthogonal: margin=0\.0 must be"):
        lrx.inner.orthogonal(margin=0.0)


def test_another_projector_takes_the_place_of_the_rows():
    tx = lrx.dion2(RATE, projector=lrx.projectors.dct(rank=2))
    assert tx.init({"kernel": jnp.ones((4, 6))}).projection.matrices["kernel"].basis.shape == (2,)
