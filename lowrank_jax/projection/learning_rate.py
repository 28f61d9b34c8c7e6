"""The final transformation of a named optimizer: learning rate and decoupled weight decay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class LearningRateState(NamedTuple):
    """State of `apply_learning_rate`: int32 count of accepted steps, which drives the schedule."""

    count: Any


def _decays(weight_decay: Any) -> bool:
    return not (isinstance(weight_decay, (int, float)) and weight_decay == 0)


def selected_for_decay(updates: Any, params: Any, weight_decay: Any, mask: Any) -> Any:
    """A tree of booleans like `updates`: which leaves decay."""
    selected = mask(params) if callable(mask) else mask
    if selected is None:
        return jax.tree.map(lambda _: _decays(weight_decay), updates)
    return jax.tree.map(lambda flag: bool(flag) and _decays(weight_decay), selected)


def decayed_step(u: jax.Array, p: jax.Array, rate: Any, weight_decay: Any, when: str, accepted: Any) -> jax.Array:
    """The float32 change of one leaf: `-lr u` with decoupled decay before or after it."""
    u = u.astype(jnp.float32)
    if not _decays(weight_decay):
        return -rate * u
    shrink = 1 - rate * weight_decay if when == "post" else 1.0
    return -rate * shrink * u - jnp.where(accepted, rate * weight_decay, 0) * p.astype(jnp.float32)


def apply_learning_rate(
    learning_rate: Any, weight_decay: Any = 0.0, *, when: str = "pre", mask: Callable | Any = None
) -> optax.GradientTransformationExtraArgs:
    """`W <- W - lr u` with decoupled decay before or after the step.

    * `when="pre"`: `W <- (1 - lr wd) W`, then `W <- W - lr u`; update `-lr (u + wd W)` (torch; FRUGAL, LDAdam, DCT).
    * `when="post"`: `W <- W - lr u`, then `W <- (1 - lr wd) W`; update `-lr (1 - lr wd) u - lr wd W` (GaLore, APOLLO).

    Args:
      learning_rate: a number or an optax schedule of the 0-based step.
      weight_decay: wd, applied to every leaf that `mask` selects (all by default).
      when: "pre" or "post".
      mask: a tree of booleans like the parameters, or a function from parameters to one.

    The extra argument `accepted` of `update` (a boolean scalar, True by default) makes a skipped step leave parameters
    and schedule untouched; the named optimizers pass it.

    Raises:
      ValueError: for an unknown `when`, a negative decay, or decay without params.

    >>> import jax.numpy as jnp
    >>> tx = apply_learning_rate(0.1, 0.5, when="post")
    >>> updates, _ = tx.update(jnp.array([1.0]), tx.init(jnp.array([2.0])), jnp.array([2.0]))
    >>> print(updates)  # 2 -> 1.9 -> 1.805
    [-0.19500001]
    """
    if when not in ("pre", "post"):
        raise ValueError(f"when={when!r} must be 'pre' or 'post' the step")
    if isinstance(weight_decay, (int, float)) and weight_decay < 0:
        raise ValueError(f"weight_decay={weight_decay} must not be negative")
    decays = _decays(weight_decay)

    def init(params):
        del params
        return LearningRateState(jnp.zeros((), jnp.int32))

    def update(updates, state, params=None, *, accepted: Any = True, **extra):
        del extra
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        if decays and params is None:
            raise ValueError(f"weight_decay={weight_decay} needs params; call update(grads, state, params)")

        def apply(u, p, decayed):
            return decayed_step(u, p, rate, weight_decay if decayed else 0, when, accepted).astype(u.dtype)

        selected = selected_for_decay(updates, params, weight_decay, mask)
        new = jax.tree.map(apply, updates, updates if params is None else params, selected)
        return new, LearningRateState(state.count + jnp.asarray(accepted, jnp.int32))

    return optax.GradientTransformationExtraArgs(init, update)
