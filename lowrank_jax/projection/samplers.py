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
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

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
      weights: of each layer, such as `outlier_ratios`: how likely it is to be drawn next, beside
        those that are left. None draws all alike.

    >>> sampler = Lisa(active=2, period=20)
    >>> sampler.draw(0, 8, jax.random.key(0)).shape
    (2,)
    >>> sampler = Lisa(active=2, weights=(0.0, 2.0, 1.0))  # layer 0 never moves
    >>> sampler.draw(0, 3, jax.random.key(0)).tolist()
    [1, 2]
    """

    active: int = 2
    period: Scalar = 20
    weights: Sequence[float] | None = None

    def __post_init__(self):
        _check_active(self.active)
        check_integer("period", self.period, at_least=1)
        if self.weights is not None:
            # hashable, and the same for equal numbers of any kind
            object.__setattr__(self, "weights", _checked_weights(self.weights, self.active))

    def slots(self, total):
        if self.weights is not None and len(self.weights) != total:
            raise ValueError(
                f"lisa: weights are of {len(self.weights)} layers, and the tree has matrices of "
                f"{total}: give one number a layer"
            )
        return min(self.active, total)

    def begun(self, step):
        return step // self.period, step % self.period

    def draw(self, number, total, key):
        slots, key = self.slots(total), jax.random.fold_in(key, number)
        if self.weights is None:
            order = jax.random.permutation(key, total)
        else:
            # the largest of log w + Gumbel noise are a draw without replacement, by weight
            noise = jax.random.gumbel(key, (total,))
            order = jnp.argsort(-(jnp.log(jnp.asarray(self.weights)) + noise))
        return jnp.sort(order[:slots]).astype(jnp.int32)


def _checked_weights(weights: Any, active: int) -> tuple[float, ...]:
    found = tuple(float(weight) for weight in np.asarray(weights).reshape(-1))
    if any(not 0 <= weight < math.inf for weight in found):
        raise ValueError(f"lisa: weights={found}: give finite numbers of at least 0")
    positive = sum(weight > 0 for weight in found)
    if positive < min(active, len(found)):
        raise ValueError(
            f"lisa: weights={found} are above 0 for {positive} layers, and active={active} are "
            "drawn: give fewer slots, or weights to more layers"
        )
    return found


def outlier_ratios(
    kernels: Mapping[str, jax.Array], input_norms: Mapping[str, jax.Array], threshold: Scalar = 13.0
) -> jax.Array:
    """OwLore's weights of layers: the share of entries that are outliers, `(L,)`.

    With `A = |W_ij| |X_i|`, of the inputs' i-th feature over a batch, all matrices of a layer taken
    together,

        D_l = #{A > threshold mean_l(A)} / #A

    as the paper defines it (https://arxiv.org/abs/2405.18380); there is no official code that
    computes it.

    Args:
      kernels: by any name `(L, n, m)`, inputs before outputs.
      input_norms: by the same names `(L, n)`, the l2 norm of each input feature.
      threshold: M, 13 in the paper.

    >>> kernels = {"up": jnp.ones((2, 3, 4)).at[1, 0, 0].set(100.0)}
    >>> outlier_ratios(kernels, {"up": jnp.ones((2, 3))}, threshold=5.0).tolist()
    [0.0, 0.0833]
    """
    if kernels.keys() != input_norms.keys():
        raise ValueError(
            f"outlier_ratios: kernels of {sorted(kernels)} and norms of {sorted(input_norms)}: give "
            "both of every matrix"
        )
    scores = [
        jnp.reshape(jnp.abs(kernels[name]) * input_norms[name][..., None], (len(kernels[name]), -1))
        for name in kernels
    ]
    pooled = jnp.concatenate(scores, axis=1)  # (L, entries of a layer)
    return jnp.mean(pooled > threshold * jnp.mean(pooled, axis=1, keepdims=True), axis=1)


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

__all__ = ["Sampler", "all", "badam", "lisa", "outlier_ratios"]
__dir__ = functools.partial(sorted, __all__)
