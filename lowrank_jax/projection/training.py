"""The whole training step: projected backprop where the basis stands, what a refresh needs where it
moves."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lowrank_jax import sharding
from lowrank_jax.projection import step as step_lib
from lowrank_jax.projection.fused import Fused, fused
from lowrank_jax.projection.slots import Projection
from lowrank_jax.projection.state import Projected, Rebased
from lowrank_jax.projection.taps import (
    accumulated,
    first_microbatch,
    is_projected,
    projected_value_and_grad,
    taps,
)
from lowrank_jax.trees import dequantized, is_quantized
from lowrank_jax.typing import Pytree

PLANS = ("full", "taps", "full at a refresh", "sketch at a refresh")


def gradient_mode(projection: Projection) -> str:
    """Which gradients a projection optimizer needs.

    * "full": always the whole gradient (a residual rule reads it, or the basis follows it at every
      step);
    * "taps": never (the basis is fixed, or moves after the update by a random key);
    * "full at a refresh": an exact SVD, a DCT's scores, and every basis that moves before its
      update;
    * "sketch at a refresh": a thin product with a second tap, after the update.

    Beside these the first step takes the whole gradient where the projector `starts_before` it.

    >>> import lowrank_jax as lrx
    >>> gradient_mode(lrx.galore(1e-2, rank=8).projection)
    'full at a refresh'
    >>> alternating = lrx.projectors.alternating(rank=8)
    >>> gradient_mode(
    ...     lrx.galore(1e-2, projector=alternating).projection
    ... )  # which moves after the update
    'sketch at a refresh'
    """
    schedule, reads = projection.refresh_schedule, projection.projector.reads
    if projection.reads_gradient:
        return "full"
    if not projection.projector.moves:
        return "taps"
    if schedule.when == "after" and "target" not in reads:
        return "sketch at a refresh" if "sketch" in reads else "taps"
    return "full" if schedule.every_step else "full at a refresh"


def train_step(
    loss: Callable[..., Any],
    optimizer: Any,
    *,
    accumulate: int = 1,
    has_aux: bool = False,
    with_norm: bool = False,
    backprop: str = "projected",
) -> Callable[..., Any]:
    """`step(params, opt_state, *args) -> (params, opt_state, value)`: backward pass and fused
    update in one function.

    A normal step takes low-rank gradients through taps; a step whose refresh needs more takes that,
    by one `cond` around the gradients, which leaves parameters and state to be written in place.
    Jit it, donate the first two.

    Args:
      loss: `loss(params, *args) -> value`, which multiplies by taps; see
        `projected_value_and_grad`.
      optimizer: a named optimizer, or its fused form `lrx.fused(tx, ...)`.
      accumulate: k microbatches along a leading axis of every argument; see
        `projected_value_and_grad`.
      has_aux: the loss returns `(value, aux)`, and so does the step, in place of the value.
      with_norm: the step returns `(value, norm)` in place of the value, with the global norm of the
        gradients that it took: low-rank ones where they are projected.
      backprop: "projected", or "full" for full gradients at every step (the same numbers, dearer).

    Raises:
      TypeError: for an optimizer without a fused form.

    >>> import jax, jax.numpy as jnp
    >>> import lowrank_jax as lrx
    >>> params, x = {"kernel": jnp.ones((4, 8))}, jnp.ones((3, 4))
    >>> tx = lrx.galore(1e-2, rank=2)
    >>> step = lrx.train_step(lambda params, x: jnp.mean(lrx.matmul(x, params["kernel"]) ** 2), tx)
    >>> params, state, value = jax.jit(step, donate_argnums=(0, 1))(params, tx.init(params), x)
    >>> print(value)
    16.0
    """
    if backprop not in ("projected", "full"):
        raise ValueError(f"backprop={backprop!r} must be 'projected' or 'full'")
    form = optimizer if isinstance(optimizer, Fused) else fused(optimizer)
    gradients = _Gradients(loss, form, accumulate, has_aux)
    mode = "full" if backprop == "full" else gradient_mode(form.recipe.projection)
    return _Step(gradients, form, mode, with_norm)


@dataclasses.dataclass(frozen=True, eq=False)
class _Step:
    """One training step by a gradient mode.

    Equal to itself alone: a mask in it may be a dict, which `jax.jit` could not hash.

    Attributes:
      gradients: the ways to take gradients.
      form: the fused form.
      mode: what `gradient_mode` says, or "full".
      with_norm: whether the norm of the gradients is returned too.
    """

    gradients: _Gradients
    form: Fused
    mode: str
    with_norm: bool

    def __call__(self, params, state, *args):
        projection = self.form.recipe.projection
        # where moments move after the update, or a first basis before it, a whole step is a branch
        if self.mode == "full at a refresh" and projection.refresh_schedule.when == "after":
            due = step_lib.due(projection, state.projection)
            return jax.lax.cond(due, self.full, self.low, params, state, args)
        if projection.starts_before and self.mode != "full":
            begins = state.projection.step == 0
            return jax.lax.cond(begins, self.full, self.usual, params, state, args)
        return self.usual(params, state, args)

    def full(self, params, state, args):
        """By full gradients."""
        value, grads = self.gradients.full(params, state, args)
        return self.updated(params, state, value, grads, {})

    def low(self, params, state, args):
        """By low-rank gradients."""
        value, grads = self.gradients.tapped(params, state, args)
        return self.updated(params, state, value, grads, {"taps": taps(state)})

    def usual(self, params, state, args):
        """By the gradients that the mode says of this step."""
        if self.mode == "full":
            return self.full(params, state, args)
        if self.mode == "taps":
            return self.low(params, state, args)
        gradients = self.gradients
        due = step_lib.due(self.form.recipe.projection, state.projection)
        if self.mode == "sketch at a refresh":
            ways = gradients.sketched, gradients.unsketched
            value, grads = jax.lax.cond(due, *ways, params, state, args)
            return self.updated(params, state, value, grads, {"taps": taps(state)})
        # bases move inside the branch, and what leaves it is low-rank
        ways = gradients.rebased, gradients.standing
        value, grads, state, rebased = jax.lax.cond(due, *ways, params, state, args)
        options = {"taps": taps(state), "rebased": rebased}
        return self.updated(params, state, value, grads, options)

    def updated(self, params, state, value, grads, options):
        """`(params, state, value)` after the fused update."""
        measured = (value, optax.tree.norm(grads)) if self.with_norm else value
        return *self.form.step(params, grads, state, **options), measured


@dataclasses.dataclass(frozen=True, eq=False)
class _Gradients:
    """The ways to take a gradient that a step chooses from, all `(params, state, args)`."""

    loss: Callable[..., Any]
    form: Fused
    accumulate: int
    has_aux: bool

    def full(self, params, state, args):
        return _value_and_grad(self.loss, self.accumulate, self.has_aux)(params, *args)

    def tapped(self, params, state, args, sketches=None):
        own = taps(state, sketches)
        function = projected_value_and_grad(
            self.loss, own, accumulate=self.accumulate, has_aux=self.has_aux
        )
        return function(params, *args)

    def rebased(self, params, state, args):
        value, grads = self.full(params, state, args)
        return value, *self.form.rebase(params, grads, state)

    def standing(self, params, state, args):
        return *self.tapped(params, state, args), state, Rebased(jnp.asarray(False))

    def sketched(self, params, state, args):
        config = self.form.recipe.projection
        bases = step_lib.sketch_bases(config, state.projection, self.form.rate(state))
        return self.tapped(params, state, args, bases)

    def unsketched(self, params, state, args):
        """As without a refresh, in the structure of one with it."""
        shapes = jax.eval_shape(self.sketched, params, state, args)[1]
        value, grads = self.tapped(params, state, args)
        return value, jax.tree.map(_with_zero_sketch, grads, shapes, is_leaf=is_projected)


def _with_zero_sketch(grad: Pytree, shape: Pytree) -> Pytree:
    if not is_projected(grad):
        return grad
    return Projected(grad.low, jax.tree.map(sharding.zeros_like, shape.sketch))


def _value_and_grad(loss: Callable[..., Any], accumulate: int, has_aux: bool) -> Callable[..., Any]:
    """`jax.value_and_grad(loss)`, averaged over microbatches; of quantised leaves the gradients of
    their values."""
    function = jax.value_and_grad(loss, has_aux=has_aux)

    def run(params, *args):
        params = jax.tree.map(dequantized, params, is_leaf=is_quantized)
        if accumulate == 1:
            return function(params, *args)
        first_microbatch(args, accumulate)
        return accumulated(function, params, args, accumulate, has_aux)

    return run
