"""The fused form of a named optimizer: `step(params, grads, state) -> (params, state)`, layer by
layer.

The optax form makes an update as large as the parameters and leaves its addition to the caller.
Here each layer of a stack is back-projected, decayed and written in place, one after the other, so
that no full-size update exists: beside donated parameters and state a step needs the scratch of one
matrix. Both forms have the same state and, in float32, the same result; the fused one adds in
float32 and rounds once, to nearest or stochastically.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_jax import deprecations, sharding
from lowrank_jax.checks import check_number, is_integer
from lowrank_jax.optim.learning_rate import LearningRateState, selected_for_decay
from lowrank_jax.projection import fused_kernel
from lowrank_jax.projection import step as step_lib
from lowrank_jax.projection.matrix_step import MOVING, MatrixStep, leaf_update
from lowrank_jax.projection.optimizers.recipe import Recipe, RecipeState
from lowrank_jax.projection.state import Rebased
from lowrank_jax.projection.write import Write
from lowrank_jax.reprs import Short
from lowrank_jax.typing import Kernel, Pytree, Rate

ROUNDING = ("nearest", "stochastic")
IMPLEMENTATIONS = ("xla", "pallas")


@deprecations.options("lrx.projection.Fused")
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Fused(Short):
    """The fused form of a recipe.

    Equal to itself alone: a mask in it may be a dict, and `jax.jit(form.step)` hashes it.

    Attributes:
      recipe: projection, learning rate and decay.
      rounding: of parameters stored in bfloat16 or as "linear" quantised blocks: "nearest" or
        "stochastic".
      plain_block: entries of a plain leaf that are updated at once, or None for all of it.
      implementation: "xla" or "pallas", see `lrx.fused`.

    >>> import lowrank_jax as lrx
    >>> lrx.fused(lrx.galore(1e-2, rank=2)).recipe.decay
    'after'
    """

    recipe: Recipe
    rounding: str = "nearest"
    plain_block: int | None = None
    implementation: str = "xla"

    products = deprecations.attribute("lrx.projection.Fused", "products")

    def __post_init__(self):
        if self.implementation not in IMPLEMENTATIONS:
            raise ValueError(
                f"implementation={self.implementation!r} must be one of {IMPLEMENTATIONS}"
            )
        sampler = self.recipe.projection.sampler
        if sampler.samples:
            raise ValueError(
                f"sampler={sampler!r} has no fused form, and so neither train_step nor the "
                "layer-wise one: take the optax form, jax.value_and_grad and update"
            )
        if self.implementation == "pallas":
            fused_kernel.check(self.recipe.projection)
        if self.rounding not in ROUNDING:
            raise ValueError(f"rounding={self.rounding!r} must be one of {ROUNDING}")
        block, plain = self.plain_block, self.recipe.projection.plain
        if block is not None and not (is_integer(block) and block >= 1):
            raise ValueError(
                f"plain_block={block!r} must be a positive integer, or None for whole leaves"
            )
        if block is not None and not plain.elementwise:
            raise ValueError(
                f"plain_block={block}: {type(plain).__name__} may couple the entries of a leaf; "
                "leave it None, or give plain=lrx.inner.adam(...), stored8 or not"
            )

    def init(self, params: Pytree) -> RecipeState:
        """The state of the optax form: both forms share it."""
        return self.recipe.optax().init(params)

    def step(
        self,
        params: Pytree,
        grads: Pytree,
        state: RecipeState,
        learning_rate: Rate | None = None,
        *,
        taps: Pytree = None,
        rebased: Rebased | None = None,
        **extra: Any,
    ) -> tuple[Any, RecipeState]:
        """The new parameters and state. Donate both: nothing else is as large as the parameters.

        Args:
          params: the parameters; quantised leaves are requantised.
          grads: like `params`, with `Projected` leaves where taps were.
          state: of `init`.
          learning_rate: a number in place of the recipe's learning rate or schedule.
          taps: of `lrx.taps(state)`, where grads hold `Projected` leaves.
          rebased: what `rebase` returned beside grads and state, so that no basis moves again.
          **extra: for the inner transformation.
        """
        with sharding.mesh_of((params, grads)):
            return self._step(params, grads, state, learning_rate, taps, rebased, extra)

    def rate(self, state: RecipeState, learning_rate: Rate | None = None) -> Any:
        """The learning rate of the next step: this number, or the recipe's."""
        return self.recipe.rate(state.rate.count, given=learning_rate)

    def rebase(
        self, params: Pytree, grads: Pytree, state: RecipeState, learning_rate: Rate | None = None
    ) -> tuple[Any, RecipeState, Rebased]:
        """`(projected gradients, state, rebased)` at a due refresh: the part of a step that reads
        full gradients.

        What remains, `step(..., taps=lrx.taps(state), rebased=rebased)`, is the same at a refresh
        and between two. A `learning_rate` is given to both.
        """
        check_number("learning_rate", learning_rate)
        rate = self.rate(state, learning_rate)
        with sharding.mesh_of((params, grads)):
            grads, projection, rebased = step_lib.rebase(
                self.recipe.projection, grads, state.projection, params, rate
            )
        return grads, state._replace(projection=projection), rebased

    def _step(self, params, grads, state, learning_rate, taps, rebased, extra):
        config, recipe = self.recipe.projection, self.recipe
        check_number("learning_rate", learning_rate)
        if rebased is not None and not isinstance(rebased, Rebased):
            raise ValueError(
                f"rebased={rebased!r} must be the third that rebase returns: grads, state, rebased = "
                "form.rebase(params, grads, state)"
            )
        rate = self.rate(state, learning_rate)
        prepared = step_lib.prepare(config, grads, state.projection, params, taps, rebased, rate)
        accepted = True if prepared.ok is None else prepared.ok
        whole = jax.tree.unflatten(prepared.treedef, prepared.references)
        decays = jax.tree.leaves(
            selected_for_decay(
                jax.tree.unflatten(prepared.treedef, [0] * len(prepared.views)),
                whole,
                recipe.weight_decay,
                recipe.mask,
            )
        )
        outputs, now = list(prepared.references), state.projection.step
        by_kernel = (
            fused_kernel.local(prepared.steps, outputs) if self.implementation == "pallas" else ()
        )
        for i, step in prepared.steps.items():
            write = Write.of(recipe, self.rounding, rate, decays[i], accepted, now, step.view.path)
            if i in by_kernel:
                outputs[i] = fused_kernel.write_leaf(step, outputs[i], prepared, write)
            else:
                outputs[i] = _write_leaf(step, outputs[i], prepared, extra, write)
        plain_rate = recipe.rate(state.rate.count, plain=True, given=learning_rate)
        writers = {
            i: Write.of(
                recipe, self.rounding, plain_rate, decays[i], accepted, now, prepared.paths[i]
            )
            for i, view in enumerate(prepared.views)
            if view is None
        }
        found, plain = write_plain(self, prepared, state.projection.plain, params, extra, writers)
        for i, leaf in found.items():
            outputs[i] = leaf
        projection = step_lib.next_state(config, prepared, state.projection, plain)
        count = state.rate.count + jnp.asarray(accepted, jnp.int32)
        new = jax.tree.unflatten(prepared.treedef, outputs)
        return new, state._replace(projection=projection, rate=LearningRateState(count))


