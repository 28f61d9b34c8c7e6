"""Equations of a program, and the few of their parameters that are read.

What differs between releases of jax stands here alone.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from typing import Any

import jax
from jax.extend import core as jex


def bind(eqn: Any, operands: Any, **changes: Any) -> list[Any]:
    """The results of an equation with these operands."""
    params = eqn.primitive.get_bind_params(dict(eqn.params) | changes)
    made = eqn.primitive.bind(*operands, **params)
    return list(made) if eqn.primitive.multiple_results else [made]


def scan_counts(params: dict[str, Any]) -> tuple[int, int]:
    """`(constants, carries)` of a scan."""
    if "ft_in" in params:  # jax 0.12
        consts, carry, _ = params["ft_in"].unpack()
        return len(consts), len(carry)
    return params["num_consts"], params["num_carry"]


def closed(jaxpr: Any) -> tuple[Any, list[Any]]:
    """`(jaxpr, consts)` of a jaxpr, closed or not."""
    consts = getattr(jaxpr, "consts", ())
    return getattr(jaxpr, "jaxpr", jaxpr), list(consts)


def names_of(eqn: Any) -> set[str]:
    """By which an equation that calls something may be known: its name, the function's, and that
    with the folder or the file that it is in, as "megablox.gmm"."""
    found = {eqn.primitive.name, str(eqn.params.get("name", ""))}
    inner = eqn.params.get("call_jaxpr")
    info = getattr(getattr(inner, "jaxpr", inner), "debug_info", None)
    for source in (info, eqn.params.get("name_and_src_info")):
        text = str(getattr(source, "func_src_info", None) or source or "")
        name, _, place = text.partition(" at ")
        found.add(name)
        path = pathlib.PurePath(place.rpartition(":")[0] or place)
        found |= {f"{part}.{name}" for part in (path.stem, path.parent.name) if part}
    return {name for name in found if name}


def dots_of(eqn: Any) -> Iterator[Any]:
    """Every dot_general within a call."""
    for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_program):
        if _is_program(inner):
            for one in closed(inner)[0].eqns:
                if one.primitive.name == "dot_general":
                    yield one
                yield from dots_of(one)


def _is_program(x: Any) -> bool:
    return isinstance(x, jex.ClosedJaxpr | jex.Jaxpr)
