"""A refresh of the matrices of one leaf: the basis moves, and with it what is kept in its terms.

    inputs         = what the projector reads, of the step and of the state
    P_new, memory  = projector.refresh(P, memory, inputs)
    C              = P_newᵀ P                       overlap of both bases
    moments        = transport(moments, C)
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
    config: Projection, view: ResolvedView, trees: Trees, due: Scalar, now: Now, total: int
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
    part = schedule.slice(now.step, config.phase(view), total)
    if part is not None:
        return _by_slice(config, view, trees, due, now, *part)
    if due is True:
        return refreshed(config, view, trees, now)
    stay = movable(config, trees)
    return jax.lax.cond(due, lambda: refreshed(config, view, trees, now), lambda: stay)


def movable(config: Projection, trees: Trees) -> Trees:
    """The part of the state that a refresh may change."""
    moving = {
        "basis": True,
        "memory": True,
        "inner": config.transport.moves,
        "target": config.target.follows_basis,
        "residual": config.residual.follows_basis,
        "refresh_schedule": config.refresh_schedule.per_layer,
    }
    return {name: trees[name] for name, moves in moving.items() if moves}


def refreshed(
    config: Projection, view: ResolvedView, trees: Trees, now: Now, *, starting: bool = False
) -> Trees:
    """The state after a refresh of all matrices in `trees`, or their first one where `starting`.

    A matrix of which a refresh makes no finite basis keeps all that it has.
    """
    inputs = refresh_inputs(config, view, trees, now)
    new = _new_basis(config, view, trees, inputs, now, starting)
    found = _moved_state(config, view, trees | {"new": new["basis"]}, now)
    old, moved = movable(config, trees), movable(config, found | new)
    return where_finite(moved, old, new, axes=len(view.batch))


def refresh_inputs(config: Projection, view: ResolvedView, trees: Trees, now: Now) -> RefreshInputs:
    """What the projector reads, laid out for its refresh."""
    reads = config.projector.reads
    own = {"target": "matrix", "sketch": "sketch", "param": "param", "low": "low"}
    given = {field: trees.get(name) for field, name in own.items() if field in reads}
    if "low" in reads and given["low"] is None and trees.get("matrix") is not None:
        given["low"] = project(config, view, trees)["low"]
    roles = {"target": "rows", "sketch": "sketch", "param": "unsharded"}
    given = laid(config, view, given, roles)
    if "momentum" in reads:
        given |= _momentum(config, view, trees)
    if "key" in reads:
        given["key"] = config.keys(view, now.step, trees["layers"])
    scalars = {name: x for name, x in now._asdict().items() if name in reads}
    return RefreshInputs(**given, **scalars)


@placed(takes={"basis": "basis_at_use"}, gives={"low": "low_at_use low"})
def project(config: Projection, view: ResolvedView, trees: Trees) -> Trees:
    """`R = PᵀK (batch..., r, k)`."""
    return {"low": config.projector.down(view, trees["basis"], trees["matrix"])}


@placed(takes={}, gives={"momentum": "momentum"})
def _momentum(config: Projection, view: ResolvedView, trees: Trees) -> Trees:
    """The debiased first moment `m / (1 - b1^t)`, in the old basis."""
    state = config.inner.decoded(trees["inner"])
    moment, value = inner_lib.first_moment(config.inner, state)
    seen = jnp.maximum(moment.count, 1)[..., None, None]
    return {"momentum": value.astype(jnp.float32) / inner_lib.debias(moment.decay, seen)}


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

    if projector.starts and starting:
        found = first()
    elif projector.starts and not config.starts_before:
        found = jax.lax.cond(now.step == 0, first, again)
    else:
        found = again()
    return dict(zip(("basis", "memory"), found, strict=True))


def start(config: Projection, view: ResolvedView, trees: Trees, begins: Scalar, now: Now) -> Trees:
    """The first refresh, where the first step `begins` and all others come after an update."""
    stay = movable(config, trees)
    return jax.lax.cond(
        begins, lambda: refreshed(config, view, trees, now, starting=True), lambda: stay
    )


@placed(takes={}, gives={"inner": "low"})
def _moved_state(config: Projection, view: ResolvedView, trees: Trees, now: Now) -> Trees:
    """Moments, and what follows the basis, in terms of the new one."""
    projector, transport, schedule = config.projector, config.transport, config.refresh_schedule
    old, new = trees["basis"], trees["new"]
    decoded = {"moments": config.inner.decoded(trees["inner"])}
    before = after = laid(config, view, decoded, {"moments": "mixed"})["moments"]
    change: Any = None
    if transport.moves or config.follows_basis or "change" in schedule.reads:
        change = projector.overlap(view, old, new)
    if transport.moves:
        fresh = config.inner.decoded(fresh_inner(config, view))
        after = like(transport.move(config.inner, before, fresh, change), before)
    found = {"inner": config.inner.encoded(after)}
    if config.follows_basis:
        lifts = (lambda low: projector.up(view, old, low), lambda low: projector.up(view, new, low))
        m = Moved(view, *lifts, change, *_first_moments(config.inner, before, after))
        found["target"] = like(config.target.moved(trees["target"], m), trees["target"])
        found["residual"] = like(config.residual.moved(trees["residual"], m), trees["residual"])
    if schedule.per_layer:
        state = trees["refresh_schedule"]
        cosines = change.cosines if "change" in schedule.reads else None
        moved = schedule.refreshed(state, step=now.step, change=cosines)
        found["refresh_schedule"] = like(moved, state)
    return trees | found


def _first_moments(inner: Any, before: Pytree, after: Pytree) -> tuple[Any, Any, Any]:
    """`(before, after, decay)` of the first moment in float32; Nones without one."""
    firsts = [moment for moment in inner.moments(before) if moment.kind == "first"]
    if len(firsts) != 1 or firsts[0].decay is None:
        return None, None, None
    first, old = inner_lib.first_moment(inner, before)
    _, new = inner_lib.first_moment(inner, after)
    return old.astype(jnp.float32), new.astype(jnp.float32), first.decay


def fresh_inner(config: Projection, view: ResolvedView) -> Pytree:
    """The inner state of a leaf, one for each of its matrices."""
    low_shape = (*view.batch, *config.projector.low_shape(view))
    low = sharding.zeros(low_shape, jnp.float32, config.projector.low_spec(view))
    return config.inner.init_stack(low, view)


def _flat(tree: Pytree, axes: int) -> Pytree:
    """Batch axes as one axis of layers in front."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[axes:]), tree)


