"""Block-wise 8-bit storage and stochastic rounding.

A block is a run of consecutive entries of the last axis with one float32 scale, its largest
magnitude; the last block of a row may be short. Codes keep the shape of the value, so that they
slice and shard like it.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from lowrank_jax import sharding
from lowrank_jax.codes import Codes
from lowrank_jax.linalg import dynamic_code
from lowrank_jax.linalg._common import Array, is_integer
from lowrank_jax.serialization import serializable
from lowrank_jax.typing import DTypeLike

CODES = ("signed", "unsigned", "linear")
_FIRST, _LAST = (
    0x3400,
    0x3F80,
)  # the upper halves of the float32 2^-23, below every middle of two codes, and 1


@functools.cache
def dynamic_code_book(signed: bool) -> np.ndarray:
    """The 256 values of the dynamic 8-bit code, ascending, float32 (Dettmers et al. 2022,
    arXiv:2110.02861).

    For each decade `10^(i-6)`, i = 0..6, the midpoints of `2^i` equal cells of [0.1, 1] (`2^(i+1)`
    when unsigned), with both signs when signed; and 0 and 1. As in bitsandbytes -1 is not among
    them: the smallest value is -0.993.

    >>> book = dynamic_code_book(signed=True)
    >>> book.shape, float(book[127]), float(book[-1])
    ((256,), 0.0, 1.0)
    """
    values = [0.0, 1.0]
    for i in range(7):
        edges = np.linspace(0.1, 1, 2 ** (i if signed else i + 1) + 1)
        middles = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (i - 6)
        values += [*middles, *(-middles if signed else ())]
    return np.sort(np.asarray(values, np.float32))


@serializable
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedBlocks(Codes):
    """An array in 8 bits an entry, and 4 bytes a block.

    Attributes:
      codes: uint8, or int8 for "linear", in the shape of the value.
      scales: float32 `(..., ceil(n / block))`.
      code: "signed", "unsigned" (dynamic code books) or "linear" (`code / 127`).
      block: entries of a block.

    >>> import jax.numpy as jnp
    >>> x = quantize_blocks(jnp.array([[0.5, -1.0, 0.25]]), "linear")
    >>> x.shape, x.codes.tolist(), x.scales.tolist()
    ((1, 3), [[64, -127, 32]], [[1.0]])
    """

    codes: Array
    scales: Array
    code: str = dataclasses.field(metadata={"static": True})
    block: int = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    @property
    def rounds_stochastically(self) -> bool:
        """Whether `requantize` takes a key: the linear code alone."""
        return self.code == "linear"

    @property
    def blocks(self) -> tuple[int, ...]:
        """The axes in whole blocks, which no device divides: `(..., ceil(n / block))`, 1 where one
        is not full."""
        size = self.shape[-1]
        return (*self.shape[:-1], 1 if size % self.block else size // self.block)

    def partition_specs(self, spec: sharding.Spec) -> "QuantizedBlocks":
        """PartitionSpecs in the place of arrays: codes and scales lie as `spec` says, an entry for
        each axis."""
        own: Any = PartitionSpec(*spec)
        return dataclasses.replace(self, codes=own, scales=own)

    def dequantize(self, dtype: DTypeLike = jnp.float32) -> Array:
        """The value; products in float32, then cast."""
        if self.code == "linear":
            value = self.codes.astype(jnp.float32) / 127
        else:
            decode = _on_tpu(_decode, dynamic_code.decode, self.code == "signed")
            value = decode(self.codes.astype(jnp.int32))
        value_by_block = spread(self.scales, self.shape[-1], self.block)
        return (value * value_by_block).astype(dtype)

    def requantize(self, value: Array, key: Array | None = None) -> "QuantizedBlocks":
        """Another value in the same code and blocks."""
        return quantize_blocks(value, self.code, self.block, key)


@functools.cache
def _on_tpu(
    tables: Callable[..., Array], arithmetic: Callable[..., Array], signed: bool
) -> Callable[..., Array]:
    """`arithmetic(..., signed)` on TPUs, where XLA writes what it looks up to device memory, else
    `tables`.

    For 1024 x 11008 entries XLA moves on v5e 237 MB to decode by a table and 57 by arithmetic, 1003
    and 57 to encode; on an H100 there is no difference.
    """
    forms = {
        "tpu": functools.partial(arithmetic, signed=signed),
        "default": functools.partial(tables, signed=signed),
    }
    return lambda *operands: jax.lax.platform_dependent(*operands, **forms)


def _decode(codes: Array, signed: bool) -> Array:
    return _lookup(dynamic_code_book(signed), codes)


def _encode(x: Array, unit: Array, signed: bool) -> Array:
    above = _nearest(jnp.abs(unit), signed)
    # the sign of x, since unit may have underflowed
    is_negative = x < 0
    if signed:
        # a negative value never becomes zero
        below = 127 - jnp.clip(above, 1, 127)
        return jnp.where(is_negative, below, 127 + above)
    return jnp.where(is_negative, 0, above)


def _lookup(table: np.ndarray, index: Array) -> Array:
    """table[index], sharded like index: on an explicit mesh a gather has to be told."""
    place = jax.typeof(index).sharding
    rows = jnp.asarray(table).at[index]
    return rows.get(mode="promise_in_bounds", out_sharding=place)


def spread(scales: Array, size: int, block: int) -> Array:
    """Each block's scale at each of its entries."""
    if scales.shape[-1] == 1:
        return scales
    spec = sharding.explicit_spec(scales)
    place = None if spec is None else PartitionSpec(*spec)
    repeated = jnp.repeat(scales, block, axis=-1, out_sharding=place)
    # the last block may not be full
    return repeated[..., :size]


