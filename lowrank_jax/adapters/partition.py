"""A tree of parameters in two: what trains as it is, and the rest; for partial fine-tuning without
adapters.

    selected, rest = lrx.adapters.partition(params, (r"head/.*", r".*/norm/scale"))
    gradients = jax.grad(lambda selected: objective(lrx.adapters.join(selected, rest), batch))(selected)

Both trees have the structure of the whole, with `optax.MaskedNode` where a leaf is in the other: a
node without leaves, so that jit, grad and every optax transformation see what is there and nothing
else.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import jax
import optax

from lowrank_jax.checks import no_match
from lowrank_jax.trees import is_node, leaves_with_metadata, map_nodes, nodes_with_keys, path_of
from lowrank_jax.typing import Pytree


def partition(params: Pytree, patterns: str | Iterable[str]) -> tuple[Pytree, Pytree]:
    """`(selected, rest)`: the leaves whose whole "/"-joined path matches a pattern, and the others.

    Args:
      params: arrays, boxes of metadata, quantised arrays; each is one leaf.
      patterns: regular expressions, as in `lrx.adapt`.

    Raises:
      ValueError: for a pattern that matches nothing, with suggestions, or none at all.

    >>> import jax.numpy as jnp
    >>> selected, rest = partition(
    ...     {"body": {"kernel": jnp.ones(2)}, "head": {"kernel": jnp.ones(3)}}, "head/.*"
    ... )
    >>> selected
    {'body': {'kernel': MaskedNode()}, 'head': {'kernel': Array([1., 1., 1.], dtype=float32)}}
    >>> rest["head"]
    {'kernel': MaskedNode()}
    """
    patterns = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    if not patterns:
        raise ValueError(
            "patterns: there is none; name the leaves to select, for instance 'head/.*'"
        )
    nodes = leaves_with_metadata(params)
    paths = [path for path, node, _ in nodes if not isinstance(node, optax.MaskedNode)]
    for pattern in patterns:
        if not any(re.fullmatch(pattern, path) for path in paths):
            raise no_match("patterns", pattern, paths)

    def half(wanted: bool) -> Pytree:
        def keep(path, node):
            chosen = any(re.fullmatch(pattern, path) for pattern in patterns)
            return node if chosen == wanted else optax.MaskedNode()

        return map_nodes(keep, params)

    return half(True), half(False)


def join(*parts: Pytree) -> Pytree:
    """The tree that `partition` took apart; also of more parts than two.

    Raises:
      ValueError: if the parts are not of one structure; naming a leaf that no part has, or two
        have.

    >>> import jax.numpy as jnp
    >>> params = {"body": jnp.ones(2), "head": jnp.ones(3)}
    >>> join(*partition(params, "head")) == params
    True
    """
    flat = [nodes_with_keys(part) for part in parts]
    structures = [jax.tree.structure(part, is_leaf=is_node) for part in parts]
    treedefs: set[Any] = set(structures)
    if len(treedefs) != 1:
        raise ValueError(
            "join: the parts are not of one structure; give what partition returned, or trees like "
            "it"
        )
    leaves = []
    for nodes in zip(*flat, strict=True):
        # the part that has it
        there = [node for _, node in nodes if not isinstance(node, optax.MaskedNode)]
        if len(there) != 1:
            which = "no part has" if not there else f"{len(there)} parts have"
            raise ValueError(
                f"join: {which} the leaf {path_of(nodes[0][0])!r}; each must be in one part"
            )
        leaves.append(there[0])
    return jax.tree.unflatten(treedefs.pop(), leaves)
