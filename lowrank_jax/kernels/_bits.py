"""The random bits of `jax.random` and stochastic rounding by them, as arithmetic that a kernel can
do on a tile."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def random_bits(key: tuple[jax.Array, jax.Array], index: jax.Array) -> jax.Array:
    """uint32 `jax.random.bits(key, shape)` at flat indices, for threefry keys of two uint32 words
    (Salmon et al. 2011).

    >>> words = jax.random.key_data(jax.random.key(3))
    >>> found = random_bits((words[0], words[1]), jnp.arange(6, dtype=jnp.uint32))
    >>> bool((found == jax.random.bits(jax.random.key(3), (6,))).all())
    True
    """
    words = (*key, key[0] ^ key[1] ^ jnp.uint32(0x1BD11BDA))
    x, y = jnp.zeros_like(index) + words[0], index + words[1]
    for block in range(5):
        for turn in (13, 15, 26, 6) if block % 2 == 0 else (17, 29, 16, 24):
            x = x + y
            y = (y << jnp.uint32(turn)) | (y >> jnp.uint32(32 - turn))
            y = x ^ y
        x, y = x + words[(block + 1) % 3], y + words[(block + 2) % 3] + jnp.uint32(block + 1)
    return x ^ y


def place(words: jax.Array, layer: jax.Array, rows: jax.Array, cols: jax.Array) -> jax.Array:
    """Flat index of entries of matrix `layer`; words are `(L, 4)`: a key, the index of entry (0,
    0), a row's length."""
    return words[layer, 2] + rows * words[layer, 3] + cols


def round_stochastically(x: jax.Array, noise: jax.Array) -> jax.Array:
    """float32 `x` in bfloat16 by 16 random bits, as `linalg.stochastic_round` does."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    upper = jnp.uint32(0xFFFF0000)
    rounded = (bits + (noise & jnp.uint32(0xFFFF))) & upper
    infinite = jnp.uint32(0x7F800000)
    rounded = jnp.where(
        rounded & infinite == infinite, bits & upper, rounded
    )  # finite values stay finite
    rounded = jax.lax.bitcast_convert_type(rounded, jnp.float32)
    return jnp.where(bits & infinite == infinite, x, rounded).astype(jnp.bfloat16)