def _largest(x: Array, block: int) -> Array:
    """`(..., ceil(n / block))`: the largest magnitude of each block."""
    size, spec = x.shape[-1], sharding.explicit_spec(x)
    if spec is not None:
        # a block may be on two devices
        x = sharding.reshard(x, (*spec[:-1], None))
    magnitude = jnp.abs(x)
    if size <= block:
        return jnp.max(magnitude, axis=-1, keepdims=True)
    # zeros fill up the last block
    widths = [(0, 0)] * (x.ndim - 1) + [(0, -size % block)]
    padded = jnp.pad(magnitude, widths)
    blocks = padded.reshape(*x.shape[:-1], -1, block)
    return jnp.max(blocks, axis=-1)


@functools.cache
def _search_tables(signed: bool) -> tuple[np.ndarray, np.ndarray]:
    """For magnitudes: the code at each bfloat16 step of [2^-23, 1], and where each code ends.

    No step holds more than one end, so that one lookup and one comparison find the nearest code.
    """
    zero = 127 if signed else 0
    book = dynamic_code_book(signed)[zero:].astype(np.float64)
    middles = (book[:-1] + book[1:]) / 2
    # the last float32 of each code: a middle, or the next number below it
    rounded = middles.astype(np.float32)
    below = np.nextafter(rounded, np.float32(0))
    ends = np.where(rounded > middles, below, rounded)
    words = np.arange(_FIRST, _LAST + 1, dtype=np.uint32) << 16
    steps = words.view(np.float32)
    starts = np.searchsorted(ends, steps).astype(np.int32)
    # the last code has no end
    return starts, np.append(ends, np.float32(np.inf))


def _nearest(magnitude: Array, signed: bool) -> Array:
    """int32: the place of the nearest of the values from 0 on; the lower one halfway."""
    starts, ends = _search_tables(signed)
    # the upper 16 bits of a float32 are those of a bfloat16
    step = jax.lax.bitcast_convert_type(magnitude, jnp.int32) >> 16
    place = jnp.clip(step, _FIRST, _LAST) - _FIRST
    code = _lookup(starts, place)
    is_beyond = magnitude > _lookup(ends, code)
    return code + is_beyond


