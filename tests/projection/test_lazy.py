"""The lazy schedule against plain Python, and what stands around it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_jax as lrx

PERIOD, STEPS = 2, 40
VIEWS = lrx.Views(stacked=("kernel",))


def due_steps(cosines, queue=3, threshold=0.4, factor=2, period=PERIOD):
    """The steps at which a matrix moves, given the signless cosine of its n-th refresh."""
    kept, found, following = [], [], 0
    for step in range(STEPS):
        if step != following:
            continue
        if found:
            kept = [*kept, cosines(len(found))][-queue:]
        if len(kept) == queue and sum(kept) / queue >= threshold:
            period = int(factor * period)
        found.append(step)
        following = step + period
    return found


def gradients():
    """Of a layer whose leading direction stays up to its sign, and of one whose always changes."""
    still = np.diag([6.0, 5, 4, 3, 2, 1])
    for step in range(STEPS):
        yield np.stack([(-1) ** step * still, np.roll(still, (step, step), axis=(0, 1))])


def test_a_layer_that_stays_moves_ever_less_and_one_that_turns_does_not():
    schedule = lrx.refresh_schedules.lazy(period=PERIOD, queue=3)
    tx = lrx.galore(0.1, rank=2, refresh_schedule=schedule, views=VIEWS)
    params = {"kernel": jnp.ones((2, 6, 6))}
    state, update = tx.init(params), jax.jit(tx.update)
    found = [[], []]
    for step, grad in enumerate(gradients()):
        before = state.projection.matrices["kernel"].refresh_schedule["refreshes"]
        _, state = update({"kernel": jnp.asarray(grad, jnp.float32)}, state, params)
        after = state.projection.matrices["kernel"].refresh_schedule["refreshes"]
        for layer in np.flatnonzero(np.asarray(after != before)):
            found[layer].append(step)
    assert found[0] == due_steps(lambda n: 1.0) == [0, 2, 4, 6, 10, 18, 34]
    assert found[1] == due_steps(lambda n: 0.0) == list(range(0, STEPS, PERIOD))


@pytest.mark.parametrize("factor, threshold", [(1.5, 0.5), (3, 0.55), (1, 0.0)])
def test_the_state_follows_any_cosines(factor, threshold):
    drawn = np.random.default_rng(1).uniform(size=(STEPS, 2)).astype(np.float32)
    options = {"queue": 3, "factor": factor, "threshold": threshold, "period": 3}
    schedule = lrx.refresh_schedules.lazy(**options)
    for layer in range(2):
        state, found = schedule.init(()), []
        for step in range(STEPS):
            if schedule.due(state, step):
                change = jnp.asarray(drawn[len(found)][layer : layer + 1])
                state = schedule.refreshed(state, step=step, change=change)
                found.append(step)
        assert found == due_steps(lambda n: drawn[n][layer], **options)  # noqa: B023


@pytest.mark.parametrize(
    "options, message",
    [
        ({"period": 0}, "period=0"),
        ({"queue": 0}, "lazy: queue=0"),
        ({"factor": 0.5}, "lazy: factor=0.5"),
        ({"threshold": -0.1}, "lazy: threshold=-0.1"),
    ],
)
def test_what_is_out_of_range_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        lrx.refresh_schedules.lazy(**{"period": 2} | options)
