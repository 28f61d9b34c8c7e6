"""`low_rank_adam` on NVIDIA GPUs: one program for the moments, one for the product that ends on
W."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from lowrank_jax.kernels import _bits, _platform
from lowrank_jax.kernels import _low_rank_adam_parts as parts
from lowrank_jax.linalg import dynamic_code

_ENTRIES = 4096  # of a tile of moments


def _place(layer, first, last, limits):
    """Index of a tile of one matrix, and which of its entries exist."""
    inside = (first < limits[0])[:, None] & (last < limits[1])[None, :]
    return (layer, first[:, None], last[None, :]), inside


def _moments_kernel(start, numbers, low, *refs, choice, sizes, tile):
    leaves = 4 if choice.coded else 2
    before, d, after = refs[:leaves], refs[leaves], refs[leaves + 1 :]
    (r, k), (i, j) = sizes, tile
    layer, part = pl.program_id(0), pl.program_id(2)
    n = {name: numbers[layer, field] for field, name in enumerate(parts.FIELDS)}
    rows, cols = pl.program_id(1) * i + jnp.arange(i), part * j + jnp.arange(j)
    own, inside = _place(layer, rows, cols, (r, k))
    place, _ = _place(start[0] + layer, rows, cols, (r, k))
    load = lambda ref, place=place: plgpu.load(ref.at[place], mask=inside, other=0)  # noqa: E731
    if not choice.coded:
        mu, nu = (load(x).astype(jnp.float32) for x in before)
        *new, direction = parts.moved(load(low, own), mu, nu, n)
        for ref, value in zip(after, new, strict=True):
            plgpu.store(ref.at[place], value.astype(ref.dtype), mask=inside)
        plgpu.store(d.at[own], direction, mask=inside)
        return
    scale_place, real = (
        (start[0] + layer, rows[:, None], jnp.full((1, 1), part)),
        (rows < r)[:, None],
    )
    codes = [load(x).astype(jnp.int32) for x in before[::2]]
    scales = [plgpu.load(x.at[scale_place], mask=real, other=0) for x in before[1::2]]
    mu, nu = (
        dynamic_code.decode(codes[number], number == 0) * scales[number] for number in range(2)
    )
    *new, direction = parts.moved(load(low, own), mu, nu, n)
    for number, code in enumerate(("signed", "unsigned")):
        kept, scale = parts.recoded(
            codes[number], scales[number], new[number], code, n["accepted"] > 0, inside
        )
        plgpu.store(after[2 * number].at[place], kept, mask=inside)
        plgpu.store(after[2 * number + 1].at[scale_place], scale, mask=real)
    plgpu.store(d.at[own], direction, mask=inside)


def _write_kernel(start, numbers, words, w, basis, d, out, *, choice, sizes, tile):
    (s, r, k), (i, j) = sizes, tile
    layer, first = pl.program_id(0), pl.program_id(1) * i + jnp.arange(i)
    last = pl.program_id(2) * j + jnp.arange(j)
    n = {name: numbers[layer, field] for field, name in enumerate(parts.FIELDS)}

    def load(ref, rows, cols, limits):
        place, inside = _place(layer, rows, cols, limits)
        return plgpu.load(ref.at[place], mask=inside, other=0).astype(jnp.float32)

    def body(step, total):
        q = step * parts.GPU_DEPTH + jnp.arange(parts.GPU_DEPTH)
        return total + plgpu.dot(load(basis, first, q, (s, r)), load(d, q, last, (r, k)))

    def turned(step, total):
        q = step * parts.GPU_DEPTH + jnp.arange(parts.GPU_DEPTH)
        return total + plgpu.dot(load(d, q, first, (r, k)).T, load(basis, last, q, (s, r)).T)

    product, shape = (body, (s, k)) if choice.side == "rows" else (turned, (k, s))
    total = jax.lax.fori_loop(
        0, pl.cdiv(r, parts.GPU_DEPTH), product, jnp.zeros((i, j), jnp.float32)
    )
    place, inside = _place(start[0] + layer, first, last, shape)
    noise = None
    if choice.stochastic:
        index = _bits.place(
            words, layer, *(x.astype(jnp.uint32) for x in (first[:, None], last[None, :]))
        )
        noise = _bits.random_bits((words[layer, 0], words[layer, 1]), index)
    old = plgpu.load(w.at[place], mask=inside, other=0)
    plgpu.store(out.at[place], parts.written(old, total, n, noise), mask=inside)


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
    cols = choice.block if choice.coded else 256
    rows = max(1, min(_ENTRIES // cols, 16))
    same = lambda x: _platform.output(x.shape, x)  # noqa: E731
    d, *moments = pl.pallas_call(
        functools.partial(_moments_kernel, choice=choice, sizes=(r, k), tile=(rows, cols)),
        grid=(count, pl.cdiv(r, rows), pl.cdiv(k, cols)),
        out_shape=[same(x) for x in (low, *moments)],
        input_output_aliases={2: 0} | {3 + number: 1 + number for number in range(len(moments))},
        compiler_params=plgpu.CompilerParams(num_warps=8, num_stages=1),
        interpret=choice.interpret,
        name="low_rank_adam_moments",
    )(start, numbers, low, *moments)
    if choice.side == "cols":
        i, j = j, i
    rows, cols = w.shape[1:]
    w = pl.pallas_call(
        functools.partial(_write_kernel, choice=choice, sizes=(s, r, k), tile=(i, j)),
        grid=(count, pl.cdiv(rows, i), pl.cdiv(cols, j)),
        out_shape=same(w),
        input_output_aliases={3: 0},
        compiler_params=plgpu.CompilerParams(
            num_warps=8 if i * j >= 128 * 128 else 4, num_stages=parts.STAGES
        ),
        interpret=choice.interpret,
        name="low_rank_adam_write",
    )(start, numbers, words, w, basis, d)
    return w, *jax.tree.unflatten(treedef, moments)
