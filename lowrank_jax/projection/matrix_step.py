"""One projected leaf on its way through an update: refresh, project, finish."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from lowrank_jax import sharding
from lowrank_jax.matrices import ResolvedView
from lowrank_jax.projection import inner as inner_lib
from lowrank_jax.projection.clocks import Staggered
from lowrank_jax.projection.projectors.base import count
from lowrank_jax.projection.state import Evidence, MatrixState

if TYPE_CHECKING:
    from lowrank_jax.projection.transformation import Projection


def each(function: Callable, batch: tuple[int, ...]) -> Callable:
    """`function` of one matrix, vmapped over the batch axes."""
    for _ in batch:
        function = jax.vmap(function)
    return function


def energy(x: jax.Array) -> jax.Array:
    """Sum of squares in float32."""
    return jnp.sum(jnp.square(x.astype(jnp.float32)))


def all_finite(arrays: list[jax.Array]) -> jax.Array:
    """Scalar: every array is finite, and its sum of squares too."""
    return jnp.isfinite(sum((energy(x) for x in arrays), jnp.zeros(())))


def select(ok: jax.Array, new: Any, old: Any) -> Any:
    """`new` where ok, else `old`, leaf by leaf."""
    return jax.tree.map(lambda a, b: jnp.where(ok, a, b), new, old)


def layer_numbers(view: ResolvedView) -> jax.Array:
    """`0 .. L-1` in the shape of the batch axes; () for a single matrix."""
    return jnp.arange(count(view), dtype=jnp.int32).reshape(view.batch)


def on_own_matrices(function: Callable, config: Projection, view: ResolvedView, trees: Any, *shared: Any) -> Any:
    """`function(config, view, trees, *shared)`, on each device's own matrices where a batch axis is sharded.

    The leaves of `trees` and of the result have the batch axes in front. There the view's batch is the local one, and
    every array that the function uses must come through its arguments: `shared`, or numbers inside `config`.
    """
    axes, whole = len(view.batch), view.spec or ()
    if not sharding.batch_axes(whole, axes):
        return function(config, view, trees, *shared)
    leaves, treedef = jax.tree.flatten((_numbers(config), shared))
    arrays = [isinstance(leaf, jax.Array) for leaf in leaves]

    def own(trees, traced):
        traced = iter(traced)
        filled = [next(traced) if array else leaf for leaf, array in zip(leaves, arrays, strict=True)]
        numbers, shared = jax.tree.unflatten(treedef, filled)
        spec = (*[None] * axes, *whole[axes:])
        local = dataclasses.replace(
            view, batch=jax.tree.leaves(trees)[0].shape[:axes], spec=spec if any(spec) else None
        )
        return function(_with_numbers(config, iter(numbers)), local, trees, *shared)

    traced = [leaf for leaf, array in zip(leaves, arrays, strict=True) if array]
    return sharding.over_batch(own, whole, axes)(trees, traced)


def _numbers(config: Any) -> list[jax.Array]:
    """The scalar arrays in the fields of nested dataclasses: hyper-parameters that somebody injected."""
    if isinstance(config, jax.Array):
        return [config] if config.ndim == 0 else []
    if not dataclasses.is_dataclass(config):
        return []
    return [x for field in dataclasses.fields(config) for x in _numbers(getattr(config, field.name))]


def _with_numbers(config: Any, numbers: Iterator[jax.Array]) -> Any:
    """`config` with its scalar arrays replaced, in the order of `_numbers`."""
    if isinstance(config, jax.Array):
        return next(numbers) if config.ndim == 0 else config
    if not _numbers(config):
        return config
    new = {field.name: _with_numbers(getattr(config, field.name), numbers) for field in dataclasses.fields(config)}
    return dataclasses.replace(config, **new)


class MatrixStep:
    """A mutable record of one leaf's update, so that `Projection.update` reads as the steps of the method.

    Attributes:
      target: `(batch..., s, k)` float32, what is projected.
      low: `(batch..., r, k)`, after `project`.
      basis, inner, residual: the state so far.
    """

    def __init__(self, config: Projection, view: ResolvedView, state: MatrixState, grad: jax.Array, param):
        self.config, self.view, self.old, self.param = config, view, state, param
        self.target, self.residual = config.residual.target(state.residual, grad.astype(jnp.float32))
        self.basis, self.inner = state.basis, state.inner

    def refresh(self, due: Any, step: jax.Array) -> None:
        """Moves basis, moments and residual where `due`: one `cond` on an unbatched scalar.

        What a refresh does not change stays outside the condition, so that a normal step does not copy it.
        """
        if due is False:
            return
        state = {"basis": self.basis, "inner": self.inner, "residual": self.residual}
        seen = {"target": self.target, "param": self.param, "layers": layer_numbers(self.view)}
        state |= on_own_matrices(_refresh, self.config, self.view, state | seen, due, step, count(self.view))
        self.basis, self.inner, self.residual = state["basis"], state["inner"], state["residual"]

    def project(self) -> None:
        def down(config, view, trees):
            return config.projector.down(view, trees["basis"], trees["x"])

        self.low = on_own_matrices(down, self.config, self.view, {"x": self.target, "basis": self.basis})

    @property
    def kept(self) -> jax.Array:
        """What the step keeps of the gradient: all of it where the residual rule reads it, else its projection."""
        return self.target if self.config.residual.sees_gradient else self.low

    def finish(self, factor: jax.Array | None, ok: jax.Array | None, extra: dict[str, Any]) -> jax.Array:
        """The oriented update; leaves the new inner and residual states in place, or the old ones where not ok."""
        arrays = {"low": self.low, "target": self.target, "param": self.param, "old": self.old.inner,
                  "old_residual": self.old.residual, "basis": self.basis, "inner": self.inner,
                  "residual": self.residual}  # fmt: skip
        update, self.inner, self.residual = on_own_matrices(_finish, self.config, self.view, arrays, factor, ok, extra)
        return update

    def state(self) -> MatrixState:
        return MatrixState(self.basis, self.inner, self.residual, self.old.view)


def _refresh(config: Projection, view: ResolvedView, trees: Any, due: Any, step: jax.Array, total: int) -> Any:
    stay = _movable(config, trees)
    if isinstance(config.clock, Staggered):
        return _refresh_staggered(config, view, trees, due, step, total)
    if due is True:
        return _refreshed(config, view, trees, step)
    return jax.lax.cond(due, lambda: _refreshed(config, view, trees, step), lambda: stay)


def _movable(config: Projection, trees: dict[str, Any]) -> dict[str, Any]:
    """The part of the state that a refresh may change."""
    moving = {"basis": True, "inner": config.transport.moves, "residual": config.residual.follows_basis}
    return {name: trees[name] for name, moves in moving.items() if moves}


def _refreshed(config: Projection, view: ResolvedView, trees: dict[str, Any], step: jax.Array) -> dict[str, Any]:
    """The state after a refresh of all matrices in `trees`."""
    needs, basis, inner, whole = config.projector.needs, trees["basis"], trees["inner"], sharding.whole_spec(view.spec)
    evidence = Evidence(
        grad=sharding.reshard(trees["target"], whole) if "grad" in needs else None,
        param=sharding.reshard(trees["param"], whole) if "param" in needs else None,
        moments=_debiased(config, inner, whole) if "moments" in needs else None,
        step=step,
        key=config.keys(view, step, trees["layers"]),
    )
    new = jax.tree.map(sharding.like, config.projector.refresh(view, basis, evidence), basis)
    after, residual = inner, trees["residual"]
    if config.transport.moves:
        change = config.projector.overlap(view, basis, new)
        after = config.transport(config.inner, inner, config.fresh_inner(view), change)
        after = jax.tree.map(sharding.like, after, inner)
    if config.residual.follows_basis:
        moved = config.residual.moved(config.projector, view, basis, new, config.inner, inner, after, residual)
        residual = jax.tree.map(sharding.like, moved, residual)
    return _movable(config, {"basis": new, "inner": after, "residual": residual})


def _debiased(config: Projection, inner: Any, spec: Any) -> jax.Array:
    """The first moment over `1 - b1^t`, in the old basis."""
    moment, value = inner_lib.first_moment(config.inner, inner)
    seen = jnp.maximum(moment.count, 1)[..., None, None]
    return sharding.reshard(value.astype(jnp.float32) / inner_lib.debias(moment.decay, seen), spec)


def _refresh_staggered(config: Projection, view: ResolvedView, trees: Any, due: Any, step: jax.Array, total: int):
    """All layers at step 0, else layers `start .. start + size` of the `total`, of which a device may own none.

    Layer numbers ascend, so those that are due lie next to each other; what else a clamped slice holds stays.
    """
    axes, layers = len(view.batch), trees["layers"].reshape(-1)
    clock: Any = config.clock
    wide = clock.layers_per_step(total)
    size = min(wide, layers.size)
    start = clock.start(step, config.phase(view), total)
    begin = jnp.minimum(jnp.sum(layers < start), layers.size - size)

    def rows(tree):
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[axes:]), tree)
        return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, begin, size), flat)

    numbers = jax.lax.dynamic_slice_in_dim(layers, begin, size)
    fresh = (numbers >= start) & (numbers < start + wide)

    def some():
        def put(whole, after):
            flat = whole.reshape(-1, *whole.shape[axes:])
            before = jax.lax.dynamic_slice_in_dim(flat, begin, size)
            chosen = jnp.where(fresh.reshape(-1, *[1] * (after.ndim - 1)), after, before)
            return jax.lax.dynamic_update_slice_in_dim(flat, chosen, begin, 0).reshape(whole.shape)

        spec = None if view.spec is None else (None, *view.spec[-2:])
        few = dataclasses.replace(view, batch=(size,), spec=spec)
        return jax.tree.map(put, stay, _refreshed(config, few, rows(trees), step))

    stay = _movable(config, trees)
    branch = jnp.where(step == 0, 2, jnp.where(jnp.any(fresh), 1, 0)) * jnp.asarray(due, jnp.int32)
    return jax.lax.switch(branch, [lambda: stay, some, lambda: _refreshed(config, view, trees, step)])


def _finish(config: Projection, view: ResolvedView, trees: dict[str, Any], factor: Any, ok: Any, extra: dict[str, Any]):
    """Oriented update, inner state, residual state."""
    low, target = (trees[name] if factor is None else trees[name] * factor for name in ("low", "target"))
    basis, param = trees["basis"], None
    if getattr(config.inner, "params", False):
        param = config.projector.down(view, basis, trees["param"])
    run = each(lambda g, s, p: config.inner.update(g, s, p, **extra), view.batch)
    direction, scale, inner = run(low, trees["inner"], param)
    scale = jnp.asarray(scale, jnp.float32) * config.scale
    if ok is not None:
        direction = jnp.where(ok, direction, 0)
    update, residual = config.residual.combine(
        config.projector, view, basis, trees["residual"], target, low, direction, scale
    )
    if ok is not None:
        inner, residual = select(ok, inner, trees["old"]), select(ok, residual, trees["old_residual"])
        update = jnp.where(ok, update, 0) if config.residual.sees_gradient else update
    return update, inner, residual
