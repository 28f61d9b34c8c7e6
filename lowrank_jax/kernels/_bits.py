"""The random bits of `jax.random`, and rounding by them, as arithmetic for a tile of a kernel."""

from __future__ import annotations

import jax
import jax.numpy as jnp

# Threefry-2x32 (Salmon et al. 2011): rotations of even and of odd groups of four rounds, and the
# constant that makes the third word of a key.
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA


def random_bits(key: tuple[jax.Array, jax.Array], index: jax.Array) -> jax.Array:
    """uint32 `jax.random.bits(key, shape)` at flat indices.

    For threefry keys of two uint32 words (Salmon et al. 2011).

    >>> words = jax.random.key_data(jax.random.key(3))
    >>> found = random_bits((words[0], words[1]), jnp.arange(6, dtype=jnp.uint32))
    >>> bool((found == jax.random.bits(jax.random.key(3), (6,))).all())
    True
    """
    words = (*key, key[0] ^ key[1] ^ jnp.uint32(_PARITY))
    # the counter is (0, index): jax draws one word for each entry
    x = jnp.zeros_like(index) + words[0]
    y = index + words[1]
    for block in range(5):
        for turn in _ROTATIONS[block % 2]:
            x = x + y
            y = (y << jnp.uint32(turn)) | (y >> jnp.uint32(32 - turn))
            y = x ^ y
        # after every four rounds the next two words of the key are added
        x = x + words[(block + 1) % 3]
        y = y + words[(block + 2) % 3] + jnp.uint32(block + 1)
    return x ^ y


def place(
    words: jax.Array,
    layer: jax.Array,
    rows: jax.Array,
    cols: jax.Array,
) -> jax.Array:
    """Flat index of entries of matrix `layer` in the array that one key draws for.

    `words` are `(L, 4)`: two of a key, the index of entry (0, 0), the length of a row.
    """
    first, length = words[layer, 2], words[layer, 3]
    return first + rows * length + cols


def round_stochastically(x: jax.Array, noise: jax.Array) -> jax.Array:
    """float32 `x` in bfloat16 by 16 random bits, as `linalg.stochastic_round` does."""
    upper = jnp.uint32(0xFFFF0000)
    lower = jnp.uint32(0xFFFF)
    infinite = jnp.uint32(0x7F800000)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    # adding noise to the lower half carries into the upper one with probability lower / 2^16
    rounded = (bits + (noise & lower)) & upper
    # a finite value stays finite: a carry into the exponent of infinity is undone
    rounded = jnp.where(rounded & infinite == infinite, bits & upper, rounded)
    rounded = jax.lax.bitcast_convert_type(rounded, jnp.float32)
    return jnp.where(bits & infinite == infinite, x, rounded).astype(jnp.bfloat16)
