"""A product and its low-rank companion in one pass over x: `y = x W + (x A) B`, a layer of LoRA.

    x (N, n)   W (n, m)   A (n, r)   B (r, m)   ->   y (N, m), low = x A (N, r)

Two programs of XLA read x twice, write `x W` and read it again for the sum. Here a tile of y is
summed in fast memory and written once. The backward pass is the same kernel,

    dx = dy Wᵀ + (dy Bᵀ) Aᵀ          low' = dy Bᵀ
    dA = xᵀ low'    dB = lowᵀ dy      (thin products, left to XLA)

and saves `low` in place of computing it again. W is frozen: its cotangent is taken only where it is
asked for. Products are counted in the dtype of x and summed in float32, `low` is rounded to the
dtype of x as `lrx.adapters` round it; the sum of both parts is rounded once, where two programs
round it twice.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as plgpu

from lowrank_jax import sharding
from lowrank_jax.kernels import _divided, _platform
from lowrank_jax.rows import fold_rows
from lowrank_jax.typing import Spec

# Sizes that the rows i and columns j of a tile of y are taken from, and how much of n a GPU
# contracts at a time.
_TPU_ROWS = (128, 256, 512, 1024, 2048, 4096)
_TPU_COLS = (256, 512)
_GPU_ROWS = (16, 32, 64, 128)
_GPU_COLS = (16, 32, 64, 128)
_GPU_DEPTH = 32

# What the registers of a GPU's block hold with a tile, and slices that are on their way at a time.
_LARGEST_GPU_RANK = 128
_STAGES = 3

# Rows that a TPU multiplies at a time.
_CHUNK = 256


@dataclasses.dataclass(frozen=True)
class _Choice:
    """What is static of a call.

    Attributes:
      transpose: whether W is given transposed, as in the backward pass.
      over: the mesh axes of `x W`, where they are known.
      divided: whether the program is one for several devices.
      implementation, chip, interpret: as of `lora_linear`.
    """

    transpose: bool
    over: _divided.Product | None
    divided: bool
    implementation: str | None
    chip: str | None
    interpret: bool


def lora_linear(
    x: Array,
    w: Array,
    a: Array,
    b: Array,
    *,
    implementation: str | None = None,
    spec: Spec | None = None,
    chip: str | None = None,
    interpret: bool = False,
) -> Array:
    """`x W + (x A) B`, with x read once and nothing else of the size of y.

    Args:
      x: `(..., n)`, float32 or bfloat16; leading axes are rows.
      w: `(n, m)`. a: `(n, r)`. b: `(r, m)`, the scale of the adapter inside a or b. They are cast
        to the dtype of x.
      implementation: "tpu" (Mosaic), "gpu" (Triton), "reference" (jnp), or None for that of the
        device which the program is compiled for: the reference on CPUs, where a kernel does not
        fit, and on TPUs where n or m is no multiple of 128, since XLA lays such arrays out
        otherwise and would copy them for the kernel.
      spec: partition entries of w's two axes on the mesh of `lrx.meshes.use`. Each device then
        multiplies its own rows of x, which lie as the rules say of "batch" and "length", by its own
        part of w. The reference runs there without it, and where the mesh does not divide evenly;
        on TPUs also where w is divided over axes of the rows, since XLA gathers it while it
        multiplies (FSDP), and where x, y and cotangents of a device fit VMEM, since XLA keeps them.
      chip: key of `CHIPS`, whose fast memory sizes the tiles; None for the smallest of the
        platform.
      interpret: run the named kernel as jnp operations, on any device.

    Raises:
      ValueError: for shapes that do not fit each other, or another dtype; where a kernel was named,
        for a rank above 128 on a GPU, and where no tile fits the chip's fast memory.

    >>> import jax.numpy as jnp
    >>> lora_linear(jnp.ones((2, 8)), jnp.ones((8, 3)), jnp.ones((8, 1)), jnp.ones((1, 3))).tolist()
    [[16.0, 16.0, 16.0], [16.0, 16.0, 16.0]]
    """
    _check(x, w, a, b)
    over = _divided.Product.of(x, w.shape, spec)
    choice = _Choice(
        transpose=False,
        over=over,
        divided=sharding.divides(),
        implementation=_platform.chosen(implementation, over),
        chip=chip,
        interpret=interpret,
    )
    leaves = [leaf.astype(x.dtype) for leaf in (w, a, b)]
    return _linear(choice, *sharding.varying_alike(x, *leaves))


def _check(x: Array, w: Array, a: Array, b: Array) -> None:
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"lora_linear: x of dtype {x.dtype} must be float32 or bfloat16; cast it")
    fits = x.ndim >= 1 and w.ndim == a.ndim == b.ndim == 2
    if fits:
        (n, m), r = w.shape, a.shape[1]
        fits = x.shape[-1] == n and a.shape == (n, r) and b.shape == (r, m)
    if not fits:
        raise ValueError(
            f"lora_linear: shapes x {x.shape}, w {w.shape}, a {a.shape}, b {b.shape} must be "
            "(..., n), (n, m), (n, r), (r, m)"
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear(choice, x, w, a, b):
    y, _ = _product(choice, x, w, a, b)
    return y


def _forward(choice, x, w, a, b):
    y, low = _product(choice, x, w, a, b)
    return y, (x, w, a, b, low)


def _backward(choice, residuals, dy):
    x, w, a, b, low = residuals
    # dx = dy Wᵀ + (dy Bᵀ) Aᵀ is the same product, and its companion is dlow = dy Bᵀ
    turned = dataclasses.replace(choice, transpose=True)
    dx, dlow = _product(turned, dy, w, b.T, a.T)
    # the others contract rows: dW = xᵀ dy, dA = xᵀ dlow, dB = lowᵀ dy
    x, dy, low, dlow = fold_rows(x, dy, low, dlow)
    rows = tuple(range(x.ndim - 1))
    over_rows = functools.partial(jax.lax.dot_general, dimension_numbers=((rows, rows), ((), ())))
    # XLA drops dW where W is frozen
    dw = over_rows(x, dy)
    da = over_rows(x, dlow)
    db = over_rows(low, dy)
    return dx, dw, da, db


_linear.defvjp(_forward, _backward)


def _product(choice: _Choice, x: Array, w: Array, a: Array, b: Array) -> tuple[Array, Array]:
    """`(y, low)` of x `(..., n)`, or of dy `(..., m)` where W is transposed."""
    reference = functools.partial(_reference, choice=choice)
    if x.size == 0:
        return reference(x, w, a, b)
    y, low = _platform.dispatch(
        choice.implementation,
        choice.interpret,
        x,
        w,
        a,
        b,
        division=_division(choice),
        reference=reference,
        tpu=_platform.folded(functools.partial(_tpu, choice=choice)),
        gpu=_platform.folded(functools.partial(_gpu, choice=choice)),
    )
    return y, low


def _division(choice: _Choice) -> _divided.Division | None:
    """How operands and results lie: A and B follow the dimension that they share with W."""
    if choice.over is None:
        return None
    w = _divided.matrix(choice.over.n, choice.over.m)
    own = choice.over.transposed if choice.transpose else choice.over
    a = _divided.matrix(own.n, ())
    b = _divided.matrix((), own.m)
    operands = (own.along(own.n), w, a, b)
    results = (own.along(own.m), own.along())
    return _divided.Division(own.mesh, operands, results, own.added)


def _dot(x, w, transpose=False, dtype=jnp.float32):
    """`x (..., n) W (n, m)`, or `x (..., m) Wᵀ`, of two-dimensional W."""
    contracted = (x.ndim - 1,), (int(transpose),)
    return jax.lax.dot_general(x, w, (contracted, ((), ())), preferred_element_type=dtype)


def _reference(x, w, a, b, choice):
    low = _dot(x, a).astype(x.dtype)
    # devices add up partial products in the dtype of x W: float32 would be twice as much to send
    summed = x.dtype if choice.divided else jnp.float32
    y = _dot(x, w, choice.transpose, summed) + _dot(low, b)
    return y.astype(x.dtype), low


def _tpu_kernel(x, w, a, b, y, low, *, transpose):
    """One tile: x (i, n), w (n, j) or (j, n), a (n, r), b (r, j) -> y (i, j), low (i, r)."""
    # outside the loop: the interpreter does not know it inside
    first = pl.program_id(1) == 0

    def part(start, size):
        rows = pl.ds(start, size)

        # low stays in VMEM for all tiles of these rows
        @pl.when(first)
        def _():
            low[rows, :] = _dot(x[rows, :], a[...]).astype(low.dtype)

        main = _dot(x[rows, :], w[...], transpose)
        companion = _dot(low[rows, :], b[...])
        y[rows, :] = (main + companion).astype(y.dtype)

    _platform.in_chunks(x.shape[0], _CHUNK, part)


def fast_bytes(
    shape: tuple[int, int, int, int],
    itemsize: int,
    platform: str,
    i: int,
    j: int,
) -> int:
    """Fast memory of a tile `(i, j)` of y for `shape = (N, n, m, r)`.

    TPU: a tile contracts all of n; W, B, y and low lie twice in VMEM, for the pipeline, x, A and
    two float32 sums once, and a slice of W once more, which the backward pass turns there.
    GPU: the slices of x, W and A of three stages lie in shared memory, and those of the last
    product.
    """
    _, n, _, r = shape
    if platform == "gpu":
        stages = _STAGES * _GPU_DEPTH * (i + j + power(r))
        last = power(r) * (i + j)
        return itemsize * (stages + last)
    wide_n, wide_r, wide_j = (_platform.wide(size) for size in (n, r, j))
    x, w = i * wide_n, wide_n * wide_j
    a, b = wide_n * wide_r, _platform.wide(r, 16) * wide_j
    y, low = i * wide_j, i * wide_r
    once = x + a + w
    twice = w + b + y + low
    sums = 8 * min(i, _CHUNK) * wide_j
    return itemsize * (once + 2 * twice) + sums


def tiles(
    shape: tuple[int, int, int, int],
    itemsize: int,
    platform: str,
    chip: str | None,
) -> tuple[int, int]:
    """Rows and columns of a tile of y: as many rows as fit.

    W is read once for each tile of rows.

    >>> (
    ...     tiles((4096, 4096, 11008, 16), 2, "tpu", "v5e"),
    ...     tiles((4096, 4096, 11008, 16), 2, "gpu", "h100"),
    ... )
    ((4096, 512), (128, 128))
    """
    rows, n, m, r = shape
    what = f"lora_linear of x ({rows}, {n}), w ({n}, {m}), rank {r}"
    costs = functools.partial(fast_bytes, shape, itemsize, platform)
    if platform == "gpu":
        choices = _gpu_sizes(_GPU_ROWS, rows), _gpu_sizes(_GPU_COLS, m)
    else:
        choices = _tpu_sizes(_TPU_ROWS, rows), _tpu_sizes(_TPU_COLS, m)
    return _platform.largest(_platform.budget(platform, chip), costs, *choices, what)


def _gpu_sizes(sizes: tuple[int, ...], size: int) -> tuple[int, ...]:
    """Sizes of a tile along an axis that are less than twice the axis, or the smallest."""
    return tuple(s for s in sizes if s < 2 * size) or sizes[:1]


def _tpu_sizes(sizes: tuple[int, ...], size: int) -> tuple[int, ...]:
    """Sizes of a tile along an axis: multiples of Mosaic's, or all of the axis."""
    all_of_it = (size,) if size <= sizes[-1] else ()
    return tuple(s for s in sizes if s < size) + all_of_it


