"""What flows through a program in a kernel node's place."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_jax.functions.axes import Axes, Digit
from lowrank_jax.kernel_node import KernelNode, parts_of, with_parts_of
from lowrank_jax.quantized import as_node
from lowrank_jax.typing import Kernel, Pytree, Shape


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Flow:
    """A node on its way from the arguments of a function to the products that multiply by it.

    Attributes:
      array: the bare kernel, on which every step of the program is made as it is written; None
        where the node has no array underneath (codes, factors).
      node: the node without that array.
      axes: static; which axes of the value are which axes of the leaf.
      dtype: static; of the value.
      path: static; of the leaf.
      stopped: static; whether its gradient was stopped.
      probing: static; whether this is an array that is only followed, so that its view is read.
    """

    array: jax.Array | None
    node: Kernel
    axes: Axes = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})
    path: str = dataclasses.field(metadata={"static": True})
    stopped: bool = dataclasses.field(default=False, metadata={"static": True})
    probing: bool = dataclasses.field(default=False, metadata={"static": True})

    @classmethod
    def of(cls, value: Kernel, path: str) -> Flow:
        """Of a leaf of the arguments."""
        node = as_node(value)
        assert node is not None
        _check_alike(node)
        array, bare = bare_of(value)
        axes = Axes.of(tuple(node.shape), node.view)
        return cls(array, bare, axes, jnp.dtype(node.dtype), node.path or path)

    @classmethod
    def probe(cls, array: jax.Array, path: str) -> Flow:
        """Of an array whose view nobody knows."""
        axes = Axes.of(tuple(array.shape), None)
        return cls(array, (), axes, array.dtype, path, probing=True)

    @property
    def shape(self) -> Shape:
        return self.axes.shape

    @property
    def label(self) -> str:
        """What this is, for errors."""
        node = as_node(self.node)
        return f"{type(self.node).__name__} {self.path!r}" if node is None else node.label

    def value(self) -> Kernel:
        """The leaf that this is, untouched."""
        return with_array(self.node, self.array)

    def moved(self, step: Callable[[jax.Array], jax.Array], axes: Axes, dtype: Any = None) -> Flow:
        """After one step of the program, which `step` makes of an array."""
        array = None if self.array is None else step(self.array)
        return dataclasses.replace(
            self, array=array, axes=axes, dtype=self.dtype if dtype is None else dtype
        )

    # ------------------------------------------------------------- batch axes

    def own(self) -> tuple[Pytree, Pytree]:
        """`(own, shared)` arrays of the node: with and without the batch digits in front."""
        return parts_of(self.node)

    def with_own(self, change: Callable[[jax.Array], jax.Array]) -> Flow:
        """With every array of the node's own changed."""
        own, shared = self.own()
        return dataclasses.replace(
            self, node=with_parts_of(self.node, jax.tree.map(change, own), shared)
        )

    def place(self, digit: Digit) -> int:
        """Which leading axis of the node's own arrays a batch digit is; -1 for none. A probe, which
        has no arrays, may be taken apart along any digit."""
        if self.probing:
            return 0
        names = [one.name for one in self.axes.batch]
        return names.index(digit.name) if digit.name in names else -1

    def indexed(self, digit: Digit, index: Any) -> Flow:
        """With one index along a batch digit, whose axis the value lacks then or has at size 1."""
        place = self.place(digit)
        take = lambda x: jax.lax.dynamic_index_in_dim(x, index, place, keepdims=False)  # noqa: E731
        return dataclasses.replace(self.with_own(take), axes=self.axes.without(digit))


def bare_of(value: Kernel) -> tuple[jax.Array | None, Kernel]:
    """`(array, node without it)`: what lies beneath all nodes, and what lies on it."""
    if not isinstance(value, KernelNode):
        return (None, value) if as_node(value) is not None else (value, ())
    base = value.base()
    if base is None or type(value).with_base is KernelNode.with_base:
        return None, value
    array, bare = bare_of(base)
    return array, value if array is None else value.with_base(bare)


def _check_alike(node: KernelNode) -> None:
    """ValueError where what lies on a node sees other matrices than it is made of."""
    base = node.base()
    if not isinstance(base, KernelNode):
        return
    if base.view != node.view:
        raise ValueError(
            f"{base.label} of shape {tuple(base.shape)} is seen as {base.view}, what lies on it sees "
            f"{node.view}; give them the same views=, or node.dense() as their base"
        )
    _check_alike(base)


def with_array(node: Kernel, array: jax.Array | None) -> Kernel:
    """The inverse of `bare_of`."""
    if array is None:
        return node
    if not isinstance(node, KernelNode):
        return array
    return node.with_base(with_array(node.base(), array))


def is_flow(x: Any) -> bool:
    """Whether a value is a node on its way."""
    return isinstance(x, Flow)
