"""The layer-wise step: each layer of a scanned stack is updated inside the backward pass, as soon
as it can be.

    x_0 = before(rest, batch)         embedding
    x_{l+1} = layer(W_l, x_l)         the stack; only the inputs x_l are kept
    value = after(rest, x_L, batch)   norm, head and loss

The backward pass goes down the stack, takes the gradient of one layer (low-rank through taps, or
full where the method reads it), moves its basis if that is due, and writes its parameters and state
in place. No gradient of the stack exists, low-rank or full, at any time. Of the parameters outside
the stack and of the stack's vectors the gradients are kept, and updated at the end as one group.

What the published layer-wise codes get wrong is kept right:

* accumulation: the inputs of all k microbatches are kept, and a layer's gradients are summed over
  them before its one update; a hook after each microbatch would make k updates;
* clipping: `clip_norm` is the global norm over all layers, which a first backward pass measures (a
  second one then updates), where clipping layer by layer would change the direction of the step;
* counting: one step for each call, whatever the number of layers.

Guard: a step is skipped, and counted, where a gradient is not finite. What moves at such a step
depends on when that is known:

* a first backward pass, which `clip_norm` brings and `exact_skip=True` asks for, sees all gradients
  before anything is written: nothing moves, as in `train_step`;
* without one, nothing moves where the value or the gradient at the top of the stack is not finite,
  which is where most bad batches show. If a gradient is first not finite further down, that layer,
  those below it and everything outside the stack stay as they are, and the layers above have moved
  already: their kernels, moments and bases. Such a step is counted in `partly_skipped`, not in
  `skipped`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lowrank_jax import sharding
from lowrank_jax.optim.guard import all_finite, energy
from lowrank_jax.optim.learning_rate import LearningRateState, selected_for_decay
from lowrank_jax.projection import step as step_lib
from lowrank_jax.projection.fused import Fused, fused, write_plain
from lowrank_jax.projection.matrix_step import MatrixStep, leaf_update, sketch_basis
from lowrank_jax.projection.stack import Stack, layer_gradients
from lowrank_jax.projection.state import Projected, matrix_states, parts_of
from lowrank_jax.projection.tapped import Tap
from lowrank_jax.projection.training import gradient_mode
from lowrank_jax.projection.write import Write
from lowrank_jax.trees import is_quantized
from lowrank_jax.typing import Pytree, Scalar


def layerwise_step(
    stack: Stack, optimizer: Any, *, accumulate: int = 1, exact_skip: bool = False
) -> Callable[..., Any]:
    """`step(params, opt_state, *args) -> (params, opt_state, value)`, which never holds a gradient
    of the stack.

    Equal to `train_step(stack.loss, optimizer)` where gradients are finite. Jit it and donate the
    first two arguments.

    Where a gradient inside the stack is not finite, the layers above it have moved when that is
    found: kernels, moments and bases. The rest stays, and the step counts as partly skipped. With
    `exact_skip`, and with a `clip_norm` always, a skipped step changes nothing but its counter.

    Args:
      stack: the model in three parts; `params` is a dict whose entry `stack.name` has the layers on
        a leading axis.
      optimizer: a named optimizer, or its fused form.
      accumulate: k microbatches along a leading axis of every argument; their values and gradients
        are averaged.
      exact_skip: know that all gradients are finite before anything is written, by a first backward
        pass: about 1.7 times the arithmetic of a step, and hardly more memory. With `clip_norm`
        that pass is made anyway.

    Raises:
      TypeError: for an optimizer without a fused form.
      ValueError: for a projected leaf outside the stack, one whose layers are not its first axis, a
        form with implementation="pallas", or `exact_skip` of an optimizer with guard=False.

    >>> import jax, jax.numpy as jnp
    >>> import lowrank_jax as lrx
    >>> stack = lrx.projection.Stack(
    ...     before=lambda rest, x: x,
    ...     layer=lambda layer, x: jnp.tanh(lrx.matmul(x, layer["kernel"])),
    ...     after=lambda rest, x, _: jnp.mean(x**2),
    ... )
    >>> params = {"layers": {"kernel": jnp.stack([jnp.eye(8)] * 3)}}
    >>> tx = lrx.galore(1e-2, rank=2, views=lrx.Views(stacked=("layers/.*",)))
    >>> step = jax.jit(lrx.layerwise_step(stack, tx), donate_argnums=(0, 1))
    >>> params, state, value = step(params, tx.init(params), jnp.ones((4, 8)))
    >>> int(state.projection.step)
    1
    """
    if accumulate < 1:
        raise ValueError(f"accumulate={accumulate} must be at least 1 microbatch")
    form = optimizer if isinstance(optimizer, Fused) else fused(optimizer)
    for refuses, message in REFUSED:
        if refuses(form, exact_skip):
            raise ValueError(f"layerwise: {message}")

    def step(params, state, *args):
        if accumulate == 1:
            args = jax.tree.map(lambda x: jnp.asarray(x)[None], args)
        return _Layerwise(stack, form, params, state, args, exact_skip).run()

    return step


# What this form does not do: a test of the fused form and `exact_skip`, and what to do instead. All
# targets, residual rules and refresh schedules are taken, those by layers with clipping too.
REFUSED: tuple[tuple[Callable[[Fused, bool], bool], str], ...] = (
    (
        lambda form, exact_skip: form.implementation != "xla",
        "implementation='pallas' writes whole stacks, not single layers; give implementation='xla'",
    ),
    (
        lambda form, exact_skip: exact_skip and not form.recipe.projection.guard,
        "exact_skip=True: an optimizer with guard=False skips no step; give guard=True, or leave it "
        "out",
    ),
)


class _Layerwise:
    """One call: the trees that its passes share. Microbatches lie on a leading axis everywhere.

    `measured` says that a first backward pass judges the step, so that the second one asks no layer
    any more.
    """

    def __init__(
        self,
        stack: Stack,
        form: Fused,
        params: Pytree,
        state: Pytree,
        args: Pytree,
        exact_skip: bool,
    ):
        self.stack, self.form, self.params, self.state, self.args = stack, form, params, state, args
        self.config = form.recipe.projection
        self.measured = exact_skip or self.config.clip_norm is not None
        self.plan = gradient_mode(self.config)
        self.rest = {name: tree for name, tree in params.items() if name != stack.name}
        leaves, self.treedef = step_lib.flatten(params[stack.name])
        report = self.config.report(params)
        prefix = f"{stack.name}/"
        self.views = [leaf.view for leaf in report.leaves if leaf.path.startswith(prefix)]
        outside = [view.path for view in report.projected if view not in self.views]
        projected = [view for view in self.views if view is not None]
        unlayered = [view.path for view in projected if not view.layered]
        if outside or unlayered:
            raise ValueError(
                f"layerwise: {outside or unlayered} "
                f"cannot be updated layer by layer; stack it under params[{stack.name!r}], or "
                "leave it out with Views(rules=...)"
            )
        by_path = {matrix.view.path: matrix for matrix in matrix_states(state.projection)}
        self.leaves = leaves
        self.matrices = [None if view is None else by_path[view.path] for view in self.views]
        self.microbatches = jax.tree.leaves(args)[0].shape[0]
        self.now = step_lib.now_of(self.config, state.projection, form.rate(state))
        self.due = step_lib.due(self.config, state.projection)
        # where bases move by full gradients after the update, or the first one is made before it,
        # all of a layer's work is a branch by this scalar
        self.takes_full: Scalar | None = None
        self.otherwise = self.plan
        if self.plan == "full at a refresh" and self.config.refresh_schedule.when == "after":
            self.takes_full, self.otherwise = self.due, "taps"
        elif self.config.starts_before and self.plan != "full":
            self.takes_full = self.now.step == 0

    def run(self):
        inputs, value, d_rest, d_top = self._forward()
        ok = jnp.asarray(True)
        if self.config.guard:
            ok = jnp.isfinite(value) & all_finite([d_top])
        # rows of a batch may be on several devices
        ok = sharding.everywhere(ok, self.params, self.state)
        factor = None
        if self.measured:
            ok, factor = self._measure(inputs, d_rest, d_top, ok)
        started = ok
        fine, top, _, vectors, d_bottom, moved = self._backward(
            inputs, d_top, ok, factor, update=True
        )
        d_rest = self._all_rest(d_rest, d_bottom)
        partly = jnp.asarray(False)
        if self.config.guard and not self.measured:
            ok = ok & fine & all_finite(self._plain(d_rest, vectors))
            partly = started & top & ~ok  # the top layer at least has moved
        accepted = _Accepted(ok, partly, factor)
        return self._next(value, d_rest, vectors, moved, accepted)

    def _measure(self, inputs, d_rest, d_top, ok):
        """`(whether the step is accepted, factor of clipping or None)`, by a backward pass that
        writes nothing."""
        found = self._backward(inputs, d_top, ok, None, update=False)
        fine, _, square, vectors, d_bottom, _ = found
        plain = self._plain(self._all_rest(d_rest, d_bottom), vectors)
        square = square + sum((energy(leaf) for leaf in plain), jnp.zeros(()))
        if self.config.guard:
            ok = ok & fine & all_finite(plain) & jnp.isfinite(square)
        if self.config.clip_norm is None:
            return ok, None
        norm = jnp.maximum(jnp.sqrt(square), 1e-30)
        return ok, jnp.minimum(1.0, self.config.clip_norm / norm)

    def _plain(self, d_rest, vectors):
        """The gradients of what is not projected."""
        return [leaf for leaf in vectors if leaf is not None] + jax.tree.leaves(d_rest)

    def _forward(self):
        """Inputs of the layers `(L, k, ...)`, the value, and the gradients at the top."""
        stack = self.stack
        bottom = jax.lax.map(lambda args: stack.before(self.rest, *args), self.args)

        def layer(x, parameters):
            # the microbatches one after the other; inputs are kept, nothing else
            return jax.lax.map(lambda one: stack.layer(parameters, one), x), x

        top, inputs = jax.lax.scan(layer, bottom, self.params[stack.name])
        value, rest, d_top = self._head(top)
        return inputs, value, rest, d_top

    def _head(self, top):
        """`(value, gradients of the rest, gradients at the top)`, averaged over microbatches."""

        def of_one(x, args):
            after = lambda rest, x: self.stack.after(rest, x, *args)  # noqa: E731
            return jax.value_and_grad(after, (0, 1))(self.rest, x)

        if self.microbatches == 1:
            x, args = jax.tree.map(lambda x: x[0], (top, self.args))
            value, (rest, dx) = of_one(x, args)
            return jnp.zeros(()) + value, rest, dx[None]

        def add(total, part):
            value, (rest, dx) = of_one(*part)
            # sums of many gradients are float32, whatever the parameters are
            wide = jax.tree.map(lambda g: g.astype(jnp.float32), rest)
            total_rest, total_value = total
            return (jax.tree.map(jnp.add, total_rest, wide), total_value + value), dx

        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), self.rest)
        start = zeros, jnp.zeros(())
        (rest, value), dx = sharding.scan(add, start, (top, self.args))
        count = self.microbatches
        return value / count, jax.tree.map(lambda g: g / count, rest), dx / count

    def _all_rest(self, d_rest, d_bottom):
        """Gradients outside the stack: from the top, and through the inputs of the first layer."""

        def one(total, part):
            args, dx = part
            _, pull = jax.vjp(lambda rest: self.stack.before(rest, *args), self.rest)
            (through_inputs,) = pull(dx)
            return jax.tree.map(lambda t, g: t + g.astype(t.dtype), total, through_inputs), None

        return jax.lax.scan(one, d_rest, (self.args, d_bottom))[0]

    def _backward(self, inputs, d_top, ok, factor, *, update: bool):
        """Down the stack: `(whether all was finite, whether the top layer was, sum of squares,
        vectors' gradients, the bottom's, moved)`."""
        layers = jax.tree.leaves(inputs)[0].shape[0]
        leaves = list(zip(self.leaves, self.views, strict=True))
        kernels = [leaf for leaf, view in leaves if view is not None]
        vectors = [leaf for leaf, view in leaves if view is None]
        states = [parts_of(matrix) for matrix in self.matrices if matrix is not None]
        gathered = [jnp.zeros(leaf.shape, leaf.dtype) for leaf in vectors]
        one = self._move_layer if update else self._measure_layer

        def body(i, carry):
            # layer `number`, from the top
            number = layers - 1 - i
            dx, kernels, states, own_states, gathered, fine, top, square = carry
            own_kernels, own_vectors = _take(kernels, number), _take(vectors, number)
            part = own_kernels, own_states, own_vectors, _take(inputs, number), dx
            written, d_vectors, dx, fine, energies = one(part, number, ok, fine, factor)
            gathered, square = _put(gathered, number, d_vectors), square + energies
            if update:
                new_kernels, new_states = written
                kernels = _put(kernels, number, new_kernels)
                states = _put(states, number, new_states)
            top = jnp.where(i == 0, fine, top)
            # the layer below, for the next round
            own_states = _take(states, jnp.maximum(number - 1, 0))
            return dx, kernels, states, own_states, gathered, fine, top, square

        # whether all was finite, and the top layer; the sum of squares
        sums = jnp.asarray(True), jnp.asarray(True), jnp.zeros(())
        sums = sharding.vary(sums, sharding.varying(self.params, self.state))
        # states travel with the loop, see `in_place`; kernels would be held twice
        start = (d_top, kernels, states, _take(states, layers - 1), gathered, *sums)
        end = jax.lax.fori_loop(0, layers, body, start)
        dx, kernels, states, _, gathered, fine, top, square = end
        placed = iter(gathered)
        d_vectors = [None if view is not None else next(placed) for view in self.views]
        return fine, top, square, d_vectors, dx, (kernels, states)

    def _measure_layer(self, part, number, ok, fine, factor):
        """As `_move_layer`, of a pass that writes nothing."""

        def by(plan):
            accepted = ok & fine if self.config.guard else ok
            steps, read, d_vectors, dx = self._layer(part, number, accepted, plan)
            return None, d_vectors, dx, *self._judged(steps, read, fine)

        # bases that move after the update do not change what is measured, but for the first one
        starting = self.now.step == 0 if self.config.starts_before else None
        return self._either(by, None if self.takes_full is None else starting)

    def _either(self, by: Callable[[str], Pytree], takes_full: Scalar | None) -> Pytree:
        """A layer's work by full gradients where the scalar says so, if there is one."""
        if takes_full is None:
            return by(self.otherwise)
        return jax.lax.cond(takes_full, lambda: by("full"), lambda: by(self.otherwise))

    def _move_layer(self, part, number, ok, fine, factor):
        """`((new kernels, new states), gradients of the vectors, gradient of the inputs, whether all
        was finite down to here, sum of squares)` of one layer."""
        guarded = self.config.guard and not self.measured

        def by(plan):
            may_move = ok & fine if guarded else ok
            steps, read, d_vectors, dx = self._layer(part, number, may_move, plan)
            good, energies = self._judged(steps, read, fine)
            own_kernels = part[0]
            # from the first layer on that is not finite, none below it is written either
            write = ok & good if guarded else ok
            kernels = [
                self._write(step, kernel, write, factor, number)
                for step, kernel in zip(steps, own_kernels, strict=True)
            ]
            states = [step.parts for step in steps]
            return (kernels, states), d_vectors, dx, good, energies

        return self._either(by, self.takes_full)

    def _judged(self, steps, read, fine):
        """`(whether all was finite down to these steps, sum of squares of what they keep)`."""
        energies = sum((energy(step.kept) for step in steps), jnp.zeros(()))
        judged = all_finite([step.judged for step in steps])
        return fine & read & judged & jnp.isfinite(energies), energies

    def _layer(self, part, number, ok, plan):
        """`(steps of the matrices, refreshed and projected; whether what a refresh reads is finite;
        gradients of the vectors; gradient of the inputs)`."""
        kernels, states, vectors, inputs, dx = part
        matrices = [matrix for matrix in self.matrices if matrix is not None]
        views = [view.layer() for view in self.views if view is not None]
        states = [dataclasses.replace(m, **own) for own, m in zip(states, matrices, strict=True)]

        def steps_of(grads):
            rows = zip(views, states, grads, kernels, strict=True)
            return [
                MatrixStep(self.config, view, state, grad, kernel, number)
                for view, state, grad, kernel in rows
            ]

        def full():
            return layer_gradients(self._apply, kernels, None, vectors, inputs, dx)

        def low():
            taps = self._taps(views, states, number, sketched=False)
            return layer_gradients(self._apply, kernels, taps, vectors, inputs, dx)

        def sketched():
            taps = self._taps(views, states, number, sketched=True)
            return layer_gradients(self._apply, kernels, taps, vectors, inputs, dx)

        def unsketched():
            # as without a refresh, in the structure of one with it
            grads, d_vectors, d_inputs = low()
            pairs = zip(grads, jax.eval_shape(sketched)[0], strict=True)
            zeros = lambda x: jnp.zeros(x.shape, x.dtype)  # noqa: E731
            grads = [
                Projected(grad.low, jax.tree.map(zeros, shape.sketch)) for grad, shape in pairs
            ]
            return grads, d_vectors, d_inputs

        if plan != "full at a refresh":
            if plan == "sketch at a refresh":
                found = jax.lax.cond(self.due, sketched, unsketched)
            else:
                found = full() if plan == "full" else low()
            grads, d_vectors, d_inputs = found
            steps = steps_of(grads)
            return steps, self._projected(steps, ok), d_vectors, d_inputs

        # bases move inside the branch, and what leaves it is low-rank
        def refreshed():
            grads, d_vectors, d_inputs = full()
            steps = steps_of(grads)
            read = self._projected(steps, ok)
            return [(step.low, step.parts) for step in steps], read, d_vectors, d_inputs

        def standing():
            grads, d_vectors, d_inputs = low()
            own = [(grad.low, parts_of(state)) for grad, state in zip(grads, states, strict=True)]
            return own, jnp.asarray(True), d_vectors, d_inputs

        own, read, d_vectors, d_inputs = jax.lax.cond(self.due, refreshed, standing)
        steps = steps_of([Projected(low) for low, _ in own])
        for step, (_, parts) in zip(steps, own, strict=True):
            step.parts = parts
        return steps, read, d_vectors, d_inputs

    def _taps(self, views, states, number, *, sketched: bool) -> list[Tap]:
        """A tap a matrix of one layer, with what a sketch multiplies by where one is taken."""
        taps = []
        matrices = [matrix for matrix in self.matrices if matrix is not None]
        for view, state, matrix in zip(views, states, matrices, strict=True):
            sketch = None
            if sketched:
                sketch = sketch_basis(self.config, view, state, self.now, number)
            taps.append(Tap(state.basis, None, sketch, None, view, matrix.projector))
        return taps

    def _projected(self, steps: list[MatrixStep], ok) -> jax.Array:
        """Refreshes and projects the matrices of a layer; whether what a refresh reads is
        finite."""
        now, read = self.now, jnp.asarray(True)
        refreshes = self.config.refresh_schedule.when == "before" and self.due is not False
        if refreshes and self.config.guard:
            read = all_finite([step.matrix for step in steps]) | ~jnp.asarray(self.due)
        begins: Scalar = False
        gradients = [step.gradient for step in steps if step.gradient is not None]
        if self.config.starts_before and gradients:
            begins, readable = step_lib.starts(self.config, now, gradients)
            begins = ok & begins
            read = read if readable is None else read & readable
        looks = self.due if begins is False else self.due | begins
        for step in steps:
            step.look(looks, now)
            step.start(begins, now)
            if refreshes:
                step.refresh(ok & read & self.due, now)
            step.project()
        return read

    def _apply(self, kernels, vectors, x):
        """One layer, from its leaves."""
        own, rest = iter(kernels), iter(vectors)
        leaves = [next(rest) if view is None else next(own) for view in self.views]
        return self.stack.layer(jax.tree.unflatten(self.treedef, leaves), x)

    def _write(self, step: MatrixStep, kernel, ok, factor, number):
        """The new kernel of one layer; leaves the new states in `step`, the old ones where not
        ok."""
        update, moved = leaf_update(self.config, step.view, step.arrays(), factor, ok, {})
        step.parts |= moved
        if self.config.refresh_schedule.when == "after":
            step.refresh(self.due if self.due is False else ok & self.due, self.now)
        step.advance(ok, self.now)
        path = step.old.view.path
        write = self._writer(ok, path, decays=self._decays()[path])
        return write(kernel, step.view.restore(update), number)

    def _decays(self) -> dict[str, bool]:
        recipe = self.form.recipe
        report = self.config.report(self.params)
        placeholders = jax.tree.map(lambda _: 0, self.params, is_leaf=is_quantized)
        decay, mask = recipe.weight_decay, recipe.mask
        flags = jax.tree.leaves(selected_for_decay(placeholders, self.params, decay, mask))
        return {leaf.path: flag for leaf, flag in zip(report.leaves, flags, strict=True)}

    def _writer(self, ok, path: str, *, decays: bool, plain: bool = False) -> Write:
        form, now = self.form, self.now.step
        rate = form.recipe.rate(self.state.rate.count, plain=plain)
        return Write.of(form.recipe, form.rounding, rate, decays, ok, now, path)

    def _next(self, value, d_rest, vectors, moved, accepted: _Accepted):
        """`(params, state, value)` after the step."""
        kernels, states = moved
        params, plain = self._write_plain(d_rest, vectors, kernels, accepted)
        own_states = iter(states)
        found = [matrix for matrix in self.matrices if matrix is not None]
        matrices = [dataclasses.replace(matrix, **next(own_states)) for matrix in found]
        # a step counts once: as accepted, skipped or partly skipped
        ok, partly = accepted.ok, accepted.partly
        count = ok.astype(jnp.int32)
        projection = self.state.projection
        projection = projection._replace(
            refresh_schedule=step_lib.next_schedule(self.config, projection, self.due, count),
            step=projection.step + count,
            skipped=projection.skipped + (~ok & ~partly).astype(jnp.int32),
            partly_skipped=projection.partly_skipped + partly.astype(jnp.int32),
            refreshes=projection.refreshes + count * jnp.asarray(self.due, jnp.int32),
            matrices=step_lib.replace_matrices(projection.matrices, matrices),
            plain=plain,
        )
        rate = LearningRateState(self.state.rate.count + count)
        new = self.state._replace(projection=projection, rate=rate)
        return params, new, value

    def _write_plain(self, d_rest, vectors, kernels, accepted: _Accepted):
        """`(params, state)`: the leaves that are not projected are updated as one group."""
        treedef: Any
        name, ok = self.stack.name, accepted.ok
        own = iter(kernels)
        stacked = [
            leaf if view is None else next(own)
            for leaf, view in zip(self.leaves, self.views, strict=True)
        ]
        # kernels stand in the place of gradients that nobody reads
        rows = zip(self.leaves, vectors, self.views, strict=True)
        d_stacked = [vector if view is None else kernel for kernel, vector, view in rows]
        params = self.rest | {name: jax.tree.unflatten(self.treedef, stacked)}
        grads = d_rest | {name: jax.tree.unflatten(self.treedef, d_stacked)}

        report = self.config.report(self.params)
        leaves, treedef = step_lib.flatten(params)
        gradients = step_lib.flatten(grads)[0]
        views = [leaf.view for leaf in report.leaves]
        paths = [leaf.path for leaf in report.leaves]
        factor, now = accepted.factor, self.now
        prepared = step_lib.Prepared(
            treedef, leaves, gradients, views, paths, {}, False, False, ok, factor, now
        )
        decays = self._decays()
        writers = {
            i: self._writer(ok, path, decays=decays[path], plain=True)
            for i, (path, view) in enumerate(zip(paths, views, strict=True))
            if view is None
        }
        old = self.state.projection.plain
        found, plain = write_plain(self.form, prepared, old, params, {}, writers)
        for i, leaf in found.items():
            leaves[i] = leaf
        return jax.tree.unflatten(treedef, leaves), plain


class _Accepted(NamedTuple):
    """What became of a step: whether it is accepted, whether its top layers alone have moved, and
    the factor of clipping or None."""

    ok: jax.Array
    partly: jax.Array
    factor: jax.Array | None


def _take(tree: Pytree, i: jax.Array) -> Pytree:
    """Layer i of arrays `(L, ...)`."""
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), tree)


def _put(tree: Pytree, i: jax.Array, new: Pytree) -> Pytree:
    """Arrays `(L, ...)` with another layer i."""

    def change(x, y):
        return jax.lax.dynamic_update_index_in_dim(x, y.astype(x.dtype), i, 0)

    return jax.tree.map(change, tree, new)
