"""Dion against a float64 reference written from its algorithm, in (out, in) layout."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_jax as lrx

STEPS, RATE, DECAY, RANK, MU, EPS = 9, 0.02, 0.1, 3, 0.8, 1e-8


def dion(w, grads, q):
    """The weight `(m, n)` after all steps, from `Q_0 (n, r)`."""
    m, n = w.shape
    momentum = np.zeros_like(w)
    for g in grads:
        momentum = momentum + g
        p, _ = np.linalg.qr(momentum @ q)
        r = momentum.T @ p
        momentum = momentum - (1 - MU) * p @ r.T
        q = r / (np.linalg.norm(r, axis=0) + EPS)
        w = (1 - RATE * DECAY) * w - RATE * np.sqrt(m / n) * p @ q.T
    return w


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def trained(tx, weight, grads):
    """The kernel `(..., n, m)` after all steps, transposed."""
    back = lambda x: jnp.asarray(np.swapaxes(x, -1, -2), jnp.float32)  # noqa: E731
    params = {"kernel": back(weight)}
    state, update = tx.init(params), jax.jit(tx.update)
    for grad in grads:
        updates, state = update({"kernel": back(grad)}, state, params)
        params = optax.apply_updates(params, updates)
    return np.swapaxes(np.asarray(params["kernel"]), -1, -2), state


def build(**options):
    return lrx.dion(RATE, momentum=MU, weight_decay=DECAY, eps=EPS, **options)


@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (9, 9)])
def test_dion_is_numpys(shape):
    weight, grads, first = drawn(*shape), drawn(STEPS, *shape), drawn(shape[1], RANK, seed=1)
    got, _ = trained(build(rank=RANK, first=first), weight, grads)
    want = dion(weight, grads, first)
    np.testing.assert_allclose(got - weight, want - weight, rtol=2e-3, atol=2e-5)


def test_each_matrix_of_a_stack_has_its_own_start():
    weight, grads, first = drawn(2, 6, 5), drawn(STEPS, 2, 6, 5), drawn(2, 5, RANK, seed=1)
    views = lrx.Views(stacked=("kernel",))
    got, state = trained(build(rank=RANK, first=(("ker.*", first),), views=views), weight, grads)
    for layer in range(2):
        want = dion(weight[layer], grads[:, layer], first[layer])
        np.testing.assert_allclose(got[layer], want, rtol=2e-3, atol=2e-5)
    unit = np.linalg.norm(state.projection.matrices["kernel"].memory, axis=-2)
    np.testing.assert_allclose(unit, 1, rtol=1e-5)


def test_a_zero_gradient_neither_moves_nor_blocks():
    """Of a zero momentum Q is zero, and the next gradient still finds directions."""
    shape = (6, 4)
    grads = np.concatenate([np.zeros((2, *shape)), drawn(1, *shape)])
    tx = lrx.dion(RATE, rank=4, weight_decay=0.0)
    params = {"kernel": jnp.zeros(shape[::-1])}
    state, moved = tx.init(params), []
    for grad in grads:
        updates, state = tx.update({"kernel": jnp.asarray(grad.T, jnp.float32)}, state, params)
        moved.append(float(jnp.linalg.norm(updates["kernel"])))
    assert moved[:2] == [0, 0]
    # P has 4 orthonormal columns and Q 4 unit columns, so |P Qᵀ| = 2
    np.testing.assert_allclose(moved[2], RATE * np.sqrt(6 / 4) * 2, rtol=1e-4)


@pytest.mark.parametrize(
    "options, match",
    [
        ({"rank": 2, "first": np.ones((3, 2))}, r"dion: first: .*\(3, 2\) is not for 'kernel'; give \(4, 2\)$"),
        ({"rank": 2, "first": (("other", np.ones((4, 2))),)}, r"dion: first: no pattern matches 'kernel'"),
        ({"rank": 5}, r"rank=5 exceeds 4, the kept dimension of 'kernel'"),
        ({"rank": 2, "clip_norm": 1.0}, r"clip_norm=1.0: Momentum sums gradients up"),
        ({"rank": 2, "eps": -1.0}, r"dion: eps=-1.0"),
        ({"rank": 2, "momentum": 1.0}, r"momentum: mu=1.0"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(options, match):
    with pytest.raises(ValueError, match=match):
        lrx.dion(RATE, **options).init({"kernel": jnp.ones((4, 6))})
