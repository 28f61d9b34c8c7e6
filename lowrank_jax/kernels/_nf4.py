"""A product with a matrix in NF4 that is never formed: `y = x dequant(W)`, the base of QLoRA.

    x (N, n)   W (n, m) as codes and scales   ->   y (N, m)         backward   dx = dy dequant(W)ᵀ, from the same codes

XLA decodes W to device memory or spreads its scales there, and reads that for the product. Here a
tile of W is decoded in fast memory, once for each tile of rows. W is frozen: it has no cotangent.
Entries are `value x scale` in float32, rounded to the dtype of x, as `NormalFloat4.dequantize`
rounds them; products are summed in float32.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as plgpu

from lowrank_jax import sharding
from lowrank_jax.kernels import _divided, _platform
from lowrank_jax.linalg import NormalFloat4, normal_float_book
from lowrank_jax.typing import Spec

# A block of 64 rows has one scale and 32 rows of bytes: the first half of its rows in their upper
# four bits, the second in the lower.
BLOCK = 64
HALF = 32

# Sizes that the rows i and columns j of a tile of the result are taken from.
_TPU_ROWS = (128, 256, 512, 1024, 2048, 4096)
_TPU_COLS = (256, 512)
_GPU_ROWS = (16, 32, 64, 128)
_GPU_COLS = (32, 64, 128)

# Rows that a TPU multiplies at a time, and columns that it decodes together.
_CHUNK = 256
_STRIPS = (512, 256, 128)

# Slices that are on their way at a time; up to how many rows a GPU takes narrow tiles, and beyond
# how many it decodes W too often.
_STAGES = 3
_FEW_ROWS = 64
_MOST_GPU_ROWS = 512


@dataclasses.dataclass(frozen=True)
class _Choice:
    """What is static of a call.

    Attributes:
      transpose: whether the product is one with Wᵀ, as in the backward pass.
      rows: n, which codes of whole blocks do not tell.
      over: the mesh axes of `x W`, where they are known.
      implementation, chip, interpret: as of `nf4_linear`.
    """

    transpose: bool
    rows: int
    over: _divided.Product | None
    implementation: str | None
    chip: str | None
    interpret: bool


def nf4_linear(
    x: Array,
    w: NormalFloat4,
    *,
    implementation: str | None = None,
    spec: Spec | None = None,
    chip: str | None = None,
    interpret: bool = False,
) -> Array:
    """`x W` of a matrix from `lrx.linalg.quantize_nf4`, differentiable in x alone.

    Args:
      x: `(..., n)`, float32 or bfloat16; leading axes are rows.
      w: one matrix `(n, m)`. Doubly quantised scales are decoded by XLA, 1 / 64 of the entries.
      implementation: "tpu" (Mosaic), "gpu" (Triton), "reference" (jnp), or None for that of the
        device which the program is compiled for: the reference on CPUs; where a kernel does not
        fit; on TPUs where n or m is no multiple of 128, since XLA lays such arrays out otherwise
        and would copy them for the kernel, and where the decoded W fits half of VMEM, since XLA
        then keeps it there and moves no more; on GPUs above 512 rows, since each tile of 128 rows
        decodes W again, and by formula more than four cost more than to write one W and read it.
      spec: partition entries of w's two axes on the mesh of `lrx.meshes.use`, as of
        `lrx.kernels.lora_linear`; codes and scales are gathered, never a decoded matrix. Where a
        device's rows of w would cut a block, the reference runs.
      chip: key of `CHIPS`, whose fast memory sizes the tiles; None for the smallest of the
        platform.
      interpret: run the named kernel as jnp operations, on any device.

    Raises:
      ValueError: for a stack of matrices, shapes that do not fit each other, or another dtype;
        where a kernel was named, and no tile fits the chip's fast memory.

    >>> import jax.numpy as jnp
    >>> from lowrank_jax import linalg
    >>> nf4_linear(jnp.ones((2, 64)), linalg.quantize_nf4(jnp.ones((64, 3)))).tolist()
    [[64.0, 64.0, 64.0], [64.0, 64.0, 64.0]]
    """
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"nf4_linear: x of dtype {x.dtype} must be float32 or bfloat16; cast it")
    if w.ndim != 2 or x.ndim < 1 or x.shape[-1] != w.shape[0]:
        raise ValueError(
            f"nf4_linear: shapes x {x.shape}, w {w.shape} must be (..., n), (n, m); slice a stack"
        )
    n = w.shape[0]
    over = _divided.Product.of(x, w.shape, spec)
    # a device needs whole blocks, each with its scale
    if over is not None and over.n and n % (BLOCK * sharding.parts(over.n, over.mesh)):
        over = None
    choice = _Choice(
        transpose=False,
        rows=n,
        over=over,
        implementation=_platform.chosen(implementation, over),
        chip=chip,
        interpret=interpret,
    )
    return _linear(choice, *sharding.varying_alike(x, w.codes, w.scales()))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear(choice, x, codes, scales):
    return _product(choice, x, codes, scales)


def _forward(choice, x, codes, scales):
    return _product(choice, x, codes, scales), (codes, scales)


def _backward(choice, residuals, dy):
    # dx = dy dequant(W)ᵀ; W is frozen
    turned = dataclasses.replace(choice, transpose=True)
    dx = _product(turned, dy, *residuals)
    return dx, None, None


_linear.defvjp(_forward, _backward)


def _product(choice: _Choice, x: Array, codes: Array, scales: Array) -> Array:
    """`x (..., n) W`, or `dy (..., m) Wᵀ`, of codes `(n / 2, m)` and scales `(n / 64, m)`."""
    reference = functools.partial(_reference, choice=choice)
    if x.size == 0:
        return reference(x, codes, scales)
    # each device has its share of the rows of W
    parts = 1 if choice.over is None else sharding.parts(choice.over.n, choice.over.mesh)
    own = dataclasses.replace(choice, rows=choice.rows // parts)
    return _platform.dispatch(
        choice.implementation,
        choice.interpret,
        x,
        codes,
        scales,
        division=_division(choice),
        reference=reference,
        tpu=_platform.folded(functools.partial(_tpu, choice=own)),
        gpu=_platform.folded(functools.partial(_gpu, choice=own)),
    )


def _division(choice: _Choice) -> _divided.Division | None:
    if choice.over is None:
        return None
    # codes and scales have the axes of W
    w = _divided.matrix(choice.over.n, choice.over.m)
    own = choice.over.transposed if choice.transpose else choice.over
    operands = (own.along(own.n), w, w)
    return _divided.Division(own.mesh, operands, own.along(own.m), own.added)


def _dot(x, w, transpose=False):
    """`x (..., n) W (n, m)`, or `x (..., m) Wᵀ`, summed in float32."""
    contracted = (x.ndim - 1,), (int(transpose),)
    return jax.lax.dot_general(x, w, (contracted, ((), ())), preferred_element_type=jnp.float32)


def _reference(x, codes, scales, choice):
    w = NormalFloat4(codes, scales, None, choice.rows, "xla").dequantize(x.dtype)
    return _dot(x, w, choice.transpose).astype(x.dtype)


def _decode_strip(book, codes, scales, w, block, cols):
    """Writes 64 rows of W at some columns, from 32 rows of codes and one of scales."""
    lanes = _platform.LANES
    half = pl.multiple_of(block * HALF, HALF)
    first = pl.multiple_of(block * BLOCK, BLOCK)
    scale = scales[pl.ds(block, 1), cols]
    code = codes[pl.ds(half, HALF), cols].astype(jnp.int32)
    for offset, index in ((0, code >> 4), (HALF, code & 15)):
        # value(code) is a gather within the 128 lanes of a register
        parts = [
            jnp.take_along_axis(
                book,
                index[:, lane : lane + lanes],
                axis=1,
                mode="promise_in_bounds",
            )
            for lane in range(0, cols.size, lanes)
        ]
        values = jnp.concatenate(parts, axis=1) * scale
        rows = pl.ds(pl.multiple_of(first + offset, HALF), HALF)
        w[rows, cols] = values.astype(w.dtype)


def _tpu_kernel(table, x, codes, scales, y, w, *, transpose):
    """One tile: W (n, j), or (j, m), is decoded into scratch `w`, then y (i, j) = x W."""
    strip = next(size for size in _STRIPS if codes.shape[1] % size == 0)
    book = jnp.broadcast_to(table[0:1, :], (HALF, _platform.LANES))

    @pl.loop(0, scales.shape[0])
    def _(block):
        @pl.loop(0, codes.shape[1] // strip)
        def _(step):
            cols = pl.ds(pl.multiple_of(step * strip, strip), strip)
            _decode_strip(book, codes, scales, w, block, cols)

    # what is contracted ends where x does: blocks and strips may reach beyond
    depth = slice(x.shape[1])
    inside = (slice(None), depth) if transpose else (depth, slice(None))

    def part(start, size):
        rows = pl.ds(start, size)
        y[rows, :] = _dot(x[rows, :], w[inside], transpose).astype(y.dtype)

    _platform.in_chunks(x.shape[0], _CHUNK, part)


def fast_bytes(
    shape: tuple[int, int, int],
    itemsize: int,
    platform: str,
    transpose: bool,
    i: int,
    j: int,
) -> int:
    """Fast memory of a tile `(i, j)` of the result for `shape = (N, n, m)`.

    The product is one of `x (N, n)` or, transposed, of `dy (N, m)`.

    TPU: a tile contracts everything; codes, scales and the result lie twice in VMEM, for the
    pipeline, x, the decoded tile of W and two float32 sums once, and the decoded tile once more
    where the product turns it. GPU: slices of x for half a block, of codes and of decoded entries,
    of three stages, lie in shared memory.
    """
    _, n, m = shape
    if platform == "gpu":
        slices = itemsize * (2 * i + 2 * j) + j
        return _STAGES * HALF * slices
    wide = _platform.wide
    depth = wide(m, _STRIPS[1]) if transpose else wide(n, BLOCK)
    tile = depth * wide(j)
    result = i * wide(j)
    once = i * wide(depth) + (1 + transpose) * tile
    # a byte for two entries of W, and four bytes for the scale of a block
    codes = tile // 2
    scales = 4 * (tile // BLOCK if transpose else wide(depth // BLOCK, 8) * wide(j))
    sums = 8 * min(i, _CHUNK) * wide(j)
    return itemsize * (once + 2 * result) + 2 * (codes + scales) + sums


def tiles(
    shape: tuple[int, int, int],
    itemsize: int,
    platform: str,
    chip: str | None,
    transpose: bool = False,
) -> tuple[int, int]:
    """Rows and columns of a tile of the result: as many rows as fit.

    Each tile of rows decodes W again. A GPU of few rows takes narrow tiles, so that all its
    processors have one.

    >>> tiles((4096, 4096, 11008), 2, "tpu", "v5e"), tiles((16, 4096, 11008), 2, "gpu", "h100")
    ((4096, 512), (16, 64))
    """
    rows, n, m = shape
    what = f"nf4_linear of {rows} rows and w ({n}, {m})" + ", transposed" * transpose
    costs = functools.partial(fast_bytes, shape, itemsize, platform, transpose)
    limit = _platform.budget(platform, chip)
    if platform == "gpu":
        narrow = _GPU_COLS[:2]
        gpu_cols = narrow if rows <= _FEW_ROWS else _GPU_COLS
        fit = tuple(size for size in _GPU_ROWS if size < 2 * rows) or _GPU_ROWS[:1]
        return _platform.largest(limit, costs, fit, gpu_cols, what)
    all_rows = (rows,) if rows <= _TPU_ROWS[-1] else ()
    fit = tuple(size for size in _TPU_ROWS if size < rows) + all_rows
    wide_m = _platform.wide(m)
    cols: tuple[int, ...]
    if transpose:
        # eight blocks, whose scales are the eight rows of a register
        cols = (8 * BLOCK,)
    else:
        cols = tuple(size for size in _TPU_COLS if size < wide_m) or (wide_m,)
    return _platform.largest(limit, costs, fit, cols, what)


def _check_gains(w_shape: tuple[int, int], itemsize: int, choice: _Choice) -> None:
    """Where nobody named the kernel, a misfit where XLA's own program moves no more on a TPU."""
    if choice.implementation is not None:
        return
    n, m = w_shape
    if n % _platform.LANES or m % _platform.LANES:
        raise _platform.Misfit(
            f"nf4_linear: XLA would copy operands of w ({n}, {m}) to the kernel's layout"
        )
    # two thirds of the budget, which is three quarters of VMEM
    half = _platform.budget("tpu", choice.chip) * 2 // 3
    if n * m * itemsize <= half:
        raise _platform.Misfit(f"nf4_linear: XLA keeps the decoded w ({n}, {m}) in VMEM")


