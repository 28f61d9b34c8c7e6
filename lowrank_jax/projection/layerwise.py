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
from typing import Any

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
        self, stack: Stack, form: Fused, params: Any, state: Any, args: Any, exact_skip: bool
    ):
        self.stack, self.form, self.params, self.state, self.args = stack, form, params, state, args
        self.config = form.recipe.projection
        self.measured = exact_skip or self.config.clip_norm is not None
        self.plan = gradient_mode(self.config)
        self.rest = {name: tree for name, tree in params.items() if name != stack.name}
        leaves, self.treedef = step_lib.flatten(params[stack.name])
        report = self.config.report(params)
        self.views = [leaf.view for leaf in report.leaves if leaf.path.startswith(f"{stack.name}/")]
        outside = [view.path for view in report.projected if view not in self.views]
        if outside or any(view is not None and not view.layered for view in self.views):
            raise ValueError(
                "layerwise: "
                f"{outside or [v.path for v in self.views if v is not None and not v.layered]} "
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
        self.takes_full: Any = None
        self.otherwise = self.plan
        if self.plan == "full at a refresh" and self.config.refresh_schedule.when == "after":
            self.takes_full, self.otherwise = self.due, "taps"
        elif self.config.starts_before and self.plan != "full":
            self.takes_full = self.now.step == 0

    def run(self):
        inputs, value, d_rest, d_top = self._forward()
        ok = jnp.isfinite(value) & all_finite([d_top]) if self.config.guard else jnp.asarray(True)
        ok = sharding.everywhere(
            ok, self.params, self.state
        )  # rows of a batch may lie on several devices
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
        return self._finish(value, d_rest, vectors, moved, ok, factor, partly)

    def _measure(self, inputs, d_rest, d_top, ok):
        """`(whether the step is accepted, factor of clipping or None)`, by a backward pass that
        writes nothing."""
        fine, _, square, vectors, d_bottom, _ = self._backward(
            inputs, d_top, ok, None, update=False
        )
        plain = self._plain(self._all_rest(d_rest, d_bottom), vectors)
        square = square + sum((energy(leaf) for leaf in plain), jnp.zeros(()))
        if self.config.guard:
            ok = ok & fine & all_finite(plain) & jnp.isfinite(square)
        if self.config.clip_norm is None:
            return ok, None
        return ok, jnp.minimum(1.0, self.config.clip_norm / jnp.maximum(jnp.sqrt(square), 1e-30))

    def _plain(self, d_rest, vectors):
        """The gradients of what is not projected."""
        return [leaf for leaf in vectors if leaf is not None] + jax.tree.leaves(d_rest)

    def _forward(self):
        """Inputs of the layers `(L, k, ...)`, the value, and the gradients at the top."""
        stack = self.stack
        bottom = jax.lax.map(lambda args: stack.before(self.rest, *args), self.args)

        def layer(x, parameters):
            return jax.lax.map(lambda one: stack.layer(parameters, one), x), x

        top, inputs = jax.lax.scan(layer, bottom, self.params[stack.name])

        def one(total, part):
            x, args = part
            value, (rest, dx) = jax.value_and_grad(
                lambda rest, x: stack.after(rest, x, *args), (0, 1)
            )(self.rest, x)
            wide = (
                jax.tree.map(lambda g: g.astype(jnp.float32), rest)
                if self.microbatches > 1
                else rest
            )
            total = (
                wide if total[0] is None else jax.tree.map(jnp.add, total[0], wide),
                total[1] + value,
            )
            return total, dx

        if self.microbatches == 1:
            (rest, value), dx = one(
                (None, jnp.zeros(())), jax.tree.map(lambda x: x[0], (top, self.args))
            )
            return inputs, value, rest, dx[None]
        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), self.rest)
        (rest, value), dx = sharding.scan(one, (zeros, jnp.zeros(())), (top, self.args))
        count = self.microbatches
        return inputs, value / count, jax.tree.map(lambda g: g / count, rest), dx / count

    def _all_rest(self, d_rest, d_bottom):
        """Gradients outside the stack: from the top, and through the inputs of the first layer."""

        def one(total, part):
            args, dx = part
            _, pull = jax.vjp(lambda rest: self.stack.before(rest, *args), self.rest)
            return jax.tree.map(lambda t, g: t + g.astype(t.dtype), total, pull(dx)[0]), None

        return jax.lax.scan(one, d_rest, (self.args, d_bottom))[0]

    def _backward(self, inputs, d_top, ok, factor, *, update: bool):
        """Down the stack: `(whether all was finite, whether the top layer was, sum of squares,
        vectors' gradients, the bottom's, moved)`."""
        layers = jax.tree.leaves(inputs)[0].shape[0]
        kernels = [
            leaf for leaf, view in zip(self.leaves, self.views, strict=True) if view is not None
        ]
        states = [parts_of(m) for m in self.matrices if m is not None]
        vectors = [leaf for leaf, view in zip(self.leaves, self.views, strict=True) if view is None]
        gathered = [jnp.zeros(leaf.shape, leaf.dtype) for leaf in vectors]

        def take(tree, i):
            return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), tree)

        def put(tree, i, new):
            change = lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y.astype(x.dtype), i, 0)  # noqa: E731
            return jax.tree.map(change, tree, new)

        def body(i, carry):
            number = layers - 1 - i
            dx, kernels, states, own_states, gathered, fine, top, square = carry
            part = (
                take(kernels, number),
                own_states,
                take(vectors, number),
                take(inputs, number),
                dx,
            )
            one = self._move_layer if update else self._measure_layer
            written, d_vectors, dx, fine, energies = one(part, number, ok, fine, factor)
            gathered, square = put(gathered, number, d_vectors), square + energies
            if update:
                kernels, states = (
                    put(old, number, new)
                    for old, new in zip((kernels, states), written, strict=True)
                )
            top = jnp.where(i == 0, fine, top)
            own_states = take(states, jnp.maximum(number - 1, 0))
            return dx, kernels, states, own_states, gathered, fine, top, square

        # states travel with the loop, see `in_place`; kernels would be held twice
        sums = sharding.vary(
            (jnp.asarray(True), jnp.asarray(True), jnp.zeros(())),
            sharding.varying(self.params, self.state),
        )
        start = (d_top, kernels, states, take(states, layers - 1), gathered, *sums)
        dx, kernels, states, _, gathered, fine, top, square = jax.lax.fori_loop(
            0, layers, body, start
        )
        placed = iter(gathered)
        vectors = [None if view is not None else next(placed) for view in self.views]
        return fine, top, square, vectors, dx, (kernels, states)

    def _measure_layer(self, part, number, ok, fine, factor):
        """As `_move_layer`, of a pass that writes nothing."""

        def by(plan):
            accepted = ok & fine if self.config.guard else ok
            steps, read, d_vectors, dx = self._layer(part, number, accepted, plan)
            return None, d_vectors, dx, *self._judged(steps, read, fine)

        # bases that move after the update do not change what is measured, but for the first one
        starting = self.now.step == 0 if self.config.starts_before else None
        return self._either(by, None if self.takes_full is None else starting)

    def _either(self, by: Callable[[str], Any], takes_full: Any) -> Any:
        """A layer's work by full gradients where the scalar says so, if there is one."""
        if takes_full is None:
            return by(self.otherwise)
        return jax.lax.cond(takes_full, lambda: by("full"), lambda: by(self.otherwise))

    def _move_layer(self, part, number, ok, fine, factor):
        """`((new kernels, new states), gradients of the vectors, gradient of the inputs, whether all
        was finite down to here, sum of squares)` of one layer."""
        guarded = self.config.guard and not self.measured

        def by(plan):
            steps, read, d_vectors, dx = self._layer(
                part, number, ok & fine if guarded else ok, plan
            )
            good, energies = self._judged(steps, read, fine)
            # from the first layer on that is not finite, none below it is written either
            write = ok & good if guarded else ok
            kernels = [
                self._write(step, kernel, write, factor, number)
                for step, kernel in zip(steps, part[0], strict=True)
            ]
            return (kernels, [step.parts for step in steps]), d_vectors, dx, good, energies

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

        def steps_of(grads, project=True):
            steps = [
                MatrixStep(self.config, view, state, grad, kernel, number)
                for view, state, grad, kernel in zip(views, states, grads, kernels, strict=True)
            ]
            return steps, self._projected(steps, ok) if project else None

        def low(sketched):
            now = self.now
            taps = []
            for view, state, matrix in zip(views, states, matrices, strict=True):
                basis = sketch_basis(self.config, view, state, now, number) if sketched else None
                taps.append(Tap(state.basis, None, basis, None, view, matrix.projector))
            return layer_gradients(self._apply, kernels, taps, vectors, inputs, dx)

        def whole():
            return layer_gradients(self._apply, kernels, None, vectors, inputs, dx)

        if plan in ("full", "taps"):
            grads, d_vectors, dx = whole() if plan == "full" else low(False)
            return *steps_of(grads), d_vectors, dx
        if plan == "sketch at a refresh":
            shapes = jax.eval_shape(lambda: low(True))[0]

            def unsketched():
                grads, *others = low(False)
                zeros = [jnp.zeros(shape.sketch.shape, shape.sketch.dtype) for shape in shapes]
                return [
                    Projected(grad.low, zero) for grad, zero in zip(grads, zeros, strict=True)
                ], *others

            grads, d_vectors, dx = jax.lax.cond(self.due, lambda: low(True), unsketched)
            return *steps_of(grads), d_vectors, dx

        # full at a refresh: bases move inside the branch, and what leaves it is low-rank
        def refreshed():
            grads, d_vectors, d_inputs = whole()
            steps, read = steps_of(grads)
            return [(step.low, step.parts) for step in steps], read, d_vectors, d_inputs

        def standing():
            grads, d_vectors, d_inputs = low(False)
            own = [(grad.low, parts_of(state)) for grad, state in zip(grads, states, strict=True)]
            return own, jnp.asarray(True), d_vectors, d_inputs

        own, read, d_vectors, dx = jax.lax.cond(self.due, refreshed, standing)
        steps, _ = steps_of([Projected(low) for low, _ in own], project=False)
        for step, (_, parts) in zip(steps, own, strict=True):
            step.parts = parts
        return steps, read, d_vectors, dx

    def _projected(self, steps: list[MatrixStep], ok) -> jax.Array:
        """Refreshes and projects the matrices of a layer; whether what a refresh reads is
        finite."""
        now, read = self.now, jnp.asarray(True)
        refreshes = self.config.refresh_schedule.when == "before" and self.due is not False
        if refreshes and self.config.guard:
            read = all_finite([step.matrix for step in steps]) | ~jnp.asarray(self.due)
        begins: Any = False
        gradients = [step.gradient for step in steps if step.gradient is not None]
        if self.config.starts_before and gradients:
            begins, whole = step_lib.starts(self.config, now, gradients)
            begins, read = ok & begins, read if whole is None else read & whole
        for step in steps:
            step.look(self.due if begins is False else self.due | begins, now)
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
        write = self._writer(ok, step.old.view.path, decays=self._decays()[step.old.view.path])
        return write(kernel, step.view.restore(update), number)

    def _decays(self) -> dict[str, bool]:
        recipe = self.form.recipe
        report = self.config.report(self.params)
        flags = selected_for_decay(
            jax.tree.map(lambda _: 0, self.params, is_leaf=is_quantized),
            self.params,
            recipe.weight_decay,
            recipe.mask,
        )
        return {
            leaf.path: flag
            for leaf, flag in zip(report.leaves, jax.tree.leaves(flags), strict=True)
        }

    def _writer(self, ok, path: str, *, decays: bool, plain: bool = False) -> Write:
        form, now = self.form, self.now.step
        rate = form.recipe.rate(self.state.rate.count, plain=plain)
        return Write.of(form.recipe, form.rounding, rate, decays, ok, now, path)

    def _finish(self, value, d_rest, vectors, moved, ok, factor, partly):
        """The plain leaves as one group, and the new trees."""
        kernels, states = moved
        own, moving = iter(kernels), iter(states)
        stacked = [
            leaf if view is None else next(own)
            for leaf, view in zip(self.leaves, self.views, strict=True)
        ]
        params = self.rest | {self.stack.name: jax.tree.unflatten(self.treedef, stacked)}
        grads = d_rest | {
            self.stack.name: jax.tree.unflatten(
                self.treedef,
                [
                    kernel if view is not None else vector
                    for kernel, vector, view in zip(self.leaves, vectors, self.views, strict=True)
                ],
            )
        }
        projection = self.state.projection
        report = self.config.report(self.params)
        leaves, treedef = step_lib.flatten(params)
        gradients = step_lib.flatten(grads)[0]
        views = [leaf.view for leaf in report.leaves]
        paths = [leaf.path for leaf in report.leaves]
        prepared = step_lib.Prepared(
            treedef, leaves, gradients, views, paths, {}, False, False, ok, factor, self.now
        )
        decays = self._decays()
        numbers = [i for i, view in enumerate(views) if view is None]
        writers = {
            i: self._writer(ok, paths[i], decays=decays[paths[i]], plain=True) for i in numbers
        }
        found, plain = write_plain(self.form, prepared, projection.plain, params, {}, writers)
        for i, leaf in found.items():
            leaves[i] = leaf
        matrices = [dataclasses.replace(m, **next(moving)) for m in self.matrices if m is not None]
        accepted = ok.astype(jnp.int32)
        projection = projection._replace(
            refresh_schedule=step_lib.next_schedule(self.config, projection, self.due, accepted),
            step=projection.step + accepted,
            skipped=projection.skipped + (~ok & ~partly).astype(jnp.int32),
            partly_skipped=projection.partly_skipped + partly.astype(jnp.int32),
            refreshes=projection.refreshes + accepted * jnp.asarray(self.due, jnp.int32),
            matrices=step_lib.replace_matrices(projection.matrices, matrices),
            plain=plain,
        )
        rate = LearningRateState(self.state.rate.count + accepted)
        new = self.state._replace(projection=projection, rate=rate)
        return jax.tree.unflatten(treedef, leaves), new, value
