"""Norms of the rows of a DCT in one pass over x: `|(Qᵀ x)_i|`, which rank the basis vectors of
DCT-AdamW.

    x (..., d, k)   ->   scores (..., d), float32

XLA multiplies by Q, which it makes inside the product, and sums there as well: x is read once and
nothing else is moved, but at `2 d² k` operations in six passes of bfloat16, by far the most of a
refresh on a TPU. The FFT that saves them has shuffles for which XLA writes arrays of the size of x.
Here a tile of columns stays in VMEM and two thin stages of products take `4 (a + b) d k`
operations, d = a b. With j = b j₁ + j₂ and i = 2a q ± p,

    cos(π i (2j+1) / 2d) = cos(π p j₁ / a) cos β ∓ sin(π p j₁ / a) sin β        β = π i (2 j₂ + 1) / 2d

since i j₁ counts modulo 2a: first all j₁ of a residue ("waves", 2a x a), then all j₂ of a p
("turns", b x 2b for each of a slots; slot 0 has p = 0 and p = a, which have no sine). Kind 2 runs
so, kind 3 is the transpose. No reordering of x, no twiddle pass. Products are those of float32
(`Precision.HIGHEST`), as in `lrx.linalg.dct`.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lowrank_jax import linalg, sharding
from lowrank_jax.kernels import _divided, _platform

# at 1024 the compilers' schedules of both forms take about as long (v6e, whose products are wider)
_SMALLEST = 2048
_UNROLL = (
    4  # slots that the compiler overlaps: a quarter to two fifths fewer cycles than one by one
)
_LANES = (
    128  # columns of a tile: Mosaic reads rows at a stride only where the last axis has as many
)


def dct_scores(
    x: jax.Array,
    kind: int,
    norm: str = "l1",
    axis: int = -2,
    *,
    implementation: str | None = None,
    chip: str | None = None,
    interpret: bool = False,
) -> jax.Array:
    """`lrx.linalg.row_scores(lrx.linalg.dct(x, kind), norm)` with the transform nowhere in device
    memory.

    Args:
      x: `(..., d, k)`, float32 or bfloat16, counted in float32; `(..., k, d)` with axis=-1.
        Inside `lrx.meshes.use` of several devices each takes the norms of its own share of k, where
        that is a multiple of 128, and they are added up.
      kind: 2 or 3, as in `lrx.linalg.dct`. norm: "l1" or "l2". axis: of the transform, -2 or -1.
      implementation: "tpu" (Mosaic), "reference" (jnp), or None for that of the device which the
        program is compiled for: the reference on CPUs, on GPUs, whose FFT takes fewer operations,
        where d is no multiple of 128, and below d = 2048, where the fewer operations come in
        products too thin to gain.
      chip: key of `CHIPS`, whose VMEM bounds d; None for the smallest TPU.
      interpret: run the kernel as jnp operations, on any device.

    Returns:
      `(..., d)` float32.

    Raises:
      ValueError: for another dtype, kind, norm or axis, fewer than two axes; where "tpu" was named
        for a d that is no multiple of 128, or that does not fit VMEM; for "gpu", which has no
        program.

    >>> import jax.numpy as jnp
    >>> dct_scores(jnp.ones((4, 3)), kind=2).round(5).tolist()
    [6.0, 0.0, 0.0, 0.0]
    """
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"dct_scores: x of dtype {x.dtype} must be float32 or bfloat16; cast it")
    if x.ndim < 2 or axis not in (-2, -1):
        raise ValueError(
            f"dct_scores: x {x.shape} must have two axes or more, and axis={axis} must be -2 or -1"
        )
    for name, value, choices in (("kind", kind, (2, 3)), ("norm", norm, ("l1", "l2"))):
        if value not in choices:
            raise ValueError(f"dct_scores: {name}={value!r} must be one of {choices}")
    batch, d = x.shape[:-2], x.shape[axis]
    reference = functools.partial(_reference, kind=kind, norm=norm, axis=axis)
    if x.size == 0:
        return reference(x)
    scores: Any = _platform.dispatch(
        implementation,
        interpret,
        x.reshape(-1, *x.shape[-2:]),
        division=_division(x, norm, axis, implementation is not None),
        reference=reference,
        tpu=functools.partial(
            _tpu,
            kind=kind,
            norm=norm,
            swapped=axis == -1,
            named=implementation is not None,
            chip=chip,
            interpret=interpret,
        ),
        gpu=_gpu,
    )
    return scores.reshape(*batch, d)


def _division(x, norm, axis, named) -> _divided.Division | None:
    """Each device has a share of k, as `sharding.rows_whole` lays it out, and its part of every
    score."""
    mesh = _divided.mesh()
    if mesh is None or x.shape[-3 - axis] % (mesh.size if named else mesh.size * _LANES):
        return None  # a device's share that is no multiple of 128 would be copied for the kernel
    over = sharding.all_axes(mesh)
    own = _divided.matrix((), (), over) if axis == -2 else _divided.matrix((), over, ())

    def added(program, name):
        del name

        def run(x):
            scores = program(x)
            return (
                jax.lax.psum(scores, over)
                if norm == "l1"
                else jnp.sqrt(jax.lax.psum(scores * scores, over))
            )

        return run

    return _divided.Division(mesh, (own,), _divided.matrix(), added)


def _reference(x, *, kind, norm, axis):
    x = x.astype(jnp.float32)
    return linalg.row_scores(linalg.dct(x if axis == -2 else jnp.swapaxes(x, -2, -1), kind), norm)


def _gpu(x):
    raise _platform.Misfit(
        "dct_scores: there is no program for GPUs, whose FFT wins; take implementation='reference'"
    )


def split(d: int) -> tuple[int, int]:
    """`(a, b)` with d = a b of fewest operations, which go with a + b.

    Raises:
      Misfit: where there is none with 8 | a and 16 | b, the rows of a register.

    >>> split(4096), split(2048), split(5120)
    ((64, 64), (32, 64), (64, 80))
    """
    found = [(d // b, b) for b in range(16, d + 1, 16) if d % b == 0 and d // b % 8 == 0]
    if not found:
        raise _platform.Misfit(
            f"dct_scores: d={d} is no multiple of 128; take implementation='reference'"
        )
    return min(found, key=lambda pair: (sum(pair), pair))


def operations(d: int, k: int) -> int:
    """Of the products for one `(d, k)`, each counted once: XLA's form takes `2 d² k`."""
    return 4 * sum(split(d)) * d * k


