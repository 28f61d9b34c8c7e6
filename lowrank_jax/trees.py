"""Leaves of a parameter tree and their paths: arrays, boxes of metadata, quantised arrays, values
of Variables."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.core import meta

from lowrank_jax.codes import Codes
from lowrank_jax.typing import DTypeLike, Kernel, Pytree

Keys = tuple[Any, ...]
"""Keys of JAX on the way to a leaf."""


def _key_name(key: Any) -> str:
    # of mappings, of dataclasses and named tuples, of sequences
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def as_float32(leaf: Kernel) -> Pytree:
    """An array in float32; of a `jax.ShapeDtypeStruct` that shape, of which `init` makes arrays as
    optax does."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=leaf.sharding)
    return leaf.astype(jnp.float32)


def is_node(x: Pytree) -> bool:
    """What counts as one leaf of a parameter tree: a masked one, a box of metadata, a quantised
    array."""
    return isinstance(x, (optax.MaskedNode, meta.AxisMetadata)) or is_quantized(x)


def is_quantized(x: Pytree) -> bool:
    """Whether a leaf is a quantised array, or an nnx Variable of one, which has all its
    attributes."""
    value = x.get_raw_value() if _is_variable(x) else x
    return isinstance(value, Codes)


def dequantized(x: Kernel, dtype: DTypeLike = jnp.float32) -> Kernel:
    """The value of a quantised array in this dtype; anything else as it is."""
    return x.dequantize(dtype) if is_quantized(x) else x


def stored_like(value: jax.Array, like: Pytree) -> Kernel:
    """A value as `like` is stored: in its dtype, or in its codes."""
    if is_quantized(like) and like.writable:
        return like.requantize(value)
    return value.astype(like.dtype)


def path_of(keys: Iterable[Any]) -> str:
    """ "/"-joined path of a leaf, of keys as `nodes_with_keys` gives them."""
    return "/".join(_key_name(key) for key in keys)


def _is_variable(x: Pytree) -> bool:
    """Whether this is an nnx Variable; where nobody imported flax.nnx there is none, and it is not
    imported here."""
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(x, nnx.Variable)


def pure(tree: Pytree) -> Pytree:
    """The tree with values in place of nnx Variables, which is how `nnx.Optimizer` hands trees to
    `update`.

    >>> from flax import nnx
    >>> state = nnx.state(nnx.Linear(2, 3, use_bias=False, rngs=nnx.Rngs(0)))
    >>> pure(state)["kernel"].shape
    (2, 3)
    """
    nnx = sys.modules.get("flax.nnx")
    return tree if nnx is None else nnx.as_pure(tree)


@functools.cache
def _placeholder_type() -> type:
    found: list[type] = []

    def init(params: Pytree) -> Pytree:
        found.append(type(params))
        return params

    optax.tree_utils.tree_map_params(init, lambda x: x, jax.numpy.zeros(()))
    return found[0]


def is_placeholder(params: Pytree) -> bool:
    """Whether `optax.tree_utils.tree_map_params` calls `init`, with a node without leaves in place
    of the parameters.

    It asks which parts of a state are like the parameters: `init` puts the node there and any leaf
    elsewhere.
    """
    return isinstance(params, _placeholder_type())


def nodes_with_keys(
    tree: Pytree, is_leaf: Callable[[Pytree], bool] = is_node
) -> list[tuple[Keys, Pytree]]:
    """`[(keys, node), ...]` in the order of `jax.tree.leaves(tree, is_leaf=is_leaf)`.

    The value of an nnx Variable is a leaf under the Variable's own keys, so that paths are the same
    with Variables, as `nnx.Optimizer` gives them to `init`, and without, as it gives them to
    `update`.
    """
    found: list[tuple[Keys, Pytree]] = []
    stops = lambda x: is_leaf(x) or _is_variable(x)  # noqa: E731
    for keys, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=stops):
        if not _is_variable(node):
            found.append((keys, node))
            continue
        # the value may be a tree, or a node that counts as one leaf
        value = nodes_with_keys(node.get_raw_value(), is_leaf)
        found += [((*keys, *inner), leaf) for inner, leaf in value]
    return found


def map_nodes(function: Callable[[str, Pytree], Pytree], tree: Pytree) -> Pytree:
    """The tree with `function(path, node)` of every node; boxes and quantised arrays are nodes,
    Variables stay."""
    made = [function(path_of(keys), node) for keys, node in nodes_with_keys(tree)]
    structure = jax.tree.structure(tree, is_leaf=is_node)
    return jax.tree.unflatten(structure, made)


def leaves_with_metadata(tree: Pytree) -> list[tuple[str, Pytree, tuple[str | None, ...] | None]]:
    """`[(path, leaf or MaskedNode, logical axis names or None), ...]` in the order of
    `jax.tree.leaves`."""
    found = []
    for keys, node in nodes_with_keys(tree):
        names = None
        # boxes may stand in boxes; the innermost one knows the array best
        while isinstance(node, meta.AxisMetadata):
            names = getattr(node, "names", names)
            node = node.unbox()
        found.append((path_of(keys), node, names))
    return found


def bytes_of(tree: Pytree) -> int:
    """Bytes of the arrays, or of their shapes, in a tree."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
