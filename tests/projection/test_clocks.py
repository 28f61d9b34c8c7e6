"""Clocks against plain Python."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_jax as lrx


@pytest.mark.parametrize(
    "period, phase, first", [(1, 0, True), (4, 0, True), (4, 3, True), (4, 3, False), (3, 7, 0)]
)
def test_every(period, phase, first):
    expected = [t for t in range(20) if t % period == phase % period or (first and t == 0)]
    clock = lrx.refresh_schedules.every(period=period, phase=phase, first=first)
    assert [t for t in range(20) if clock.due((), jnp.int32(t))] == expected
    traced = jax.jit(
        lambda p, f, t: lrx.refresh_schedules.every(period=p, phase=f, first=first).due((), t)
    )
    assert [
        t for t in range(20) if traced(jnp.int32(period), jnp.int32(phase), jnp.int32(t))
    ] == expected


def test_every_step_and_never():
    assert [t for t in range(4) if lrx.refresh_schedules.every_step().due((), jnp.int32(t))] == [
        0,
        1,
        2,
        3,
    ]
    assert [t for t in range(4) if lrx.refresh_schedules.never().due((), jnp.int32(t))] == [0]


@pytest.mark.parametrize("period, layers", [(4, 10), (4, 3), (1, 5), (7, 7), (3, 8)])
def test_staggered_moves_every_layer_once_in_a_period(period, layers):
    clock = lrx.refresh_schedules.staggered(period=period)
    size = clock.layers_per_step(layers)
    assert size == int(np.ceil(layers / period))
    for phase in (0, 5, 2**32 - 1):
        moved = []
        for step in range(period):
            start = int(clock.start(jnp.int32(step), phase, layers))
            assert start == (step + phase) % period * size
            moved += range(start, min(start + size, layers))
        assert sorted(moved) == list(range(layers))


def test_staggered_refreshes_only_its_layers():
    """Of five layers with period 3 each step moves two, or the last one; step 0 moves all."""
    transformation = lrx.scale_by_projection(
        lrx.projectors.svd(rank=2),
        refresh_schedule=lrx.refresh_schedules.staggered(period=3),
        views=lrx.Views(stacked=("kernel",)),
        inner=optax.identity(),
    )
    params = {"kernel": jnp.ones((5, 4, 6))}
    phase = transformation.projection.phase(lrx.explain(transformation, params).projected[0])
    grads = np.random.default_rng(0).normal(size=(7, 5, 4, 6)).astype(np.float32)
    state, bases = transformation.init(params), []
    update = jax.jit(transformation.update)
    for grad in grads:
        _, state = update({"kernel": jnp.asarray(grad)}, state)
        bases.append(np.asarray(state.matrices["kernel"].basis))
    for step in range(1, 7):
        start = (step + phase) % 3 * 2
        moved = np.any(bases[step] != bases[step - 1], axis=(1, 2))
        assert moved.tolist() == [start <= layer < start + 2 for layer in range(5)]
        u = np.linalg.svd(grads[step])[0][..., :2]
        got = bases[step] @ np.swapaxes(bases[step], -1, -2)
        np.testing.assert_allclose(got[moved], (u @ np.swapaxes(u, -1, -2))[moved], atol=1e-4)
    assert np.all(np.any(bases[0] != np.eye(4, 2), axis=(1, 2)))


def test_after_uses_the_old_basis_and_leaves_the_new_one():
    grads = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
    projector = lrx.projectors.columns(rank=1, select="l2")
    best = int(np.argmax(np.sum(grads**2, axis=1)))
    assert best != 0  # the basis of init is row 0
    for when, row in (("before", best), ("after", 0)):
        clock = lrx.refresh_schedules.every_step(when=when)
        transformation = lrx.scale_by_projection(
            projector, refresh_schedule=clock, inner=optax.identity()
        )
        updates, state = transformation.update(
            jnp.asarray(grads), transformation.init(jnp.asarray(grads))
        )
        expected = np.zeros_like(grads)
        expected[row] = grads[row]
        np.testing.assert_allclose(updates, expected)
        assert state.matrices.basis.tolist() == [best]


def test_idle_steps_of_a_staggered_schedule_read_no_full_gradient():
    """What the basis does not see may be infinite there, as between two refreshes of all."""
    transformation = lrx.scale_by_projection(
        lrx.projectors.columns(rank=1, select="l2"),
        refresh_schedule=lrx.refresh_schedules.staggered(period=3),
    )
    params = {"kernel": jnp.ones((4, 6))}
    grads = {"kernel": jnp.ones((4, 6)).at[0].set(2.0)}
    bad = {"kernel": grads["kernel"].at[3, 2].set(jnp.inf)}
    phase = transformation.projection.phase(lrx.explain(transformation, params).projected[0])
    state, update = transformation.init(params), jax.jit(transformation.update)
    _, state = update(grads, state, params)
    for step in range(1, 4):
        _, after = update(bad, state, params)
        assert int(after.skipped) == ((step + phase) % 3 == 0)
        _, state = update(grads, state, params)
