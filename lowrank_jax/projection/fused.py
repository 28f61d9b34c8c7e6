"""The fused form of a named optimizer: `step(params, grads, state) -> (params, state)`, layer by layer.

The optax form makes an update as large as the parameters and leaves its addition to the caller. Here each layer of a
stack is back-projected, decayed and written in place, one after the other, so that no full-size update exists: beside
donated parameters and state a step needs the scratch of one matrix. Both forms have the same state and, in float32,
the same result; the fused one adds in float32 and rounds once, to nearest or stochastically.
"""

from __future__ import annotations

import dataclasses
import zlib
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from lowrank_jax import linalg, sharding
from lowrank_jax.projection import step as step_lib
from lowrank_jax.projection.learning_rate import LearningRateState, decayed_step, selected_for_decay
from lowrank_jax.projection.matrix_step import MatrixStep, finish, select

if TYPE_CHECKING:
    from lowrank_jax.projection.optimizers import Recipe, RecipeState

ROUNDING = ("nearest", "stochastic")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fused:
    """The fused form of a recipe.

    Attributes:
      recipe: projection, learning rate and decay.
      rounding: of parameters stored in bfloat16 or as quantised blocks: "nearest" or "stochastic".

    >>> import lowrank_jax as lr
    >>> lr.fused(lr.galore(1e-2, rank=2)).recipe.when
    'post'
    """

    recipe: Recipe
    rounding: str = "nearest"

    def __post_init__(self):
        if self.rounding not in ROUNDING:
            raise ValueError(f"rounding={self.rounding!r} must be one of {ROUNDING}")

    def init(self, params: Any) -> RecipeState:
        """The state of the optax form: both forms share it."""
        return self.recipe.optax().init(params)

    def step(
        self,
        params: Any,
        grads: Any,
        state: RecipeState,
        learning_rate: Any = None,
        *,
        taps: Any = None,
        rebased: bool = False,
        **extra: Any,
    ) -> tuple[Any, RecipeState]:
        """The new parameters and state. Donate both: nothing else is as large as the parameters.

        Args:
          params: the parameters; quantised leaves are requantised.
          grads: like `params`, with `Projected` leaves where taps were.
          state: of `init`.
          learning_rate: a number in place of the recipe's learning rate or schedule.
          taps: of `lr.taps(state)`, where grads hold `Projected` leaves.
          rebased: grads and state come from `rebase`, so that no basis moves again.
          **extra: for the inner transformation.
        """
        with sharding.mesh_of((params, grads)):
            return self._step(params, grads, state, learning_rate, taps, rebased, extra)

    def rebase(self, params: Any, grads: Any, state: RecipeState) -> tuple[Any, RecipeState]:
        """`(projected gradients, state)` at a due refresh: the part of a step that reads full gradients.

        What remains, `step(..., taps=lr.taps(state), rebased=True)`, is the same at a refresh and between two.
        """
        with sharding.mesh_of((params, grads)):
            grads, projection = step_lib.rebase(self.recipe.projection, grads, state.projection, params)
        return grads, state._replace(projection=projection)

    def _step(self, params, grads, state, learning_rate, taps, rebased, extra):
        config, recipe = self.recipe.projection, self.recipe
        prepared = step_lib.prepare(config, grads, state.projection, params, taps, rebased)
        rate = recipe.learning_rate if learning_rate is None else learning_rate
        rate = rate(state.schedule.count) if callable(rate) else rate
        accepted = True if prepared.ok is None else prepared.ok
        whole = jax.tree.unflatten(prepared.treedef, prepared.references)
        decays = jax.tree.leaves(selected_for_decay(
            jax.tree.unflatten(prepared.treedef, [0] * len(prepared.views)), whole, recipe.weight_decay, recipe.mask
        ))  # fmt: skip
        outputs = list(prepared.references)
        for i, step in prepared.steps.items():
            write = Write.of(self, rate, decays[i], accepted, state.projection.step, step.view.path)
            outputs[i] = _finish_leaf(step, outputs[i], prepared, extra, write)
        updates, plain = step_lib.update_plain(config, prepared, state.projection.plain, params, extra)
        numbers = [i for i, view in enumerate(prepared.views) if view is None]
        for i, update in zip(numbers, updates, strict=True):
            write = Write.of(self, rate, decays[i], accepted, state.projection.step, prepared.paths[i])
            outputs[i] = write(outputs[i], update, 0)
        projection = step_lib.finished(config, prepared, state.projection, plain)
        count = state.schedule.count + jnp.asarray(accepted, jnp.int32)
        new = jax.tree.unflatten(prepared.treedef, outputs)
        return new, state._replace(projection=projection, schedule=LearningRateState(count))


