"""Older layouts of the optimizers' state, brought to the present one.

Paths are what `jax.tree_util.keystr(path, simple=True, separator="/")` gives, and what
`flax.serialization` calls its nested names: `projection/matrices/dense/kernel/inner/mu`.

| format | what changed | where it was before |
|---|---|---|
| 2 | `refreshes` | |
| 3 | errors that are projected again stand in `target` | `residual` |
|   | `RecipeState.rate` | `schedule` |
|   | `partly_skipped` | 0 |

Memories and states of refresh schedules are new in format 3, and so are the methods that have them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax.projection.state import FORMAT_VERSION
from lowrank_jax.typing import Pytree

# Of format 2: patterns of paths and what they are called now, where that is a path of the present
# state (the limiter's norms are called `residual` still).
RENAMED: tuple[tuple[str, str], ...] = (
    (r"^((?:.*/)?)schedule/count$", r"\1rate/count"),
    (r"^((?:.*/)?)residual$", r"\1target"),
)

# What it does not have, and the number that says the same.
FILLED: tuple[tuple[str, int], ...] = ((r"(?:.*/)?partly_skipped", 0),)


def sources(wanted: Iterable[str], stored: Collection[str]) -> dict[str, str | int]:
    """Where each array of the present layout stands among the stored paths, or the number that it
    is filled with.

    Its own path where nothing is known of it, so that what is missing shows.

    >>> old = ["schedule/count", "kernel/residual", "other/residual", "step"]
    >>> found = sources(["rate/count", "kernel/target", "other/residual", "partly_skipped"], old)
    >>> list(found.values())
    ['schedule/count', 'kernel/residual', 'other/residual', 0]
    """
    wanted, present = list(wanted), frozenset(stored)
    places: dict[str, str | int] = {path: path for path in wanted}
    for path in present - places.keys():
        for pattern, new in RENAMED:
            name = re.sub(pattern, new, path)
            if name in places and name not in present:
                places[name] = path
    for path in wanted:
        fills = [value for pattern, value in FILLED if re.fullmatch(pattern, path)]
        if places[path] not in present and fills:
            places[path] = fills[0]
        is_version = path.rpartition("/")[2] == "format_version"
        if is_version and path.removesuffix("format_version") + "refreshes" in present:
            places[path] = FORMAT_VERSION
    return places


def table(tree: Pytree) -> dict[str, Any]:
    """`{path: leaf}` of a tree, of nested names, or of a dict of paths."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def upgraded(saved: Pytree, like: Pytree) -> Pytree:
    """A saved state in the present layout.

    Args:
      saved: of any format, as nested names (`flax.serialization.msgpack_restore`), as a dict of
        paths, or as a pytree.
      like: a state of the optimizer that goes on with it, such as `jax.eval_shape(tx.init, params)`.

    Raises:
      ValueError: naming the first array that is missing, superfluous, or of another shape or dtype.

    >>> import jax.numpy as jnp
    >>> import lowrank_jax as lrx
    >>> from flax import serialization
    >>> tx, params = lrx.galore(1e-2, rank=2), {"kernel": jnp.ones((4, 8))}
    >>> saved = serialization.to_state_dict(tx.init(params))
    >>> saved["schedule"] = saved.pop("rate")  # as it was called in format 2
    >>> int(upgraded(saved, tx.init(params)).rate.count)
    0
    """
    stored, wanted = table(saved), table(like)
    places = sources(wanted, stored)
    used = {place for place in places.values() if isinstance(place, str)}
    superfluous = sorted(set(stored) - used - {p for p in stored if p.endswith("format_version")})
    if superfluous:
        raise ValueError(
            f"saved: {superfluous[0]!r} has no place in this optimizer's state; give the optimizer "
            "that wrote it"
        )
    leaves = []
    for path, leaf in wanted.items():
        place = places[path]
        if isinstance(place, int):
            leaves.append(jnp.asarray(place, leaf.dtype))
            continue
        found = stored.get(place)
        shown = None if found is None else (np.shape(found), np.dtype(found.dtype))
        if shown != (tuple(leaf.shape), np.dtype(leaf.dtype)):
            raise ValueError(
                f"saved: {place!r} is {shown}, and this optimizer's state has "
                f"{(tuple(leaf.shape), np.dtype(leaf.dtype))} there; give the optimizer that wrote "
                "it"
            )
        leaves.append(jnp.asarray(found))
    return jax.tree.unflatten(jax.tree.structure(like), leaves)
