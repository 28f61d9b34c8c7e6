"""The dynamic 8-bit code as arithmetic, for where a table is dear: a TPU, and a tile of a kernel.

The values of the code are midpoints of equal cells of decades (`dynamic_code_book`), the i-th with
n = 2^i cells (2^(i+1) when unsigned):

    value(i, cell) = 10^(i-6) (0.1 + 0.9 (cell + 1/2) / n)

and the place of a value among those from 0 on is n + cell (n - 1 + cell when unsigned), whose
binary exponent tells i and whose mantissa tells cell / n. Both ways agree with the tables but for
the last bit of a value, and for magnitudes that lie within rounding of the middle of two codes.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

_DECADES = range(7)


def _steps(x: jax.Array, thresholds: list, values: list) -> jax.Array:
    """`values[i]`, i the number of thresholds below x; they ascend."""
    found = jnp.full(x.shape, values[0], jnp.float32)
    for threshold, value in zip(thresholds, values[1:], strict=True):
        found = jnp.where(x > threshold, jnp.float32(value), found)
    return found


def decode(codes: jax.Array, signed: bool) -> jax.Array:
    """float32 values in [-1, 1] of codes 0..255 of an integer dtype that holds negative numbers.

    >>> print(decode(jnp.array([0, 127, 191, 255]), signed=True))
    [-0.9929687  0.         0.107      1.       ]
    """
    place = jnp.abs(codes - 127) if signed else codes + 1
    bits = jax.lax.bitcast_convert_type(place.astype(jnp.float32), jnp.int32)
    exponent = bits & 0x7F800000  # n = 2^exponent
    fraction = jax.lax.bitcast_convert_type((bits & 0x007FFFFF) | 0x3F800000, jnp.float32) - 1
    inverse = jax.lax.bitcast_convert_type((254 << 23) - exponent, jnp.float32)  # 1 / n
    size = place.astype(jnp.float32)
    first = 1 if signed else 2
    powers = _steps(
        size, [first * 2**i - 0.5 for i in _DECADES[1:]], [10.0 ** (i - 6) for i in _DECADES]
    )
    value = powers * (0.1 + 0.9 * fraction + 0.45 * inverse)
    value = jnp.where(size < first, 0.0, jnp.where(size > first * 128 - 0.5, 1.0, value))
    return jnp.where(codes < 127, -value, value) if signed else value


def encode(x: jax.Array, unit: jax.Array, signed: bool) -> jax.Array:
    """int32 codes of `unit`, float32 in [-1, 1] with the sign of x, which may have underflowed.

    >>> encode(
    ...     jnp.array([-1.0, 0.0, 1e-9, 1.0]), jnp.array([-1.0, 0.0, 1e-9, 1.0]), signed=True
    ... ).tolist()
    [0, 127, 127, 255]
    """
    size = jnp.abs(unit)
    cells = [2**i if signed else 2 ** (i + 1) for i in _DECADES]
    first = [10.0 ** (i - 6) * (0.1 + 0.45 / cells[i]) for i in _DECADES]
    last = [10.0 ** (i - 6) * (1 - 0.45 / cells[i]) for i in _DECADES]
    ends = [(low + high) / 2 for low, high in zip(last[:-1], first[1:], strict=True)]
    per_unit = _steps(size, ends, [10.0 ** (6 - i) * cells[i] / 0.9 for i in _DECADES])
    count = _steps(size, ends, [float(n) for n in cells])
    cell = jnp.ceil(size * per_unit - count / 9) - 1  # the lower one halfway
    above = jnp.clip(cell, 0, count - 1) + count - (0 if signed else 1)
    above = jnp.where(size > (last[-1] + 1) / 2, 128.0 if signed else 255.0, above)
    above = jnp.where(size > first[0] / 2, above, 0.0).astype(jnp.int32)
    if signed:
        return jnp.where(x < 0, 127 - jnp.clip(above, 1, 127), 127 + above)
    return jnp.where(x < 0, 0, above)
