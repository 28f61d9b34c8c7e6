"""A product with a matrix in NF4, which is never formed: `y = x dequant(W)`, the frozen base of
QLoRA.

    x (N, n)   W (n, m) as codes and scales   ->   y (N, m)         backward   dx = dy dequant(W)ᵀ, from the same codes

XLA decodes W to device memory or spreads its scales there, and reads that for the product. Here a
tile of W is decoded in fast memory, once for each tile of rows. W is frozen: it has no cotangent.
Entries are `value x scale` in float32, rounded to the dtype of x, as `NormalFloat4.dequantize`
rounds them; products are summed in float32.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as plgpu

from lowrank_jax import sharding
from lowrank_jax.kernels import _divided, _platform
from lowrank_jax.linalg import NormalFloat4, normal_float_book

BLOCK, HALF = 64, 32
_TPU_ROWS, _TPU_COLS = (128, 256, 512, 1024, 2048, 4096), (256, 512)
_CHUNK, _STRIPS = 256, (512, 256, 128)  # rows of a product; columns that are decoded together
_GPU_ROWS, _GPU_COLS, _STAGES = (16, 32, 64, 128), (32, 64, 128), 3
_FEW_ROWS, _MOST_GPU_ROWS = 64, 512


@dataclasses.dataclass(frozen=True)
class _Choice:
    """What is static: whether W is given transposed, its rows, the mesh axes of `x W`, and how the
    product is made."""

    transpose: bool
    rows: int
    over: _divided.Product | None
    implementation: str | None
    chip: str | None
    interpret: bool


def nf4_linear(
    x: jax.Array,
    w: NormalFloat4,
    *,
    implementation: str | None = None,
    spec: tuple[Any, Any] | None = None,
    chip: str | None = None,
    interpret: bool = False,
) -> jax.Array:
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
        `lrx.kernels.thin_linear`; codes and scales are gathered, never a decoded matrix. Where a
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
    over = _divided.Product.of(x, w.shape, spec)
    if over is not None and over.n and w.shape[0] % (BLOCK * sharding.parts(over.n, over.mesh)):
        over = None
    choice = _Choice(
        False, w.shape[0], over, _platform.settled(implementation, over), chip, interpret
    )
    return _linear(choice, *sharding.varying_alike(x, w.codes, w.scales()))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear(choice, x, codes, scales):
    return _product(choice, x, codes, scales)


def _forward(choice, x, codes, scales):
    return _product(choice, x, codes, scales), (codes, scales)


def _backward(choice, residuals, dy):
    return _product(dataclasses.replace(choice, transpose=True), dy, *residuals), None, None


_linear.defvjp(_forward, _backward)


def _product(choice: _Choice, x, codes, scales):
    reference = functools.partial(_reference, choice=choice)
    if x.size == 0:
        return reference(x, codes, scales)
    rows = (
        choice.rows
        if choice.over is None
        else choice.rows // sharding.parts(choice.over.n, choice.over.mesh)
    )
    own = dataclasses.replace(choice, rows=rows)
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
    own, w = choice.over, _divided.matrix(choice.over.n, choice.over.m)
    own = own.turned if choice.transpose else own
    return _divided.Division(own.mesh, (own.along(own.n), w, w), own.along(own.m), own.added)


def _dot(x, w, transpose=False):
    axes = ((x.ndim - 1,), (int(transpose),)), ((), ())
    return jax.lax.dot_general(x, w, axes, preferred_element_type=jnp.float32)


def _reference(x, codes, scales, choice):
    w = NormalFloat4(codes, scales, None, choice.rows, "xla").dequantize(x.dtype)
    return _dot(x, w, choice.transpose).astype(x.dtype)


def _tpu_kernel(table, x, codes, scales, y, w, *, transpose):
    inside = (slice(None), slice(x.shape[1])) if transpose else (slice(x.shape[1]), slice(None))
    strip = next(size for size in _STRIPS if codes.shape[1] % size == 0)
    book = jnp.broadcast_to(table[0:1, :], (HALF, 128))

    @pl.loop(0, scales.shape[0])
    def _(block):
        half, whole = pl.multiple_of(block * HALF, HALF), pl.multiple_of(block * BLOCK, BLOCK)

        @pl.loop(0, codes.shape[1] // strip)
        def _(step):
            cols = pl.ds(pl.multiple_of(step * strip, strip), strip)
            scale, code = (
                scales[pl.ds(block, 1), cols],
                codes[pl.ds(half, HALF), cols].astype(jnp.int32),
            )
            for offset, index in ((0, code >> 4), (HALF, code & 15)):
                parts = [
                    jnp.take_along_axis(
                        book, index[:, lane : lane + 128], axis=1, mode="promise_in_bounds"
                    )
                    for lane in range(0, strip, 128)  # a gather within the 128 lanes of a register
                ]
                rows = pl.ds(pl.multiple_of(whole + offset, HALF), HALF)
                w[rows, cols] = (jnp.concatenate(parts, axis=1) * scale).astype(w.dtype)

    def some(start, size):
        rows = pl.ds(start, size)
        y[rows, :] = _dot(x[rows, :], w[inside], transpose).astype(y.dtype)

    whole, rest = divmod(
        x.shape[0], _CHUNK
    )  # a loop: Mosaic unrolls a product, and compiles a large one for minutes

    if whole:

        @pl.loop(0, whole)
        def _(step):
            some(pl.multiple_of(step * _CHUNK, _CHUNK), _CHUNK)

    if rest:
        some(whole * _CHUNK, rest)


def _wide(size: int, to: int = 128) -> int:
    return -(-size // to) * to


def fast_bytes(
    shape: tuple[int, int, int], itemsize: int, platform: str, transpose: bool, i: int, j: int
) -> int:
    """Fast memory of a tile `(i, j)` of the result for `shape = (N, n, m)` of `x (N, n)` or,
    transposed, `dy (N, m)`.

    TPU: a tile contracts everything; codes, scales and the result lie twice in VMEM, for the
    pipeline, x, the decoded tile of W and two float32 sums once, and the decoded tile once more
    where the product turns it. GPU: slices of x for half a block, of codes and of decoded entries,
    of three stages, lie in shared memory.
    """
    _, n, m = shape
    if platform == "gpu":
        return _STAGES * HALF * (itemsize * (2 * i + 2 * j) + j)
    depth = _wide(m, _STRIPS[1]) if transpose else _wide(n, BLOCK)
    tile = depth * _wide(j)
    once = i * _wide(depth) + (1 + transpose) * tile
    twice = tile // 2 + 4 * (tile // BLOCK if transpose else _wide(depth // BLOCK, 8) * _wide(j))
    return itemsize * (once + 2 * i * _wide(j)) + 2 * twice + 8 * min(i, _CHUNK) * _wide(j)


def tiles(
    shape: tuple[int, int, int],
    itemsize: int,
    platform: str,
    chip: str | None,
    transpose: bool = False,
) -> tuple[int, int]:
    """Rows and columns of a tile of the result: as many rows as fit, since each tile of rows
    decodes W again.

    A GPU of few rows takes narrow tiles, so that all its processors have one.

    >>> tiles((4096, 4096, 11008), 2, "tpu", "v5e"), tiles((16, 4096, 11008), 2, "gpu", "h100")
    ((4096, 512), (16, 64))
    """
    rows, n, m = shape
    what = f"nf4_linear of {rows} rows and w ({n}, {m})" + ", transposed" * transpose
    costs = functools.partial(fast_bytes, shape, itemsize, platform, transpose)
    limit = _platform.budget(platform, chip)
    if platform == "gpu":
        cols = _GPU_COLS[:2] if rows <= _FEW_ROWS else _GPU_COLS
        fit = tuple(size for size in _GPU_ROWS if size < 2 * rows) or _GPU_ROWS[:1]
        return _platform.largest(limit, costs, fit, cols, what)
    fit = tuple(size for size in _TPU_ROWS if size < rows) + (
        (rows,) if rows <= _TPU_ROWS[-1] else ()
    )
    if transpose:  # eight blocks, whose scales are the eight rows of a register
        return _platform.largest(limit, costs, fit, (8 * BLOCK,), what)
    return _platform.largest(
        limit, costs, fit, tuple(s for s in _TPU_COLS if s < _wide(m)) or (_wide(m),), what
    )


def _tpu(x, codes, scales, *, choice):
    (rows, _), n, m = x.shape, choice.rows, codes.shape[1]
    if choice.implementation is None and (n % 128 or m % 128):
        raise _platform.Misfit(
            f"nf4_linear: XLA would copy operands of w ({n}, {m}) to the kernel's layout"
        )
    if (
        choice.implementation is None
        and n * m * x.dtype.itemsize <= _platform.budget("tpu", choice.chip) * 2 // 3
    ):
        raise _platform.Misfit(f"nf4_linear: XLA keeps the decoded w ({n}, {m}) in VMEM")
    i, j = tiles((rows, n, m), x.dtype.itemsize, "tpu", choice.chip, choice.transpose)
    if choice.transpose:  # whole strips, of which the product leaves out what is beyond m
        out, tile, at = n, (j, _wide(m, _STRIPS[1])), lambda p, q: (q, 0)
    else:
        out, tile, at = m, (2 * codes.shape[0], j), lambda p, q: (0, q)
    once = pl.Buffered(1)
    return pl.pallas_call(
        functools.partial(_tpu_kernel, transpose=choice.transpose),
        grid=(pl.cdiv(rows, i), pl.cdiv(out, j)),
        in_specs=[
            pl.BlockSpec((8, 128), lambda p, q: (0, 0), pipeline_mode=once),
            pl.BlockSpec(
                (i, x.shape[1]), lambda p, q: (p, 0), pipeline_mode=once
            ),  # one wait for each tile of rows
            pl.BlockSpec((tile[0] // 2, tile[1]), at),
            pl.BlockSpec((tile[0] // BLOCK, tile[1]), at),
        ],
        out_specs=pl.BlockSpec((i, j), lambda p, q: (p, q)),
        out_shape=_platform.output((rows, out), x),
        scratch_shapes=[pltpu.VMEM(tile, x.dtype)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=_platform.budget("tpu", choice.chip) * 7 // 6,
        ),
        interpret=choice.interpret,
        name="nf4_linear",
    )(jnp.asarray(np.tile(normal_float_book(), (8, 8))), x, codes, scales)


def _halves(table, codes, scales, first, last, limits, dtype):
    """Both halves of W at rows `first` of codes and columns `last`, zeros outside."""
    inside = (first < limits[0])[:, None] & (last < limits[1])[None, :]
    code = plgpu.load(codes.at[first[:, None], last[None, :]], mask=inside, other=0).astype(
        jnp.int32
    )
    scale = plgpu.load(scales.at[(first // HALF)[:, None], last[None, :]], mask=inside, other=0.0)
    return tuple(
        (plgpu.load(table.at[index]) * scale).astype(dtype) for index in (code >> 4, code & 15)
    )


def _gpu_kernel(table, x, codes, scales, y, *, sizes, tile):
    (rows, n, m), (i, j) = sizes, tile
    p, q = pl.program_id(0) * i + jnp.arange(i), pl.program_id(1) * j + jnp.arange(j)
    limits = codes.shape[0], m

    def body(block, total):
        half = block * HALF + jnp.arange(HALF)
        for offset, w in enumerate(_halves(table, codes, scales, half, q, limits, x.dtype)):
            k = block * BLOCK + offset * HALF + jnp.arange(HALF)
            inside = (p < rows)[:, None] & (k < n)[None, :]
            total += plgpu.dot(plgpu.load(x.at[p[:, None], k[None, :]], mask=inside, other=0), w)
        return total

    total = jax.lax.fori_loop(0, codes.shape[0] // HALF, body, jnp.zeros((i, j), jnp.float32))
    plgpu.store(
        y.at[p[:, None], q[None, :]],
        total.astype(y.dtype),
        mask=(p < rows)[:, None] & (q < m)[None, :],
    )


def _gpu_turned(table, dy, codes, scales, dx, *, sizes, tile):
    (rows, n, m), (i, j) = sizes, tile
    p, q = pl.program_id(0) * i + jnp.arange(i), pl.program_id(1) * (j // 2) + jnp.arange(j // 2)

    def body(step, totals):
        k = step * HALF + jnp.arange(HALF)
        inside = (p < rows)[:, None] & (k < m)[None, :]
        left = plgpu.load(dy.at[p[:, None], k[None, :]], mask=inside, other=0)
        halves = _halves(table, codes, scales, q, k, (codes.shape[0], m), dy.dtype)
        return tuple(total + plgpu.dot(left, w.T) for total, w in zip(totals, halves, strict=True))

    start = (jnp.zeros((i, j // 2), jnp.float32),) * 2
    totals = jax.lax.fori_loop(0, pl.cdiv(m, HALF), body, start)
    for offset, total in enumerate(totals):
        cols = q // HALF * BLOCK + offset * HALF + q % HALF
        mask = (p < rows)[:, None] & (cols < n)[None, :]
        plgpu.store(dx.at[p[:, None], cols[None, :]], total.astype(dx.dtype), mask=mask)


def _gpu(x, codes, scales, *, choice):
    sizes = rows, n, m = x.shape[0], choice.rows, codes.shape[1]
    if choice.implementation is None and rows > _MOST_GPU_ROWS:
        raise _platform.Misfit(
            f"nf4_linear: {rows} rows decode w more than {_MOST_GPU_ROWS // _GPU_ROWS[-1]} times"
        )
    tile = tiles(sizes, x.dtype.itemsize, "gpu", choice.chip, choice.transpose)
    kernel, out = (_gpu_turned, 2 * codes.shape[0]) if choice.transpose else (_gpu_kernel, m)
    return pl.pallas_call(
        functools.partial(kernel, sizes=sizes, tile=tile),
        grid=(pl.cdiv(rows, tile[0]), pl.cdiv(out, tile[1])),
        out_shape=_platform.output((rows, n if choice.transpose else m), x),
        compiler_params=plgpu.CompilerParams(
            num_warps=8 if tile[0] * tile[1] >= 128 * 128 else 4, num_stages=_STAGES
        ),
        interpret=choice.interpret,
        name="nf4_linear",
    )(jnp.asarray(normal_float_book()), x, codes, scales)
