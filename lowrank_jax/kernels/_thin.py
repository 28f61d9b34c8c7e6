"""A product and its thin companion in one pass over x: `y = x W + (x A) B`, the linear layer of
LoRA.

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
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as plgpu

from lowrank_jax import sharding
from lowrank_jax.kernels import _divided, _platform
from lowrank_jax.rows import fold_rows

_TPU_ROWS, _TPU_COLS = (128, 256, 512, 1024, 2048, 4096), (256, 512)
_GPU_ROWS, _GPU_COLS, _GPU_DEPTH = (16, 32, 64, 128), (16, 32, 64, 128), 32
_LARGEST_GPU_RANK, _STAGES = 128, 3
_CHUNK = 256


@dataclasses.dataclass(frozen=True)
class _Choice:
    """What is static: whether W is given transposed, the mesh axes of `x W`, whether it is in a
    program for several devices, and how it is made."""

    transpose: bool
    over: _divided.Product | None
    divided: bool
    implementation: str | None
    chip: str | None
    interpret: bool


def thin_linear(
    x: jax.Array,
    w: jax.Array,
    a: jax.Array,
    b: jax.Array,
    *,
    implementation: str | None = None,
    spec: tuple[Any, Any] | None = None,
    chip: str | None = None,
    interpret: bool = False,
) -> jax.Array:
    """`x W + (x A) B`, with x read once and nothing of the size of y beside y.

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
    >>> thin_linear(jnp.ones((2, 8)), jnp.ones((8, 3)), jnp.ones((8, 1)), jnp.ones((1, 3))).tolist()
    [[16.0, 16.0, 16.0], [16.0, 16.0, 16.0]]
    """
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"thin_linear: x of dtype {x.dtype} must be float32 or bfloat16; cast it")
    n, r = a.shape if a.ndim == 2 else (-1, -1)
    if (
        x.ndim < 1
        or w.ndim != 2
        or b.ndim != 2
        or x.shape[-1] != n
        or w.shape[0] != n
        or b.shape != (r, w.shape[1])
    ):
        raise ValueError(
            f"thin_linear: shapes x {x.shape}, w {w.shape}, a {a.shape}, b {b.shape} must be "
            "(..., n), (n, m), (n, r), (r, m)"
        )
    over = _divided.Product.of(x, w.shape, spec)
    choice = _Choice(
        False, over, sharding.divides(), _platform.settled(implementation, over), chip, interpret
    )
    return _linear(
        choice, *sharding.varying_alike(x, *(leaf.astype(x.dtype) for leaf in (w, a, b)))
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear(choice, x, w, a, b):
    return _product(choice, x, w, a, b)[0]


def _forward(choice, x, w, a, b):
    y, low = _product(choice, x, w, a, b)
    return y, (x, w, a, b, low)


def _backward(choice, residuals, dy):
    x, w, a, b, low = residuals
    dx, pulled = _product(dataclasses.replace(choice, transpose=True), dy, w, b.T, a.T)
    x, dy, low, pulled = fold_rows(x, dy, low, pulled)
    lead = tuple(range(x.ndim - 1))
    thin = functools.partial(jax.lax.dot_general, dimension_numbers=((lead, lead), ((), ())))
    return dx, thin(x, dy), thin(x, pulled), thin(low, dy)  # XLA drops the cotangent of a frozen W


_linear.defvjp(_forward, _backward)


def _product(choice: _Choice, x, w, a, b):
    """`(y, low)`."""
    if x.size == 0:
        return _reference(x, w, a, b, choice)
    return _platform.dispatch(
        choice.implementation,
        choice.interpret,
        x,
        w,
        a,
        b,
        division=_division(choice),
        reference=functools.partial(_reference, choice=choice),
        tpu=_platform.folded(functools.partial(_tpu, choice=choice)),
        gpu=_platform.folded(functools.partial(_gpu, choice=choice)),
    )


def _division(choice: _Choice) -> _divided.Division | None:
    if choice.over is None:
        return None
    own, w = choice.over, _divided.matrix(choice.over.n, choice.over.m)
    own = own.turned if choice.transpose else own
    operands = own.along(own.n), w, _divided.matrix(own.n, ()), _divided.matrix((), own.m)
    return _divided.Division(own.mesh, operands, (own.along(own.m), own.along()), own.added)


def _dot(x, w, transpose=False, dtype=jnp.float32):
    axes = ((x.ndim - 1,), (int(transpose),)), ((), ())
    return jax.lax.dot_general(x, w, axes, preferred_element_type=dtype)


def _reference(x, w, a, b, choice):
    low = _dot(x, a).astype(x.dtype)
    # devices add up partial products in the dtype of x W: float32 would be twice as much to send
    whole = _dot(x, w, choice.transpose, x.dtype if choice.divided else jnp.float32)
    return (whole + _dot(low, b)).astype(x.dtype), low


def _tpu_kernel(x, w, a, b, y, low, *, transpose):
    first = pl.program_id(1) == 0  # outside the loop: the interpreter does not know it inside

    def some(start, size):
        rows = pl.ds(start, size)

        @pl.when(first)
        def _():
            low[rows, :] = _dot(x[rows, :], a[...]).astype(low.dtype)

        y[rows, :] = (_dot(x[rows, :], w[...], transpose) + _dot(low[rows, :], b[...])).astype(
            y.dtype
        )

    whole, rest = divmod(
        x.shape[0], _CHUNK
    )  # a loop: Mosaic unrolls a product, and compiles a large one for minutes

    if whole:

        @pl.loop(0, whole)
        def _(step):
            some(pl.multiple_of(step * _CHUNK, _CHUNK), _CHUNK)

    if rest:
        some(whole * _CHUNK, rest)


def fast_bytes(
    shape: tuple[int, int, int, int], itemsize: int, platform: str, i: int, j: int
) -> int:
    """Fast memory of a tile `(i, j)` of y for `shape = (N, n, m, r)`.

    TPU: a tile contracts all of n; W, B, y and low lie twice in VMEM, for the pipeline, x, A and
    two float32 sums once, and a slice of W once more, which the backward pass turns there.
    GPU: the slices of x, W and A of three stages lie in shared memory, and those of the last
    product.
    """
    _, n, _, r = shape
    if platform == "gpu":
        return itemsize * (_STAGES * _GPU_DEPTH * (i + j + power(r)) + power(r) * (i + j))
    wide = lambda size: -(-size // 128) * 128  # noqa: E731  # lanes of VMEM, which a narrow array fills in part
    once = i * wide(n) + wide(n) * wide(r) + wide(n) * wide(j)
    twice = wide(n) * wide(j) + 16 * wide(j) * -(-r // 16) + i * wide(j) + i * wide(r)
    return itemsize * (once + 2 * twice) + 8 * min(i, _CHUNK) * wide(j)


def tiles(
    shape: tuple[int, int, int, int], itemsize: int, platform: str, chip: str | None
) -> tuple[int, int]:
    """Rows and columns of a tile of y: as many rows as fit, since W is read once for each tile of
    rows.

    >>> (
    ...     tiles((4096, 4096, 11008, 16), 2, "tpu", "v5e"),
    ...     tiles((4096, 4096, 11008, 16), 2, "gpu", "h100"),
    ... )
    ((4096, 512), (128, 128))
    """
    rows, n, m, r = shape
    what = f"thin_linear of x ({rows}, {n}), w ({n}, {m}), rank {r}"
    costs = functools.partial(fast_bytes, shape, itemsize, platform)
    if platform == "gpu":
        fit = lambda sizes, size: tuple(s for s in sizes if s < 2 * size) or sizes[:1]  # noqa: E731
        choices = fit(_GPU_ROWS, rows), fit(_GPU_COLS, m)
    else:  # a tile is a multiple of Mosaic's, or all of an axis

        def fit(sizes, size):
            return tuple(s for s in sizes if s < size) + ((size,) if size <= sizes[-1] else ())

        choices = fit(_TPU_ROWS, rows), fit(_TPU_COLS, m)
    return _platform.largest(_platform.budget(platform, chip), costs, *choices, what)


def power(size: int) -> int:
    """The least power of two from 16 on that holds `size`: what Triton multiplies."""
    return max(16, 1 << math.ceil(math.log2(size)))


def _tpu(x, w, a, b, *, choice):
    (rows, n), r, m = x.shape, a.shape[1], b.shape[1]
    if choice.implementation is None and (n % 128 or m % 128):
        raise _platform.Misfit(f"thin_linear: XLA would copy w ({n}, {m}) to the kernel's layout")
    if choice.implementation is None and choice.over is not None:
        if choice.over.gathers:
            raise _platform.Misfit(
                "thin_linear: XLA gathers w as it multiplies, and a kernel waits for all of it"
            )
        if 2 * rows * (n + m) * x.dtype.itemsize <= _platform.vmem(choice.chip):
            raise _platform.Misfit(
                f"thin_linear: XLA keeps {rows} rows of x, y and their cotangents in VMEM"
            )
    i, j = tiles((rows, n, m, r), x.dtype.itemsize, "tpu", choice.chip)
    return pl.pallas_call(
        functools.partial(_tpu_kernel, transpose=choice.transpose),
        grid=(pl.cdiv(rows, i), pl.cdiv(m, j)),
        in_specs=[
            pl.BlockSpec(
                (i, n), lambda p, q: (p, 0), pipeline_mode=pl.Buffered(1)
            ),  # one wait for each tile of rows
            pl.BlockSpec(
                *(
                    ((j, n), lambda p, q: (q, 0))
                    if choice.transpose
                    else ((n, j), lambda p, q: (0, q))
                )
            ),
            pl.BlockSpec((n, r), lambda p, q: (0, 0), pipeline_mode=pl.Buffered(1)),
            pl.BlockSpec((r, j), lambda p, q: (0, q)),
        ],
        out_specs=[
            pl.BlockSpec((i, j), lambda p, q: (p, q)),
            pl.BlockSpec((i, r), lambda p, q: (p, 0)),
        ],
        out_shape=[_platform.output((rows, m), x), _platform.output((rows, r), x)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=_platform.budget("tpu", choice.chip) * 7 // 6,
        ),
        interpret=choice.interpret,
        name="thin_linear",
    )(x, w, a, b)


def _gpu_kernel(x, w, a, b, y, low, *, transpose, sizes, tile):
    (rows, n, m, r), (i, j) = sizes, tile
    depth, wide = _GPU_DEPTH, power(sizes[3])
    p, q = pl.program_id(0) * i + jnp.arange(i), pl.program_id(1) * j + jnp.arange(j)
    s = jnp.arange(wide)

    def load(ref, first, last, limits):
        inside = (first < limits[0])[:, None] & (last < limits[1])[None, :]
        return plgpu.load(ref.at[first[:, None], last[None, :]], mask=inside, other=0)

    def body(step, sums):
        k = step * depth + jnp.arange(depth)
        left = load(x, p, k, (rows, n))
        right = load(w, q, k, (m, n)).T if transpose else load(w, k, q, (n, m))
        return sums[0] + plgpu.dot(left, right), sums[1] + plgpu.dot(left, load(a, k, s, (n, r)))

    start = jnp.zeros((i, j), jnp.float32), jnp.zeros((i, wide), jnp.float32)
    total, thin = jax.lax.fori_loop(0, pl.cdiv(n, depth), body, start)
    thin = thin.astype(x.dtype)
    total += plgpu.dot(thin, load(b, s, q, (r, m)))
    inside = (p < rows)[:, None]
    plgpu.store(y.at[p[:, None], q[None, :]], total.astype(y.dtype), mask=inside & (q < m)[None, :])
    first = (s < r)[None, :] & (pl.program_id(1) == 0)  # one tile of each row writes low
    plgpu.store(low.at[p[:, None], s[None, :]], thin, mask=inside & first)


def _gpu(x, w, a, b, *, choice):
    (rows, n), r, m = x.shape, a.shape[1], b.shape[1]
    if r > _LARGEST_GPU_RANK:
        raise _platform.Misfit(
            f"thin_linear: rank {r} exceeds {_LARGEST_GPU_RANK}, which the registers of a GPU's "
            "block hold beside a tile; take implementation='reference'"
        )
    sizes = rows, n, m, r
    tile = tiles(sizes, x.dtype.itemsize, "gpu", choice.chip)
    return pl.pallas_call(
        functools.partial(_gpu_kernel, transpose=choice.transpose, sizes=sizes, tile=tile),
        grid=(pl.cdiv(rows, tile[0]), pl.cdiv(m, tile[1])),
        out_shape=[_platform.output((rows, m), x), _platform.output((rows, r), x)],
        compiler_params=plgpu.CompilerParams(
            num_warps=8 if tile[0] * tile[1] >= 128 * 128 else 4, num_stages=_STAGES
        ),
        interpret=choice.interpret,
        name="thin_linear",
    )(x, w, a, b)
