"""The moments protocol: which leaves of an optimizer's state are moments, by the type of the state.

Transports and error feedback move moments without knowing the fields of the state that holds them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import optax

from lowrank_jax.typing import Pytree, Scalar


class Moment(NamedTuple):
    """One moment inside an inner state.

    Attributes:
      path: key path of the leaf inside the state.
      kind: "first", "second", "max", "factored" or "other".
      decay: its decay rate, or None where the state does not know.
      count: steps it has seen, or None.
    """

    path: tuple
    kind: str
    decay: Any
    count: Any


class Registered(NamedTuple):
    """What a type of state says of its fields: the kind of each moment, and which field counts."""

    kinds: dict[str, str]
    counter: str | None


_REGISTRY: dict[type, Registered] = {}


def register_moments(state_type: type, kinds: dict[str, str], count: str | None = None) -> None:
    """Tells the moments protocol which fields of a state type are moments, and of which kind."""
    _REGISTRY[state_type] = Registered(kinds, count)


register_moments(optax.ScaleByAdamState, {"mu": "first", "nu": "second"}, "count")
register_moments(
    optax.ScaleByAmsgradState, {"mu": "first", "nu": "second", "nu_max": "max"}, "count"
)
register_moments(optax.ScaleByLionState, {"mu": "first"}, "count")
register_moments(optax.TraceState, {"trace": "first"})
register_moments(optax.EmaState, {"ema": "first"}, "count")
register_moments(optax.ScaleByRmsState, {"nu": "second"})
register_moments(
    optax.FactoredState, {"v_row": "factored", "v_col": "factored", "v": "second"}, "count"
)


def kinds_of(state: Pytree) -> dict[str, str] | None:
    """`{field: kind}` of the moments of a state, None where its type is not registered."""
    entry = _REGISTRY.get(type(state))
    return None if entry is None else entry.kinds


def fields_of(state: Pytree) -> tuple[str, ...]:
    """The fields of a state that are moments; TypeError where its type is not registered."""
    entry = _REGISTRY.get(type(state))
    if entry is None:
        raise TypeError(
            f"state {type(state).__name__} is not registered; say which of its fields are moments "
            "with lrx.inner.register_moments"
        )
    return tuple(entry.kinds)


def registered(state: Pytree, decays: dict[str, Scalar]) -> list[Moment]:
    """The registered moments inside a state, in the order of its leaves.

    Args:
      state: of any nesting; the registered types are found in it.
      decays: decay rates by kind of moment, as far as they are known.
    """
    found: list[Moment] = []

    def of_entry(node, entry, path):
        count = getattr(node, entry.counter) if entry.counter else None
        # the leaves of a field are moments of one kind
        for field, kind in entry.kinds.items():
            leaves = jax.tree_util.tree_flatten_with_path(getattr(node, field))[0]
            for inner_path, _ in leaves:
                where = (*path, jax.tree_util.GetAttrKey(field), *inner_path)
                found.append(Moment(where, kind, decays.get(kind), count))

    # down the state, and no further than to registered types
    def visit(node, path):
        entry = _REGISTRY.get(type(node))
        if entry is not None:
            of_entry(node, entry, path)
            return
        children = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)[0]
        for child_path, child in children:
            if child is not node:
                visit(child, (*path, *child_path))

    visit(state, ())
    return found
