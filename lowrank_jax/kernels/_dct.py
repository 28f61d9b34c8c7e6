"""Norms of the rows of a DCT in one pass over x: `|(Qᵀ x)_i|`, which rank DCT-AdamW's vectors.

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

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lowrank_jax import linalg, sharding
from lowrank_jax.kernels import _divided, _platform

# At 1024 the compilers' schedules of both forms take about as long (v6e, whose products are wider).
_SMALLEST = 2048

# Slots that the compiler overlaps: a quarter to two fifths fewer cycles than one by one.
_UNROLL = 4

# Columns of a tile: Mosaic reads rows at a stride only where the last axis has as many.
_LANES = _platform.LANES


def dct_scores(
    x: Array,
    kind: int,
    norm: str = "l1",
    axis: int = -2,
    *,
    implementation: str | None = None,
    chip: str | None = None,
    interpret: bool = False,
) -> Array:
    """`lrx.linalg.row_scores(lrx.linalg.dct(x, kind), norm)`, whose transform is not in memory.

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
    _check(x, kind, norm, axis)
    batch, d = x.shape[:-2], x.shape[axis]
    named = implementation is not None
    reference = functools.partial(_reference, kind=kind, norm=norm, axis=axis)
    if x.size == 0:
        return reference(x)
    tpu = functools.partial(
        _tpu,
        kind=kind,
        norm=norm,
        swapped=axis == -1,
        named=named,
        chip=chip,
        interpret=interpret,
    )
    scores = _platform.dispatch(
        implementation,
        interpret,
        x.reshape(-1, *x.shape[-2:]),
        division=_division(x, norm, axis, named),
        reference=reference,
        tpu=tpu,
        gpu=_gpu,
    )
    return scores.reshape(*batch, d)


def _check(x: Array, kind: int, norm: str, axis: int) -> None:
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"dct_scores: x of dtype {x.dtype} must be float32 or bfloat16; cast it")
    if x.ndim < 2 or axis not in (-2, -1):
        raise ValueError(
            f"dct_scores: x {x.shape} must have two axes or more, and axis={axis} must be -2 or -1"
        )
    for name, value, choices in (("kind", kind, (2, 3)), ("norm", norm, ("l1", "l2"))):
        if value not in choices:
            raise ValueError(f"dct_scores: {name}={value!r} must be one of {choices}")


def _division(x: Array, norm: str, axis: int, named: bool) -> _divided.Division | None:
    """Each device has a share of k, and its part of every score.

    Columns are laid out as `sharding.unshard_rows` does.
    """
    mesh = _divided.mesh()
    if mesh is None:
        return None
    # a share that is no multiple of 128 would be copied for the kernel
    share = mesh.size if named else mesh.size * _LANES
    k = x.shape[-3 - axis]
    if k % share:
        return None
    over = sharding.all_axes(mesh)
    columns = _divided.matrix((), (), over) if axis == -2 else _divided.matrix((), over, ())

    def added(program, name):
        del name

        def run(x):
            # the l2 norm of all columns is that of the devices' norms
            scores = program(x)
            if norm == "l1":
                return jax.lax.psum(scores, over)
            return jnp.sqrt(jax.lax.psum(scores * scores, over))

        return run

    return _divided.Division(mesh, (columns,), _divided.matrix(), added)


