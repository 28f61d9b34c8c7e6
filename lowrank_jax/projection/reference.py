"""The whole step of one matrix, in the order in which the papers have it: read this first.

No mesh, no guard, no stack, no refresh schedule, no fusion; tests compare every method with it. The
matrix is oriented: `G (s, k)`, basis `P (s, r)`, low-rank objects `(r, k)`.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from lowrank_jax.matrices import ResolvedView
from lowrank_jax.optim import inner as inner_lib
from lowrank_jax.optim import scales
from lowrank_jax.projection.residuals import Combine
from lowrank_jax.projection.slots import Projection
from lowrank_jax.projection.state import MatrixState, RefreshInputs
from lowrank_jax.projection.targets import Kept, Moved


def step(
    slots: Projection,
    view: ResolvedView,
    state: MatrixState,
    gradient: jax.Array,
    inputs: RefreshInputs,
    *,
    due: bool,
) -> tuple[jax.Array, MatrixState]:
    """`(update (s, k), state)`: the positive direction of one step.

    Args:
      slots, view, state: of one matrix.
      gradient: `G (s, k)`.
      inputs: what a refresh reads of the step: `step`, `key`, `param`, `learning_rate`, `refreshes`.
      due: whether the basis moves.
    """
    projector, when = slots.projector, slots.refresh_schedule.when
    # K = G, or G and what earlier steps lost of it, or a momentum
    target, left = slots.target.take(state.target, gradient)
    state, inputs = (
        dataclasses.replace(state, target=left),
        dataclasses.replace(inputs, target=target),
    )
    if slots.starts_before and inputs.step == 0:
        state, due = refresh(slots, view, state, inputs), False
    if due and when == "before":
        state = refresh(slots, view, state, inputs)
    # R = PᵀK, and the inner transformation's step d c in its terms
    low = projector.down(view, state.basis, target)
    param = None
    if slots.inner.reads_params:
        param = projector.down(view, state.basis, jnp.asarray(inputs.param))
    direction, scale, inner = slots.inner.update(low, state.inner, view=view, params=param)
    # U = up(alpha c d), and what the residual rule makes of the rest K - up(R)
    lift = lambda low: projector.up(view, state.basis, low)  # noqa: E731
    rest = lambda: projector.rest(view, state.basis, target, low)  # noqa: E731
    rounding = lambda: projector.rounding(view, target)  # noqa: E731
    alpha, scale = scales.factor(slots.scale, view), jnp.asarray(scale)
    update, residual = slots.residual.combine(
        Combine(view, lift, rest, rounding, target, low, direction, scale, alpha, state.residual)
    )
    left = slots.target.kept(state.target, Kept(view, target, low, lift, rest))
    memory = projector.seen(view, state.basis, state.memory, low, target)
    state = dataclasses.replace(state, inner=inner, target=left, residual=residual, memory=memory)
    if due and when == "after":
        state = refresh(slots, view, state, dataclasses.replace(inputs, low=low))
    return update, state


def refresh(
    slots: Projection, view: ResolvedView, state: MatrixState, inputs: RefreshInputs
) -> MatrixState:
    """The basis moves, and with it moments, errors and states that are in its terms."""
    projector, old, before = slots.projector, state.basis, slots.inner.decoded(state.inner)
    target = jnp.asarray(inputs.target)
    if "momentum" in projector.reads:
        first, m = inner_lib.first_moment(slots.inner, before)
        m_hat = m / inner_lib.debias(first.decay, jnp.maximum(first.count, 1))
        inputs = dataclasses.replace(inputs, momentum=m_hat)
    if "low" in projector.reads and inputs.low is None:
        inputs = dataclasses.replace(inputs, low=projector.down(view, old, target))
    if "sketch" in projector.reads:
        contracted = projector.sketch_basis(view, old, state.memory, inputs)
        inputs = dataclasses.replace(inputs, sketch=target @ contracted)
    is_first = projector.starts and inputs.step == 0
    if is_first:
        new, memory = projector.start(view, inputs)
    else:
        new, memory = projector.refresh(view, old, state.memory, inputs)
    change = projector.overlap(view, old, new)
    fresh = slots.inner.decoded(slots.inner.init(jnp.zeros(projector.low_shape(view)), view))
    after = slots.transport.move(slots.inner, before, fresh, change)
    left, residual = state.target, state.residual
    if slots.follows_basis:
        first, m = inner_lib.first_moment(slots.inner, before)
        _, moved = inner_lib.first_moment(slots.inner, after)
        lifts = (lambda low: projector.up(view, old, low), lambda low: projector.up(view, new, low))
        record = Moved(view, *lifts, change, m, moved, first.decay)
        left = slots.target.moved(left, record)
        residual = slots.residual.moved(residual, record)
    schedule, own = slots.refresh_schedule, state.refresh_schedule
    if schedule.per_layer:
        cosines = change.cosines if "change" in schedule.reads else None
        own = schedule.refreshed(own, step=jnp.asarray(inputs.step), change=cosines)
    return dataclasses.replace(
        state,
        refresh_schedule=own,
        basis=new,
        memory=memory,
        inner=slots.inner.encoded(after),
        target=left,
        residual=residual,
    )
