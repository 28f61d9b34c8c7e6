"""One projected leaf on its way through an update: refresh, project, finish."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_jax import sharding
from lowrank_jax.matrices import ResolvedView
from lowrank_jax.optim import inner as inner_lib
from lowrank_jax.optim.guard import select
from lowrank_jax.projection import layout
from lowrank_jax.projection.batches import count, layer_numbers
from lowrank_jax.projection.refresh_schedules import Staggered
from lowrank_jax.projection.slots import Projection
from lowrank_jax.projection.state import Evidence, MatrixState, Projected
from lowrank_jax.trees import dequantized


def whole(param: Any) -> jax.Array:
    """A parameter as an array: quantised ones are decoded."""
    return dequantized(param)


def on_own_matrices(
    function: Callable, config: Projection, view: ResolvedView, trees: Any, *shared: Any
) -> Any:
    """`function(config, view, trees, *shared)`, on each device's own matrices where a batch axis is
    sharded.

    The leaves of `trees` and of the result have the batch axes in front. There the view's batch is
    the local one, and every array that the function uses must come through its arguments: `shared`,
    or numbers inside `config`.
    """
    axes, whole = len(view.batch), view.spec or ()
    if not sharding.batch_axes(whole, axes):
        return function(config, view, trees, *shared)
    leaves, treedef = jax.tree.flatten((_numbers(config), shared))
    arrays = [isinstance(leaf, jax.Array) for leaf in leaves]

    def own(trees, traced):
        traced = iter(traced)
        filled = [
            next(traced) if array else leaf for leaf, array in zip(leaves, arrays, strict=True)
        ]
        numbers, shared = jax.tree.unflatten(treedef, filled)
        spec = (*[None] * axes, *whole[axes:])
        local = dataclasses.replace(
            view, batch=jax.tree.leaves(trees)[0].shape[:axes], spec=spec if any(spec) else None
        )
        return function(_with_numbers(config, iter(numbers)), local, trees, *shared)

    traced = [leaf for leaf, array in zip(leaves, arrays, strict=True) if array]
    return sharding.over_batch(own, whole, axes)(trees, traced)


def _numbers(config: Any) -> list[jax.Array]:
    """The scalar arrays in the fields of nested dataclasses: hyper-parameters that somebody
    injected."""
    if isinstance(config, jax.Array):
        return [config] if config.ndim == 0 else []
    if not dataclasses.is_dataclass(config):
        return []
    return [
        x for field in dataclasses.fields(config) for x in _numbers(getattr(config, field.name))
    ]


def _with_numbers(config: Any, numbers: Iterator[jax.Array]) -> Any:
    """`config` with its scalar arrays replaced, in the order of `_numbers`."""
    if isinstance(config, jax.Array):
        return next(numbers) if config.ndim == 0 else config
    if not _numbers(config):
        return config
    new = {
        field.name: _with_numbers(getattr(config, field.name), numbers)
        for field in dataclasses.fields(config)
    }
    return dataclasses.replace(config, **new)


def fresh_inner(config: Projection, view: ResolvedView) -> Any:
    """The inner state of a leaf, one for each of its matrices."""
    low_shape = (*view.batch, *config.projector.low_shape(view))
    low = sharding.zeros(low_shape, jnp.float32, config.projector.low_spec(view))
    return config.inner.init_stack(low, view)


def fresh_state(config: Projection, view: ResolvedView) -> MatrixState:
    """The state of a leaf before its first step."""

    def rest(config, view, trees):
        return fresh_inner(config, view), config.residual.init(view)

    config.projector.check(view)
    layers = layer_numbers(view)
    keys = config.keys(view, jnp.zeros((), jnp.int32), layers)
    basis = config.projector.init(view, keys)
    inner, residual = on_own_matrices(rest, config, view, {"layers": layers})
    return MatrixState(basis, inner, residual, view.structure(), config.projector.structure())


def check_inner(config: Projection, matrix: MatrixState) -> None:
    """ValueError where the slots cannot work with the inner state of a leaf."""
    axes = len(matrix.view.batch)
    state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[axes:], x.dtype), matrix.inner)
    state = jax.eval_shape(config.inner.decoded, state)
    config.transport.check(config.inner, state)
    config.residual.check(config.inner, state, matrix.view, config.projector.low_shape(matrix.view))
    if "moments" in config.projector.needs:
        inner_lib.first_moment(config.inner, state)


class MatrixStep:
    """A mutable record of one leaf's update, so that an update of the tree reads as the steps of
    the method.

    Attributes:
      gradient: `(batch..., s, k)` float32; None where it came projected.
      target: likewise what is projected, the gradient or more.
      low: `(batch..., r, k)`, after `project`.
      sketch: `(batch..., s, q)`, or None.
      basis, inner, residual: the state so far.
    """

    def __init__(
        self,
        config: Projection,
        view: ResolvedView,
        state: MatrixState,
        grad: Any,
        param: Any,
        layer: Any = None,
    ):
        self.config, self.view, self.old = config, view, state
        # the numbers and the count of the leaf's matrices, of which a layer-wise step has one
        self.layers = layer_numbers(view) if layer is None else layer
        self.total = count(state.view)
        self.param = view.orient(whole(param)) if config.reads_params else None
        self.basis, self.inner, self.residual = state.basis, state.inner, state.residual
        self.gradient: Any = None
        self.target: Any = None
        self.sketch: Any = None
        if isinstance(grad, Projected):
            self.low, self.sketch = _checked(config, view, grad)
        else:
            self.gradient = view.orient(grad).astype(jnp.float32)
            self.target, self.residual = config.residual.target(state.residual, self.gradient)

    @property
    def can_refresh(self) -> bool:
        """Whether a refresh finds what it reads: a gradient, or the sketch that serves instead."""
        needs = self.config.projector.needs
        return self.target is not None or not (
            "grad" in needs or ("sketch" in needs and self.sketch is None)
        )

    def look(self, due: Any, step: jax.Array) -> None:
        """Takes the sketch of a full gradient, where a refresh after the update will need it."""
        if due is False or self.target is None or "sketch" not in self.config.projector.needs:
            return

        def product():
            made = self.target @ sketch_basis(self.config, self.view, self.old, step, self.layers)
            return sharding.reshard(made, sharding.whole_spec(self.view.spec))

        nothing = sharding.zeros_like(jax.eval_shape(product))
        self.sketch = product() if due is True else jax.lax.cond(due, product, lambda: nothing)

    def refresh(self, due: Any, step: jax.Array) -> None:
        """Moves basis, moments and residual where `due`: one `cond` on an unbatched scalar.

        What a refresh does not change stays outside the condition, so that a normal step does not
        copy it.
        """
        if due is False or not self.can_refresh:
            return
        state = {"basis": self.basis, "inner": self.inner, "residual": self.residual}
        seen = {
            "target": self.target,
            "sketch": self.sketch,
            "param": self.param,
            "layers": self.layers,
        }
        state |= on_own_matrices(
            _refresh, self.config, self.view, state | seen, due, step, self.total
        )
        self.basis, self.inner, self.residual = state["basis"], state["inner"], state["residual"]

    def project(self) -> None:
        def down(config, view, trees):
            basis = layout.placed(view, trees["basis"], "basis_at_use")
            low = config.projector.down(view, basis, trees["x"])
            return layout.placed(view, layout.placed(view, low, "low_at_use"), "low")

        if self.target is not None:
            self.low = on_own_matrices(
                down, self.config, self.view, {"x": self.target, "basis": self.basis}
            )

    @property
    def kept(self) -> Any:
        """What the step keeps of the gradient: all of it where the residual rule reads it, else its
        projection."""
        return self.target if self.config.residual.sees_gradient else self.low

    @property
    def judged(self) -> Any:
        """What the guard judges: as `kept`, without what earlier steps fed back."""
        return self.gradient if self.config.residual.sees_gradient else self.low

    def arrays(self) -> dict[str, Any]:
        """What `finish` reads, batch axes in front; what it does not read is left out."""
        own = {
            "low": self.low,
            "target": self.target if self.config.residual.sees_gradient else None,
            "param": self.param if self.config.inner.reads_params else None,
            "basis": self.basis,
            "inner": self.inner,
            "residual": self.residual,
        }
        moved = {"inner": self.old.inner, "residual": self.old.residual}
        return own | {"old": {name: tree for name, tree in moved.items() if own[name] is not tree}}

    def finish(
        self, factor: jax.Array | None, ok: jax.Array | None, extra: dict[str, Any]
    ) -> jax.Array:
        """The oriented update; leaves the new inner and residual states in place, or the old ones
        where not ok."""
        update, self.inner, self.residual = on_own_matrices(
            finish, self.config, self.view, self.arrays(), factor, ok, extra
        )
        return update

    def state(self) -> MatrixState:
        return MatrixState(self.basis, self.inner, self.residual, self.old.view, self.old.projector)


def _checked(
    config: Projection, view: ResolvedView, grad: Projected
) -> tuple[jax.Array, jax.Array | None]:
    """`(low, sketch)` of a projected gradient; ValueError where it cannot serve."""
    if config.residual.sees_gradient:
        raise ValueError(
            f"leaf {view.path!r}: residual {type(config.residual).__name__} reads the full "
            "gradient, and this one is projected; take jax.value_and_grad(loss) for this "
            "optimizer, or residual=lrx.residuals.discard()"
        )
    shape = (*view.batch, *config.projector.low_shape(view))
    if tuple(grad.low.shape) != shape:
        raise ValueError(
            f"leaf {view.path!r}: the projected gradient has shape {tuple(grad.low.shape)}, not "
            f"{shape}; something between lrx.projected_value_and_grad and update broadcast or "
            "stacked it. Accumulate with projected_value_and_grad(..., accumulate=k), not "
            "optax.MultiSteps"
        )
    return layout.placed(view, grad.low, "low").astype(jnp.float32), layout.placed(
        view, grad.sketch, "basis"
    )


def sketch_basis(
    config: Projection, view: ResolvedView, state: MatrixState, step: jax.Array, layers: jax.Array
) -> jax.Array:
    """`(batch..., k, q)`: what a refresh by a sketch contracts the kept side of the gradient
    with."""
    evidence = Evidence(
        moments=layout.divided(view, _debiased(config, state.inner), -1)
        if "moments" in config.projector.needs
        else None,
        step=step,
        key=config.keys(view, step, layers),
    )
    return config.projector.sketch_basis(view, evidence)


def _refresh(
    config: Projection, view: ResolvedView, trees: Any, due: Any, step: jax.Array, total: int
) -> Any:
    stay = _movable(config, trees)
    if isinstance(config.clock, Staggered):
        return _refresh_staggered(config, view, trees, due, step, total)
    if due is True:
        return _refreshed(config, view, trees, step)
    return jax.lax.cond(due, lambda: _refreshed(config, view, trees, step), lambda: stay)


def _movable(config: Projection, trees: dict[str, Any]) -> dict[str, Any]:
    """The part of the state that a refresh may change."""
    moving = {
        "basis": True,
        "inner": config.transport.moves,
        "residual": config.residual.follows_basis,
    }
    return {name: trees[name] for name, moves in moving.items() if moves}


def _refreshed(
    config: Projection, view: ResolvedView, trees: dict[str, Any], step: jax.Array
) -> dict[str, Any]:
    """The state after a refresh of all matrices in `trees`."""
    needs, basis, inner = config.projector.needs, trees["basis"], trees["inner"]
    whole = sharding.whole_spec(view.spec)
    evidence = Evidence(
        grad=layout.rows(
            view, sharding.reshard(trees["target"], whole), pad=config.projector.of_rows
        )
        if "grad" in needs
        else None,
        sketch=layout.divided(view, sharding.reshard(trees["sketch"], whole), -2)
        if "sketch" in needs
        else None,
        param=sharding.reshard(trees["param"], whole) if "param" in needs else None,
        moments=layout.divided(view, _debiased(config, inner), -1) if "moments" in needs else None,
        step=step,
        key=config.keys(view, step, trees["layers"]),
    )
    # placed here, so that what a refresh gathers is gathered at refreshes only
    new = jax.tree.map(sharding.like, config.projector.refresh(view, basis, evidence), basis)
    new = layout.placed(view, new, "basis")
    residual, before = trees["residual"], config.inner.decoded(inner)
    before = after = layout.mixed(view, before)
    if config.transport.moves:
        change = config.projector.overlap(view, basis, new)
        fresh = config.inner.decoded(fresh_inner(config, view))
        moved = config.transport(config.inner, before, fresh, change)
        after = jax.tree.map(sharding.like, moved, before)
    if config.residual.follows_basis:
        moved = config.residual.moved(
            config.projector, view, basis, new, config.inner, before, after, residual
        )
        residual = jax.tree.map(sharding.like, moved, residual)
    after = layout.placed(view, config.inner.encoded(after), "low")
    return _movable(config, {"basis": new, "inner": after, "residual": residual})


def _debiased(config: Projection, inner: Any) -> jax.Array:
    """The first moment over `1 - b1^t`, in the old basis; whole matrices on an explicit mesh."""
    moment, value = inner_lib.first_moment(config.inner, config.inner.decoded(inner))
    seen = jnp.maximum(moment.count, 1)[..., None, None]
    whole = sharding.whole_spec(sharding.explicit_spec(value))
    return sharding.reshard(value.astype(jnp.float32) / inner_lib.debias(moment.decay, seen), whole)


def _refresh_staggered(
    config: Projection, view: ResolvedView, trees: Any, due: Any, step: jax.Array, total: int
):
    """All layers at step 0, else layers `start .. start + size` of the `total`, of which a device
    may own none.

    Layer numbers ascend, so those that are due lie next to each other; what else a clamped slice
    holds stays.
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
    return jax.lax.switch(
        branch, [lambda: stay, some, lambda: _refreshed(config, view, trees, step)]
    )


