"""Lotus against a float64 reference written from its Algorithm 1, given the bases that are drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_jax as lrx

STEPS, RATE, RANK, GAP, GAMMA, B1, B2, EPS = 24, 0.02, 2, 4, 0.12, 0.9, 0.999, 1e-6


def lotus(w, grads, bases):
    """`(weight (s, k), steps of the switches)`; `bases[t] (s, r)` serves at step t."""
    m, v, switches, is_due = np.zeros((RANK, w.shape[1])), np.zeros((RANK, w.shape[1])), [], True
    for t, (g, p) in enumerate(zip(grads, bases, strict=True)):
        r = p.T @ g
        d = r / np.linalg.norm(r)
        if is_due:
            switches.append(t)
            first, count = d, 1
        count += 1
        is_due = count % GAP == 0 and np.linalg.norm(d - first) / count < GAMMA
        m, v = B1 * m + (1 - B1) * r, B2 * v + (1 - B2) * r**2
        correction = np.sqrt(1 - B2 ** (t + 1)) / (1 - B1 ** (t + 1))
        w = w - RATE * 0.25 * correction * p @ (m / (np.sqrt(v) + EPS))
        w = w * (1 - RATE * 0.1)
    return w, switches


@pytest.mark.parametrize("turned", [False, True])
def test_lotus_is_numpys_and_each_layer_switches_by_itself(turned):
    """One layer's gradient wanders more than the other's; the decision is never a near one."""
    generator = np.random.default_rng(0)
    shape = (2, 10, 6) if turned else (2, 6, 10)
    flip = (lambda x: np.swapaxes(x, -1, -2)) if turned else (lambda x: x)
    weight, fixed = generator.normal(size=shape), generator.normal(size=shape)
    noise = generator.normal(size=(STEPS, *shape)) * np.array([0.1, 0.6])[:, None, None]
    grads = fixed + noise
    tx = lrx.lotus(
        RATE,
        rank=RANK,
        gap=GAP,
        threshold=GAMMA,
        weight_decay=0.1,
        views=lrx.Views(stacked=("kernel",)),
    )
    params = {"kernel": jnp.asarray(weight, jnp.float32)}
    state, update = tx.init(params), jax.jit(tx.update)
    bases = []
    for grad in grads:
        updates, state = update({"kernel": jnp.asarray(grad, jnp.float32)}, state, params)
        params = optax.apply_updates(params, updates)
        bases.append(np.asarray(state.projection.matrices["kernel"].basis, np.float64))
    got, found = np.asarray(params["kernel"]), []
    for layer in range(2):
        own = [basis[layer] for basis in bases]
        want, switches = lotus(flip(weight)[layer], flip(grads)[:, layer], own)
        np.testing.assert_allclose(
            flip(got - weight)[layer], want - flip(weight)[layer], rtol=1e-3, atol=2e-5
        )
        moved = [t for t in range(1, STEPS) if not np.array_equal(own[t], own[t - 1])]
        assert switches == [0, *moved]
        found.append(switches)
        # the first basis lies near the leading directions, and is orthonormal
        np.testing.assert_allclose(own[0].T @ own[0], np.eye(RANK), atol=1e-5)
    assert found[0] == list(range(0, STEPS, GAP - 1)) != found[1]


def test_a_basis_that_moves_after_the_update_counts_from_its_own_first_step():
    schedule = lrx.refresh_schedules.displacement(gap=3, threshold=0.5, when="after")
    state = schedule.init((), (1, 2))
    state = schedule.refreshed(state, step=0)
    for step, low in enumerate(([9.0, 9.0], [0.0, 2.0], [0.0, 3.0], [4.0, 0.0])):
        state = schedule.advance(state, step=step, low=jnp.array([low]))
        if step == 1:  # the first of this basis
            assert state["first"].tolist() == [[0.0, 1.0]]
        assert bool(schedule.due(state, step)) == (step == 2)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"gap": 1}, "displacement: gap=1 must be .*at least 2"),
        ({"threshold": -0.1}, r"displacement: threshold=-0\.1 must be .*at least 0"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        lrx.lotus(1e-2, rank=4, **options)