def write_plain(
    form: Fused,
    prepared: step_lib.Prepared,
    state: Pytree,
    params: Pytree,
    extra: dict[str, Any],
    writers: dict[int, Write],
) -> tuple[dict[int, Any], Any]:
    """`({number: new plain leaf}, new state)`; `writers` has a `Write` by the number of each plain
    leaf.

    With `plain_block` a leaf is taken in blocks of rows, one after the other and in place: decoded
    moments, direction and float32 update exist for one block at a time. Those of a whole leaf in
    bfloat16 are several times its size.
    """
    config, leaves, ok = (
        form.recipe.projection,
        {i: prepared.references[i] for i in writers},
        prepared.ok,
    )
    if form.plain_block is None:
        updates, state = step_lib.update_plain(config, prepared, state, params, extra)
        return {
            i: writers[i](leaves[i], u, 0) for i, u in zip(writers, updates, strict=True)
        }, state
    new, parts = {}, []
    for (i, write), own in zip(writers.items(), config.plain.by_leaf(state), strict=True):

        def one(number, grad, param, own, write=write):
            grad = grad.astype(jnp.float32) if prepared.factor is None else grad * prepared.factor
            given = param if config.plain.reads_params else None
            direction, scale, own = config.plain.guarded(grad, own, params=given, ok=ok, **extra)
            update = jnp.asarray(scale * direction)
            return write(param, update if ok is None else jnp.where(ok, update, 0), number), own

        new[i], moved = _by_rows(
            one, form.plain_block, prepared.paths[i], prepared.gradients[i], leaves[i], own
        )
        parts.append(moved)
    return new, config.plain.of_leaves(state, parts, ok, extra)