def finish(
    config: Projection,
    view: ResolvedView,
    trees: dict[str, Any],
    factor: Any,
    ok: Any,
    extra: dict[str, Any],
):
    """Oriented update, inner state, residual state, from `MatrixStep.arrays`."""
    low, target = (
        x if factor is None or x is None else x * factor for x in (trees["low"], trees["target"])
    )
    low = layout.placed(view, low, "low")
    basis, param = layout.placed(view, trees["basis"], "basis_at_use"), None
    if config.inner.reads_params:
        param = config.projector.down(view, basis, trees["param"])
    inner = layout.placed(view, trees["inner"], "low")
    direction, scale, inner = config.inner.update_stack(low, inner, view, param, ok, extra)
    inner = layout.placed(view, inner, "low")
    direction = layout.placed(view, layout.placed(view, direction, "low"), "low_at_use")
    scale = jnp.asarray(scale, jnp.float32) * config.scale
    if ok is not None:
        direction = jnp.where(ok, direction, 0)
    update, residual = config.residual.combine(
        config.projector, view, basis, trees["residual"], target, low, direction, scale
    )
    if ok is not None:
        residual = select(ok, residual, (trees | trees["old"])["residual"])
        inner = select(ok, inner, trees["old"]["inner"]) if "inner" in trees["old"] else inner
        update = jnp.where(ok, update, 0) if config.residual.sees_gradient else update
    return update, inner, residual