def power(size: int) -> int:
    """The least power of two from 16 on that holds `size`: what Triton multiplies."""
    return max(16, 1 << math.ceil(math.log2(size)))


def _check_gains(x: Array, w_shape: tuple[int, int], choice: _Choice) -> None:
    """Where nobody named the kernel, a misfit where XLA's own program moves no more on a TPU."""
    if choice.implementation is not None:
        return
    rows, (n, m) = x.shape[0], w_shape
    if n % _platform.LANES or m % _platform.LANES:
        raise _platform.Misfit(f"lora_linear: XLA would copy w ({n}, {m}) to the kernel's layout")
    if choice.over is None:
        return
    if choice.over.gathers:
        raise _platform.Misfit(
            "lora_linear: XLA gathers w as it multiplies, and a kernel waits for all of it"
        )
    kept = 2 * rows * (n + m) * x.dtype.itemsize
    if kept <= _platform.vmem(choice.chip):
        raise _platform.Misfit(
            f"lora_linear: XLA keeps {rows} rows of x, y and their cotangents in VMEM"
        )


def _tpu(x, w, a, b, *, choice):
    rows, n = x.shape
    r, m = a.shape[1], b.shape[1]
    _check_gains(x, (n, m), choice)
    itemsize = x.dtype.itemsize
    i, j = tiles((rows, n, m, r), itemsize, "tpu", choice.chip)
    # grid position (p, q) is the tile of rows p and columns q; q moves first, so that what depends
    # on p alone is read once for each tile of rows, and need not lie twice in VMEM
    once = pl.Buffered(1)
    x_block = pl.BlockSpec((i, n), lambda p, q: (p, 0), pipeline_mode=once)
    if choice.transpose:
        w_block = pl.BlockSpec((j, n), lambda p, q: (q, 0))
    else:
        w_block = pl.BlockSpec((n, j), lambda p, q: (0, q))
    a_block = pl.BlockSpec((n, r), lambda p, q: (0, 0), pipeline_mode=once)
    b_block = pl.BlockSpec((r, j), lambda p, q: (0, q))
    y_block = pl.BlockSpec((i, j), lambda p, q: (p, q))
    low_block = pl.BlockSpec((i, r), lambda p, q: (p, 0))
    outputs = (rows, m), (rows, r)
    return pl.pallas_call(
        functools.partial(_tpu_kernel, transpose=choice.transpose),
        grid=(pl.cdiv(rows, i), pl.cdiv(m, j)),
        in_specs=[x_block, w_block, a_block, b_block],
        out_specs=[y_block, low_block],
        out_shape=[_platform.output(shape, x) for shape in outputs],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=_platform.vmem_limit(choice.chip),
        ),
        interpret=choice.interpret,
        name="lora_linear",
    )(x, w, a, b)