def _by_rows(
    function: Callable[..., Any], block: int, path: str, grad: jax.Array, param: Kernel, own: Any
):
    """`function(number, grad, param, own) -> (param, own)` on blocks of rows, in place; scalars in
    `own` stay."""
    rows, size = (
        param.shape[0] if param.ndim > 1 else 1,
        max(1, block // math.prod(param.shape[1:])),
    )
    if size >= rows:
        return function(0, grad, param, own)
    if (sharding.explicit_spec(param) or (None,))[0] is not None:
        raise ValueError(
            f"plain_block={block}: leaf {path!r} is sharded along its rows, which blocks would "
            "gather; leave it None"
        )

    def take(x, number):
        return jax.lax.dynamic_slice_in_dim(x, number * size, size) if x.ndim else x

    def put(x, new, number):
        return jax.lax.dynamic_update_slice_in_dim(x, new, number * size, 0) if x.ndim else x

    def one(number, param, own):
        return function(number, take(grad, number), param, own)

    new = in_place(one, rows // size, take, put, param, own)
    rest = rows % size
    if not rest:
        return new
    last = lambda x: x[rows - rest :] if x.ndim else x  # noqa: E731
    tail = function(rows // size, last(grad), *jax.tree.map(last, new))
    return jax.tree.map(lambda x, y: put(x, y.astype(x.dtype), rows // size), new, tail)


def _write_leaf(
    step: MatrixStep,
    param: Kernel,
    prepared: step_lib.Prepared,
    extra: dict[str, Any],
    write: Write,
):
    """The new parameter; leaves the new states in `step`."""
    view, factor, ok = step.view, prepared.factor, prepared.ok
    if not view.layered or (view.spec is not None and view.spec[0] is not None):
        return write(param, view.restore(step.update(factor, ok, extra)), 0)
    config, arrays, layer = step.config, step.arrays(), view.layer()
    take = functools.partial(jax.lax.dynamic_index_in_dim, keepdims=False)
    put = functools.partial(jax.lax.dynamic_update_index_in_dim, axis=0)
    moving = {name: arrays.pop(name) for name in MOVING}

    def one(number, param, moving):
        trees = moving | jax.tree.map(lambda x: take(x, number), arrays)
        update, moved = leaf_update(config, layer, trees, factor, ok, extra)
        return write(param, layer.restore(update), number), moved

    param, moved = in_place(one, view.batch[0], take, put, param, moving)
    step.parts |= moved
    return param


def in_place(
    function: Callable, count: int, take: Callable, put: Callable, param: Kernel, state: Pytree
) -> tuple[Any, Any]:
    """`(param, state)` after `function(number, param, state)` on each of `count` parts
    `take(x, number)` of both.

    A part of the state travels with the loop from the end of the step before. If it were taken
    where it is used, every operation that uses it would read the whole state for itself, some of
    them after it was written, and XLA would copy the whole state for each part. Parameters are read
    once, by what writes them.
    """

    def of(tree, number):
        return jax.tree.map(lambda x: take(x, number), tree)

    def body(number, carry):
        param, state, own = carry
        new = function(number, of(param, number), own)
        param, state = jax.tree.map(
            lambda x, y: put(x, y.astype(x.dtype), number), (param, state), new
        )
        return param, state, of(state, number + 1)

    return jax.lax.fori_loop(0, count, body, (param, state, of(state, 0)))[:2]


@deprecations.options("lrx.fused")
def fused(
    transformation: Any,
    *,
    rounding: str = "nearest",
    plain_block: int | None = None,
    implementation: str = "xla",
) -> Fused:
    """The fused form of a named optimizer of this library.

    Args:
      transformation: `lrx.galore(...)` or another named optimizer.
      rounding: "nearest", or "stochastic" for parameters in bfloat16 or "linear" quantised blocks,
        so that updates below half a unit in the last place are not lost but made with the right
        probability.
      plain_block: entries of leaves that are not projected that are updated at once, in blocks of
        rows; None for whole leaves. On one device a block of some millions saves the float32
        scratch of embedding and head.
      implementation: "xla", or "pallas": `lrx.kernels.low_rank_adam` makes moments, product and weight of
        a stack in one program on a TPU and two on a GPU. It is for Adam, stored in 8 bits or not,
        with a stored basis in float32 or bfloat16, which drops the rest of the gradient. Inside
        `lrx.meshes.use(mesh, parameters=...)` of an auto mesh each writes its own block of leaves
        whose shrunk dimension is whole (`side=lrx.projection.sides_for(...)`), and XLA's form serves the
        others; a warning says where it serves all. No device has timed it.

    Raises:
      TypeError: for an optax chain or any transformation without a recipe.
      ValueError: for an unknown rounding or implementation; at the first step for stochastic rounding of
        a leaf in NF4 or in a dynamic code, which have none; for a `plain_block` where the inner
        transformation of plain leaves may couple the entries of a leaf, or where a leaf is sharded
        along its rows; for implementation="pallas" where inner, residual, projector, or at the first step
        a leaf, is one that the kernel does not take.

    >>> import jax, jax.numpy as jnp
    >>> import lowrank_jax as lrx
    >>> optimizer = lrx.fused(lrx.galore(1e-2, rank=2))
    >>> params = {"kernel": jnp.ones((4, 8))}
    >>> grads, state = {"kernel": jnp.ones((4, 8))}, optimizer.init(params)
    >>> params, state = jax.jit(optimizer.step, donate_argnums=(0, 2))(params, grads, state)
    >>> print(params["kernel"][0, :2].round(4))
    [0.9987 0.9987]
    """
    recipe = getattr(transformation, "recipe", None)
    if recipe is None:
        raise TypeError(
            f"{type(transformation).__name__} has no fused form: nothing can look inside "
            "optax.chain or inject_hyperparams, and scale_by_projection has no learning rate. Pass "
            "a named optimizer such as lrx.galore(...), with clip_norm= in place of a chained clip "
            "and learning_rate= of step in place of an injected one"
        )
    return Fused(
        recipe=recipe, rounding=rounding, plain_block=plain_block, implementation=implementation
    )