def _reference(x, *, kind, norm, axis):
    x = x.astype(jnp.float32)
    x = x if axis == -2 else jnp.swapaxes(x, -2, -1)
    return linalg.row_scores(linalg.dct(x, kind), norm)


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
    sizes = [b for b in range(16, d + 1, 16) if d % b == 0]
    found = [(d // b, b) for b in sizes if d // b % 8 == 0]
    if not found:
        raise _platform.Misfit(
            f"dct_scores: d={d} is no multiple of 128; take implementation='reference'"
        )
    return min(found, key=lambda pair: (sum(pair), pair))


def operations(d: int, k: int) -> int:
    """Of the products for one `(d, k)`, each counted once: XLA's form takes `2 d² k`."""
    return 4 * sum(split(d)) * d * k


def _cos(turns: Array, d: int) -> Array:
    """cos(π turns / 2d) for uint32, reduced exactly before the one sine."""
    # cos of a turn of 4d is even and 4d-periodic: |t - 2d| - d lies within a quarter of sin
    turn = (turns % jnp.uint32(4 * d)).astype(jnp.int32)
    quarter = jnp.abs(turn - 2 * d) - d
    return jnp.sin(quarter.astype(jnp.float32) * (math.pi / (2 * d)))


def frequencies(a: int, b: int) -> np.ndarray:
    """i of row (p, l) of the turns, `(a, b)`.

    The first half of l counts 2a q + p, the second 2a q + 2a - p.
    """
    p = np.arange(a)[:, None]
    q = 2 * a * np.arange(b // 2)[None, :]
    mirror = np.where(p == 0, a, 2 * a - p)
    return np.concatenate([q + p, q + mirror], axis=1)


def _turns(a: int, b: int) -> Array:
    """`(a, b, 2b)`: in slot p, row l has cosines (b) and sines (b) of all j₂."""
    d = a * b
    j = jnp.arange(b, dtype=jnp.uint32)
    i = jnp.asarray(frequencies(a, b), jnp.uint32)[:, :, None]
    # β = π i (2 j₂ + 1) / 2d; sin t = cos(t + 3π/2), which is 3d in units of π / 2d
    phase = i * (2 * j + 1)
    scale = jnp.where(i == 0, math.sqrt(1 / d), math.sqrt(2 / d)).astype(jnp.float32)
    cos = scale * _cos(phase, d)
    sin = scale * _cos(phase + jnp.uint32(3 * d), d)
    # i = 2a q + p takes - sin, i = 2a q + 2a - p takes + sin
    half = jnp.arange(b) < b // 2
    sign = jnp.where(half, -1.0, 1.0)[None, :, None]
    # slot 0: p = 0 reads the first part alone, p = a the second
    first = (jnp.arange(a) == 0)[:, None, None]
    rows = half[None, :, None]
    left = jnp.where(first & ~rows, 0, cos)
    right = jnp.where(first, jnp.where(rows, 0, cos), sign * sin)
    return jnp.concatenate([left, right], axis=-1)


def _waves(a: int) -> Array:
    """`(2a, a)`: cosine and sine of π p j₁ / a for each p in turn; p = 0 has that of p = a too."""
    p = jnp.arange(a, dtype=jnp.uint32)[:, None]
    j = 2 * jnp.arange(a, dtype=jnp.uint32)[None, :]
    cos = _cos(p * j, a)
    sin = _cos(p * j + 3 * a, a)
    # cos(π j₁) = ± 1 is the cosine of p = a, in the place of a sine of 0
    alternating = jnp.where(jnp.arange(a) % 2 == 0, 1.0, -1.0)[None, :]
    waves = jnp.stack([cos, jnp.where(p == 0, alternating, sin)], axis=1)
    return waves.reshape(2 * a, a)


def factors(a: int, b: int) -> tuple[Array, Array]:
    """`(turns (a, b, 2b), waves (2a, a))`, float32: what the two stages of kind 2 multiply by."""
    return _turns(a, b), _waves(a)


def _dot(left, right):
    return jnp.dot(
        left,
        right,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


def _add(out, start, size, values, limit, norm):
    """Adds the norms of `values`, over its columns before `limit`, lane by lane."""
    inside = jax.lax.broadcasted_iota(jnp.int32, values.shape, 1) < limit
    terms = jnp.abs(values) if norm == "l1" else values * values
    rows = pl.ds(pl.multiple_of(start, 8), size)
    out[rows, :] += jnp.where(inside, terms, 0)


def _as_float32(x, own, d, swapped):
    """Writes x into `own (d, 128)`: only rows of 32 bits are read at a stride."""

    @pl.loop(0, d // _LANES)
    def _(step):
        rows = pl.ds(pl.multiple_of(step * _LANES, _LANES), _LANES)
        if swapped:
            own[rows, :] = x[:, rows].astype(jnp.float32).T
        else:
            own[rows, :] = x[rows, :].astype(jnp.float32)


def _kernel(x, turns, waves, out, low, *own, sizes, kind, norm, swapped):
    """A tile of 128 columns: x (d, 128) -> sums out (d, 128); low (2d, 128) is between stages."""
    d, k = sizes
    a, b = split(d)
    # columns from here on are beyond the matrix
    limit = k - pl.program_id(1) * _LANES

    # sums of a matrix stay while its tiles come one after the other
    @pl.when(pl.program_id(1) == 0)
    def _():
        out[...] = jnp.zeros_like(out)

    if own:
        _as_float32(x, own[0], d, swapped)
        x = own[0]
        x = own[0]

    def slot(p):
        return pl.ds(pl.multiple_of(p * 2 * b, 16), 2 * b)

    if kind == 2:
        # waves over j₁ for each j₂ = j, kept as (p, cos or sin, j₂); then turns over j₂ for each p
        @pl.loop(0, b, unroll=_UNROLL)
        def _(j):
            low[pl.ds(j, 2 * a, b), :] = _dot(waves[...], x[pl.ds(j, a, b), :])

        @pl.loop(0, a, unroll=_UNROLL)
        def _(p):
            start = p * b
            coefficients = _dot(turns[p], low[slot(p), :])
            _add(out, start, b, coefficients, limit, norm)

    else:
        # the transpose: turns from frequencies of residue ± p, then waves
        @pl.loop(0, a, unroll=_UNROLL)
        def _(p):
            mirror = jnp.where(p == 0, a, 2 * a - p)
            halves = [x[pl.ds(start, b // 2, 2 * a), :] for start in (p, mirror)]
            low[slot(p), :] = _dot(turns[p], jnp.concatenate(halves, axis=0))

        @pl.loop(0, b, unroll=_UNROLL)
        def _(j):
            start = j * a
            coefficients = _dot(waves[...], low[pl.ds(j, 2 * a, b), :])
            _add(out, start, a, coefficients, limit, norm)


def fast_bytes(d: int, itemsize: int, swapped: bool) -> int:
    """VMEM of a tile.

    x and the sums twice, for the pipeline, both stages' factors and the first one's result once.
    """
    a, b = split(d)
    wide = _platform.wide
    of_kind_2 = a * b * wide(2 * b) + 2 * a * wide(a)
    of_kind_3 = a * 2 * b * wide(b) + a * wide(2 * a)
    factor_bytes = 4 * max(of_kind_2, of_kind_3)
    own = 4 * d * _LANES if swapped or itemsize < 4 else 0
    x_and_sums = 2 * d * _LANES * (itemsize + 4)
    low = 8 * d * _LANES
    return x_and_sums + low + own + factor_bytes


def _tpu(x, *, kind, norm, swapped, named, chip, interpret):
    count, *sizes = x.shape
    itemsize = x.dtype.itemsize
    d, k = sizes[::-1] if swapped else sizes
    if not named and d < _SMALLEST:
        raise _platform.Misfit(f"dct_scores: below d={_SMALLEST} XLA's product takes as long")
    if not swapped and k % _LANES:
        # XLA lays such an array out with d last, and would copy it for the kernel
        x, swapped = jnp.swapaxes(x, 1, 2), True
    a, b = split(d)
    what = f"dct_scores of x ({d}, {k})"
    costs = lambda *_: fast_bytes(d, itemsize, swapped)  # noqa: E731
    limit = _platform.budget("tpu", chip)
    _platform.largest(limit, costs, (d,), (_LANES,), what)
    # kind 3 goes through the transposes of both stages
    turns, waves = factors(a, b)
    if kind == 3:
        turns, waves = jnp.swapaxes(turns, 1, 2), waves.T
    # grid position (n, c) is the columns c of matrix n; sums of one matrix stay for all c
    once = pl.Buffered(1)
    if swapped:
        x_block = pl.BlockSpec((None, _LANES, d), lambda n, c: (n, c, 0))
    else:
        x_block = pl.BlockSpec((None, d, _LANES), lambda n, c: (n, 0, c))
    turns_block = pl.BlockSpec(turns.shape, lambda n, c: (0, 0, 0), pipeline_mode=once)
    waves_block = pl.BlockSpec(waves.shape, lambda n, c: (0, 0), pipeline_mode=once)
    scratch = [pltpu.VMEM((2 * d, _LANES), jnp.float32)]
    if swapped or itemsize < 4:
        scratch.append(pltpu.VMEM((d, _LANES), jnp.float32))
    varying = jax.typeof(x).manual_axis_type
    shape = count, d, _LANES
    sums = pl.pallas_call(
        functools.partial(_kernel, sizes=(d, k), kind=kind, norm=norm, swapped=swapped),
        grid=(count, pl.cdiv(k, _LANES)),
        in_specs=[x_block, turns_block, waves_block],
        out_specs=pl.BlockSpec((None, d, _LANES), lambda n, c: (n, 0, 0)),
        out_shape=jax.ShapeDtypeStruct(shape, jnp.float32, manual_axis_type=varying),
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=_platform.vmem_limit(chip),
        ),
        interpret=interpret,
        name="dct_scores",
    )(x, turns, waves)
    # the norm of each row of coefficients, over columns and tiles
    scores = jnp.sum(sums, axis=-1)
    scores = scores if norm == "l1" else jnp.sqrt(scores)
    if kind == 3:
        # rows came as (j₂, j₁)
        by_place = scores.reshape(count, b, a)
        return jnp.swapaxes(by_place, 1, 2).reshape(count, d)
    order = np.argsort(frequencies(a, b).ravel())
    return scores[:, order]
