"""One projector first, another one later."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax

from lowrank_jax.checks import check_integer
from lowrank_jax.projection.projectors.base import Projector
from lowrank_jax.projection.projectors.wrapped import Wrapped
from lowrank_jax.typing import Rank, Scalar


@dataclasses.dataclass(frozen=True, kw_only=True)
class Switch(Wrapped):
    """Bases of `first`, and of `then` at refreshes from step `at` on (GoLore).

    A basis is of one kind throughout, so that moments and taps pass from one projector to the
    other; a refresh decides by one condition on the step. The memories of both are kept.

    Args:
      at: accepted steps before the first refresh by `then`: a number, also a traced one.
      first, then: projectors of one rank, whose bases are stored alike.

    Raises:
      ValueError: for projectors of different ranks or kinds of basis, for one that never moves as
        `then`, or a negative `at`.

    >>> from lowrank_jax import projectors
    >>> random = projectors.random(rank=4, kind="orthonormal")
    >>> switch = Switch(at=1000, first=projectors.svd(rank=4), then=random)
    >>> sorted(switch.reads), switch.rank
    (['key', 'step', 'target'], 4)
    """

    rank: Rank = dataclasses.field(init=False)  # that of both
    at: Any
    first: Projector
    then: Projector

    def __post_init__(self):
        for name in ("first", "then"):
            if not isinstance(getattr(self, name), Projector):
                raise ValueError(
                    f"switch: {name}={getattr(self, name)!r} must be one of lrx.projectors"
                )
        object.__setattr__(self, "rank", self.first.rank)
        super().__post_init__()
        check_integer("switch: at", self.at, at_least=0)
        if not self.then.moves:
            raise ValueError(
                f"switch: then={self.then!r} never moves its basis; give a projector that refreshes"
            )
        if self.first.rank != self.then.rank:
            raise ValueError(
                f"switch: first={self.first!r} and then={self.then!r} must have one rank"
            )
        kinds = [projector.structure() for projector in (self.first, self.then)]
        if kinds[0] != kinds[1]:
            raise ValueError(
                f"switch: first={self.first!r} keeps its basis as {kinds[0]!r} and "
                f"then={self.then!r} as {kinds[1]!r}; give two that store bases alike (of one "
                "dtype), such as svd and random(kind='orthonormal')"
            )

    @property
    def parts(self):
        return (self.first, self.then)

    @property
    def reads(self):
        of_start = {"key"} if self.starts else set()  # the memory of the other one
        return super().reads | of_start | {"step"}

    def _chosen(self, step: Scalar, first: Callable, then: Callable) -> Any:
        """`first()` before step `at`, else `then()`."""
        before = step < self.at
        if isinstance(before, bool):
            return first() if before else then()
        return jax.lax.cond(before, first, then)

    def start(self, view, inputs):
        _, (one, other) = self.init(view, inputs.key)

        def first():
            basis, memory = self.first.start(view, inputs)
            return basis, (memory, other)

        def then():
            basis, memory = self.then.start(view, inputs)
            return basis, (one, memory)

        return self._chosen(inputs.step, first, then)

    def refresh(self, view, basis, memory, inputs):
        one, other = memory

        def first():
            new, moved = self.first.refresh(view, basis, one, inputs)
            return new, (moved, other)

        def then():
            new, moved = self.then.refresh(view, basis, other, inputs)
            return new, (one, moved)

        return self._chosen(inputs.step, first, then)

    def sketch_basis(self, view, basis, memory, inputs):
        both = zip((self.first, self.then), memory, strict=True)
        makers = [
            functools.partial(own.sketch_basis, view, basis, kept, inputs)
            for own, kept in both
            if "sketch" in own.reads
        ]
        # where one of them reads no sketch, its refreshes make nothing of the other's
        return self._chosen(inputs.step, makers[0], makers[-1])


switch = Switch
