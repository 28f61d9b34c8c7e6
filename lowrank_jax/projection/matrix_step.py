"""One projected leaf on its way through an update: refresh, project, update.

The mathematics are pure functions of one stack, `refresh.refresh`, `refresh.project` and
`leaf_update`; `placement` lays their arrays out.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_jax import sharding
from lowrank_jax.matrices import ResolvedView
from lowrank_jax.optim import inner as inner_lib
from lowrank_jax.optim import scales
from lowrank_jax.optim.guard import select
from lowrank_jax.projection import layout
from lowrank_jax.projection.batches import count, layer_numbers
from lowrank_jax.projection.placement import Trees, laid, like, on_own_matrices, placed
from lowrank_jax.projection.refresh import fresh_inner, project, refresh, refresh_inputs, start
from lowrank_jax.projection.residuals import Combine
from lowrank_jax.projection.slots import Projection
from lowrank_jax.projection.state import (
    MatrixState,
    Now,
    Projected,
    Sketch,
    parts_of,
    sketch_of,
)
from lowrank_jax.projection.targets import Kept
from lowrank_jax.projection.transports import check_registered
from lowrank_jax.trees import dequantized


def fresh_state(config: Projection, view: ResolvedView) -> MatrixState:
    """The state of a leaf before its first step."""

    def own(config, view, trees):
        inner = fresh_inner(config, view)
        return inner, config.target.init(view), config.residual.init(view)

    config.projector.check(view)
    layers = layer_numbers(view)
    keys = config.keys(view, jnp.zeros((), jnp.int32), layers)
    basis, memory = config.projector.init(view, keys)
    memory = jax.tree.map(functools.partial(_of_batch, view), memory)
    inner, target, residual = on_own_matrices(own, config, view, {"layers": layers})
    schedule = config.refresh_schedule
    low_shape = config.projector.low_shape(view)
    scheduled = schedule.state_for(view.batch, low_shape) if schedule.per_layer else ()
    return MatrixState(
        basis=basis,
        memory=memory,
        inner=inner,
        target=target,
        residual=residual,
        refresh_schedule=jax.tree.map(functools.partial(_of_batch, view), scheduled),
        view=view.structure(),
        projector=config.projector.structure(),
    )


def _of_batch(view: ResolvedView, x: jax.Array) -> jax.Array:
    """`x (batch..., ...)` with its batch axes divided as the leaf's are, on an explicit mesh."""
    if view.spec is None:
        return x
    axes = len(view.batch)
    own = sharding.explicit_spec(x) or (None,) * x.ndim
    spec = (*view.spec[:axes], *own[axes:])
    return sharding.reshard(x, spec)


def check_slots(config: Projection, matrix: MatrixState) -> None:
    """ValueError where the slots cannot work with the inner state of a leaf."""
    axes = len(matrix.view.batch)

    def of_one(x):
        return jax.ShapeDtypeStruct(x.shape[axes:], x.dtype)

    state = jax.tree.map(of_one, matrix.inner)
    state = jax.eval_shape(config.inner.decoded, state)
    low_shape = config.projector.low_shape(matrix.view)
    config.transport.check(config.inner, state)
    config.target.check(config.inner, state, matrix.view, low_shape)
    config.residual.check(config.inner, state, matrix.view, low_shape)
    if config.projector.masks:
        name = f"projector {type(config.projector).__name__}"
        check_registered(name, config.inner, state, "one such as lrx.inner.adam")
    if "momentum" in config.projector.reads:
        inner_lib.first_moment(config.inner, state)


