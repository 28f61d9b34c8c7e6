"""What the programs of `low_rank_adam` share: a step of a tile, the reference, sizes of tiles.

Names of arrays: `mu`, `nu` the moments before a step, `m`, `v` those after it, `d` the direction;
`n` the numbers of one matrix by the names of `FIELDS`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array

from lowrank_jax.kernels import _bits, _platform
from lowrank_jax.linalg import dynamic_code

# Sizes that the columns of a tile are taken from, on GPUs its rows too, and how much of the rank a
# GPU contracts at a time, in how many slices on their way.
TPU_COLS = (128, 256, 512)
GPU_TILES = (16, 32, 64, 128)
GPU_DEPTH = 32
STAGES = 3

# Rows that a TPU multiplies at a time.
CHUNK = 256

# Columns of the table of numbers, a row for each matrix: 1 - b1 and 1 - b2 are counted outside.
FIELDS = ("b1", "rest1", "b2", "rest2", "eps", "rate", "decay", "factor", "accepted")

Numbers = Mapping[str, Array]


@dataclasses.dataclass(frozen=True)
class Choice:
    """What is static of a call.

    Attributes:
      side: the shrunk side.
      coded: whether moments are 8-bit codes. block: entries of a block of them, 0 for arrays.
      stochastic: whether weights are rounded by random bits.
      implementation, chip, interpret: as of `low_rank_adam`.
    """

    side: str
    coded: bool
    block: int
    stochastic: bool
    implementation: str | None
    chip: str | None
    interpret: bool


def moved(low: Array, mu: Array, nu: Array, n: Numbers) -> tuple[Array, Array, Array]:
    """`(m, v, d)` in float32 of one step of Adam; without one, `(mu, nu, 0)`."""
    grad, accepted = low * n["factor"], n["accepted"] > 0
    # m = b1 mu + (1 - b1) g,  v = b2 nu + (1 - b2) g²,  d = m / (sqrt(v) + eps)
    m = jnp.where(accepted, n["b1"] * mu + n["rest1"] * grad, mu)
    v = jnp.where(accepted, n["b2"] * nu + n["rest2"] * grad * grad, nu)
    d = jnp.where(accepted, m / (jnp.sqrt(v) + n["eps"]), 0.0)
    return m, v, d


def written(w: Array, step: Array, n: Numbers, noise: Array | None = None) -> Array:
    """The new entries of w: `w - rate step - decay w`, rounded by `noise` where it is given."""
    old = w.astype(jnp.float32)
    value = old - n["rate"] * step - n["decay"] * old
    value = jnp.where(n["accepted"] > 0, value, old)
    if noise is None:
        return value.astype(w.dtype)
    return _bits.round_stochastically(value, noise)


def drawn(words: Array, layer: Array, rows: Array, cols: Array) -> Array:
    """Random bits for the entries of matrix `layer` at these rows and columns, uint32."""
    index = _bits.place(words, layer, rows, cols)
    key = (words[layer, 0], words[layer, 1])
    return _bits.random_bits(key, index)


def reference(numbers, words, w, basis, low, mu, nu, first=0, *, choice):
    """The step in jnp, a matrix after the other.

    The matrices of `basis`, which has numbers and words too, are those of the other stacks from
    `first` on.
    """

    def as_float32(moment):
        return moment.dequantize() if choice.coded else moment.astype(jnp.float32)

    def as_stored(moment, value):
        return moment.requantize(value) if choice.coded else value.astype(moment.dtype)

    def one(number, w, mu, nu):
        n = dict(zip(FIELDS, numbers[number], strict=True))
        old = as_float32(mu), as_float32(nu)
        m, v, d = moved(low[first + number], *old, n)
        # the step is P d, or dᵀ Pᵀ where the columns are shrunk
        p = basis[number].astype(jnp.float32)
        step = p @ d if choice.side == "rows" else d.T @ p.T
        noise = None
        if choice.stochastic:
            rows, cols = (jax.lax.broadcasted_iota(jnp.uint32, w.shape, i) for i in (0, 1))
            noise = drawn(words, number, rows, cols)
        # codes are kept as they are where nothing changes: to store them again could move them
        new = [as_stored(mu, m), as_stored(nu, v)]
        keep = functools.partial(jnp.where, n["accepted"] > 0)
        new = jax.tree.map(keep, new, [mu, nu])
        return written(w, step, n, noise), *new

    def body(number, carry):
        def take(x):
            return jax.lax.dynamic_index_in_dim(x, first + number, keepdims=False)

        def put(x, y):
            return jax.lax.dynamic_update_index_in_dim(x, y, first + number, 0)

        own = jax.tree.map(take, carry)
        return jax.tree.map(put, carry, one(number, *own))

    return jax.lax.fori_loop(0, basis.shape[0], body, (w, mu, nu))


def recoded(
    codes: Array,
    scale: Array,
    value: Array,
    code: str,
    accepted: Array,
    valid: Array,
) -> tuple[Array, Array]:
    """`(codes, scale)` of a block's new values, rows of one block each."""
    magnitude = jnp.where(valid, jnp.abs(value), 0.0)
    largest = jnp.max(magnitude, axis=1, keepdims=True)
    unit = value / jnp.where(largest > 0, largest, 1.0)
    new = dynamic_code.encode(value, unit, code == "signed")
    new = jnp.where(accepted, new, codes).astype(jnp.uint8)
    return new, jnp.where(accepted, largest, scale)


