"""Adam inside a subspace and its step on the weight, without the step in memory: W is read once and
written in place.

    low (r, k)   mu, nu (r, k)   P (s, r)   W (s, k), or (k, s) where the columns are shrunk; each of them stacked

    m = b1 mu + (1 - b1) f low     v = b2 nu + (1 - b2) (f low)²     d = m / (sqrt(v) + eps)
    W <- W - rate P d - decay W

On TPUs one program makes a tile of moments, keeps its d in VMEM, and writes the same columns of W:
XLA reads both new moments again for P d, and of 8-bit moments writes float32 ones beside them. On
GPUs, where XLA writes P d in float32 and reads it again, two programs serve: moments, whose d takes
the place of `low`, then the product, which ends on W. Moments are float32, bfloat16 or
`linalg.QuantizedBlocks` in the dynamic codes (`lrx.inner.stored8`); arithmetic is float32, products
have the platform's default precision.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lowrank_jax import linalg, sharding
from lowrank_jax.kernels import _bits, _divided, _low_rank_adam_gpu, _platform
from lowrank_jax.kernels import _low_rank_adam_parts as parts
from lowrank_jax.linalg import dynamic_code

_MOMENT_CHUNK = 32  # a tile of 8-bit entries in VMEM has 32 rows


def low_rank_adam(
    w: jax.Array,
    basis: jax.Array,
    low: jax.Array,
    mu: Any,
    nu: Any,
    *,
    b1: Any,
    b2: Any,
    eps: Any,
    rate: Any,
    decay: Any = 0.0,
    factor: Any = 1.0,
    accepted: Any = True,
    keys: jax.Array | None = None,
    side: str = "rows",
    implementation: str | None = None,
    spec: tuple[Any, Any, Any] | None = None,
    chip: str | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, Any, Any]:
    """`(w, mu, nu)` after one step; donate all three, and not `low`, whose shape is that of the
    moments.

    Args:
      w: `(L, s, k)`, or `(L, k, s)` with side="cols"; float32 or bfloat16.
      basis: `(L, s, r)`, float32 or bfloat16.
      low: `(L, r, k)` float32, the projected gradient.
      mu, nu: `(L, r, k)`, float32, bfloat16, or `linalg.QuantizedBlocks` of one block size,
        "signed" and "unsigned".
      b1, b2: decay rates.
      eps, rate: numbers or `(L,)`; bias corrections belong into them.
      decay: the share of w that a step takes away. factor: of clipping, on low.
      accepted: boolean scalar; where False nothing changes, whatever low holds.
      keys: `(L,)` random keys: a bfloat16 w is rounded stochastically, by the bits that
        `linalg.stochastic_round` draws for w[l] (threefry keys; of others the first two words
        serve). None rounds to nearest.
      side: which dimension of w is shrunk, "rows" or "cols".
      implementation: "tpu" (Mosaic), "gpu" (Triton), "reference" (jnp, a matrix after the other),
        or None for that of the device which the program is compiled for: the reference on CPUs,
        where a kernel does not fit, and on TPUs where a dimension of w is no multiple of 128, since
        XLA would copy w for the kernel.
      spec: partition entries, on the mesh of `lrx.meshes.use`, of L, of the k of w, low, mu and nu,
        and of the s of the basis alone. Each device then writes its own block, and bases are
        gathered one after the other. The reference runs there without it, and on TPUs where the
        float32 step of a block fits a quarter of VMEM and moments are arrays: XLA moves no more.
      chip: key of `CHIPS`, whose fast memory sizes the tiles; None for the smallest of the
        platform.
      interpret: run the named kernel as jnp operations, on any device.

    Raises:
      ValueError: for shapes that do not fit each other, another dtype or side; for a spec that
        leaves a rest or cuts a block of moments; where a kernel was named, for blocks of moments
        that it cannot tile, and where no tile fits the chip's fast memory.

    >>> import jax.numpy as jnp
    >>> w, basis, low, zeros = (
    ...     jnp.ones((1, 3, 2)),
    ...     jnp.ones((1, 3, 1)),
    ...     jnp.ones((1, 1, 2)),
    ...     jnp.zeros((1, 1, 2)),
    ... )
    >>> w, mu, nu = low_rank_adam(w, basis, low, zeros, zeros, b1=0.5, b2=0.75, eps=0.0, rate=0.1)
    >>> print(w[0, 0], mu[0, 0], nu[0, 0])  # the direction is 0.5 / sqrt(0.25)
    [0.9 0.9] [0.5 0.5] [0.25 0.25]
    """
    coded = isinstance(mu, linalg.QuantizedBlocks)
    _check(w, basis, low, mu, nu, keys, side)
    values = {
        "b1": b1,
        "rest1": 1 - b1,
        "b2": b2,
        "rest2": 1 - b2,
        "eps": eps,
        "rate": rate,
        "decay": decay,
        "factor": factor,
        "accepted": accepted,
    }
    count = w.shape[0]
    numbers = jnp.stack(
        [jnp.broadcast_to(jnp.asarray(values[n], jnp.float32), count) for n in parts.FIELDS], axis=1
    )
    words, stochastic = (
        jnp.zeros((count, 2), jnp.uint32),
        keys is not None and w.dtype == jnp.bfloat16,
    )
    if keys is not None and stochastic:
        words = jax.random.key_data(keys)[..., :2]
    first, across = jnp.zeros((count, 1), jnp.uint32), jnp.full((count, 1), w.shape[-1], jnp.uint32)
    words = jnp.concatenate(
        [words, first, across], axis=1
    )  # of w[l]: a key, the flat index of its first entry, a row
    block = mu.block if coded else 0
    choice = parts.Choice(side, coded, block, stochastic, implementation, chip, interpret)
    operands = (numbers, words, w, basis, low, mu, nu)
    programs = {"reference": parts.reference, "tpu": _tpu, "gpu": _low_rank_adam_gpu.gpu}
    bound: dict[str, Any] = {
        name: functools.partial(program, choice=choice) for name, program in programs.items()
    }
    division = None
    if spec is not None and _divided.mesh() is not None:
        division = _division(_divided.mesh(), spec, choice, (count, basis.shape[1], low.shape[2]))
    return _platform.dispatch(implementation, interpret, *operands, division=division, **bound)


def _division(mesh, spec, choice, shape) -> _divided.Division:
    block, side = choice.block, choice.side
    (count, s, k), (layers, kept, rows) = shape, (sharding.dividing(entry, mesh) for entry in spec)
    few, many = sharding.parts(layers, mesh), sharding.parts(kept, mesh)
    if (
        count % few
        or k % many
        or s % sharding.parts(rows, mesh)
        or (block and kept and k // many % block)
    ):
        raise ValueError(
            f"low_rank_adam: spec={spec} on the mesh {dict(mesh.shape)} must divide {count} "
            f"matrices, k = {k} and s = "
            f"{s} without a rest" + f", and cut no block of {block}" * bool(block)
        )
    low = _divided.matrix(layers, (), kept)
    w = low if side == "rows" else _divided.matrix(layers, kept, ())
    own = _divided.matrix(layers)
    around = functools.partial(_on_own_block, kept=kept, count=many, rows=rows, choice=choice)
    operands = own, own, w, _divided.matrix(layers, rows), low, low, low
    return _divided.Division(mesh, operands, (w, low, low), around, falls_back=True)


def _on_own_block(program, name, *, kept, count, rows, choice):
    """`program` on a device's columns of matrices, whose bases are gathered over `rows` one after
    the other.

    Its words draw for the entries of the block what they draw for them in all of w. At the default
    precision a TPU multiplies by a basis in bfloat16, and so it is sent.
    """
    precision = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    side, exact = choice.side, choice.interpret or precision not in (None, "default")

    def run(numbers, words, w, basis, low, mu, nu):
        small = 4 * w.shape[1] * w.shape[2] <= _platform.vmem(choice.chip) // 4
        if name == "tpu" and choice.implementation is None and small and not choice.coded:
            raise _platform.Misfit(
                f"low_rank_adam: XLA keeps the step of a block {w.shape[1:]} in VMEM"
            )
        if kept:
            step, across = low.shape[-1], count * w.shape[-1]
            step, across = (step, across) if side == "rows" else (step * w.shape[-1], w.shape[-1])
            first = jax.lax.axis_index(kept).astype(jnp.uint32) * jnp.uint32(step)
            words = words.at[:, 2].set(first).at[:, 3].set(jnp.uint32(across))
        if not rows:
            return program(numbers, words, w, basis, low, mu, nu)

        def one(layer, carry):
            w, mu, nu = carry
            *own, part = (
                jax.lax.dynamic_slice_in_dim(x, layer, 1) for x in (numbers, words, basis)
            )
            part = part if exact or name != "tpu" else part.astype(jnp.bfloat16)
            whole = jax.lax.all_gather(part, rows, axis=1, tiled=True)
            return program(*own, w, whole, low, mu, nu, first=layer)

        return jax.lax.fori_loop(0, w.shape[0], one, (w, mu, nu))

    return run


def _check(w, basis, low, mu, nu, keys, side) -> None:
    if side not in ("rows", "cols"):
        raise ValueError(f"low_rank_adam: side={side!r} must be 'rows' or 'cols'")
    leaves = {"w": w, "basis": basis, "low": low, "mu": mu, "nu": nu}
    for name, leaf in leaves.items():
        kinds = ("float32",) if name == "low" else ("float32", "bfloat16")
        if leaf.dtype not in kinds:
            raise ValueError(
                f"low_rank_adam: {name} of dtype {leaf.dtype} must be {' or '.join(kinds)}; cast it"
            )
    shapes = {name: tuple(leaf.shape) for name, leaf in leaves.items()}
    count, s, r = shapes["basis"] if basis.ndim == 3 else (-1, -1, -1)
    k = low.shape[-1]
    whole = (count, s, k) if side == "rows" else (count, k, s)
    if shapes["w"] != whole or any(shapes[name] != (count, r, k) for name in ("low", "mu", "nu")):
        raise ValueError(
            f"low_rank_adam: shapes {shapes} must be w "
            f"{'(L, s, k)' if side == 'rows' else '(L, k, s)'}, basis (L, s, r), and low, mu, nu "
            "(L, r, k)"
        )
    stored = [
        (x.code, x.block) if isinstance(x, linalg.QuantizedBlocks) else None for x in (mu, nu)
    ]
    block = getattr(mu, "block", None)
    if stored not in ([None, None], [("signed", block), ("unsigned", block)]):
        raise ValueError(
            f"low_rank_adam: mu and nu are stored as {stored[0]} and {stored[1]}; give both as "
            "arrays, or both in blocks of one size, mu signed and nu unsigned"
        )
    if keys is not None and keys.shape != (count,):
        raise ValueError(
            f"low_rank_adam: keys of shape {keys.shape} must be ({count},), one for each matrix"
        )


def _chunks(size: int, chunk: int, some: Callable[[Any, int], None]) -> None:
    """`some(start, length)` over an axis; a loop, since Mosaic unrolls what stands inside."""
    whole, rest = divmod(size, chunk)
    if whole:

        @pl.loop(0, whole)
        def _(step):
            some(pl.multiple_of(step * chunk, chunk), chunk)

    if rest:
        some(whole * chunk, rest)


def _tpu_kernel(first, numbers, words, basis, w, low, *refs, choice, k):
    del first  # of the blocks' places alone
    leaves = 4 if choice.coded else 2
    before, w_out, after = refs[:leaves], refs[leaves], refs[leaves + 1 : 2 * leaves + 1]
    d, *turned = refs[2 * leaves + 1 :]
    layer, tile = pl.program_id(0), pl.program_id(1)
    n = {name: numbers[layer, i] for i, name in enumerate(parts.FIELDS)}
    (r, cols), s = low.shape, basis.shape[0]

    def plain(start, size):
        rows = pl.ds(start, size)
        mu, nu = (x[rows, :].astype(jnp.float32) for x in before)
        m, v, new = parts.moved(low[rows, :], mu, nu, n)
        for out, value in zip((*after, d), (m, v, new), strict=True):
            out[rows, :] = value.astype(out.dtype)

    def coded(start, size):
        rows, width = pl.ds(start, size), min(choice.block, cols)
        for part in range(cols // width):
            lanes, number = pl.ds(part * width, width), tile * (cols // width) + part
            here = jax.lax.broadcasted_iota(jnp.int32, (size, before[1].shape[1]), 1) == number
            valid = jax.lax.broadcasted_iota(jnp.int32, (size, width), 1) + number * width < k
            codes = [x[rows, lanes].astype(jnp.int32) for x in before[::2]]
            scales = [
                jnp.sum(jnp.where(here, x[rows, :], 0.0), axis=1, keepdims=True)
                for x in before[1::2]
            ]
            mu, nu = (dynamic_code.decode(codes[i], i == 0) * scales[i] for i in range(2))
            *new, direction = parts.moved(low[rows, lanes], mu, nu, n)
            for i, code in enumerate(("signed", "unsigned")):
                kept, scale = parts.recoded(
                    codes[i], scales[i], new[i], code, n["accepted"] > 0, valid
                )
                after[2 * i][rows, lanes] = kept
                after[2 * i + 1][rows, :] = jnp.where(here, scale, after[2 * i + 1][rows, :])
            d[rows, lanes] = direction.astype(d.dtype)

    _chunks(r, _MOMENT_CHUNK, coded if choice.coded else plain)
    if choice.side == "cols":
        turned[0][...] = d[...].T

    def write(start, size):
        p = basis[pl.ds(start, size), :]
        place: Any
        if choice.side == "rows":
            place, step = (pl.ds(start, size), slice(None)), _dot(p, d[...])
            first, last = start, tile * cols
        else:
            place, step = (slice(None), pl.ds(start, size)), _dot(turned[0][...], p, transpose=True)
            first, last = tile * cols, start
        noise = None
        if choice.stochastic:
            rows, lanes = (jax.lax.broadcasted_iota(jnp.int32, step.shape, axis) for axis in (0, 1))
            index = _bits.place(
                words, layer, (rows + first).astype(jnp.uint32), (lanes + last).astype(jnp.uint32)
            )
            noise = _bits.random_bits((words[layer, 0], words[layer, 1]), index)
        w_out[place] = parts.written(w[place], step, n, noise)

    _chunks(s, parts.CHUNK, write)


def _dot(x, y, transpose=False):
    return jax.lax.dot_general(
        x, y, (((1,), (int(transpose),)), ((), ())), preferred_element_type=jnp.float32
    )


def _tpu(numbers, words, w, basis, low, mu, nu, first=0, *, choice):
    """The matrices of `basis`, which has numbers and words too, are those of the other stacks from
    `first` on."""
    (count, s, r), k = basis.shape, low.shape[2]
    if choice.implementation is None and (s % 128 or k % 128):
        raise _platform.Misfit(f"low_rank_adam: XLA would copy w {w.shape} to the kernel's layout")
    moments, treedef = jax.tree.flatten((mu, nu))
    sizes = (
        w.dtype.itemsize,
        basis.dtype.itemsize,
        max(x.dtype.itemsize for x in moments[:: 1 + choice.coded]),
    )
    _, cols = parts.tiles((s, r, k), sizes, choice.block if choice.coded else 0, "tpu", choice.chip)
    column = pl.BlockSpec((None, r, cols), lambda layer, tile, first: (first[0] + layer, 0, tile))
    if choice.side == "rows":
        weight = pl.BlockSpec(
            (None, s, cols), lambda layer, tile, first: (first[0] + layer, 0, tile)
        )
    else:
        weight = pl.BlockSpec(
            (None, cols, s), lambda layer, tile, first: (first[0] + layer, tile, 0)
        )

    def whole(x):
        return pl.BlockSpec(
            (None, *x.shape[1:]), lambda layer, tile, first: (first[0] + layer, 0, 0)
        )

    specs = [whole(x) if choice.coded and i % 2 else column for i, x in enumerate(moments)]
    scalars = pl.BlockSpec(memory_space=pltpu.SMEM)
    resident = pl.BlockSpec(
        (None, s, r), lambda layer, tile, first: (layer, 0, 0), pipeline_mode=pl.Buffered(1)
    )
    shapes = [_platform.output(x.shape, x) for x in (w, *moments)]
    w, *moments = pl.pallas_call(
        functools.partial(_tpu_kernel, choice=choice, k=k),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(count, pl.cdiv(k, cols)),
            in_specs=[scalars, scalars, resident, weight, column, *specs],
            out_specs=[weight, *specs],
            scratch_shapes=[pltpu.VMEM((r, cols), basis.dtype)]
            + [pltpu.VMEM((cols, r), basis.dtype)] * (choice.side == "cols"),
        ),
        out_shape=shapes,
        input_output_aliases={4: 0} | {6 + i: 1 + i for i in range(len(moments))},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=(
                "arbitrary",
                "arbitrary" if choice.coded else "parallel",
            ),  # scales are filled in turn
            vmem_limit_bytes=_platform.budget("tpu", choice.chip) * 7 // 6,
        ),
        interpret=choice.interpret,
        name="low_rank_adam",
    )(jnp.asarray(first, jnp.int32).reshape(1), numbers, words, basis, w, low, *moments)
    return w, *jax.tree.unflatten(treedef, moments)
