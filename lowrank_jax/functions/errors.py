"""Errors of reading a program: the leaf, the primitive, the user's line, the reason, the remedy."""

from __future__ import annotations

from typing import Any

from jax.extend import source_info_util


class ReadError(ValueError):
    """A program reads a kernel node in a way that its semantics do not cover."""


def line_of(*equations: Any) -> str:
    """Where the user's program makes an equation; the outer ones are asked where jax's own functions
    made it."""
    for eqn in equations:
        line = source_info_util.summarize(eqn.source_info)
        if line and "unknown" not in line.lower():
            return line
    return "an unknown line"
