"""What the programs of `low_rank_adam` share: one step of a tile in jnp, the reference, and the
sizes of tiles."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from lowrank_jax.kernels import _bits, _platform
from lowrank_jax.linalg import dynamic_code

TPU_COLS, GPU_TILES, GPU_DEPTH, STAGES = (128, 256, 512), (16, 32, 64, 128), 32, 3
CHUNK = 256
FIELDS = ("b1", "rest1", "b2", "rest2", "eps", "rate", "decay", "factor", "accepted")


@dataclasses.dataclass(frozen=True)
class Choice:
    """What is static: the shrunk side, how moments and weights are stored, and how the program is
    made."""

    side: str
    coded: bool
    block: int
    stochastic: bool
    implementation: str | None
    chip: str | None
    interpret: bool


def moved(low, mu, nu, n):
    """`(m, v, d)` in float32; n are the numbers of `FIELDS`."""
    grad, accepted = low * n["factor"], n["accepted"] > 0
    m = jnp.where(accepted, n["b1"] * mu + n["rest1"] * grad, mu)
    v = jnp.where(accepted, n["b2"] * nu + n["rest2"] * grad * grad, nu)
    return m, v, jnp.where(accepted, m / (jnp.sqrt(v) + n["eps"]), 0.0)


def written(w, step, n, noise=None):
    """The new entries of w."""
    old = w.astype(jnp.float32)
    value = old - n["rate"] * step - n["decay"] * old
    value = jnp.where(n["accepted"] > 0, value, old)
    return value.astype(w.dtype) if noise is None else _bits.round_stochastically(value, noise)


def reference(numbers, words, w, basis, low, mu, nu, first=0, *, choice):
    """The matrices of `basis`, which has numbers and words too, are those of the other stacks from
    `first` on."""

    def one(number, w, mu, nu):
        n = dict(zip(FIELDS, numbers[number], strict=True))
        one_mu, one_nu = (
            x.dequantize() if choice.coded else x.astype(jnp.float32) for x in (mu, nu)
        )
        m, v, d = moved(low[first + number], one_mu, one_nu, n)
        p = basis[number].astype(jnp.float32)
        step = p @ d if choice.side == "rows" else d.T @ p.T
        noise = None
        if choice.stochastic:
            index = _bits.place(
                words, number, *(jax.lax.broadcasted_iota(jnp.uint32, w.shape, i) for i in (0, 1))
            )
            noise = _bits.random_bits((words[number, 0], words[number, 1]), index)
        new = [
            x.requantize(y) if choice.coded else y.astype(x.dtype) for x, y in ((mu, m), (nu, v))
        ]
        new = jax.tree.map(lambda a, b: jnp.where(n["accepted"] > 0, a, b), new, [mu, nu])
        return written(w, step, n, noise), *new

    def body(number, carry):
        own = jax.tree.map(
            lambda x: jax.lax.dynamic_index_in_dim(x, first + number, keepdims=False), carry
        )
        put = lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y, first + number, 0)  # noqa: E731
        return jax.tree.map(put, carry, one(number, *own))

    return jax.lax.fori_loop(0, basis.shape[0], body, (w, mu, nu))


def recoded(codes, scale, value, code, accepted, valid):
    """`(codes, scale)` of a block's new values, rows of one block each."""
    largest = jnp.max(jnp.where(valid, jnp.abs(value), 0.0), axis=1, keepdims=True)
    unit = value / jnp.where(largest > 0, largest, 1.0)
    new = dynamic_code.encode(value, unit, code == "signed")
    return jnp.where(accepted, new, codes).astype(jnp.uint8), jnp.where(accepted, largest, scale)


def fast_bytes(
    shape: tuple[int, int, int], sizes: tuple[int, int, int], platform: str, i: int, j: int
) -> int:
    """Fast memory of a tile, for `shape = (s, r, k)` and the bytes of an entry
    `sizes = (w, basis, a moment)`.

    TPU, tile `(s, j)` of w: basis once, w, low and the moments twice for the pipeline, the
    direction also turned, and sums of a chunk; 8-bit moments have their scales beside them. GPU,
    tile `(i, j)`: slices of three stages.
    """
    s, r, k = shape
    if platform == "gpu":
        return 4 * STAGES * GPU_DEPTH * (i + j)
    wide = lambda size: -(-size // 128) * 128  # noqa: E731
    scales = 8 * 4 * r * wide(-(-k // 128)) if sizes[2] == 1 else 0
    twice = 2 * s * wide(j) * sizes[0] + 4 * r * wide(j) + 4 * r * wide(j) * sizes[2]
    return (
        s * wide(r) * sizes[1]
        + 2 * twice
        + scales
        + 2 * wide(r) * wide(j) * sizes[1]
        + 16 * CHUNK * wide(j)
    )


def tiles(
    shape: tuple[int, int, int],
    sizes: tuple[int, int, int],
    block: int,
    platform: str,
    chip: str | None,
) -> tuple[int, int]:
    """`(rows, columns)` of a tile of the oriented w; on TPUs all rows. `block` is 0 where moments
    are arrays.

    >>> (
    ...     tiles((4096, 1024, 11008), (2, 4, 4), 0, "tpu", "v5e"),
    ...     tiles((4096, 1024, 11008), (2, 4, 4), 0, "gpu", "h100"),
    ... )
    ((4096, 512), (128, 128))
    """
    s, r, k = shape
    what = f"low_rank_adam of a matrix ({s}, {k}), rank {r}"
    costs = functools.partial(fast_bytes, shape, sizes, platform)
    if platform == "gpu":
        if block & (block - 1) or block > 4096:
            raise _platform.Misfit(
                f"{what}: moments in blocks of {block} must be a power of two up to 4096 on a GPU"
            )
        fit = lambda size: tuple(t for t in GPU_TILES if t < 2 * size) or GPU_TILES[:1]  # noqa: E731
        return _platform.largest(_platform.budget(platform, chip), costs, fit(s), fit(k), what)
    if block and block % 128 and block < k:
        raise _platform.Misfit(
            f"{what}: moments in blocks of {block} must be a multiple of 128 on a TPU"
        )
    cols = tuple(
        t for t in ({*TPU_COLS, block} if block else TPU_COLS) if not block or t % block == 0
    )
    whole = block >= k or (
        k <= max(cols) and not (block and k % block)
    )  # a tile holds whole blocks
    cols = tuple(t for t in cols if t < k) + ((k,) if whole else ())
    return _platform.largest(_platform.budget(platform, chip), costs, (s,), cols, what)
