"""Which layers move at all? The others keep no state.

    layers in slots = draw(number of the draw, L)      (slots,) int32, the same for all leaves

The L layers of a model are the first axis of stacked leaves `(L, ...)`, or leaves whose paths count
(`layers_0/...`, `layers_1/...`). `slots` of them are active at a time: the state is that of a model
with so few layers, and starts afresh at each draw. The matrices of the other layers get an update of
zero, and no decay. Leaves outside the layers, and the vectors of all layers, are always on.

Which draw a step belongs to depends on the number of accepted steps alone, so a skipped step leaves
a draw due.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from lowrank_jax.checks import check_integer, is_integer
from lowrank_jax.matrices import ResolvedView
from lowrank_jax.reprs import Short
from lowrank_jax.resolution import Leaf, Report
from lowrank_jax.typing import Scalar

LAYERS = r"(?:.*/)?(?:layers?|blocks?|h)[_/]?(\d+)/.*"


class Group(NamedTuple):
    """One matrix of every layer.

    Attributes:
      paths: of one stacked leaf `(L, ...)`, or of the L leaves by their numbers.
      total: L.
      stacked: it is one leaf.
    """

    paths: tuple[str, ...]
    total: int
    stacked: bool


OUTSIDE = "outside the layers: always on"  # the note of a matrix that is in no layer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampler(Short):
    """Base of the samplers.

    Subclasses implement `slots`, `begun` and `draw`.

    Attributes:
      layers: pattern of the whole paths of leaves that are one layer's, whose first group is its
        number. Other projected leaves count layers by their first axis.
    """

    layers: str = LAYERS
    samples: ClassVar[bool] = True

    def slots(self, total: int) -> int:
        """The number of slots, of so many layers."""
        raise TypeError(f"{type(self).__name__} does not implement slots")

    def begun(self, step: Scalar) -> tuple[Scalar, Scalar]:
        """`(number of the draw, steps since)`, 0-based, of an accepted step."""
        raise TypeError(f"{type(self).__name__} does not implement begun")

    def draw(self, number: Scalar, total: int, key: jax.Array) -> jax.Array:
        """The layers in the slots, `(slots(total),)` int32.

        Args:
          number: of the draw, 0-based.
          total: number of layers.
          key: of the seed, the same at every step.
        """
        raise TypeError(f"{type(self).__name__} does not implement draw")

    def restricted(self, report: Report) -> Report:
        """The report with only the matrices of layers projected."""
        if not self.samples:
            return report
        return Report(tuple(map(self._kept, report.leaves)))

    def _kept(self, leaf: Leaf) -> Leaf:
        view = leaf.view
        if view is None or view.layered or self._number(leaf.path) is not None:
            return leaf
        return dataclasses.replace(leaf, view=None, note=OUTSIDE)

    def _number(self, path: str) -> tuple[str, int] | None:
        """`(path without the number, number)` of a leaf of one layer."""
        found = re.fullmatch(self.layers, path)
        if found is None:
            return None
        start, end = found.span(1)
        return f"{path[:start]}*{path[end:]}", int(found[1])

    def groups(self, report: Report) -> tuple[Group, ...]:
        """The matrices that layers have in common.

        Raises:
          ValueError: where layers that count differ in shape, rank or side, where numbers are
            missing, or where a mesh divides the layers of a stack.
        """
        groups: list[Group] = []
        families: dict[str, dict[int, ResolvedView]] = {}
        for view in report.projected:
            named = self._number(view.path)
            if named is None:
                _check_whole(view)
                groups.append(Group((view.path,), view.shape[0], stacked=True))
            else:
                families.setdefault(named[0], {})[named[1]] = view
        for name, family in families.items():
            _check_family(name, family)
            paths = tuple(family[number].path for number in range(len(family)))
            groups.append(Group(paths, len(paths), stacked=False))
        return tuple(groups)


def _check_whole(view: ResolvedView) -> None:
    if view.spec is not None and view.spec[0] is not None:
        raise ValueError(
            f"leaf {view.path!r}: a sampler takes single layers, and the mesh divides them over "
            f"{view.spec[0]!r}; divide another axis, or give sampler=lrx.samplers.all()"
        )


def _check_family(name: str, family: dict[int, ResolvedView]) -> None:
    numbers = sorted(family)
    if numbers != list(range(len(numbers))):
        raise ValueError(
            f"leaves {name!r} are of layers {numbers}; a sampler needs all from 0 on: leave them "
            "out with Views(rules=((pattern, None),)), or name the layers by its option layers="
        )
    kinds = {(view.shape, view.view, view.side, view.rank) for view in family.values()}
    if len(kinds) > 1:
        raise ValueError(
            f"leaves {name!r} differ in shape, view, side or rank: {sorted(map(str, kinds))}; a "
            "slot serves all layers in turn, so give them one rank and side"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class All(Sampler):
    """All layers, always."""

    samples: ClassVar[bool] = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lisa(Sampler):
    """LISA's: `active` layers at random without replacement, newly drawn every `period` steps.

    Args:
      active: the paper's gamma, a Python integer, since it fixes shapes.
      period: the paper's K, in accepted steps.

    >>> sampler = Lisa(active=2, period=20)
    >>> sampler.draw(0, 8, jax.random.key(0)).shape
    (2,)
    """

    active: int = 2
    period: Scalar = 20

    def __post_init__(self):
        _check_active(self.active)
        check_integer("period", self.period, at_least=1)

    def slots(self, total):
        return min(self.active, total)

    def begun(self, step):
        return step // self.period, step % self.period

    def draw(self, number, total, key):
        order = jax.random.permutation(jax.random.fold_in(key, number), total)
        return jnp.sort(order[: self.slots(total)]).astype(jnp.int32)


ORDERS = ("ascending", "descending", "random")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Badam(Sampler):
    """BAdam's: one layer at a time, all in turn.

    Args:
      period: the paper's K, accepted steps on one layer.
      order: "ascending", "descending", or "random", a new order for each round of all layers.
      phase: by how many steps the first turn is shorter; 1 in the official code.

    >>> sampler = Badam(period=2, order="descending")
    >>> [int(sampler.draw(sampler.begun(step)[0], 3, None)[0]) for step in range(8)]
    [2, 2, 1, 1, 0, 0, 2, 2]
    """

    period: Scalar = 50
    order: str = "descending"
    phase: Scalar = 0

    def __post_init__(self):
        check_integer("period", self.period, at_least=1)
        check_integer("phase", self.phase, at_least=0)
        if self.order not in ORDERS:
            raise ValueError(f"badam: order={self.order!r} must be one of {ORDERS}")

    def slots(self, total):
        return 1

    def begun(self, step):
        number = (step + self.phase) // self.period
        first = self.phase // self.period  # what the phase alone counts
        since = jnp.where(number == first, step, (step + self.phase) % self.period)
        return number - first, since

    def draw(self, number, total, key):
        turn = number % total
        if self.order == "descending":
            turn = total - 1 - turn
        elif self.order == "random":
            turn = jax.random.permutation(jax.random.fold_in(key, number // total), total)[turn]
        return jnp.reshape(jnp.asarray(turn, jnp.int32), (1,))


def _check_active(active) -> None:
    if not is_integer(active):
        raise ValueError(
            f"lisa: active={active} must be a Python integer, since it fixes the shapes of the state "
            "(put it in static_args)"
        )
    check_integer("lisa: active", active, at_least=1)


all = All
badam = Badam
lisa = Lisa

__all__ = ["Sampler", "all", "badam", "lisa"]
__dir__ = functools.partial(sorted, __all__)