def _gpu_kernel(x, w, a, b, y, low, *, transpose, sizes, tile):
    """Tile `(i, j)` of y; axes are rows p (i,), columns q (j,), rank s and the contracted k."""
    rows, n, m, r = sizes
    i, j = tile
    depth, wide = _GPU_DEPTH, power(r)
    p = pl.program_id(0) * i + jnp.arange(i)
    q = pl.program_id(1) * j + jnp.arange(j)
    s = jnp.arange(wide)

    def load(ref, first, last, limits):
        is_row = (first < limits[0])[:, None]
        is_col = (last < limits[1])[None, :]
        inside = is_row & is_col
        place = first[:, None], last[None, :]
        return plgpu.load(ref.at[place], mask=inside, other=0)

    def body(step, sums):
        # a part of what is contracted: total (i, j), companion (i, wide)
        total, companion = sums
        k = step * depth + jnp.arange(depth)
        left = load(x, p, k, (rows, n))
        # w is stored (m, n) in the backward pass
        right = load(w, q, k, (m, n)).T if transpose else load(w, k, q, (n, m))
        total = total + plgpu.dot(left, right)
        a_part = load(a, k, s, (n, r))
        companion = companion + plgpu.dot(left, a_part)
        return total, companion

    start = jnp.zeros((i, j), jnp.float32), jnp.zeros((i, wide), jnp.float32)
    steps = pl.cdiv(n, depth)
    total, companion = jax.lax.fori_loop(0, steps, body, start)
    # low = x A, rounded before it is multiplied by B as `lrx.adapters` round it
    companion = companion.astype(x.dtype)
    total += plgpu.dot(companion, load(b, s, q, (r, m)))
    is_row = (p < rows)[:, None]
    written = is_row & (q < m)[None, :]
    y_place = p[:, None], q[None, :]
    plgpu.store(y.at[y_place], total.astype(y.dtype), mask=written)
    # one tile of each row writes low
    is_first = (s < r)[None, :] & (pl.program_id(1) == 0)
    low_place = p[:, None], s[None, :]
    plgpu.store(low.at[low_place], companion, mask=is_row & is_first)


def _gpu(x, w, a, b, *, choice):
    (rows, n), r, m = x.shape, a.shape[1], b.shape[1]
    if r > _LARGEST_GPU_RANK:
        raise _platform.Misfit(
            f"lora_linear: rank {r} exceeds {_LARGEST_GPU_RANK}, which the registers of a GPU's "
            "block hold beside a tile; take implementation='reference'"
        )
    sizes = rows, n, m, r
    i, j = tiles(sizes, x.dtype.itemsize, "gpu", choice.chip)
    return pl.pallas_call(
        functools.partial(_gpu_kernel, transpose=choice.transpose, sizes=sizes, tile=(i, j)),
        grid=(pl.cdiv(rows, i), pl.cdiv(m, j)),
        out_shape=[_platform.output((rows, m), x), _platform.output((rows, r), x)],
        compiler_params=plgpu.CompilerParams(
            num_warps=8 if i * j >= 128 * 128 else 4,
            num_stages=_STAGES,
        ),
        interpret=choice.interpret,
        name="lora_linear",
    )(x, w, a, b)
