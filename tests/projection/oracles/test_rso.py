"""RSO against a float64 reference that trains B of `W + P B` by itself."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_jax as lrx

STEPS, RATE, RANK, EVERY, DECAY = 8, 0.05, 3, 3, 0.1
OWN = {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "scale": 1.0}


def rso(w, grads, bases, b1, b2, eps, scale):
    """The weight `(s, k)` after all steps, s the smaller; `bases` the P `(s, r)` of each step.

    What is trained is B, from zero in every small problem, of `W + P B` with W at its start.
    """
    for begin in range(0, len(grads), EVERY):
        p, start = bases[begin], w
        b = m = v = np.zeros((RANK, w.shape[1]))
        for t, g in enumerate(grads[begin : begin + EVERY], start=1):
            r = p.T @ g
            m, v = b1 * m + (1 - b1) * r, b2 * v + (1 - b2) * r**2
            start = start - RATE * DECAY * (start + p @ b)  # decay is of the whole weight
            b = b - RATE * scale * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
            w = start + p @ b
    return w


@pytest.mark.parametrize(
    "options", [{"kind": "orthonormal"}, {"b1": 0.5, "b2": 0.9, "eps": 1e-2, "scale": 0.5}]
)
@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (2, 6, 10)])
def test_rso_is_numpys(shape, options):
    generator = np.random.default_rng(0)
    weight, grads = generator.normal(size=shape), generator.normal(size=(STEPS, *shape))
    views = lrx.Views(stacked=("kernel",) if len(shape) == 3 else ())
    tx = lrx.rso(RATE, rank=RANK, refresh_every=EVERY, weight_decay=DECAY, views=views, **options)
    params = {"kernel": jnp.asarray(weight, jnp.float32)}
    state, update, bases = tx.init(params), jax.jit(tx.update), []
    for grad in grads:
        matrix = state.projection.matrices["kernel"]
        basis = tx.projection.projector.columns(matrix.view, matrix.basis)
        bases.append(np.asarray(basis, np.float64))
        updates, state = update({"kernel": jnp.asarray(grad, jnp.float32)}, state, params)
        params = optax.apply_updates(params, updates)
    flip = np.transpose if shape[-2] > shape[-1] else lambda x: x
    stack = lambda x: x if len(shape) == 3 else x[None]  # noqa: E731
    numbers = OWN | {name: value for name, value in options.items() if name != "kind"}
    # (layers, steps, ...)
    grads, bases = (stack(np.moveaxis(np.asarray(x), 0, -3)) for x in (grads, bases))
    want = []
    for layer, w in enumerate(stack(weight)):
        after = rso(flip(w), [flip(g) for g in grads[layer]], bases[layer], **numbers)
        want.append(flip(after) - w)
    got = np.asarray(params["kernel"]) - weight
    np.testing.assert_allclose(stack(got), want, rtol=1e-3, atol=5e-5)
    identity = np.eye(RANK)
    is_orthonormal = np.allclose(np.swapaxes(bases, -1, -2) @ bases, identity, atol=1e-5)
    assert is_orthonormal == (options.get("kind") == "orthonormal")
    # every small problem has all of its T steps, and another subspace than the one before
    for first in range(0, STEPS, EVERY):
        same = [np.array_equal(basis, bases[0, first]) for basis in bases[0]]
        assert np.flatnonzero(same).tolist() == list(range(first, min(first + EVERY, STEPS)))


def test_no_step_forms_a_full_gradient():
    assert lrx.projection.gradient_mode(lrx.rso(1e-2, rank=4).projection) == "taps"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"refresh_every": 0}, "period=0"),
        ({"rank": None}, "rank=None"),
        ({"b1": 1.0}, r"b1=1\.0"),
        ({"kind": "uniform"}, "random: kind='uniform' must be one of"),
        ({"refresh_schedule": lrx.refresh_schedules.lazy(period=2)}, "reads cosines"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        lrx.rso(1e-2, **{"rank": 4} | options)
