"""Arrays in 4 bits an entry with an offset: 16 equal steps from the smallest to the largest value.

A block is a run of consecutive entries of the last axis; the last block of a row may be short. A
byte holds entries i (upper half) and i + ceil(n / 2) (lower half) of a row of n.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lowrank_jax import sharding
from lowrank_jax.codes import Codes
from lowrank_jax.linalg._common import Array, is_integer
from lowrank_jax.linalg.quantization import spread
from lowrank_jax.serialization import serializable
from lowrank_jax.typing import DTypeLike

LEVELS = 16


@serializable
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Affine4(Codes):
    """An array in 4 bits an entry, and 8 bytes a block: `offset + step code`, code = 0 .. 15.

    Attributes:
      codes: uint8 `(..., ceil(n / 2))`, two codes a byte.
      offsets, steps: float32 `(..., ceil(n / block))`.
      size: n.
      block: entries of a block.

    >>> import jax.numpy as jnp
    >>> x = quantize_affine(jnp.array([[1.0, 2.5, 1.3]]))
    >>> x.shape, x.codes.tolist(), x.offsets.tolist(), x.dequantize().round(2).tolist()
    ((1, 3), [[3, 240]], [[1.0]], [[1.0, 2.5, 1.2999999523162842]])
    """

    codes: Array
    offsets: Array
    steps: Array
    size: int = dataclasses.field(metadata={"static": True})
    block: int = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.codes.shape[:-1], self.size)

    @property
    def rounds_stochastically(self) -> bool:
        """False: `requantize` takes no key."""
        return False

    @property
    def blocks(self) -> tuple[int, ...]:
        """`(..., 1)`: bytes hold entries of both halves of a row, which no device divides."""
        return (*self.codes.shape[:-1], 1)

    def partition_specs(self, spec: sharding.Spec) -> Affine4:
        """PartitionSpecs in the place of arrays: codes, offsets and steps lie as `spec` says, an
        entry for each axis, with whole rows."""
        own: Any = PartitionSpec(*spec[:-1], None)
        return dataclasses.replace(self, codes=own, offsets=own, steps=own)

    def dequantize(self, dtype: DTypeLike = jnp.float32) -> Array:
        """The value; products in float32, then cast."""
        halves = jnp.concatenate([self.codes >> 4, self.codes & 15], axis=-1)
        code = halves[..., : self.size].astype(jnp.float32)
        steps = spread(self.steps, self.size, self.block)
        return (spread(self.offsets, self.size, self.block) + steps * code).astype(dtype)

    def requantize(self, value: Array, key: Array | None = None) -> Affine4:
        """Another value in the same blocks; ValueError with a key, since nothing here rounds
        stochastically."""
        if key is not None:
            raise ValueError("key: affine codes round to the nearest value; leave key=None")
        return quantize_affine(value, self.block)


def quantize_affine(x: Any, block: int = 256) -> Affine4:
    """`x` in blocks of 4-bit codes, `round((x - low) / step)` with `step = (high - low) / 15`.

    Args:
      x: floating, of at least one axis.
      block: entries of a block.

    A block of one value keeps it exactly. A block with an entry that is not finite gives NaN. On an
    explicit mesh the last axis must be whole.

    Raises:
      ValueError: for a block below 1, or a value that is not floating.

    >>> import jax.numpy as jnp
    >>> quantize_affine(jnp.full(5, 0.25)).dequantize().tolist()
    [0.25, 0.25, 0.25, 0.25, 0.25]
    """
    if not is_integer(block) or block < 1:
        raise ValueError(f"block={block!r} must be a positive integer; 256 is the default")
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating) or x.ndim < 1:
        raise ValueError(
            f"x of dtype {x.dtype} and shape {x.shape} must be floating, with at least one axis"
        )
    x = x.astype(jnp.float32)
    size = x.shape[-1]
    width = min(block, size)
    # the last entry again fills up the last block, and changes neither end of its range
    last = x[..., -1:] + jnp.zeros(-size % width)
    filled = jnp.concatenate([x, last], axis=-1)
    blocks = filled.reshape(*x.shape[:-1], -1, width)
    low, high = jnp.min(blocks, axis=-1), jnp.max(blocks, axis=-1)
    steps = (high - low) / (LEVELS - 1)
    # an infinite end would leave the others finite
    steps = jnp.where(jnp.isfinite(steps), steps, jnp.nan)
    divisor = jnp.where(steps == 0, 1, steps)
    place = (x - spread(low, size, block)) / spread(divisor, size, block)
    code = jnp.clip(jnp.round(place), 0, LEVELS - 1).astype(jnp.uint8)
    code = jnp.pad(code, [*[(0, 0)] * (x.ndim - 1), (0, size % 2)])
    upper, lower = jnp.split(code, 2, axis=-1)
    return Affine4(upper << 4 | lower, low, steps, size, block)
