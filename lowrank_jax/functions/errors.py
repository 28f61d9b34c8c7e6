"""Errors of reading a program: the leaf, the primitive, the user's line, the reason, the remedy."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

from jax.extend import source_info_util

# Nothing in this room is a user's line: products and traces are made here on their behalf.
source_info_util.register_exclusion(str(pathlib.Path(__file__).parent))


class ReadError(ValueError):
    """A program reads a kernel node in a way that its semantics do not cover."""


@dataclasses.dataclass(frozen=True)
class Here:
    """Where a function is called that was adapted: what lies outside of all its equations, as of
    `lrx.einsum`, which the user calls."""

    source_info: Any

    @classmethod
    def now(cls) -> Here:
        return cls(source_info_util.current())


def line_of(*equations: Any) -> str:
    """Where the user's program makes an equation; the outer ones are asked where jax's own functions
    made it."""
    for eqn in equations:
        line = source_info_util.summarize(eqn.source_info)
        if line and "unknown" not in line.lower():
            return line
    return "an unknown line"
