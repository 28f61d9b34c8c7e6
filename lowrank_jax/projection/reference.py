"""The whole step of one matrix, in the order in which the papers have it: read this first.

No mesh, no guard, no stack, no fusion, no condition; tests compare every method with it. The matrix
is oriented: `G (s, k)`, basis `P (s, r)`, low-rank objects `(r, k)`. A state is a dict of the parts
that `MatrixState` names.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_jax.matrices import ResolvedView
from lowrank_jax.optim import inner as inner_lib
from lowrank_jax.optim import scales
from lowrank_jax.projection.residuals import Combine
from lowrank_jax.projection.slots import Projection
from lowrank_jax.projection.state import RefreshInputs, sketch_of
from lowrank_jax.projection.targets import Kept, Moved
from lowrank_jax.typing import Pytree

State = dict[str, Any]


def step(
    slots: Projection,
    view: ResolvedView,
    state: State,
    gradient: jax.Array,
    inputs: RefreshInputs,
    *,
    due: bool,
) -> tuple[jax.Array, State]:
    """`(update (s, k), state)`: the positive direction of one step.

    Args:
      slots, view, state: of one matrix.
      gradient: `G (s, k)`.
      inputs: what a refresh reads of the step: `step`, `key`, `param`, `learning_rate`, `refreshes`.
      due: whether the basis moves.
    """
    p, when = slots.projector, slots.refresh_schedule.when
    # K = G, or G and what earlier steps lost of it, or a momentum
    whole, target = slots.target.take(state["target"], gradient)
    state, inputs = state | {"target": target}, dataclasses.replace(inputs, target=whole)
    starts = slots.starts_before and inputs.step == 0
    if starts or (due and when == "before"):
        state = refresh(slots, view, state, inputs)
    # R = PᵀK; K and R are clipped by one factor, from the norm of what the step is made of
    basis = state["basis"]
    clip = _clip(slots, whole if slots.keeps_gradient else p.down(view, basis, whole))
    K = clip * whole
    R = clip * p.down(view, basis, whole)
    # the inner transformation's step c d, in the terms of R
    W = p.down(view, basis, jnp.asarray(inputs.param)) if slots.inner.reads_params else None
    d, c, inner = slots.inner.update(R, state["inner"], view=view, params=W)
    # U = up(alpha c d), and what the residual rule makes of the rest K - up(R)
    lift = lambda low: p.up(view, basis, low)  # noqa: E731
    rest = lambda: p.rest(view, basis, K, R)  # noqa: E731
    rounding = lambda: p.rounding(view, K)  # noqa: E731
    alpha = scales.factor(slots.scale, view)
    made = Combine(view, lift, rest, rounding, K, R, d, jnp.asarray(c), alpha, state["residual"])
    update, residual = slots.residual.combine(made)
    target = slots.target.kept(state["target"], Kept(view, K, R, lift, rest))
    memory = p.seen(view, basis, state["memory"], R, K)
    state |= {"inner": inner, "target": target, "residual": residual, "memory": memory}
    if due and not starts and when == "after":
        state = refresh(slots, view, state, inputs)
    return update, state | {"refresh_schedule": _advanced(slots, view, state, R, inputs)}


def refresh(slots: Projection, view: ResolvedView, state: State, inputs: RefreshInputs) -> State:
    """The basis moves, and with it moments, errors and states that are in its terms."""
    p, old, before = slots.projector, state["basis"], slots.inner.decoded(state["inner"])
    inputs = _seen_by(slots, view, state, before, inputs)
    if p.starts and inputs.step == 0:
        new, memory = p.start(view, inputs)
    else:
        new, memory = p.refresh(view, old, state["memory"], inputs)
    # C = P_newᵀ P_old, by which a transport moves the moments
    change = p.overlap(view, old, new)
    fresh = slots.inner.decoded(slots.inner.init(jnp.zeros(p.low_shape(view)), view))
    after = slots.transport.move(slots.inner, before, fresh, change)
    if p.masks:
        after = inner_lib.of_served(slots.inner, after, p.served(view, new))
    state = state | {"basis": new, "memory": memory, "inner": slots.inner.encoded(after)}
    if slots.follows_basis:
        first, m = inner_lib.first_moment(slots.inner, before)
        _, later = inner_lib.first_moment(slots.inner, after)
        lifts = (lambda low: p.up(view, old, low), lambda low: p.up(view, new, low))
        moved = Moved(view, *lifts, change, m, later, first.decay)
        state["target"] = slots.target.moved(state["target"], moved)
        state["residual"] = slots.residual.moved(state["residual"], moved)
    schedule = slots.refresh_schedule
    if schedule.per_layer:
        cosines = change.cosines if "change" in schedule.reads else None
        own, number = state["refresh_schedule"], jnp.asarray(inputs.step)
        state["refresh_schedule"] = schedule.refreshed(own, step=number, change=cosines)
    return state


def _clip(slots: Projection, kept: jax.Array) -> Any:
    """`min(1, clip_norm / |kept|)`; of a tree the norm is that of all its leaves."""
    if slots.clip_norm is None:
        return 1.0
    return jnp.minimum(1.0, slots.clip_norm / jnp.maximum(jnp.linalg.norm(kept), 1e-30))


def _advanced(
    slots: Projection, view: ResolvedView, state: State, low: jax.Array, inputs: RefreshInputs
) -> Pytree:
    """The state of a schedule by layers after the step."""
    schedule, own = slots.refresh_schedule, state["refresh_schedule"]
    if not schedule.per_layer:
        return own
    captured: jax.Array | None = None
    if "captured" in schedule.reads:
        captured = slots.projector.measure(view, state["basis"], jnp.asarray(inputs.target))
    read = {"low": low} if "low" in schedule.reads else {}
    return schedule.advance(own, step=jnp.asarray(inputs.step), captured=captured, **read)


def _seen_by(
    slots: Projection, view: ResolvedView, state: State, inner: Pytree, inputs: RefreshInputs
) -> RefreshInputs:
    """The inputs with what the projector reads of the matrix and of its state before the refresh."""
    p, basis, found = slots.projector, state["basis"], inputs
    target = jnp.asarray(inputs.target)
    if "low" in p.reads:
        found = dataclasses.replace(found, low=p.down(view, basis, target))
    if "momentum" in p.reads:
        first, m = inner_lib.first_moment(slots.inner, inner)
        unbiased = m / inner_lib.debias(first.decay, jnp.maximum(first.count, 1))
        found = dataclasses.replace(found, momentum=unbiased)
    if "sketch" in p.reads:
        contracted = p.sketch_basis(view, basis, state["memory"], found)
        found = dataclasses.replace(found, sketch=sketch_of(target, contracted))
    return found
