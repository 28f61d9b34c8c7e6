"""The law of the reference: of each matrix of a tree or of a stack the step is the one that
`projection/reference.py` says for one matrix alone."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import pytest

import lowrank_jax as lrx
from lowrank_jax.optim.learning_rate import at_step, decayed_step
from lowrank_jax.projection import reference
from lowrank_jax.projection.batches import count
from lowrank_jax.projection.state import parts_of
from tests.laws import methods as m

STEPS = 3
MATRICES = (("dense", None), ("stack", 1))  # a matrix, and a layer of a stack


def _is_due(slots, view, layer, step, state):
    schedule = slots.refresh_schedule
    if schedule.per_layer:
        return bool(schedule.due(state, step))
    part = schedule.slice(step, slots.phase(view), count(view))
    own = part is not None and part[0] <= (layer or 0) < part[0] + part[1]
    return slots.projector.moves and bool(schedule.due((), step) or own)


def _layer(tree, layer):
    return tree if layer is None else jax.tree.map(lambda x: x[layer], tree)


def _reference(method, name, layer):
    """`(updates, parts of the state)` of the first steps of one matrix."""
    transformation, _, _ = m.program(method)
    slots, recipe = (
        lrx.projection.projection_of(transformation),
        getattr(transformation, "recipe", None),
    )
    state = m.eager(transformation.init, m.params_like())
    whole = m.projection_state(state).matrices[name]["kernel"]
    view = whole.view if layer is None else whole.view.layer()
    state = _layer(parts_of(whole), layer)
    param = _layer(m.params_like()[name]["kernel"], layer)
    refreshes = 0
    for step in range(STEPS):
        inputs = lrx.projectors.RefreshInputs(
            step=jnp.asarray(step),
            refreshes=jnp.asarray(refreshes),
            key=slots.keys(view, step, jnp.asarray(layer or 0)),
            param=view.orient(param),
            learning_rate=None if recipe is None else at_step(recipe.learning_rate, step),
        )
        gradient = view.orient(_layer(m.at(m.gradients(), step)[name]["kernel"], layer))
        is_due = _is_due(slots, whole.view, layer, step, state["refresh_schedule"])
        update, state = reference.step(slots, view, state, gradient, inputs, due=is_due)
        refreshes += bool(is_due)
        update = view.restore(update)
        if recipe is not None:
            decay = (
                at_step(recipe.weight_decay, step) if recipe.mask is None or name == "dense" else 0
            )
            rate = at_step(recipe.learning_rate, step)
            update = decayed_step(update, param, rate, decay, recipe.decay, True)
        param = param + update
        yield update, state


@m.every_method(unless=lambda method: method.name in m.COUPLED)
def test_each_matrix_makes_the_step_of_the_reference(method):
    _, (updates, states) = m.trajectory(method)
    for name, layer in MATRICES:
        with jax.disable_jit():
            found = list(_reference(method, name, layer))
        for step, (update, parts) in enumerate(found):
            own = m.at(m.projection_state(states), step).matrices[name]["kernel"]
            m.assert_close(_layer(parts_of(own), layer), parts, method.tolerance)
            m.assert_close(
                _layer(m.at(updates, step)[name]["kernel"], layer), update, method.tolerance
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class WhenLittleIsSeen(lrx.refresh_schedules.RefreshSchedule):
    """Moves the basis at the step after one that saw less than half of the target."""

    per_layer: ClassVar[bool] = True
    reads: ClassVar[frozenset[str]] = frozenset({"captured"})

    def init(self, batch):
        return jnp.ones(batch, bool)

    def due(self, state, step):
        return state

    def refreshed(self, state, *, step, change=None):
        return jnp.zeros_like(state)

    def advance(self, state, *, step, captured=None):
        return captured < 0.5


ALONE = {
    "clipped": {"clip_norm": 0.5, "target": lrx.targets.error_feedback()},
    "clipped, rest": {"clip_norm": 0.5, "residual": lrx.residuals.sgd()},
    "captured": {"refresh_schedule": WhenLittleIsSeen()},
    "captured after": {"refresh_schedule": WhenLittleIsSeen(when="after")},
}


@pytest.mark.parametrize("name", ALONE)
def test_a_matrix_alone_is_clipped_and_its_schedule_advances(name):
    """What couples leaves, or reads each step, on a tree of one leaf."""
    transformation = lrx.scale_by_projection(lrx.projectors.svd(rank=2), **ALONE[name])
    slots, update = lrx.projection.projection_of(transformation), jax.jit(transformation.update)
    params = {"kernel": jnp.ones((6, 10))}
    state = transformation.init(params)
    view = state.matrices["kernel"].view
    own, dues = parts_of(state.matrices["kernel"]), []
    for step in range(6):
        # one subspace for two steps, then another
        gradient = jax.random.normal(jax.random.key(step // 2), (6, 10)) * (1 + step % 2)
        found, state = update({"kernel": gradient}, state, params)
        dues.append(_is_due(slots, view, None, step, own["refresh_schedule"]))
        inputs = lrx.projectors.RefreshInputs(step=jnp.asarray(step))
        expected, own = reference.step(
            slots, view, own, view.orient(gradient), inputs, due=dues[-1]
        )
        m.assert_close(view.restore(expected), found["kernel"], 1e-5)
        m.assert_close(parts_of(state.matrices["kernel"]), own, 1e-5)
    assert (dues[0] and not all(dues)) or "captured" not in name