class MatrixStep:
    """A mutable record of one leaf's update, so that an update of the tree reads as the steps of
    the method.

    Attributes:
      gradient: `(batch..., s, k)` float32; None where it came projected.
      matrix: likewise what is projected, the gradient or more.
      low: `(batch..., r, k)`, after `project`.
      sketch: `(batch..., s, q)`, or None.
      parts: the state so far, by field of `MatrixState`.
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
        self.param = view.orient(dequantized(param)) if config.reads_params else None
        self.parts = parts_of(state)
        self.gradient: Any = None
        self.matrix: Any = None
        self.low: Any = None
        self.sketch: Any = None
        if isinstance(grad, Projected):
            self.low, self.sketch = _checked(config, view, grad)
        else:
            self.gradient = view.orient(grad).astype(jnp.float32)
            taken = config.target.take(state.target, self.gradient)
            self.matrix, self.parts["target"] = taken

    @property
    def can_refresh(self) -> bool:
        """Whether a refresh finds what it reads: a gradient, or the sketch that serves instead."""
        reads = self.config.projector.reads
        return self.matrix is not None or not (
            "target" in reads or ("sketch" in reads and self.sketch is None)
        )

    def look(self, due: Any, now: Now) -> None:
        """Takes the sketch of a full gradient, where a refresh after the update will need it."""
        reads = self.config.projector.reads
        if due is False or self.matrix is None or "sketch" not in reads:
            return

        def product():
            # (batch..., s, k) times (batch..., k, q), or thin products of both sides
            basis = sketch_basis(self.config, self.view, self.old, now, self.layers)
            made, spec = sketch_of(self.matrix, basis), sharding.unsharded_spec(self.view.spec)
            return jax.tree.map(lambda x: sharding.reshard(x, spec), made)

        nothing = jax.tree.map(sharding.zeros_like, jax.eval_shape(product))
        if due is True:
            self.sketch = product()
        else:
            self.sketch = jax.lax.cond(due, product, lambda: nothing)

    def refresh(self, due: Any, now: Now) -> None:
        """Moves the basis, and what moves with it, where `due`: an unbatched scalar."""
        if due is False or not self.can_refresh:
            return
        if self.config.starts_before:  # the first basis was made before the first update
            due = due & (now.step > 0)
        trees = self._read()
        schedule = self.config.refresh_schedule
        if schedule.per_layer:
            own = schedule.due(self.parts["refresh_schedule"], now.step)
            trees["due"] = jnp.broadcast_to(own, self.view.batch)
        trees |= self.parts
        shared = (due, now, self.total)
        self.parts |= on_own_matrices(refresh, self.config, self.view, trees, *shared)

    def _read(self) -> Trees:
        """What a refresh may read beside the state."""
        return {
            "matrix": self.matrix,
            "sketch": self.sketch,
            "param": self.param,
            "low": self.low if "low" in self.config.projector.reads else None,
            "layers": self.layers,
        }

    def start(self, begins: Any, now: Now) -> None:
        """Makes the first basis where the first step `begins`, see `Projector.starts_before`."""
        if begins is False or self.matrix is None:
            return
        trees = self.parts | self._read()
        self.parts |= on_own_matrices(start, self.config, self.view, trees, begins, now)

    def project(self) -> None:
        """Makes the low-rank object, where it did not come as one."""
        if self.matrix is not None:
            trees = {"matrix": self.matrix, "basis": self.parts["basis"]}
            self.low = on_own_matrices(project, self.config, self.view, trees)["low"]

    @property
    def kept(self) -> Any:
        """What the step is made of: all of the target where something keeps it, else its
        projection."""
        return self.matrix if self.config.keeps_gradient else self.low

    @property
    def judged(self) -> Any:
        """What the guard judges: as `kept`, without what earlier steps fed back."""
        return self.gradient if self.config.reads_gradient else self.low

    def arrays(self) -> Trees:
        """What `leaf_update` reads, batch axes in front; what it does not read is left out."""
        own = {
            "low": self.low,
            "matrix": self.matrix if self.config.uses_gradient else None,
            "param": self.param if self.config.inner.reads_params else None,
            "basis": self.parts["basis"],
        }
        own |= {name: self.parts[name] for name in MOVING}
        # what a refresh replaced, for a step that is not accepted
        old = {}
        for name in ("inner", "target", "residual"):
            before = getattr(self.old, name)
            if own[name] is not before:
                old[name] = before
        return own | {"old": old}

    def update(
        self,
        factor: jax.Array | None,
        ok: jax.Array | None,
        extra: dict[str, Any],
    ) -> jax.Array:
        """The oriented update; leaves the new states in place, or the old ones where not ok."""
        update, parts = on_own_matrices(
            leaf_update, self.config, self.view, self.arrays(), factor, ok, extra
        )
        self.parts |= parts
        return update

    def advance(self, ok: jax.Array | None, now: Now) -> None:
        """The state of a schedule that decides by layers, after a step."""
        has_state = jax.tree.leaves(self.parts["refresh_schedule"])
        if self.config.refresh_schedule.per_layer and has_state:
            trees = {name: self.parts[name] for name in ("basis", "refresh_schedule")}
            trees |= {"matrix": self.matrix, "low": self.low}
            moved = on_own_matrices(advance, self.config, self.view, trees, ok, now)
            self.parts["refresh_schedule"] = moved

    def state(self) -> MatrixState:
        """The state so far, as it is kept."""
        return MatrixState(**self.parts, view=self.old.view, projector=self.old.projector)


def _checked(
    config: Projection, view: ResolvedView, grad: Projected
) -> tuple[jax.Array, Sketch | None]:
    """`(low, sketch)` of a projected gradient; ValueError where it cannot serve."""
    if config.reads_gradient:
        target, residual = type(config.target).__name__, type(config.residual).__name__
        raise ValueError(
            f"leaf {view.path!r}: target {target} with residual {residual} reads the full "
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
    low = layout.placed(view, grad.low, "low").astype(jnp.float32)
    sketch = layout.placed(view, grad.sketch, "basis")
    return low, sketch


def sketch_basis(
    config: Projection,
    view: ResolvedView,
    state: MatrixState,
    now: Now,
    layers: jax.Array,
) -> Sketch:
    """`(batch..., k, q)`: what a refresh by a sketch contracts the kept side of the gradient with;
    or a pair, for both sides."""
    trees = parts_of(state) | {"layers": layers}
    inputs = refresh_inputs(config, view, trees, now)
    return config.projector.sketch_basis(view, state.basis, state.memory, inputs)


MOVING = ("memory", "inner", "target", "residual")
"""The parts of a state that `leaf_update` moves."""


def leaf_update(
    config: Projection,
    view: ResolvedView,
    trees: Trees,
    factor: Any,
    ok: Any,
    extra: dict,
) -> tuple[jax.Array, Trees]:
    """`(oriented update, moved parts of the state)`, from `MatrixStep.arrays`.

    Args:
      config, view, trees: of one stack.
      factor: of clipping, or None.
      ok: whether the step is accepted, or None.
      extra: for the inner transformation.
    """
    if factor is not None:
        read = [name for name in ("low", "matrix") if trees[name] is not None]
        trees = trees | {name: trees[name] * factor for name in read}
    trees = laid(config, view, trees, {"low": "low", "basis": "basis_at_use"})
    moved = _inner_step(config, view, trees, ok, extra)
    direction = moved["direction"]
    if ok is not None:
        direction = jnp.where(ok, direction, 0)

    projector, basis = config.projector, trees["basis"]
    low, matrix = trees["low"], trees["matrix"]
    lift = functools.partial(projector.up, view, basis)

    @functools.cache
    def rest():  # K - up(R), made once where target and residual rule both read it
        return projector.rest(view, basis, matrix, low)

    def rounding():
        return projector.rounding(view, matrix)

    # what the next step finds of the target
    new = {"inner": moved["inner"], "memory": trees["memory"]}
    kept = Kept(view, matrix, low, lift, rest)
    new["target"] = config.target.kept(trees["target"], kept)

    # U = up(alpha c d), and what becomes of the rest
    combine = Combine(
        view=view,
        lift=lift,
        rest=rest,
        rounding=rounding,
        target=matrix,
        low=low,
        direction=direction,
        inner_scale=moved["inner_scale"],
        scale=scales.factor(config.scale, view),
        state=trees["residual"],
    )
    update, new["residual"] = config.residual.combine(combine)

    if projector.sees:
        memory = trees["memory"]
        target = matrix if "target" in projector.sees else None
        seen = projector.seen(view, basis, memory, low, target)
        new["memory"] = like(seen, memory)
    return _accepted(config, trees, update, new, ok)


@placed(takes={"inner": "low"}, gives={"inner": "low", "direction": "low low_at_use"})
def _inner_step(
    config: Projection,
    view: ResolvedView,
    trees: Trees,
    ok: Any,
    extra: dict,
) -> Trees:
    """Direction and scale of the inner transformation, and its state."""
    param = None
    if config.inner.reads_params:
        param = config.projector.down(view, trees["basis"], trees["param"])
    direction, scale, inner = config.inner.update_stack(
        trees["low"], trees["inner"], view, param, ok, extra
    )
    scale = jnp.asarray(scale, jnp.float32)
    return {"direction": direction, "inner_scale": scale, "inner": inner}


def _accepted(
    config: Projection,
    trees: Trees,
    update: jax.Array,
    new: Trees,
    ok: Any,
) -> tuple[jax.Array, Trees]:
    """`(update, states)`, or zeros and the states before the step where it is not accepted."""
    if ok is None:
        return update, new
    old = trees | trees["old"]  # before anything was taken from it, or moved with the basis
    for name in ("target", "residual"):
        new[name] = select(ok, new[name], old[name])
    if "inner" in trees["old"]:  # otherwise the inner transformation left it where it was
        new["inner"] = select(ok, new["inner"], old["inner"])
    if config.projector.sees:  # a refreshed memory stays with its basis
        new["memory"] = select(ok, new["memory"], trees["memory"])
    # of a direction of zeros the step in the subspace is zero, but not what is made of the target
    if config.keeps_gradient:
        update = jnp.where(ok, update, 0)
    return update, new


def advance(
    config: Projection,
    view: ResolvedView,
    trees: Trees,
    ok: Any,
    now: Now,
) -> Any:
    """The state of a schedule by layers after a step."""
    schedule, state = config.refresh_schedule, trees["refresh_schedule"]
    captured: jax.Array | None = None
    if "captured" in schedule.reads:
        captured = config.projector.measure(view, trees["basis"], trees["matrix"])
    read: Trees = {}
    if "low" in schedule.reads:
        read = laid(config, view, {"low": trees["low"]}, {"low": "unsharded"})
    advanced = schedule.advance(state, step=now.step, captured=captured, **read)
    moved = like(advanced, state)
    return moved if ok is None else select(ok, moved, state)
