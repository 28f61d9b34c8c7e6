"""Matrices in 4 bits an entry: the NormalFloat code of QLoRA (Dettmers et al. 2023,
arXiv:2305.14314).

A block is 64 consecutive rows of one column, with its largest magnitude as scale: the blocks that
bitsandbytes cuts from a torch weight, which is the transpose. A byte holds rows i (upper half) and
i + 32 (lower half) of its block, so that half a block is decoded from 32 whole rows of bytes and no
neighbours change places; bitsandbytes pairs neighbours, which is the same code in another order.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from lowrank_jax import deprecations, sharding
from lowrank_jax.codes import Codes
from lowrank_jax.linalg._common import Array
from lowrank_jax.linalg.quantization import quantize_blocks
from lowrank_jax.serialization import serializable
from lowrank_jax.typing import DTypeLike

BLOCK, HALF = 64, 32
IMPLEMENTATIONS = ("xla", "pallas")
# Appendix E of the paper: quantiles of the normal distribution, of which the outermost are -1 and
# 1, and an exact 0.
_BOOK = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def normal_float_book() -> np.ndarray:
    """The 16 values of NF4, ascending, float32.

    >>> book = normal_float_book()
    >>> book.shape, float(book[0]), float(book[7]), float(book[15])
    ((16,), -1.0, 0.0, 1.0)
    """
    return np.asarray(_BOOK, np.float32)


@serializable
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NormalFloat4(Codes):
    """Matrices `(..., n, m)` in 4 bits an entry and a scale for 64 of them: 4.5 bits, 4.127 with
    doubly coded scales.

    Attributes:
      codes: uint8 `(..., 32 ceil(n / 64), m)`, two codes a byte; rows from n on are zeros.
      absmax: float32 `(..., ceil(n / 64), m)`; or, doubly quantised, the signed 8-bit code of what
        is left of it without `mean`, column after column, in blocks of 256.
      mean: float32 `(..., 1)`, of the scales of each matrix, or None.
      rows: n.
      implementation: "xla", or "pallas", see `quantize_nf4`.

    >>> import jax.numpy as jnp
    >>> w = quantize_nf4(jnp.ones((64, 2)))
    >>> w.shape, w.codes.shape, w.absmax.shape, int(w.codes[0, 0])
    ((64, 2), (32, 2), (1, 2), 255)
    """

    codes: Array
    absmax: Any
    mean: Any
    rows: int = dataclasses.field(metadata={"static": True})
    implementation: str = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.codes.shape[:-2], self.rows, self.codes.shape[-1])

    @property
    def rounds_stochastically(self) -> bool:
        """False: `requantize` takes no key."""
        return False

    @property
    def blocks(self) -> tuple[int, ...]:
        """`(..., ceil(n / 64), m)`: the axes of a matrix in whole blocks, which no device
        divides."""
        return (*self.codes.shape[:-2], self.codes.shape[-2] // HALF, self.codes.shape[-1])

    def partition_specs(self, spec: sharding.Spec) -> NormalFloat4:
        """PartitionSpecs in the place of arrays, where the matrix is placed as `spec` says, an entry for
        each axis.

        Codes and scales lie as the matrix does. Doubly quantised scales, column after column, are
        divided as far as it is, columns first; their own scales and the mean are whole.
        """
        *lead, rows, cols = spec
        codes: Any = PartitionSpec(*spec)
        absmax: Any = codes
        if self.mean is not None:
            flat = PartitionSpec(
                *lead, (*sharding.axis_names_of(cols), *sharding.axis_names_of(rows)) or None
            )
            absmax = dataclasses.replace(self.absmax, codes=flat, scales=PartitionSpec(*lead, None))
        mean = None if self.mean is None else PartitionSpec(*lead, None)
        return dataclasses.replace(self, codes=codes, absmax=absmax, mean=mean)

    def scales(self) -> Array:
        """float32 `(..., ceil(n / 64), m)`."""
        if self.mean is None:
            return self.absmax
        flat, placed = self.absmax.dequantize() + self.mean, sharding.explicit_spec(self.codes)
        if (
            placed is not None
        ):  # on an explicit mesh columns of blocks are put together before they are divided anew
            flat = sharding.reshard(flat, (*placed[:-2], None))
        return sharding.reshard(
            jnp.swapaxes(flat.reshape(*flat.shape[:-1], self.codes.shape[-1], -1), -1, -2), placed
        )

    def dequantize(self, dtype: DTypeLike = jnp.float32) -> Array:
        """The value; products in float32, then cast.

        The barrier makes this one fusion: without it XLA spreads codes or scales over device memory
        for the product.
        """
        lead, m = self.codes.shape[:-2], self.codes.shape[-1]
        bytes_ = self.codes.reshape(*lead, -1, HALF, m)
        code = jnp.stack([bytes_ >> 4, bytes_ & 15], axis=-3)
        value = (_level(code) * self.scales()[..., None, None, :]).astype(dtype)
        whole = jax.lax.optimization_barrier(value).reshape(*lead, -1, m)
        placed = sharding.explicit_spec(whole)
        if placed is not None and whole.shape[-2] != self.rows:
            whole = sharding.reshard(
                whole, (*placed[:-2], None, placed[-1])
            )  # the rest may be no multiple of the mesh
        return whole[..., : self.rows, :]

    def requantize(self, value: Array, key: Array | None = None) -> NormalFloat4:
        """Another value in the same form; ValueError with a key, since nothing here rounds
        stochastically."""
        if key is not None:
            raise ValueError(
                "key: NF4 rounds to the nearest value, never stochastically; leave key=None"
            )
        return quantize_nf4(value, double=self.mean is not None, implementation=self.implementation)


def _level(code: Array) -> Array:
    """The value of each code, by four levels of selects: they fuse, where XLA keeps a gather
    apart."""
    code, values = code.astype(jnp.int32), [jnp.float32(value) for value in _BOOK]
    for bit in range(4):
        upper = (code >> bit) & 1 == 1
        values = [
            jnp.where(upper, high, low) for low, high in zip(values[::2], values[1::2], strict=True)
        ]
    return values[0]


@deprecations.options("lrx.linalg.quantize_nf4")
def quantize_nf4(x: Any, *, double: bool = False, implementation: str = "xla") -> NormalFloat4:
    """`x (..., n, m)` in NF4: the nearest value to each entry over its block's largest magnitude;
    halfway, the lower.

    Args:
      x: floating, of at least two axes; leading axes are stacks. Other kernels are viewed as
        matrices first.
      double: the scales, less their mean, in 8 bits (section 3 of the paper); codes are chosen by
        the exact scales.
      implementation: "xla" decodes where the matrix is multiplied. "pallas": `lrx.matmul(x, w)` of one
        matrix, with adapters or without, takes `lrx.kernels.nf4_linear`, which never forms it; x is
        float32 or bfloat16. Inside `lrx.meshes.use` of several devices only a matrix with adapters
        does, which its `parameters` name. Other products decode. No device has timed it.

    A block of zeros gives exact zeros. A block with an entry that is not finite gives NaN; doubly
    quantised, where one mean is taken of all scales, its whole matrix does.

    Raises:
      ValueError: for another dtype, fewer axes, or an unknown implementation.

    >>> import jax.numpy as jnp
    >>> quantize_nf4(jnp.array([[2.0, 1.0], [0.2, -0.7], [-0.1, 0.0]])).dequantize().round(
    ...     3
    ... ).tolist()
    [[2.0, 1.0], [0.159, -0.696], [-0.182, 0.0]]
    """
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating) or x.ndim < 2:
        raise ValueError(
            f"x of dtype {x.dtype} and shape {x.shape} must be floating, with at least two axes"
        )
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r} must be one of {IMPLEMENTATIONS}")
    *lead, n, m = x.shape
    padded = jnp.pad(x.astype(jnp.float32), [(0, 0)] * len(lead) + [(0, -n % BLOCK), (0, 0)])
    blocks = padded.reshape(*lead, -1, BLOCK, m)
    absmax = jnp.max(jnp.abs(blocks), axis=-2)
    absmax = jnp.where(
        jnp.isfinite(absmax), absmax, jnp.nan
    )  # an infinite one would make NaN of 0, -inf of inf
    unit = blocks / jnp.where(absmax == 0, 1, absmax)[..., None, :]
    book = normal_float_book().astype(np.float64)
    above = (unit > jnp.float32(middle) for middle in (book[:-1] + book[1:]) / 2)
    code = sum(above, jnp.zeros((), jnp.uint8))
    codes = (code[..., :HALF, :] << 4 | code[..., HALF:, :]).reshape(*lead, -1, m)
    if not double:
        return NormalFloat4(codes, absmax, None, n, implementation)
    flat = jnp.swapaxes(absmax, -1, -2).reshape(*lead, -1)
    mean = jnp.mean(flat, axis=-1, keepdims=True)
    return NormalFloat4(codes, quantize_blocks(flat - mean, "signed"), mean, n, implementation)
