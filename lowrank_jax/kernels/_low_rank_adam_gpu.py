"""`low_rank_adam` on NVIDIA GPUs: a program for moments, and one for the product that ends on W."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from lowrank_jax.kernels import _low_rank_adam_parts as parts
from lowrank_jax.kernels import _platform
from lowrank_jax.linalg import dynamic_code

# Entries of a tile of moments, its columns where they are arrays, and the most rows.
_ENTRIES = 4096
_COLS = 256
_ROWS = 16


def _numbers(table, layer):
    return {name: table[layer, field] for field, name in enumerate(parts.FIELDS)}


def _place(layer, first, last, limits):
    """Index of a tile of one matrix, and which of its entries exist."""
    inside = (first < limits[0])[:, None] & (last < limits[1])[None, :]
    return (layer, first[:, None], last[None, :]), inside


def _moments_kernel(start, numbers, low, *refs, choice, sizes, tile):
    """Tile `(i, j)` of the moments; `refs` are moments before, the direction, moments after.

    Moments in codes are `(codes of mu, scales of mu, codes of nu, scales of nu)`.
    """
    leaves = 4 if choice.coded else 2
    before, d, after = refs[:leaves], refs[leaves], refs[leaves + 1 :]
    r, _ = sizes
    i, j = tile
    layer, part = pl.program_id(0), pl.program_id(2)
    n = _numbers(numbers, layer)
    rows = pl.program_id(1) * i + jnp.arange(i)
    cols = part * j + jnp.arange(j)
    # low and d are those of this call, moments stand in stacks that begin before
    own, inside = _place(layer, rows, cols, sizes)
    place, _ = _place(start[0] + layer, rows, cols, sizes)
    grad = plgpu.load(low.at[own], mask=inside, other=0)
    tile_of = grad, n, before, after, place, inside
    if choice.coded:
        direction = _step_blocks(*tile_of, start[0] + layer, rows, part, r)
    else:
        direction = _step_arrays(*tile_of)
    plgpu.store(d.at[own], direction, mask=inside)


def _step_arrays(grad, n, before, after, place, inside):
    """The direction of a tile `(i, j)`, whose moments are arrays, and are written."""
    load = functools.partial(plgpu.load, mask=inside, other=0)
    mu, nu = (load(x.at[place]).astype(jnp.float32) for x in before)
    *new, direction = parts.moved(grad, mu, nu, n)
    for ref, value in zip(after, new, strict=True):
        plgpu.store(ref.at[place], value.astype(ref.dtype), mask=inside)
    return direction


def _step_blocks(grad, n, before, after, place, inside, matrix, rows, part, r):
    """The direction of a tile that is a block wide, whose moments are codes, and are written."""
    # one scale a row, (i, 1)
    scale_place = (matrix, rows[:, None], jnp.full((1, 1), part))
    is_row = (rows < r)[:, None]
    load = functools.partial(plgpu.load, mask=inside, other=0)
    codes = [load(x.at[place]).astype(jnp.int32) for x in before[::2]]
    scales = [plgpu.load(x.at[scale_place], mask=is_row, other=0) for x in before[1::2]]
    mu = dynamic_code.decode(codes[0], signed=True) * scales[0]
    nu = dynamic_code.decode(codes[1], signed=False) * scales[1]
    *new, direction = parts.moved(grad, mu, nu, n)
    # back into codes, the old ones where the step is not accepted
    for i, code in enumerate(("signed", "unsigned")):
        accepted = n["accepted"] > 0
        old = codes[i], scales[i]
        stored, scale = parts.recoded(*old, new[i], code, accepted, inside)
        all_codes, all_scales = after[2 * i : 2 * i + 2]
        plgpu.store(all_codes.at[place], stored, mask=inside)
        plgpu.store(all_scales.at[scale_place], scale, mask=is_row)
    return direction


def _write_kernel(start, numbers, words, w, basis, d, out, *, choice, sizes, tile):
    """Tile `(i, j)` of w: rows `first`, columns `last`, summed over the rank."""
    s, r, k = sizes
    i, j = tile
    depth = parts.GPU_DEPTH
    layer = pl.program_id(0)
    first = pl.program_id(1) * i + jnp.arange(i)
    last = pl.program_id(2) * j + jnp.arange(j)
    n = _numbers(numbers, layer)

    def load(ref, rows, cols, limits):
        place, inside = _place(layer, rows, cols, limits)
        values = plgpu.load(ref.at[place], mask=inside, other=0)
        return values.astype(jnp.float32)

    def by_rows(step, total):
        # P d: P (i, depth), d (depth, j)
        q = step * depth + jnp.arange(depth)
        p_part = load(basis, first, q, (s, r))
        d_part = load(d, q, last, (r, k))
        return total + plgpu.dot(p_part, d_part)

    def by_cols(step, total):
        # dᵀ Pᵀ: d (depth, i), P (j, depth)
        q = step * depth + jnp.arange(depth)
        d_part = load(d, q, first, (r, k)).T
        p_part = load(basis, last, q, (s, r)).T
        return total + plgpu.dot(d_part, p_part)

    # the step (i, j), summed over parts of the rank
    is_rows = choice.side == "rows"
    product = by_rows if is_rows else by_cols
    zero = jnp.zeros((i, j), jnp.float32)
    total = jax.lax.fori_loop(0, pl.cdiv(r, depth), product, zero)

    shape = (s, k) if is_rows else (k, s)
    place, inside = _place(start[0] + layer, first, last, shape)
    noise = None
    if choice.stochastic:
        rows = first[:, None].astype(jnp.uint32)
        cols = last[None, :].astype(jnp.uint32)
        noise = parts.drawn(words, layer, rows, cols)
    old = plgpu.load(w.at[place], mask=inside, other=0)
    own = out.at[place]
    plgpu.store(own, parts.written(old, total, n, noise), mask=inside)


def _like(x):
    return _platform.output(x.shape, x)


def _moments(start, numbers, low, moments, choice):
    """`(d, *moments)`, the direction in the place of `low`."""
    count, r, k = low.shape
    cols = choice.block if choice.coded else _COLS
    rows = max(1, min(_ENTRIES // cols, _ROWS))
    aliases = {2: 0} | {3 + i: 1 + i for i in range(len(moments))}
    return pl.pallas_call(
        functools.partial(_moments_kernel, choice=choice, sizes=(r, k), tile=(rows, cols)),
        grid=(count, pl.cdiv(r, rows), pl.cdiv(k, cols)),
        out_shape=[_like(x) for x in (low, *moments)],
        input_output_aliases=aliases,
        compiler_params=plgpu.CompilerParams(num_warps=8, num_stages=1),
        interpret=choice.interpret,
        name="low_rank_adam_moments",
    )(start, numbers, low, *moments)


def gpu(numbers, words, w, basis, low, mu, nu, first=None, *, choice):
    """Both programs, one after the other; the direction takes the place of `low`.

    The matrices of `basis`, which has numbers and words too, are those of the other stacks from
    `first` on.
    """
    (count, s, r), k = basis.shape, low.shape[2]
    if first is not None:
        low = jax.lax.dynamic_slice_in_dim(low, first, count)
    start = jnp.asarray(0 if first is None else first, jnp.int32).reshape(1)
    sizes = (w.dtype.itemsize, basis.dtype.itemsize, mu.dtype.itemsize)
    i, j = parts.tiles((s, r, k), sizes, choice.block, "gpu", choice.chip)
    moments, treedef = jax.tree.flatten((mu, nu))
    d, *moments = _moments(start, numbers, low, moments, choice)
    # the tile is one of the oriented w
    if choice.side == "cols":
        i, j = j, i
    rows, cols = w.shape[1:]
    w = pl.pallas_call(
        functools.partial(_write_kernel, choice=choice, sizes=(s, r, k), tile=(i, j)),
        grid=(count, pl.cdiv(rows, i), pl.cdiv(cols, j)),
        out_shape=_like(w),
        input_output_aliases={3: 0},
        compiler_params=plgpu.CompilerParams(
            num_warps=8 if i * j >= 128 * 128 else 4,
            num_stages=parts.STAGES,
        ),
        interpret=choice.interpret,
        name="low_rank_adam_write",
    )(start, numbers, words, w, basis, d)
    return w, *jax.tree.unflatten(treedef, moments)