def quantize_blocks(
    x: Any, code: str = "signed", block: int = 256, key: Array | None = None
) -> QuantizedBlocks:
    """`x` in blocks of 8-bit codes of `x / scale`, with the block's largest magnitude as scale.

    Args:
      x: floating, of at least one axis.
      code: "signed" or "unsigned": the nearest value of the dynamic code book; a negative value
        never becomes zero or positive (it takes the next code down, as bitsandbytes does; a tiny
        positive one may become zero). "linear": `round(127 x / scale)`.
      block: entries of a block; 256 in current bitsandbytes, 2048 in older releases.
      key: rounds "linear" stochastically, up with the probability of the fraction of
        `127 x / scale`, without bias.

    A block of zeros has scale 0 and gives exact zeros. A block with an entry that is not finite
    gives NaN.

    Raises:
      ValueError: for an unknown code, a block below 1, a value that is not floating, or a key with
        a dynamic code.

    >>> import jax.numpy as jnp
    >>> quantize_blocks(jnp.array([1.0, -0.993, 0.0])).dequantize().round(3).tolist()
    [1.0, -0.993, 0.0]
    """
    if code not in CODES:
        raise ValueError(f"code={code!r} must be one of {CODES}")
    if not is_integer(block) or block < 1:
        raise ValueError(f"block={block!r} must be a positive integer; 256 is the default")
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating) or x.ndim < 1:
        raise ValueError(
            f"x of dtype {x.dtype} and shape {x.shape} must be floating, with at least one axis"
        )
    if key is not None and code != "linear":
        raise ValueError(
            f"key: stochastic rounding is for code='linear', not {code!r}; leave key=None"
        )
    x = x.astype(jnp.float32)
    scales = _largest(x, block)
    nonzero = jnp.where(scales > 0, scales, 1)
    unit = x / spread(nonzero, x.shape[-1], block)
    if code != "linear":
        encode = _on_tpu(_encode, dynamic_code.encode, code == "signed")
        codes = encode(x, unit).astype(jnp.uint8)
        return QuantizedBlocks(codes, scales, code, block)
    wide = 127 * unit
    if key is None:
        integer = jnp.round(wide)
    else:
        # a comparison, not floor(wide + u), which rounds up now and then where wide is an integer
        integer = jnp.floor(wide)
        integer += jax.random.uniform(key, x.shape) < wide - integer
    codes = jnp.clip(integer, -127, 127).astype(jnp.int8)
    return QuantizedBlocks(codes, scales, code, block)


def stochastic_round(x: Array, dtype: DTypeLike, key: Array) -> Array:
    """float32 `x` in bfloat16 (or as it is in float32), up or down with probabilities that make the
    mean x.

    Adds 16 random bits below the cut of the mantissa and truncates. Values that bfloat16 holds
    stay; finite values stay finite; infinities and NaN pass.

    Raises:
      ValueError: for another dtype.

    >>> import jax, jax.numpy as jnp
    >>> rounded = stochastic_round(jnp.full(4096, 1 + 2**-9), jnp.bfloat16, jax.random.key(0))
    >>> sorted({float(value) for value in rounded})  # a quarter of them up
    [1.0, 1.0078125]
    """
    dtype = jnp.dtype(dtype)
    if dtype == jnp.float32:
        return x
    if dtype != jnp.bfloat16:
        raise ValueError(f"dtype={dtype} must be bfloat16, or float32 for no rounding")
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    upper, noise = (
        jnp.uint32(0xFFFF0000),
        jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32),
    )
    rounded = jax.lax.bitcast_convert_type((bits + noise) & upper, jnp.float32)
    cut = jax.lax.bitcast_convert_type(bits & upper, jnp.float32)
    rounded = jnp.where(jnp.isfinite(rounded), rounded, cut)
    return jnp.where(jnp.isfinite(x), rounded, x).astype(jnp.bfloat16)