def _tpu(x, codes, scales, *, choice):
    rows, depth = x.shape
    n, m = choice.rows, codes.shape[1]
    itemsize = x.dtype.itemsize
    _check_gains((n, m), itemsize, choice)
    i, j = tiles((rows, n, m), itemsize, "tpu", choice.chip, choice.transpose)
    # of W a grid position decodes `tile` entries, for the columns q of the result
    if choice.transpose:
        # strips reach beyond m, and the product leaves out what is there
        out, tile = n, (j, _platform.wide(m, _STRIPS[1]))
        at = lambda p, q: (q, 0)  # noqa: E731
    else:
        out, tile = m, (2 * codes.shape[0], j)
        at = lambda p, q: (0, q)  # noqa: E731
    once = pl.Buffered(1)
    book = jnp.asarray(np.tile(normal_float_book(), (8, 8)))
    book_block = pl.BlockSpec((8, _platform.LANES), lambda p, q: (0, 0), pipeline_mode=once)
    # one wait for each tile of rows
    x_block = pl.BlockSpec((i, depth), lambda p, q: (p, 0), pipeline_mode=once)
    codes_block = pl.BlockSpec((tile[0] // 2, tile[1]), at)
    scales_block = pl.BlockSpec((tile[0] // BLOCK, tile[1]), at)
    return pl.pallas_call(
        functools.partial(_tpu_kernel, transpose=choice.transpose),
        grid=(pl.cdiv(rows, i), pl.cdiv(out, j)),
        in_specs=[book_block, x_block, codes_block, scales_block],
        out_specs=pl.BlockSpec((i, j), lambda p, q: (p, q)),
        out_shape=_platform.output((rows, out), x),
        scratch_shapes=[pltpu.VMEM(tile, x.dtype)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=_platform.vmem_limit(choice.chip),
        ),
        interpret=choice.interpret,
        name="nf4_linear",
    )(book, x, codes, scales)


def _load(ref, first, last, limits, other=0):
    """The entries of `ref` at rows `first` and columns `last`; `other` beyond the limits."""
    is_row = (first < limits[0])[:, None]
    is_col = (last < limits[1])[None, :]
    inside = is_row & is_col
    place = first[:, None], last[None, :]
    return plgpu.load(ref.at[place], mask=inside, other=other)


def _halves(table, codes, scales, first, last, limits, dtype):
    """Both halves of W at rows `first` of codes and columns `last`, zeros outside."""
    is_row = (first < limits[0])[:, None]
    is_col = (last < limits[1])[None, :]
    inside = is_row & is_col
    place = first[:, None], last[None, :]
    code = plgpu.load(codes.at[place], mask=inside, other=0)
    code = code.astype(jnp.int32)
    # a scale serves the two halves of its block
    block = (first // HALF)[:, None]
    scale = plgpu.load(scales.at[block, last[None, :]], mask=inside, other=0.0)
    upper, lower = code >> 4, code & 15
    # the book holds what each index of four bits means
    halves = upper, lower
    return tuple((plgpu.load(table.at[index]) * scale).astype(dtype) for index in halves)


def _gpu_kernel(table, x, codes, scales, y, *, sizes, tile):
    """Tile `(i, j)` of `y = x W`: rows p (i,), columns q (j,), a block of n at a time."""
    rows, n, m = sizes
    i, j = tile
    p = pl.program_id(0) * i + jnp.arange(i)
    q = pl.program_id(1) * j + jnp.arange(j)
    limits = codes.shape[0], m

    def body(block, total):
        half = block * HALF + jnp.arange(HALF)
        halves = _halves(table, codes, scales, half, q, limits, x.dtype)
        for offset, w in enumerate(halves):
            # rows of W of this half
            k = block * BLOCK + offset * HALF + jnp.arange(HALF)
            x_part = _load(x, p, k, (rows, n))
            total += plgpu.dot(x_part, w)
        return total

    start = jnp.zeros((i, j), jnp.float32)
    blocks = codes.shape[0] // HALF
    total = jax.lax.fori_loop(0, blocks, body, start)
    inside = (p < rows)[:, None] & (q < m)[None, :]
    place = p[:, None], q[None, :]
    plgpu.store(y.at[place], total.astype(y.dtype), mask=inside)


def _gpu_transposed_kernel(table, dy, codes, scales, dx, *, sizes, tile):
    """Tile `(i, j)` of `dx = dy Wᵀ`: its columns are rows of W, read as j / 2 rows of codes."""
    rows, n, m = sizes
    i, j = tile
    p = pl.program_id(0) * i + jnp.arange(i)
    # rows of codes, each of which holds two rows of W
    q = pl.program_id(1) * (j // 2) + jnp.arange(j // 2)
    limits = codes.shape[0], m

    def body(step, totals):
        k = step * HALF + jnp.arange(HALF)
        left = _load(dy, p, k, (rows, m))
        halves = _halves(table, codes, scales, q, k, limits, dy.dtype)
        pairs = zip(totals, halves, strict=True)
        return tuple(total + plgpu.dot(left, w.T) for total, w in pairs)

    # one sum for the rows in the upper four bits, one for those in the lower
    start = (jnp.zeros((i, j // 2), jnp.float32),) * 2
    totals = jax.lax.fori_loop(0, pl.cdiv(m, HALF), body, start)
    for offset, total in enumerate(totals):
        # row q of codes holds rows of W that are half a block apart
        cols = q // HALF * BLOCK + offset * HALF + q % HALF
        inside = (p < rows)[:, None] & (cols < n)[None, :]
        place = p[:, None], cols[None, :]
        plgpu.store(dx.at[place], total.astype(dx.dtype), mask=inside)


def _gpu(x, codes, scales, *, choice):
    sizes = rows, n, m = x.shape[0], choice.rows, codes.shape[1]
    if choice.implementation is None and rows > _MOST_GPU_ROWS:
        raise _platform.Misfit(
            f"nf4_linear: {rows} rows decode w more than {_MOST_GPU_ROWS // _GPU_ROWS[-1]} times"
        )
    i, j = tiles(sizes, x.dtype.itemsize, "gpu", choice.chip, choice.transpose)
    if choice.transpose:
        kernel, cols, out = _gpu_transposed_kernel, 2 * codes.shape[0], n
    else:
        kernel, cols, out = _gpu_kernel, m, m
    return pl.pallas_call(
        functools.partial(kernel, sizes=sizes, tile=(i, j)),
        grid=(pl.cdiv(rows, i), pl.cdiv(cols, j)),
        out_shape=_platform.output((rows, out), x),
        compiler_params=plgpu.CompilerParams(
            num_warps=8 if i * j >= 128 * 128 else 4,
            num_stages=_STAGES,
        ),
        interpret=choice.interpret,
        name="nf4_linear",
    )(jnp.asarray(normal_float_book()), x, codes, scales)
