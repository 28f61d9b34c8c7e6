"""When does the basis move? One scalar decides for the whole tree, so that a refresh is one `cond`
outside any vmap."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_jax.checks import check_integer, is_integer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clock:
    """Base of the clocks.

    Attributes:
      when: "before" the update, as in the papers (the step that pays for the refresh uses it), or
        "after" it (the new basis serves from the next step on).
    """

    when: str = "before"

    def __post_init__(self):
        if self.when not in ("before", "after"):
            raise ValueError(f"when={self.when!r} must be 'before' or 'after' the update")

    def due(self, step: Any) -> Any:
        """Scalar: does the basis move at this 0-based step? A Python bool where it is known without
        the step."""
        raise TypeError(f"{type(self).__name__} has no scalar clock")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Every(Clock):
    """Due when `step mod period = phase`, and at step 0 if `first`.

    GaLore, Fira, APOLLO and FRUGAL count from 0: `phase=0`. DCT-AdamW counts from 1 (steps 0, T-1,
    2T-1, ...): `phase=period - 1`.

    Args:
      period: T, in accepted optimizer steps.
      phase: which step of the period.
      first: also refresh at step 0. Without it the basis of `init` serves until the first due step.

    Raises:
      ValueError: if period < 1.

    >>> clock = Every(period=4, phase=3)
    >>> [step for step in range(12) if clock.due(step)]
    [0, 3, 7, 11]
    """

    period: Any
    phase: Any = 0
    first: bool = True

    def __post_init__(self):
        super().__post_init__()
        _check_period(self.period)
        check_integer("phase", self.phase, at_least=0)

    def due(self, step):
        if is_integer(self.period) and self.period == 1:
            return True
        period = jnp.asarray(self.period, jnp.int32)
        due = jnp.mod(step, period) == jnp.mod(jnp.asarray(self.phase, jnp.int32), period)
        return due | (step == 0) if self.first else due


@dataclasses.dataclass(frozen=True, kw_only=True)
class EveryStep(Clock):
    """Due at every step (LDAdam, Dion, Trion)."""

    def due(self, step):
        return True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Never(Clock):
    """The basis is made at the first step and then stays."""

    def due(self, step):
        return step == 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Staggered(Clock):
    """Every matrix moves once in a period, but not all at the same step, which takes the spike out
    of refreshes.

    A stack of L layers refreshes `k = ceil(L / period)` layers a step, starting at
    `((step + phase) mod period) k` and idle when that is past L; the phase is the CRC32 of the
    leaf's path. Step 0 refreshes everything.

    Args:
      period: T, a Python integer, since it fixes how many layers a step refreshes.

    Raises:
      ValueError: if period < 1 or is not a Python integer.

    >>> Staggered(period=4).layers_per_step(10)
    3
    """

    period: int

    def __post_init__(self):
        super().__post_init__()
        if not is_integer(self.period):
            raise ValueError(
                f"staggered: period={self.period} must be a Python integer (put it in static_args)"
            )
        _check_period(self.period)

    def layers_per_step(self, layers: int) -> int:
        return -(-layers // self.period)

    def start(self, step: jax.Array, phase: int, layers: int) -> jax.Array:
        """First layer to refresh at this step; at or past `layers` there is none."""
        return jnp.mod(step + phase % self.period, self.period) * self.layers_per_step(layers)


def _check_period(period) -> None:
    check_integer("period", period, at_least=1)


every = Every
every_step = EveryStep
never = Never
staggered = Staggered
