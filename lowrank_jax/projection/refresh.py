"""A refresh of the matrices of one leaf: the basis moves, and with it what is kept in its terms.

    inputs         = what the projector reads, of the step and of the state
    P_new, memory  = projector.refresh(P, memory, inputs)
    C              = P_newᵀ P                       overlap of both bases
    moments        = transport(moments, C)          and zero in the places of vectors that are zero
    target, rule   = moved(...)                     states that follow the basis

All of it is pure functions of one stack `(batch..., ...)`. Conditions stand here, on scalars, and
what a refresh does not change stays outside of them, so that a normal step does not copy it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_jax import sharding
from lowrank_jax.matrices import ResolvedView
from lowrank_jax.optim import inner as inner_lib
from lowrank_jax.optim.guard import where_finite
from lowrank_jax.projection.batches import count
from lowrank_jax.projection.placement import Trees, laid, like, placed
from lowrank_jax.projection.slots import Projection
from lowrank_jax.projection.state import Now, RefreshInputs
from lowrank_jax.projection.targets import Moved
from lowrank_jax.typing import Pytree, Scalar


def refresh(
    config: Projection,
    view: ResolvedView,
    trees: Trees,
    due: Scalar,
    now: Now,
    total: int,
) -> Trees:
    """What a refresh changes of `trees`, moved where it is due.

    Args:
      config: the slots.
      view: of the leaf, or of a device's own matrices of it.
      trees: the state's parts; "matrix", what is projected; "sketch", "param", "low", "layers" (the
        numbers of the matrices in the leaf) and, of a schedule by layers, "due" `(batch...)`.
      due: without which nothing moves.
      now: where the step stands.
      total: number of matrices in the leaf.
    """
    schedule = config.refresh_schedule
    if schedule.per_layer:
        return _by_layer(config, view, trees, due, now)
    phase = config.phase(view)
    part = schedule.slice(now.step, phase, total)
    if part is not None:
        return _by_slice(config, view, trees, due, now, *part)
    if due is True:
        return refreshed(config, view, trees, now)

    def move():
        return refreshed(config, view, trees, now)

    # what does not move is a constant of the condition, and not copied by it
    stay = movable(config, trees)
    return jax.lax.cond(due, move, lambda: stay)


def start(
    config: Projection,
    view: ResolvedView,
    trees: Trees,
    begins: Scalar,
    now: Now,
) -> Trees:
    """The first refresh, where the first step `begins` and all others come after an update."""

    def first():
        return refreshed(config, view, trees, now, starting=True)

    stay = movable(config, trees)
    return jax.lax.cond(begins, first, lambda: stay)


def movable(config: Projection, trees: Trees) -> Trees:
    """The part of the state that a refresh may change."""
    moving = {
        "basis": True,
        "memory": True,
        "inner": config.transport.moves or config.projector.masks,
        "target": config.target.follows_basis,
        "residual": config.residual.follows_basis,
        "refresh_schedule": config.refresh_schedule.per_layer,
    }
    return {name: trees[name] for name, moves in moving.items() if moves}


def refreshed(
    config: Projection,
    view: ResolvedView,
    trees: Trees,
    now: Now,
    *,
    starting: bool = False,
) -> Trees:
    """The state after a refresh of all matrices in `trees`, or their first one where `starting`.

    A matrix of which a refresh makes no finite basis keeps all that it has.
    """
    inputs = refresh_inputs(config, view, trees, now)
    new = _new_basis(config, view, trees, inputs, now, starting)
    with_both = trees | {"new": new["basis"]}
    found = _moved_state(config, view, with_both, now)

    # judged by basis and memory: what is moved by them is finite with them
    old = movable(config, trees)
    moved = movable(config, found | new)
    axes = len(view.batch)
    return where_finite(moved, old, new, axes)


def refresh_inputs(
    config: Projection,
    view: ResolvedView,
    trees: Trees,
    now: Now,
) -> RefreshInputs:
    """What the projector reads, laid out for its refresh."""
    reads = config.projector.reads
    given: Trees = {}
    for name in ("target", "sketch", "param", "low"):
        if name in reads:
            given[name] = trees.get("matrix" if name == "target" else name)

    # a refresh before the update sees the low-rank object in the basis that it replaces
    has_matrix = trees.get("matrix") is not None
    if "low" in reads and given["low"] is None and has_matrix:
        given["low"] = project(config, view, trees)["low"]
    roles = {"target": "rows", "sketch": "sketch", "param": "unsharded"}
    given = laid(config, view, given, roles)

    if "momentum" in reads:
        given |= _momentum(config, view, trees)
    if "key" in reads:
        layers = trees["layers"]
        given["key"] = config.keys(view, now.step, layers)
    scalars = now._asdict()
    given |= {name: scalars[name] for name in scalars if name in reads}
    return RefreshInputs(**given)


@placed(takes={"basis": "basis_at_use"}, gives={"low": "low_at_use low"})
def project(config: Projection, view: ResolvedView, trees: Trees) -> Trees:
    """`R = PᵀK (batch..., r, k)`."""
    basis, matrix = trees["basis"], trees["matrix"]
    low = config.projector.down(view, basis, matrix)
    return {"low": low}


@placed(takes={}, gives={"momentum": "momentum"})
def _momentum(config: Projection, view: ResolvedView, trees: Trees) -> Trees:
    """The debiased first moment `m / (1 - b1^t)`, in the old basis."""
    state = config.inner.decoded(trees["inner"])
    moment, value = inner_lib.first_moment(config.inner, state)
    # one count for each matrix; before the first step m is zero, whatever divides it
    count_seen = jnp.maximum(moment.count, 1)
    seen = count_seen[..., None, None]
    correction = inner_lib.debias(moment.decay, seen)
    return {"momentum": value.astype(jnp.float32) / correction}


@placed(takes={}, gives={"basis": "basis", "memory": "basis"})
def _new_basis(
    config: Projection,
    view: ResolvedView,
    trees: Trees,
    inputs: RefreshInputs,
    now: Now,
    starting: bool,
) -> Trees:
    """Basis and memory after a refresh, or the first ones."""
    projector = config.projector
    old = (trees["basis"], trees["memory"])

    # placed here, so that what a refresh gathers is gathered at refreshes only
    def again():
        return like(projector.refresh(view, *old, inputs), old)

    def first():
        return like(projector.start(view, inputs), old)

    if not projector.starts:
        found = again()
    elif config.starts_before:
        found = first() if starting else again()
    else:
        found = jax.lax.cond(now.step == 0, first, again)
    return {"basis": found[0], "memory": found[1]}


@placed(takes={}, gives={"inner": "low"})
def _moved_state(
    config: Projection,
    view: ResolvedView,
    trees: Trees,
    now: Now,
) -> Trees:
    """Moments, and what follows the basis, in terms of the new one."""
    projector, transport = config.projector, config.transport
    schedule = config.refresh_schedule
    old, new = trees["basis"], trees["new"]
    # decoded, whatever stores them, and whole along the rank, which a transport mixes
    decoded = {"moments": config.inner.decoded(trees["inner"])}
    roles = {"moments": "mixed"}
    before = laid(config, view, decoded, roles)["moments"]
    after = before

    # C = P_newᵀ P_old, where something asks for it
    reads_change = "change" in schedule.reads
    change: Any = None
    if transport.moves or config.follows_basis or reads_change:
        change = projector.overlap(view, old, new)

    if transport.moves:
        fresh = config.inner.decoded(fresh_inner(config, view))
        after = transport.move(config.inner, before, fresh, change)
        after = like(after, before)
    if projector.masks:
        served = projector.served(view, new)
        after = inner_lib.of_served(config.inner, after, served)
    found = {"inner": config.inner.encoded(after)}

    if config.follows_basis:

        def lift_old(low):
            return projector.up(view, old, low)

        def lift_new(low):
            return projector.up(view, new, low)

        first = _first_moments(config.inner, before, after)
        moved = Moved(view, lift_old, lift_new, change, *first)
        target = config.target.moved(trees["target"], moved)
        found["target"] = like(target, trees["target"])
        residual = config.residual.moved(trees["residual"], moved)
        found["residual"] = like(residual, trees["residual"])

    if schedule.per_layer:
        state = trees["refresh_schedule"]
        cosines = change.cosines if reads_change else None
        later = schedule.refreshed(state, step=now.step, change=cosines)
        found["refresh_schedule"] = like(later, state)
    return trees | found


def _first_moments(inner: Any, before: Pytree, after: Pytree) -> tuple[Any, Any, Any]:
    """`(before, after, decay)` of the first moment in float32; Nones without one."""
    moments = inner.moments(before)
    firsts = [moment for moment in moments if moment.kind == "first"]
    if len(firsts) != 1 or firsts[0].decay is None:
        return None, None, None
    first, old = inner_lib.first_moment(inner, before)
    _, new = inner_lib.first_moment(inner, after)
    old = old.astype(jnp.float32)
    new = new.astype(jnp.float32)
    return old, new, first.decay


def fresh_inner(config: Projection, view: ResolvedView) -> Pytree:
    """The inner state of a leaf, one for each of its matrices."""
    projector = config.projector
    # (batch..., r, k), or (batch..., r, r) of two-sided bases
    shape = (*view.batch, *projector.low_shape(view))
    spec = projector.low_spec(view)
    low = sharding.zeros(shape, jnp.float32, spec)
    return config.inner.init_stack(low, view)


def _flat(tree: Pytree, axes: int) -> Pytree:
    """Batch axes as one axis of layers in front."""

    def one(x):
        matrix = x.shape[axes:]
        return x.reshape(-1, *matrix)

    return jax.tree.map(one, tree)


def _take(tree: Pytree, start: Scalar, size: int) -> Pytree:
    """The layers `start .. start + size` of flat trees."""

    def one(x):
        return jax.lax.dynamic_slice_in_dim(x, start, size)

    return jax.tree.map(one, tree)


def _put(tree: Pytree, new: Pytree, start: Scalar) -> Pytree:
    """The flat trees with `new` as their layers from `start` on."""

    def put(x, y):
        return jax.lax.dynamic_update_slice_in_dim(x, y, start, 0)

    return jax.tree.map(put, tree, new)


def _few(view: ResolvedView, size: int) -> ResolvedView:
    """The view of `size` layers of a flat stack."""
    spec = None
    if view.spec is not None:  # layers of a flat stack lie on no mesh axis
        spec = (None, *view.spec[-2:])
    return dataclasses.replace(view, batch=(size,), spec=spec)


def _by_slice(
    config: Projection,
    view: ResolvedView,
    trees: Trees,
    due: Scalar,
    now: Now,
    start: Scalar,
    wide: int,
) -> Trees:
    """All layers where the schedule is due, else layers `start .. start + wide` of the leaf, of
    which a device may own none.

    Layer numbers ascend, so those that move lie next to each other; what else a clamped slice holds
    stays.
    """
    axes = len(view.batch)
    layers = trees["layers"].reshape(-1)
    size = min(wide, layers.size)

    # the place of the first layer that moves, and which of those behind it do
    before_it = jnp.sum(layers < start)
    begin = jnp.minimum(before_it, layers.size - size)
    numbers = _take(layers, begin, size)
    fresh = (numbers >= start) & (numbers < start + wide)
    stay = movable(config, trees)

    def some():
        own = _take(_flat(trees, axes), begin, size)
        new = refreshed(config, _few(view, size), own, now)

        def put(whole, after):
            flat = _flat(whole, axes)
            before = _take(flat, begin, size)
            ones = (1,) * (after.ndim - 1)
            moves = fresh.reshape(-1, *ones)
            chosen = jnp.where(moves, after, before)
            return _put(flat, chosen, begin).reshape(whole.shape)

        return jax.tree.map(put, stay, new)

    def everything():
        return refreshed(config, view, trees, now)

    # one switch: nothing, the slice, or the whole leaf
    own = jnp.where(jnp.any(fresh), 1, 0)
    branch = jnp.where(now.all_layers, 2, own)
    branch = branch * jnp.asarray(due, jnp.int32)
    branches = [lambda: stay, some, everything]
    return jax.lax.switch(branch, branches)


def _by_layer(
    config: Projection,
    view: ResolvedView,
    trees: Trees,
    due: Scalar,
    now: Now,
) -> Trees:
    """One condition for each layer, in a loop: a vmap of it would refresh every layer."""
    axes = len(view.batch)
    flat, few = _flat(trees, axes), _few(view, 1)

    def one(number, moving):
        # what does not move is read where it lies; what moves travels with the loop
        own = _take(flat, number, 1)
        own |= _take(moving, number, 1)
        is_due = own["due"][0] & due

        def move():
            return refreshed(config, few, own, now)

        def stay():
            return movable(config, own)

        new = jax.lax.cond(is_due, move, stay)
        return _put(moving, new, number)

    def unflat(x, old):
        return x.reshape(old.shape)

    old = movable(config, trees)
    # the batch axes as one, (layers, ...), and back
    start = movable(config, flat)
    layers = count(view)
    moved = jax.lax.fori_loop(0, layers, one, start)
    return jax.tree.map(unflat, moved, old)