def _cos(turns: jax.Array, d: int) -> jax.Array:
    """cos(π turns / 2d) for uint32, reduced exactly before the one sine."""
    quarter = jnp.abs((turns % jnp.uint32(4 * d)).astype(jnp.int32) - 2 * d) - d
    return jnp.sin(quarter.astype(jnp.float32) * (math.pi / (2 * d)))


def frequencies(a: int, b: int) -> np.ndarray:
    """i of row (p, l) of the turns, `(a, b)`: the first half of l counts 2a q + p, the second 2a q
    + 2a - p."""
    p, q = np.arange(a)[:, None], 2 * a * np.arange(b // 2)[None, :]
    return np.concatenate([q + p, q + np.where(p == 0, a, 2 * a - p)], axis=1)


def factors(a: int, b: int) -> tuple[jax.Array, jax.Array]:
    """`(turns (a, b, 2b), waves (2a, a))`, float32: what the two stages of kind 2 multiply by."""
    d, half = a * b, jnp.arange(b) < b // 2
    i = jnp.asarray(frequencies(a, b), jnp.uint32)[:, :, None]
    phase = i * (2 * jnp.arange(b, dtype=jnp.uint32) + 1)
    scale = jnp.where(i == 0, math.sqrt(1 / d), math.sqrt(2 / d)).astype(jnp.float32)
    cos, sin = scale * _cos(phase, d), scale * _cos(phase + jnp.uint32(3 * d), d)
    sign, first = jnp.where(half, -1.0, 1.0)[None, :, None], (jnp.arange(a) == 0)[:, None, None]
    rows = half[None, :, None]  # slot 0: p = 0 reads the first part alone, p = a the second
    left = jnp.where(first & ~rows, 0, cos)
    right = jnp.where(first, jnp.where(rows, 0, cos), sign * sin)
    p, j = jnp.arange(a, dtype=jnp.uint32)[:, None], 2 * jnp.arange(a, dtype=jnp.uint32)[None, :]
    alternating = jnp.where(jnp.arange(a) % 2 == 0, 1.0, -1.0)[None, :]
    waves = jnp.stack(
        [_cos(p * j, a), jnp.where(p == 0, alternating, _cos(p * j + 3 * a, a))], axis=1
    )
    return jnp.concatenate([left, right], axis=-1), waves.reshape(2 * a, a)


def _dot(left, right):
    return jnp.dot(
        left, right, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )


def _add(out, start, size, values, limit, norm):
    """Adds the norms of `values`, over its columns before `limit`, lane by lane."""
    inside = jax.lax.broadcasted_iota(jnp.int32, values.shape, 1) < limit
    out[pl.ds(pl.multiple_of(start, 8), size), :] += jnp.where(
        inside, jnp.abs(values) if norm == "l1" else values * values, 0
    )


def _kernel(x, turns, waves, out, low, *own, sizes, kind, norm, swapped):
    (d, k), (a, b) = sizes, split(sizes[0])
    limit = k - pl.program_id(1) * _LANES

    @pl.when(pl.program_id(1) == 0)
    def _():
        out[...] = jnp.zeros_like(out)

    if own:  # x as float32, d along the rows: only rows of 32 bits are read at a stride
        (whole,) = own

        @pl.loop(0, d // _LANES)
        def _(step):
            rows = pl.ds(pl.multiple_of(step * _LANES, _LANES), _LANES)
            whole[rows, :] = (
                x[:, rows].astype(jnp.float32).T if swapped else x[rows, :].astype(jnp.float32)
            )

        x = whole

    def slot(p):
        return pl.ds(pl.multiple_of(p * 2 * b, 16), 2 * b)

    if kind == 2:

        @pl.loop(0, b, unroll=_UNROLL)
        def _(j):
            low[pl.ds(j, 2 * a, b), :] = _dot(waves[...], x[pl.ds(j, a, b), :])

        @pl.loop(0, a, unroll=_UNROLL)
        def _(p):
            _add(out, p * b, b, _dot(turns[p], low[slot(p), :]), limit, norm)

    else:

        @pl.loop(0, a, unroll=_UNROLL)
        def _(p):
            mirror = jnp.where(p == 0, a, 2 * a - p)
            halves = [x[pl.ds(start, b // 2, 2 * a), :] for start in (p, mirror)]
            low[slot(p), :] = _dot(turns[p], jnp.concatenate(halves, axis=0))

        @pl.loop(0, b, unroll=_UNROLL)
        def _(j):
            _add(out, j * a, a, _dot(waves[...], low[pl.ds(j, 2 * a, b), :]), limit, norm)


def fast_bytes(d: int, itemsize: int, swapped: bool) -> int:
    """VMEM of a tile: x and the sums twice, for the pipeline, both stages' factors and the first
    one's result once."""
    a, b = split(d)
    wide = lambda size: -(-size // _LANES) * _LANES  # noqa: E731  # a narrow array fills its lanes in part
    factor_bytes = 4 * max(
        a * b * wide(2 * b) + 2 * a * wide(a), a * 2 * b * wide(b) + a * wide(2 * a)
    )
    own = 4 * d * _LANES if swapped or itemsize < 4 else 0
    return 2 * d * _LANES * (itemsize + 4) + 8 * d * _LANES + own + factor_bytes


def _tpu(x, *, kind, norm, swapped, named, chip, interpret):
    (count, *sizes), itemsize = x.shape, x.dtype.itemsize
    d, k = sizes[::-1] if swapped else sizes
    if not named and d < _SMALLEST:
        raise _platform.Misfit(f"dct_scores: below d={_SMALLEST} XLA's product takes as long")
    if (
        not swapped and k % _LANES
    ):  # XLA lays such an array out with d last, and would copy it for the kernel
        x, swapped = jnp.swapaxes(x, 1, 2), True
    a, b = split(d)
    costs = lambda *_: fast_bytes(d, itemsize, swapped)  # noqa: E731
    _platform.largest(
        _platform.budget("tpu", chip), costs, (d,), (_LANES,), f"dct_scores of x ({d}, {k})"
    )
    turns, waves = factors(a, b)
    if kind == 3:
        turns, waves = jnp.swapaxes(turns, 1, 2), waves.T
    once = pl.Buffered(1)
    block, index = (
        ((None, _LANES, d), lambda n, c: (n, c, 0))
        if swapped
        else ((None, d, _LANES), lambda n, c: (n, 0, c))
    )
    scratch = [pltpu.VMEM((2 * d, _LANES), jnp.float32)]
    if swapped or itemsize < 4:
        scratch.append(pltpu.VMEM((d, _LANES), jnp.float32))
    sums = pl.pallas_call(
        functools.partial(_kernel, sizes=(d, k), kind=kind, norm=norm, swapped=swapped),
        grid=(count, pl.cdiv(k, _LANES)),
        in_specs=[
            pl.BlockSpec(block, index),
            pl.BlockSpec(turns.shape, lambda n, c: (0, 0, 0), pipeline_mode=once),
            pl.BlockSpec(waves.shape, lambda n, c: (0, 0), pipeline_mode=once),
        ],
        out_specs=pl.BlockSpec((None, d, _LANES), lambda n, c: (n, 0, 0)),
        out_shape=jax.ShapeDtypeStruct(
            (count, d, _LANES), jnp.float32, manual_axis_type=jax.typeof(x).manual_axis_type
        ),
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=_platform.budget("tpu", chip) * 7 // 6,
        ),
        interpret=interpret,
        name="dct_scores",
    )(x, turns, waves)
    scores = jnp.sum(sums, axis=-1)
    scores = scores if norm == "l1" else jnp.sqrt(scores)
    if kind == 3:  # rows came as (j₂, j₁)
        return jnp.swapaxes(scores.reshape(count, b, a), 1, 2).reshape(count, d)
    return scores[:, np.argsort(frequencies(a, b).ravel())]
