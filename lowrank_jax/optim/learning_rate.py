"""The final transformation of a named optimizer: learning rate and decoupled weight decay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_jax import deprecations
from lowrank_jax.checks import check_floating, check_number, is_zero
from lowrank_jax.reprs import show
from lowrank_jax.trees import pure
from lowrank_jax.typing import Pytree, Rate, Scalar


class LearningRateState(NamedTuple):
    """State of `apply_learning_rate`: int32 count of accepted steps, which drives the schedule."""

    count: Any

    def __repr__(self) -> str:
        return show(self)


def at_step(value: Rate, count: Scalar) -> Scalar:
    """A number, or what a schedule gives at a step."""
    return value(count) if callable(value) else value


def selected_for_decay(updates: Pytree, params: Pytree, weight_decay: Rate, mask: Pytree) -> Pytree:
    """A tree of booleans like `updates`: which leaves decay. A mask may be a prefix of it."""
    decays = not is_zero(weight_decay)
    selected = mask(params) if callable(mask) else mask
    if selected is None:
        selected = True

    def spread(flag: Scalar, part: Pytree) -> Pytree:
        return jax.tree.map(lambda _: bool(flag) and decays, part)

    try:
        return jax.tree.map(spread, pure(selected), updates)
    except ValueError as error:
        raise ValueError(
            f"mask: {jax.tree.structure(selected)} is neither the structure of the parameters nor "
            "a prefix of it; give a boolean for each leaf or for whole subtrees, or a function "
            "that makes such a tree of the parameters"
        ) from error


def decayed_step(
    u: jax.Array, p: jax.Array, rate: Scalar, weight_decay: Scalar, decay: str, accepted: Scalar
) -> jax.Array:
    """The float32 change of one leaf: `-lr u` with decoupled decay before or after it."""
    u = u.astype(jnp.float32)
    if is_zero(weight_decay):
        return -rate * u
    # after the step: (1 - lr wd) (p - lr u) - p; before it: (1 - lr wd) p - lr u - p
    shrink = 1 - rate * weight_decay if decay == "after" else 1.0
    step = -rate * shrink * u
    # u of a skipped step is zero, and its decay must be made so
    share = jnp.where(accepted, rate * weight_decay, 0)
    return step - share * p.astype(jnp.float32)


@deprecations.options("lrx.apply_learning_rate")
def apply_learning_rate(
    learning_rate: Rate,
    weight_decay: Rate = 0.0,
    *,
    decay: str = "before",
    mask: Callable | Pytree = None,
) -> optax.GradientTransformationExtraArgs:
    """`W <- W - lr u` with decoupled decay before or after the step.

    * `decay="before"`: `W <- (1 - lr wd) W`, then `W <- W - lr u`; update `-lr (u + wd W)` (torch;
      FRUGAL, LDAdam, DCT).
    * `decay="after"`: `W <- W - lr u`, then `W <- (1 - lr wd) W`; update
      `-lr (1 - lr wd) u - lr wd W` (GaLore, APOLLO).

    Args:
      learning_rate: a number or an optax schedule of the 0-based step.
      weight_decay: wd, a number or a schedule, applied to every leaf that `mask` selects (all by
        default).
      decay: "before" or "after" the step.
      mask: a tree of booleans like the parameters or a prefix of it, or a function from parameters
        to one.

    The extra argument `accepted` of `update` (a boolean scalar, True by default) makes a skipped
    step leave parameters and schedule untouched; `rates`, a tree of numbers like the updates, stands
    in place of the one rate. The named optimizers pass both. `learning_rate`, a number, stands in
    place of the rate or schedule of this step, as in the fused form's `step`.

    Raises:
      ValueError: for an unknown `decay`, a rate that is not finite, a negative decay, decay without
        params, or leaves that are not real.

    >>> import jax.numpy as jnp
    >>> tx = apply_learning_rate(0.1, 0.5, decay="after")
    >>> updates, _ = tx.update(jnp.array([1.0]), tx.init(jnp.array([2.0])), jnp.array([2.0]))
    >>> print(updates)  # 2 -> 1.9 -> 1.805
    [-0.19500001]
    """
    if decay not in ("before", "after"):
        raise ValueError(f"decay={decay!r} must be 'before' or 'after' the step")
    check_number("learning_rate", learning_rate, otherwise="a schedule")
    check_number("weight_decay", weight_decay, at_least=0, otherwise="a schedule")
    decays = not is_zero(weight_decay)

    def init(params):
        check_floating(params, "apply_learning_rate")
        return LearningRateState(jnp.zeros((), jnp.int32))

    def update(
        updates: Pytree,
        state: LearningRateState,
        params: Pytree = None,
        *,
        accepted: Scalar = True,
        rates: Pytree = None,
        **extra: Pytree,
    ) -> tuple[Pytree, LearningRateState]:
        given = extra.get("learning_rate")
        rate = at_step(learning_rate if given is None else given, state.count)
        shrinks = at_step(weight_decay, state.count)
        if decays and params is None:
            raise ValueError(
                f"weight_decay={weight_decay} needs params; call update(grads, state, params)"
            )
        check_floating(updates, "apply_learning_rate")

        def apply(u, p, is_selected, rate):
            own_decay = shrinks if is_selected else 0
            return decayed_step(u, p, rate, own_decay, decay, accepted).astype(u.dtype)

        selected = selected_for_decay(updates, params, weight_decay, mask)
        if rates is None:
            rates = jax.tree.map(lambda _: rate, updates)
        # without decay no parameter is read
        read = updates if params is None else params
        new = jax.tree.map(apply, updates, read, selected, rates)
        # a skipped step leaves the schedule where it was
        return new, LearningRateState(state.count + jnp.asarray(accepted, jnp.int32))

    return optax.GradientTransformationExtraArgs(init, update)
