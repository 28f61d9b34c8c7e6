"""Projectors that are made of other ones."""

from __future__ import annotations

import functools
from collections.abc import Callable

from lowrank_jax.projection.projectors.base import Projector


def _any(name: str) -> property:
    return property(lambda self: any(getattr(part, name) for part in self.parts))


def _all(name: str) -> property:
    return property(lambda self: all(getattr(part, name) for part in self.parts))


def _union(name: str) -> property:
    return property(lambda self: frozenset().union(*(getattr(part, name) for part in self.parts)))


def _shared(name: str) -> Callable:
    """A verb on bases, which has one meaning for all parts."""

    @functools.wraps(getattr(Projector, name))
    def verb(self, *args, **options):
        return getattr(self.parts[0], name)(*args, **options)

    return verb


class Wrapped(Projector):
    """Base of projectors made of `parts`, whose bases mean the same and of which one refreshes.

    What a basis does is asked of the first part, what is declared follows from all of them, and the
    memory is a tuple of theirs. Subclasses implement `parts`, `start`, `refresh` and
    `sketch_basis`, and a law sees to it that no verb of `Projector` is left to its default.
    """

    reads, sees = _union("reads"), _union("sees")
    moves, starts, remembers = _any("moves"), _any("starts"), _any("remembers")
    decomposes, of_range = _any("decomposes"), _any("of_range")
    masks, of_layers = _any("masks"), _any("of_layers")
    orthonormal, of_rows = _all("orthonormal"), _all("of_rows")
    starts_before = property(lambda self: self.parts[0].starts_before)

    rank_at, rank_for = _shared("rank_at"), _shared("rank_for")
    structure = _shared("structure")
    down, up, thin = _shared("down"), _shared("up"), _shared("thin")
    rest, rounding, measure = _shared("rest"), _shared("rounding"), _shared("measure")
    overlap, served = _shared("overlap"), _shared("served")
    basis_bytes = _shared("basis_bytes")
    low_shape, low_spec = _shared("low_shape"), _shared("low_spec")

    @property
    def parts(self) -> tuple[Projector, ...]:
        raise TypeError(f"{type(self).__name__} does not implement parts")

    def start(self, view, inputs):
        raise TypeError(f"{type(self).__name__} does not implement start")

    def refresh(self, view, basis, memory, inputs):
        raise TypeError(f"{type(self).__name__} does not implement refresh")

    def sketch_basis(self, view, basis, memory, inputs):
        raise TypeError(f"{type(self).__name__} does not implement sketch_basis")

    def check(self, view):
        for part in self.parts:
            part.check(view)

    def init(self, view, keys):
        made = [part.init(view, keys) for part in self.parts]
        # the bases of all parts mean the same, and the first part draws it
        basis, _ = made[0]
        return basis, tuple(memory for _, memory in made)

    def seen(self, view, basis, memory, low, target):
        pairs = zip(self.parts, memory, strict=True)
        return tuple(part.seen(view, basis, kept, low, target) for part, kept in pairs)

    def memory_bytes(self, view):
        return sum(part.memory_bytes(view) for part in self.parts)
