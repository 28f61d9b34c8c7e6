"""Random positions in a matrix: PyTorch's, by a seed and without PyTorch, and from a JAX key.

A flat position counts through PyTorch's weight `(m, n)` row by row: `flat = column * n + row` of a
kernel `(n, m)`.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

TORCH_LIMIT = (2**32 - 1) // 20  # from this size on, torch.randperm draws otherwise


def torch_uint32(seed: int, count: int) -> np.ndarray:
    """The first numbers of `torch.Generator().manual_seed(seed)` on the CPU: MT19937, as NumPy's
    older generator."""
    return np.random.RandomState(seed).randint(0, 2**32, count, dtype=np.uint32)


@functools.lru_cache(maxsize=64)
def torch_permutation(size: int, count: int, seed: int) -> np.ndarray:
    """The first `count` entries of
    `torch.randperm(size, generator=torch.Generator().manual_seed(seed))`.

    The shuffle swaps entry i with one behind it, so the first entries need no others. Sizes from
    214,748,364 on are shuffled alike, in which PyTorch draws 64 bits in another order.

    >>> torch_permutation(10, 4, seed=777).shape
    (4,)
    """
    moved: dict[int, int] = {}
    found = np.empty(count, np.int64)
    for i, draw in enumerate(torch_uint32(seed, count).tolist()):
        j = i + draw % (size - i)
        found[i] = moved.get(j, j)
        moved[j] = moved.get(i, i)
    return found


def keyed_positions(key: jax.Array, size: int, count: int) -> jax.Array:
    """`count` different numbers below `size`, uint32, ascending, in time and memory proportional to
    `count`.

    A Feistel network permutes the numbers below a power of four; what falls out of range is
    permuted again.

    >>> import jax
    >>> keyed_positions(jax.random.key(0), 9, 9).tolist()
    [0, 1, 2, 3, 4, 5, 6, 7, 8]
    """
    # numbers of 2 half bits, in two halves
    half = max(1, -(-(size - 1).bit_length() // 2))
    limit, low = jnp.uint32(size), jnp.uint32(2**half - 1)
    rounds = jax.random.bits(key, (6,), jnp.uint32)

    def permuted(x):
        left, right = x >> half, x & low
        # six rounds of a Feistel network
        for i in range(6):
            left, right = right, left ^ (_mixed(right ^ rounds[i]) & low)
        return (left << half) | right

    def again(x):
        return jnp.where(x >= limit, permuted(x), x)

    first = permuted(jnp.arange(count, dtype=jnp.uint32))
    return jnp.sort(jax.lax.while_loop(lambda x: jnp.any(x >= limit), again, first))


def _mixed(x: jax.Array) -> jax.Array:
    """A bijection of uint32 whose every output bit depends on every input bit."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return x ^ (x >> 16)