@dataclasses.dataclass(frozen=True)
class Write:
    """`param <- param + change`, in float32 and rounded once."""

    rounding: str
    rate: Any
    weight_decay: Any
    when: str
    accepted: Any
    key: jax.Array

    @classmethod
    def of(cls, form: Fused, rate: Any, decays: bool, accepted: Any, step: jax.Array, path: str) -> Write:
        """The writer of one leaf; its random numbers follow from the seed, the step and the path."""
        recipe = form.recipe
        key = jax.random.fold_in(jax.random.key(jnp.asarray(recipe.projection.seed, jnp.int32)), step)
        key = jax.random.fold_in(key, zlib.crc32(path.encode()))
        return cls(form.rounding, rate, recipe.weight_decay if decays else 0, recipe.when, accepted, key)

    def __call__(self, param: Any, update: jax.Array, layer: Any) -> Any:
        old = param.dequantize() if hasattr(param, "dequantize") else param.astype(jnp.float32)
        value = old + decayed_step(update, old, self.rate, self.weight_decay, self.when, self.accepted)
        key = jax.random.fold_in(self.key, layer) if self.rounding == "stochastic" else None
        if hasattr(param, "requantize"):
            return select(self.accepted, param.requantize(value, key), param)
        if key is None or param.dtype == jnp.float32:
            return value.astype(param.dtype)
        return linalg.stochastic_round(value, param.dtype, key)


def _finish_leaf(step: MatrixStep, param: Any, prepared: step_lib.Prepared, extra: dict[str, Any], write: Write):
    """The new parameter; leaves the new states in `step`."""
    view, factor, ok = step.view, prepared.factor, prepared.ok
    if not view.layered or (view.spec is not None and view.spec[0] is not None):
        return write(param, view.restore(step.finish(factor, ok, extra)), 0)
    arrays, layer = step.arrays(), view.layer()
    moving = {name: arrays.pop(name) for name in ("inner", "residual")}

    def body(number, carry):
        take = lambda x: jax.lax.dynamic_index_in_dim(x, number, keepdims=False)  # noqa: E731
        put = lambda x, new: jax.lax.dynamic_update_index_in_dim(x, new.astype(x.dtype), number, 0)  # noqa: E731
        param, own = jax.tree.map(take, carry)
        update, inner, residual = finish(step.config, layer, own | jax.tree.map(take, arrays), factor, ok, extra)
        new = (write(param, layer.restore(update), number), {"inner": inner, "residual": residual})
        return jax.tree.map(put, carry, new)

    param, moved = jax.lax.fori_loop(0, view.batch[0], body, (param, moving))
    step.inner, step.residual = moved["inner"], moved["residual"]
    return param


def fused(transformation: Any, *, rounding: str = "nearest") -> Fused:
    """The fused form of a named optimizer of this library.

    Args:
      transformation: `lr.galore(...)` or another named optimizer.
      rounding: "nearest", or "stochastic" for parameters in bfloat16 or quantised blocks, so that updates below half a
        unit in the last place are not lost but made with the right probability.

    Raises:
      TypeError: for an optax chain or any transformation without a recipe.

    >>> import jax, jax.numpy as jnp
    >>> import lowrank_jax as lr
    >>> optimizer = lr.fused(lr.galore(1e-2, rank=2))
    >>> params = {"kernel": jnp.ones((4, 8))}
    >>> grads, state = {"kernel": jnp.ones((4, 8))}, optimizer.init(params)
    >>> params, state = jax.jit(optimizer.step, donate_argnums=(0, 2))(params, grads, state)
    >>> print(params["kernel"][0, :2].round(4))
    [0.9987 0.9987]
    """
    recipe = getattr(transformation, "recipe", None)
    if recipe is None:
        raise TypeError(
            f"{type(transformation).__name__} has no fused form: nothing can look inside optax.chain or "
            "inject_hyperparams, and scale_by_projection has no learning rate. Pass a named optimizer such as "
            "lr.galore(...), with clip_norm= in place of a chained clip and learning_rate= of step in place of an "
            "injected one"
        )
    return Fused(recipe=recipe, rounding=rounding)