def _take(tree: Pytree, start: Scalar, size: int) -> Pytree:
    """The layers `start .. start + size` of flat trees."""
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, size), tree)


def _few(view: ResolvedView, size: int) -> ResolvedView:
    """The view of `size` layers of a flat stack."""
    spec = None if view.spec is None else (None, *view.spec[-2:])
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
    axes, layers = len(view.batch), trees["layers"].reshape(-1)
    size = min(wide, layers.size)
    begin = jnp.minimum(jnp.sum(layers < start), layers.size - size)
    numbers = _take(layers, begin, size)
    fresh = (numbers >= start) & (numbers < start + wide)
    stay = movable(config, trees)

    def some():
        def put(whole, after):
            flat = whole.reshape(-1, *whole.shape[axes:])
            before = _take(flat, begin, size)
            chosen = jnp.where(fresh.reshape(-1, *[1] * (after.ndim - 1)), after, before)
            return jax.lax.dynamic_update_slice_in_dim(flat, chosen, begin, 0).reshape(whole.shape)

        own = _take(_flat(trees, axes), begin, size)
        return jax.tree.map(put, stay, refreshed(config, _few(view, size), own, now))

    branch = jnp.where(now.all_layers, 2, jnp.where(jnp.any(fresh), 1, 0)) * jnp.asarray(
        due, jnp.int32
    )
    return jax.lax.switch(branch, [lambda: stay, some, lambda: refreshed(config, view, trees, now)])


def _by_layer(config: Projection, view: ResolvedView, trees: Trees, due: Scalar, now: Now) -> Trees:
    """One condition for each layer, in a loop: a vmap of it would refresh every layer."""
    axes = len(view.batch)
    flat, few = _flat(trees, axes), _few(view, 1)

    def one(number, moving):
        own = _take(flat, number, 1) | _take(moving, number, 1)
        is_due = own["due"][0] & due
        new = jax.lax.cond(
            is_due, lambda: refreshed(config, few, own, now), lambda: movable(config, own)
        )
        put = lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, number, 0)  # noqa: E731
        return jax.tree.map(put, moving, new)

    stay = movable(config, trees)
    moved = jax.lax.fori_loop(0, count(view), one, movable(config, flat))
    return jax.tree.map(lambda x, old: x.reshape(old.shape), moved, stay)
