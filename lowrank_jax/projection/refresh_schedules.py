"""When does the basis move?

One scalar decides for the whole tree, so that a refresh is one `cond` outside any vmap, unless a
schedule says otherwise in one of two ways:

* it gives each step a `slice` of the layers of a stack, whose place may depend on the step;
* it decides layer by layer (`per_layer`) by a state of its own, which has the batch axes in front.
  A stack then loops over its layers with one condition each; a vmap of a condition would pay both
  sides of it for every layer at every step.

The states of a schedule, and what else moves with a basis, are sliced with the basis.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lowrank_jax import deprecations
from lowrank_jax.checks import check_integer, check_number, is_integer
from lowrank_jax.reprs import Short
from lowrank_jax.typing import Pytree, Scalar, Shape


@dataclasses.dataclass(frozen=True, kw_only=True)
class RefreshSchedule(Short):
    """Base of the refresh schedules.

    Attributes:
      when: "before" the update, as in the papers (the step that pays for the refresh uses it), or
        "after" it (the new basis serves from the next step on).
      per_layer: it decides layer by layer.
      reads: which of "change", "captured" and "low" it needs, of a schedule that is `per_layer`.
        With "captured" every step takes the full gradient; with "low" `init` is given the shape of
        a low-rank object, and `advance` each step's.
      first: it is due at step 0, so that no step is made with a basis that saw no data.

    Subclasses implement `due`; those with a state `init`, and `refreshed` or `advance`:

    >>> import jax.numpy as jnp
    >>> @dataclasses.dataclass(frozen=True, kw_only=True)
    ... class Doubling(RefreshSchedule):
    ...     "Due at steps 0, 1, 2, 4, 8, ..."
    ...
    ...     def init(self, batch):
    ...         return jnp.zeros(batch, jnp.int32)
    ...
    ...     def due(self, state, step):
    ...         return step == state
    ...
    ...     def refreshed(self, state, *, step, change=None):
    ...         return jnp.maximum(2 * state, 1)
    >>> schedule, found = Doubling(), []
    >>> state = schedule.init(())
    >>> for step in range(9):
    ...     if schedule.due(state, step):
    ...         found, state = [*found, step], schedule.refreshed(state, step=step)
    >>> found
    [0, 1, 2, 4, 8]
    """

    when: str = "before"
    per_layer: ClassVar[bool] = False
    reads: ClassVar[frozenset[str]] = frozenset()
    first = True

    def __post_init__(self):
        if self.when not in ("before", "after"):
            raise ValueError(f"when={self.when!r} must be 'before' or 'after' the update")

    @property
    def every_step(self) -> bool:
        """Whether all bases move at every step, whatever the state."""
        return False

    @property
    def sliced(self) -> bool:
        """Whether each step moves a slice of the layers, see `slice`."""
        return type(self).slice is not RefreshSchedule.slice

    def init(self, batch: Shape, low: Shape = ()) -> Pytree:
        """The state before the first step: of shapes `(batch...)` in front, () for the tree.

        Args:
          batch: batch axes of the leaf.
          low: shape of a low-rank object without them, where `reads` has "low".
        """
        return ()

    def state_for(self, batch: Shape, low: Shape) -> Pytree:
        """`init`, given what it reads."""
        return self.init(batch, low) if "low" in self.reads else self.init(batch)

    def due(self, state: Pytree, step: Scalar) -> Scalar:
        """Does the basis move at this 0-based step? A scalar, `(batch...)` where `per_layer`, or a
        Python bool where it is known without state and step."""
        raise TypeError(f"{type(self).__name__} does not implement due")

    def refreshed(self, state: Pytree, *, step: Scalar, change: jax.Array | None = None) -> Pytree:
        """The state after a refresh, with which it moves: in the same condition as the basis.

        Args:
          state: of those layers that moved.
          step: int32 (), accepted steps before this one.
          change: `(batch..., r)` where `reads` has "change": the absolute cosine of each old basis
            vector and the new one in its place (`cosines` of the overlap).
        """
        return state

    def advance(
        self,
        state: Pytree,
        *,
        step: Scalar,
        captured: jax.Array | None = None,
        low: jax.Array | None = None,
    ) -> Pytree:
        """The state after any accepted step.

        Args:
          state: of all layers.
          step: int32 (), accepted steps before this one.
          captured: `(batch...)` where `reads` has "captured": the share of the target's energy that
            the basis of this step sees.
          low: `(batch..., r, k)` where `reads` has "low", of this step; not passed otherwise.
        """
        return state

    def slice(self, step: Scalar, phase: int, layers: int) -> tuple[Scalar, int] | None:
        """`(start, size)` of the layers of a stack that move at this step beside those that are
        `due`; past the last layer there is none. None for a schedule without slices.

        Args:
          step: 0-based.
          phase: a number of the leaf alone.
          layers: of the stack.
        """
        return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Every(RefreshSchedule):
    """Due when `step mod period = phase`, and at step 0 if `first`.

    GaLore, Fira, APOLLO and FRUGAL count from 0: `phase=0`. DCT-AdamW counts from 1 (steps 0, T-1,
    2T-1, ...): `phase=period - 1`.

    Args:
      period: T, in accepted optimizer steps.
      phase: which step of the period.
      first: also refresh at step 0. Without it the basis of `init` serves until the first due step.

    Raises:
      ValueError: if period < 1.

    >>> schedule = Every(period=4, phase=3)
    >>> [step for step in range(12) if schedule.due((), step)]
    [0, 3, 7, 11]
    """

    period: Scalar
    phase: Any = 0
    first: bool = True

    def __post_init__(self):
        super().__post_init__()
        _check_period(self.period)
        check_integer("phase", self.phase, at_least=0)

    @property
    def every_step(self):
        return is_integer(self.period) and self.period == 1

    def due(self, state, step):
        if self.every_step:
            return True
        period = jnp.asarray(self.period, jnp.int32)
        due = jnp.mod(step, period) == jnp.mod(jnp.asarray(self.phase, jnp.int32), period)
        return due | (step == 0) if self.first else due


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piecewise(RefreshSchedule):
    """`every` with a period that changes with the step: subspaces turn fast at first and slowly
    later.

    From step `begin_i` on, until the next begin, due when `(step - begin_i) mod T_i = 0`, so that
    every change of the period is a refresh.

    Args:
      periods: `((begin, T), ...)` or a dict, begins ascending from 0, in accepted steps.

    Raises:
      ValueError: for begins that do not ascend from 0, or a period < 1.

    >>> schedule = Piecewise(periods={0: 2, 5: 4})
    >>> [step for step in range(14) if schedule.due((), step)]
    [0, 2, 4, 5, 9, 13]
    """

    periods: tuple[tuple[Scalar, Scalar], ...]

    def __post_init__(self):
        super().__post_init__()
        pairs = self.periods.items() if isinstance(self.periods, Mapping) else self.periods
        object.__setattr__(self, "periods", tuple(tuple(pair) for pair in pairs))
        begins = [begin for begin, _ in self.periods]
        if not begins or begins[0] != 0 or begins != sorted(set(begins)):
            raise ValueError(
                f"piecewise: periods={self.periods} must begin at step 0 and ascend, such as "
                "((0, 50), (1000, 200))"
            )
        for _, period in self.periods:
            _check_period(period)

    def due(self, state, step):
        begins, periods = (jnp.asarray(x, jnp.int32) for x in zip(*self.periods, strict=True))
        # the last piece that has begun
        own = jnp.sum(begins <= step) - 1
        return jnp.mod(step - begins[own], periods[own]) == 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class EveryStep(RefreshSchedule):
    """Due at every step (LDAdam, Dion, Trion)."""

    every_step = True

    def due(self, state, step):
        return True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Never(RefreshSchedule):
    """The basis is made at the first step and then stays."""

    def due(self, state, step):
        return step == 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Staggered(RefreshSchedule):
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

    def due(self, state, step):
        return step == 0  # all layers

    def slice(self, step, phase, layers):
        return self.start(step, phase, layers), self.layers_per_step(layers)

    def layers_per_step(self, layers: int) -> int:
        return -(-layers // self.period)

    def start(self, step: jax.Array, phase: int, layers: int) -> jax.Array:
        """First layer to refresh at this step; at or past `layers` there is none."""
        return jnp.mod(step + phase % self.period, self.period) * self.layers_per_step(layers)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lazy(RefreshSchedule):
    """Each matrix moves less and less often, as long as its leading direction stays (Q-GaLore).

    At a refresh of a matrix, with `c = |u_newᵀ u_old|` of the first basis vectors:

        queue <- the last `queue` values of c
        T     <- floor(factor T)        where the queue is full and its mean at least threshold
        the next refresh is T steps later

    The official code takes the cosine with its sign. Singular vectors have none, so that the signs
    of a LAPACK decide there how often a basis moves: 17 refreshes in place of 9 were seen in one
    run. It also moves at steps that T divides, which a new T shifts; here T steps lie between two
    refreshes. State: two int32, one int32 count and `queue` float32 for each matrix.

    Args:
      period: the first T.
      threshold: mean cosine from which T grows; .4 in the official code.
      queue: how many cosines are averaged, a Python integer; 5 in the official code.
      factor: of T, 2 in the official code.

    Raises:
      ValueError: for period or queue < 1, factor < 1, or threshold < 0.

    >>> schedule, found = Lazy(period=1, queue=2), []
    >>> state = schedule.init(())
    >>> for step in range(24):  # a direction that always stays
    ...     if schedule.due(state, step):
    ...         found.append(step)
    ...         state = schedule.refreshed(state, step=step, change=jnp.ones(4))
    >>> found
    [0, 1, 2, 4, 8, 16]
    """

    period: Scalar
    threshold: Any = 0.4
    queue: int = 5
    factor: Any = 2
    per_layer: ClassVar[bool] = True
    reads: ClassVar[frozenset[str]] = frozenset({"change"})

    def __post_init__(self):
        super().__post_init__()
        _check_period(self.period)
        check_number("lazy: threshold", self.threshold, at_least=0)
        check_number("lazy: factor", self.factor, at_least=1)
        if not is_integer(self.queue) or self.queue < 1:
            raise ValueError(f"lazy: queue={self.queue} must be a Python integer of at least 1")

    def init(self, batch):
        counts = {name: jnp.zeros(batch, jnp.int32) for name in ("next", "refreshes")}
        period = jnp.broadcast_to(jnp.asarray(self.period, jnp.int32), batch)
        return counts | {"period": period, "queue": jnp.zeros((*batch, self.queue))}

    def due(self, state, step):
        return step >= state["next"]

    def refreshed(self, state, *, step, change=None):
        seen = state["refreshes"]  # the first basis has none before it
        cosine = jnp.minimum(change[..., :1], 1.0)
        shifted = jnp.concatenate([state["queue"][..., 1:], cosine], axis=-1)
        queue = jnp.where(seen[..., None] > 0, shifted, state["queue"])
        stays = jnp.mean(queue, axis=-1) >= self.threshold
        # in float32 a period of a billion is as good as never, and does not overflow
        longer = jnp.minimum(jnp.floor(self.factor * state["period"].astype(jnp.float32)), 1e9)
        grows = stays & (seen >= self.queue)
        period = jnp.where(grows, longer.astype(jnp.int32), state["period"])
        return {"next": step + period, "refreshes": seen + 1, "period": period, "queue": queue}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Displacement(RefreshSchedule):
    """Each matrix moves when its low-rank gradient turns too little, and so no longer learns in this
    subspace (Lotus).

    With unit directions `d = R / |R|` of the low-rank objects, `d_0` the one of a basis' first step
    and T its number of steps and one, every `gap` steps (`T mod gap = 0`)

        the basis moves at the next step  where  |d - d_0| / T < threshold

    State: two int32 and `r k` float32 for each matrix.

    Args:
      gap: steps between two looks, the paper's eta, 50 (25 to 100).
      threshold: the paper's gamma, .01 (.005 to .02).

    Raises:
      ValueError: for gap < 2, at which every step moves, or a negative threshold.

    >>> schedule, found = Displacement(gap=4, threshold=0.2), []
    >>> state, low = schedule.init((), (1, 2)), jnp.array([[3.0, 0.0]])
    >>> for step in range(12):  # a direction that never turns
    ...     if schedule.due(state, step):
    ...         found.append(step)
    ...         state = schedule.refreshed(state, step=step)
    ...     state = schedule.advance(state, step=step, low=low)
    >>> found
    [0, 3, 6, 9]
    """

    gap: Scalar = 50
    threshold: Scalar = 0.01
    per_layer: ClassVar[bool] = True
    reads: ClassVar[frozenset[str]] = frozenset({"low"})

    def __post_init__(self):
        super().__post_init__()
        check_integer("displacement: gap", self.gap, at_least=2)
        check_number("displacement: threshold", self.threshold, at_least=0)

    def init(self, batch, low=()):
        count = jnp.zeros(batch, jnp.int32)
        return {"due": count + 1, "count": count, "first": jnp.zeros((*batch, *low))}

    def due(self, state, step):
        return state["due"] > 0

    def refreshed(self, state, *, step, change=None):
        # a basis that moved after the update has its first step yet to come
        count = jnp.full_like(state["count"], 1 if self.when == "before" else 0)
        return state | {"due": jnp.zeros_like(count), "count": count}

    def advance(self, state, *, step, captured=None, low=None):
        size = jnp.linalg.norm(low, axis=(-2, -1), keepdims=True)
        direction = low / jnp.where(size > 0, size, 1)
        is_first = (state["count"] == 1)[..., None, None]
        first = jnp.where(is_first, direction, state["first"])
        # T of the basis, and how far its direction went in a step
        count = state["count"] + 1
        average = jnp.linalg.norm(direction - first, axis=(-2, -1)) / count
        looks = (count > 1) & (count % self.gap == 0)
        due = looks & (average < self.threshold)
        return {"due": due.astype(jnp.int32), "count": count, "first": first}


def _check_period(period) -> None:
    check_integer("period", period, at_least=1)


displacement = Displacement
every = Every
every_step = EveryStep
lazy = Lazy
never = Never
piecewise = Piecewise
staggered = Staggered

__getattr__ = deprecations.names("lowrank_jax.refresh_schedules")

__all__ = [
    "RefreshSchedule",
    "displacement",
    "every",
    "every_step",
    "lazy",
    "never",
    "piecewise",
    "staggered",
]
__dir__ = functools.partial(sorted, __all__)
