"""How many of a basis' vectors serve?

Shapes are those of the largest rank r throughout. A schedule says at each refresh which of the r
vectors serve, for `lrx.projectors.ranked`; the others are zero in every product, and so are their
moments. What it saves is therefore what a step reads of a gradient, not memory.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax.checks import check_integer, check_number, is_number
from lowrank_jax.matrices import ResolvedView
from lowrank_jax.projection.batches import count
from lowrank_jax.reprs import Short
from lowrank_jax.typing import Pytree, Scalar


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankSchedule(Short):
    """Base of the rank schedules.

    Attributes:
      reads: which of "step" and "energies" it needs. With "energies" a refresh reads the target.
      of_layers: its state differs by the number of a layer in its stack.

    Subclasses implement `serving`; those with a state `init`:

    >>> import jax.numpy as jnp
    >>> @dataclasses.dataclass(frozen=True, kw_only=True)
    ... class Even(RankSchedule):
    ...     "Every second vector."
    ...
    ...     def serving(self, rank, state, *, step=None, energies=None):
    ...         return jnp.arange(rank) % 2 == 0
    >>> Even().serving(5, ()).tolist()
    [True, False, True, False, True]
    """

    reads: ClassVar[frozenset[str]] = frozenset()
    of_layers: ClassVar[bool] = False

    def init(self, view: ResolvedView) -> Pytree:
        """What it keeps of a leaf, each array with the batch axes in front; () for most."""
        return ()

    def serving(
        self,
        rank: int,
        state: Pytree,
        *,
        step: Scalar | None = None,
        energies: tuple[jax.Array, jax.Array] | None = None,
    ) -> jax.Array:
        """Which vectors serve until the next refresh: bool `(r,)` or `(batch..., r)`.

        Args:
          rank: r, the largest rank.
          state: of `init`.
          step: int32 (), accepted steps before this one.
          energies: `|p_jᵀG|² (batch..., r)` of the new basis, and `|G|² (batch...)`.
        """
        raise TypeError(f"{type(self).__name__} does not implement serving")


def _first(rank: int, share: Scalar) -> jax.Array:
    """The first `round(share r)` of r vectors, at least one, for shares `(batch...)`."""
    number = jnp.maximum(jnp.round(jnp.asarray(share, jnp.float32) * rank), 1)
    return jnp.arange(rank) < number[..., None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decay(RankSchedule):
    """The rank falls from r to `to r`, since gradients lose rank as training goes on.

    With `x = (step - begin) / steps` between 0 and 1, `max(1, round((1 + (to - 1) x) r))` of the
    vectors serve, or with a half cosine in the place of x; the first ones, which singular vectors
    have in front.

    Args:
      steps: from the largest rank to the smallest.
      to: share of r that is left, in (0, 1].
      begin: the step at which it begins to fall.
      shape: "linear" or "cosine".

    >>> schedule = decay(steps=100, to=0.25)
    >>> [int(schedule.serving(8, (), step=step).sum()) for step in (0, 50, 100, 500)]
    [8, 5, 2, 2]
    """

    steps: Scalar
    to: Scalar
    begin: Scalar = 0
    shape: str = "linear"
    reads: ClassVar[frozenset[str]] = frozenset({"step"})

    def __post_init__(self):
        check_integer("decay: steps", self.steps, at_least=1)
        check_integer("decay: begin", self.begin, at_least=0)
        _check_share("decay: to", self.to)
        if self.shape not in ("linear", "cosine"):
            raise ValueError(f"decay: shape={self.shape!r} must be 'linear' or 'cosine'")

    def serving(self, rank, state, *, step=None, energies=None):
        gone = jnp.clip((jnp.asarray(step) - self.begin) / self.steps, 0, 1)
        if self.shape == "cosine":
            gone = (1 - jnp.cos(jnp.pi * gone)) / 2
        return _first(rank, 1 + (self.to - 1) * gone)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByLayer(RankSchedule):
    """Each layer of a stack has a rank of its own, a share of r.

    Shares stand at equal distances over the depth of a stack, and layers between two of them get
    what lies between: `(1, .5)` is a ramp, and as many shares as layers are taken as they are. A
    leaf that is one matrix has the first. State: a float32 for each matrix.

    Models whose layers are leaves of their own need none of this: `rank=` by path.

    Args:
      shares: of the largest rank, in (0, 1].

    >>> import lowrank_jax as lrx
    >>> views = lrx.Views(stacked=("kernel",))
    >>> params = {"kernel": jnp.ones((3, 8, 8))}
    >>> view = lrx.resolution.resolve(params, views, rank=4).projected[0]
    >>> schedule = by_layer(shares=(1, 0.5))
    >>> schedule.serving(4, schedule.init(view)).sum(axis=-1).tolist()
    [4, 3, 2]
    """

    shares: tuple[Scalar, ...]
    of_layers: ClassVar[bool] = True

    def __post_init__(self):
        object.__setattr__(self, "shares", tuple(self.shares))
        if not self.shares:
            raise ValueError("by_layer: shares=() must name at least one share of the rank")
        for share in self.shares:
            _check_share("by_layer: shares", share)

    def init(self, view):
        depths = np.linspace(0, 1, count(view))
        at = np.linspace(0, 1, len(self.shares))
        shares = jnp.interp(depths, at, jnp.asarray(self.shares, jnp.float32))
        return shares.astype(jnp.float32).reshape(view.batch)

    def serving(self, rank, state, *, step=None, energies=None):
        return _first(rank, state)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Energy(RankSchedule):
    """As few vectors as capture a share of the target's energy, each matrix for itself
    (AdaRankGrad's idea).

    Those with the largest `|p_jᵀG|²` serve, until they sum up to `share |G|²`; all r where these
    do not reach it. Bases must be orthonormal, and a refresh reads the target.

    AdaRankGrad (https://arxiv.org/abs/2410.17881, by its abstract) so lets the rank of a layer fall
    with that of its gradients; by which share, the abstract does not say.

    Args:
      share: of the energy, in (0, 1].
      least: vectors that serve in any case.

    >>> schedule = energy(share=0.9)
    >>> schedule.serving(3, (), energies=(jnp.array([1.0, 6.0, 3.0]), jnp.array(10.0))).tolist()
    [False, True, True]
    """

    share: Scalar
    least: Scalar = 1
    reads: ClassVar[frozenset[str]] = frozenset({"energies"})

    def __post_init__(self):
        _check_share("energy: share", self.share)
        check_integer("energy: least", self.least, at_least=1)

    def serving(self, rank, state, *, step=None, energies=None):
        own, whole = energies
        # place of each vector by its energy, the largest first, (batch..., r)
        order = jnp.argsort(-own, axis=-1, stable=True)
        place = jnp.argsort(order, axis=-1, stable=True)
        # what those in front of it capture
        largest_first = jnp.take_along_axis(own, order, axis=-1)
        in_front = jnp.cumsum(largest_first, axis=-1) - largest_first
        needed = in_front < self.share * whole[..., None]
        number = jnp.maximum(jnp.sum(needed, axis=-1, keepdims=True), self.least)
        return place < number


def _check_share(field: str, value: Scalar) -> None:
    check_number(field, value, above=0)
    if is_number(value) and value > 1:
        raise ValueError(f"{field}={value} must be a share in (0, 1]")


by_layer = ByLayer
decay = Decay
energy = Energy

__all__ = ["RankSchedule", "by_layer", "decay", "energy"]
__dir__ = functools.partial(sorted, __all__)