def fast_bytes(
    shape: tuple[int, int, int],
    sizes: tuple[int, int, int],
    platform: str,
    i: int,
    j: int,
) -> int:
    """Fast memory of a tile for `shape = (s, r, k)` and `sizes = (w, basis, a moment)` in bytes.

    TPU, tile `(s, j)` of w: basis once, w, low and the moments twice for the pipeline, the
    direction also turned, and sums of a chunk; 8-bit moments have their scales as well. GPU,
    tile `(i, j)`: slices of three stages.
    """
    s, r, k = shape
    of_w, of_basis, of_moment = sizes
    if platform == "gpu":
        return 4 * STAGES * GPU_DEPTH * (i + j)
    wide = _platform.wide
    w = s * wide(j) * of_w
    basis = s * wide(r) * of_basis
    low = 4 * r * wide(j)
    # mu and nu, before and after
    moments = 4 * r * wide(j) * of_moment
    blocks = -(-k // 128)
    scales = 8 * 4 * r * wide(blocks) if of_moment == 1 else 0
    direction = 2 * wide(r) * wide(j) * of_basis
    sums = 16 * CHUNK * wide(j)
    twice = 2 * w + low + moments
    return basis + 2 * twice + scales + direction + sums


def tiles(
    shape: tuple[int, int, int],
    sizes: tuple[int, int, int],
    block: int,
    platform: str,
    chip: str | None,
) -> tuple[int, int]:
    """`(rows, columns)` of a tile of the oriented w; on TPUs all rows.

    `block` is 0 where moments are arrays.

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
    if block and block % _platform.LANES and block < k:
        raise _platform.Misfit(
            f"{what}: moments in blocks of {block} must be a multiple of 128 on a TPU"
        )
    cols = _tpu_cols(k, block)
    return _platform.largest(_platform.budget(platform, chip), costs, (s,), cols, what)


def _tpu_cols(k: int, block: int) -> tuple[int, ...]:
    """Columns that a tile may have: it holds blocks without a rest, or all of the k columns."""
    if not block:
        sizes: tuple[int, ...] = TPU_COLS
        all_columns = k <= max(sizes)
    else:
        sizes = tuple(t for t in {*TPU_COLS, block} if t % block == 0)
        all_columns = block >= k or (k <= max(sizes) and k % block == 0)
    return tuple(t for t in sizes if t < k) + ((k,) if all_columns else ())
