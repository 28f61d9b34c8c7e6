"""Quantised arrays: what every form of codes has in common.

A parameter, a moment or a basis may be kept in few bits an entry. Wherever the library meets one it
asks `trees.is_quantized`, and speaks to it by the verbs of `Codes`; which bits those are, only the
class of the codes knows (`lrx.linalg.QuantizedBlocks`, `lrx.linalg.NormalFloat4`, or a class of
one's own).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lowrank_jax.reprs import Short
from lowrank_jax.typing import DTypeLike, Kernel, Key, Pytree, Shape, Spec


class Codes(Short):
    """Base of quantised arrays: pytrees whose leaves are codes and scales, and whose value is one
    array.

    A subclass is registered as a pytree and has at least `shape` and `dequantize`. What it adds
    says what else it can do: `requantize` makes it writable, `partition_specs` and `blocks` let a
    mesh divide it.

    >>> import dataclasses, jax, jax.numpy as jnp
    >>> import lowrank_jax as lrx
    >>> @jax.tree_util.register_dataclass
    ... @dataclasses.dataclass(frozen=True)
    ... class Halves(lrx.linalg.Codes):
    ...     codes: jax.Array
    ...
    ...     @property
    ...     def shape(self):
    ...         return self.codes.shape
    ...
    ...     def dequantize(self, dtype=jnp.float32):
    ...         return self.codes.astype(dtype) / 2
    >>> lrx.matmul(jnp.ones((1, 3)), Halves(jnp.ones((3, 2), jnp.int8))).tolist()
    [[1.5, 1.5]]
    """

    # How codes are rounded where they are written: whether `requantize` takes a key.
    rounds_stochastically: Any = True

    @property
    def shape(self) -> Shape:
        """Of the value, not of the codes."""
        raise NotImplementedError(f"{type(self).__name__} must say the shape of its value")

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def dtype(self) -> Any:
        """Of the value, float32, not of the codes."""
        return jnp.dtype(jnp.float32)

    @property
    def blocks(self) -> Shape:
        """The axes of the value in units that no device divides."""
        return self.shape

    @property
    def writable(self) -> bool:
        """Whether another value can be written in this form."""
        return type(self).requantize is not Codes.requantize

    def dequantize(self, dtype: DTypeLike = jnp.float32) -> jax.Array:
        """The value."""
        raise NotImplementedError(f"{type(self).__name__} must decode itself")

    def requantize(self, value: jax.Array, key: Key | None = None) -> Kernel:
        """Another value in the same form; a key rounds stochastically."""
        del value, key
        raise ValueError(
            f"{type(self).__name__} has no requantize, so that nothing can be written to it"
        )

    def partition_specs(self, spec: Spec) -> Pytree:
        """PartitionSpecs in the place of arrays, where the value is placed as `spec` says; None where
        the codes cannot follow it."""
        del spec
        return None
