"""Adam inside a subspace and its step on the weight, read once and written in place.

    low (r, k)   mu, nu (r, k)   P (s, r)   W (s, k), or (k, s) where the columns are shrunk; each of them stacked

The step itself is never in memory:

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
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lowrank_jax import sharding
from lowrank_jax.kernels import _divided, _low_rank_adam_gpu, _platform
from lowrank_jax.kernels import _low_rank_adam_parts as parts
from lowrank_jax.linalg import QuantizedBlocks, dynamic_code
from lowrank_jax.typing import Scalar, Spec

# A tile of 8-bit entries in VMEM has 32 rows.
_MOMENT_CHUNK = 32

# A moment as it is stored.
Moment = Array | QuantizedBlocks


def low_rank_adam(
    w: Array,
    basis: Array,
    low: Array,
    mu: Moment,
    nu: Moment,
    *,
    b1: Scalar,
    b2: Scalar,
    eps: Scalar,
    rate: Scalar,
    decay: Scalar = 0.0,
    factor: Scalar = 1.0,
    accepted: Scalar = True,
    keys: Array | None = None,
    side: str = "rows",
    implementation: str | None = None,
    spec: Spec | None = None,
    chip: str | None = None,
    interpret: bool = False,
) -> tuple[Array, Moment, Moment]:
    """`(w, mu, nu)` after one step; donate all three, and not `low`, which is like the moments.

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
    _check(w, basis, low, mu, nu, keys, side)
    stochastic = keys is not None and w.dtype == jnp.bfloat16
    values = {"b1": b1, "b2": b2, "eps": eps, "rate": rate, "decay": decay, "factor": factor}
    numbers = _numbers(w.shape[0], accepted=accepted, **values)
    words = _words(w, keys if stochastic else None)
    coded = isinstance(mu, QuantizedBlocks)
    choice = parts.Choice(
        side=side,
        coded=coded,
        block=getattr(mu, "block", 0) if coded else 0,
        stochastic=stochastic,
        implementation=implementation,
        chip=chip,
        interpret=interpret,
    )
    operands = numbers, words, w, basis, low, mu, nu
    _, s, _ = basis.shape
    shape = w.shape[0], s, low.shape[2]
    division = None if spec is None else _division(spec, choice, shape)
    return _dispatched(choice, division, operands)


def _dispatched(choice: parts.Choice, division: _divided.Division | None, operands: tuple):
    """The step by the program of the platform, or by the one that is named."""
    return _platform.dispatch(
        choice.implementation,
        choice.interpret,
        *operands,
        division=division,
        reference=functools.partial(parts.reference, choice=choice),
        tpu=functools.partial(_tpu, choice=choice),
        gpu=functools.partial(_low_rank_adam_gpu.gpu, choice=choice),
    )


def _numbers(count: int, **values: Scalar) -> Array:
    """`(L, fields)` float32: the numbers of `parts.FIELDS` for each matrix."""
    values |= {"rest1": 1 - values["b1"], "rest2": 1 - values["b2"]}

    columns = [jnp.asarray(values[name], jnp.float32) for name in parts.FIELDS]
    return jnp.stack([jnp.broadcast_to(column, count) for column in columns], axis=1)


def _words(w: Array, keys: Array | None) -> Array:
    """`(L, 4)` uint32: of each matrix a key, the flat index of its first entry, a row's length."""
    count = w.shape[0]
    key_words = jnp.zeros((count, 2), jnp.uint32)
    if keys is not None:
        key_words = jax.random.key_data(keys)[..., :2]
    first = jnp.zeros((count, 1), jnp.uint32)
    length = jnp.full((count, 1), w.shape[-1], jnp.uint32)
    return jnp.concatenate([key_words, first, length], axis=1)


def _division(
    spec: Spec, choice: parts.Choice, shape: tuple[int, int, int]
) -> _divided.Division | None:
    """How operands of `shape = (L, s, k)` are divided: all along L and k, bases along L and s.

    None without a mesh.
    """
    mesh = _divided.mesh()
    if mesh is None:
        return None
    count, s, k = shape
    layers, columns, rows = (sharding.dividing(entry, mesh) for entry in spec)
    n_layers, n_columns, n_rows = (sharding.parts(axes, mesh) for axes in (layers, columns, rows))
    even = count % n_layers == 0 and k % n_columns == 0 and s % n_rows == 0
    cuts_block = bool(choice.block and columns and k // n_columns % choice.block)
    if not even or cuts_block:
        raise ValueError(
            f"low_rank_adam: spec={spec} on the mesh {dict(mesh.shape)} must divide {count} "
            f"matrices, k = {k} and s = {s} without a rest"
            + f", and cut no block of {choice.block}"
            * bool(choice.block)
        )
    per_layer = _divided.matrix(layers)
    basis = _divided.matrix(layers, rows)
    low = _divided.matrix(layers, (), columns)
    w = low if choice.side == "rows" else _divided.matrix(layers, columns, ())
    around = functools.partial(
        _on_own_block,
        columns=columns,
        count=n_columns,
        rows=rows,
        choice=choice,
    )
    operands = (per_layer, per_layer, w, basis, low, low, low)
    return _divided.Division(mesh, operands, (w, low, low), around, falls_back=True)


def _check_gains(w: Array, name: str, choice: parts.Choice) -> None:
    """Where nobody named the kernel, a misfit where XLA's own program moves no more on a TPU."""
    step_bytes = 4 * w.shape[1] * w.shape[2]
    small = step_bytes <= _platform.vmem(choice.chip) // 4
    if name == "tpu" and choice.implementation is None and small and not choice.coded:
        raise _platform.Misfit(
            f"low_rank_adam: XLA keeps the step of a block {w.shape[1:]} in VMEM"
        )


def _own_words(words: Array, w: Array, low: Array, columns, count: int, side: str) -> Array:
    """Words that draw for the entries of a block what they draw for them in all of w."""
    if side == "rows":
        # blocks of columns lie next to each other in a row of `count` blocks
        step, length = low.shape[-1], count * w.shape[-1]
    else:
        # blocks of rows come one after the other
        step, length = low.shape[-1] * w.shape[-1], w.shape[-1]
    number = jax.lax.axis_index(columns).astype(jnp.uint32)
    first = number * jnp.uint32(step)
    return words.at[:, 2].set(first).at[:, 3].set(jnp.uint32(length))


def _on_own_block(program, name, *, columns, count, rows, choice):
    """`program` on a device's columns, with bases gathered over `rows` one after the other.

    At the default precision a TPU multiplies by a basis in bfloat16, and so it is sent.
    """
    precision = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    exact = choice.interpret or precision not in (None, "default")
    sent_rounded = name == "tpu" and not exact

    def run(numbers, words, w, basis, low, mu, nu):
        _check_gains(w, name, choice)
        if columns:
            words = _own_words(words, w, low, columns, count, choice.side)
        if not rows:
            return program(numbers, words, w, basis, low, mu, nu)

        def one(layer, carry):
            w, mu, nu = carry
            each = (numbers, words, basis)
            own = [jax.lax.dynamic_slice_in_dim(x, layer, 1) for x in each]
            own_numbers, own_words, part = own
            part = part.astype(jnp.bfloat16) if sent_rounded else part
            # (1, s / devices, r) -> (1, s, r)
            gathered = jax.lax.all_gather(part, rows, axis=1, tiled=True)
            return program(own_numbers, own_words, w, gathered, low, mu, nu, first=layer)

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
    w_shape, text = (count, s, k), "(L, s, k)"
    if side == "cols":
        w_shape, text = (count, k, s), "(L, k, s)"
    low_shapes = [shapes[name] for name in ("low", "mu", "nu")]
    if shapes["w"] != w_shape or any(shape != (count, r, k) for shape in low_shapes):
        raise ValueError(
            f"low_rank_adam: shapes {shapes} must be w {text}, basis (L, s, r), and low, mu, nu "
            "(L, r, k)"
        )
    _check_storage(mu, nu)
    if keys is not None and keys.shape != (count,):
        raise ValueError(
            f"low_rank_adam: keys of shape {keys.shape} must be ({count},), one for each matrix"
        )


def _check_storage(mu: Moment, nu: Moment) -> None:
    kinds = [(x.code, x.block) if isinstance(x, QuantizedBlocks) else None for x in (mu, nu)]
    block = getattr(mu, "block", None)
    if kinds not in ([None, None], [("signed", block), ("unsigned", block)]):
        raise ValueError(
            f"low_rank_adam: mu and nu are stored as {kinds[0]} and {kinds[1]}; give both as "
            "arrays, or both in blocks of one size, mu signed and nu unsigned"
        )


def _step_arrays(rows, n, low, before, after, d):
    """Moments that are arrays: some rows of a tile, written to `after` and to the direction d."""
    old = [x[rows, :] for x in before]
    mu, nu = (x.astype(jnp.float32) for x in old)
    new = parts.moved(low[rows, :], mu, nu, n)
    for out, value in zip((*after, d), new, strict=True):
        out[rows, :] = value.astype(out.dtype)


def _step_blocks(rows, n, low, before, after, d, *, block, tile, k):
    """Moments in 8-bit codes: some rows of a tile, a block of columns after the other.

    `before` and `after` are `(codes of mu, scales of mu, codes of nu, scales of nu)`; scales lie in
    VMEM for all blocks of a row, of which a mask takes the column of this block.
    """
    size, cols = rows.size, low.shape[1]
    width = min(block, cols)
    blocks = cols // width
    of_blocks = before[1].shape[1]
    for part in range(blocks):
        number = tile * blocks + part
        lanes = pl.ds(part * width, width)
        # the column of this block among the scales, and its entries that are there
        here = jax.lax.broadcasted_iota(jnp.int32, (size, of_blocks), 1) == number
        column = jax.lax.broadcasted_iota(jnp.int32, (size, width), 1)
        valid = column + number * width < k

        codes = [x[rows, lanes].astype(jnp.int32) for x in before[::2]]

        def own_scale(x, here=here):
            return jnp.sum(jnp.where(here, x[rows, :], 0.0), axis=1, keepdims=True)

        scales = [own_scale(x) for x in before[1::2]]
        mu, nu = (dynamic_code.decode(codes[i], i == 0) * scales[i] for i in range(2))
        *new, direction = parts.moved(low[rows, lanes], mu, nu, n)

        # back into codes, the old ones where the step is not accepted
        for i, code in enumerate(("signed", "unsigned")):
            accepted = n["accepted"] > 0
            old = codes[i], scales[i]
            stored, scale = parts.recoded(*old, new[i], code, accepted, valid)
            all_codes, all_scales = after[2 * i : 2 * i + 2]
            all_codes[rows, lanes] = stored
            all_scales[rows, :] = jnp.where(here, scale, all_scales[rows, :])
        d[rows, lanes] = direction.astype(d.dtype)


def _tpu_kernel(first, numbers, words, basis, w, low, *refs, choice, k):
    """One tile of columns: basis (s, r), w (s, cols) or (cols, s), low and moments (r, cols)."""
    del first  # read where blocks are found
    leaves = 4 if choice.coded else 2
    before, w_out = refs[:leaves], refs[leaves]
    after = refs[leaves + 1 : 2 * leaves + 1]
    d, *turned = refs[2 * leaves + 1 :]
    layer, tile = pl.program_id(0), pl.program_id(1)
    n = {name: numbers[layer, i] for i, name in enumerate(parts.FIELDS)}
    r, cols = low.shape
    s = basis.shape[0]

    def moments(start, size):
        rows = pl.ds(start, size)
        if choice.coded:
            _step_blocks(rows, n, low, before, after, d, block=choice.block, tile=tile, k=k)
        else:
            _step_arrays(rows, n, low, before, after, d)

    _platform.in_chunks(r, _MOMENT_CHUNK, moments)
    if choice.side == "cols":
        turned[0][...] = d[...].T

    def write(start, size):
        p = basis[pl.ds(start, size), :]
        # rows of P d, or columns of dᵀ Pᵀ; `top, left` is where they begin in the matrix
        place: tuple[Any, Any]
        if choice.side == "rows":
            place = (pl.ds(start, size), slice(None))
            step = _dot(p, d[...])
            top, left = start, tile * cols
        else:
            place = (slice(None), pl.ds(start, size))
            step = _dot(turned[0][...], p, transpose=True)
            top, left = tile * cols, start
        noise = None
        if choice.stochastic:
            # the entry's place in the matrix says which bits are its own
            shape = step.shape
            row, col = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
            row, col = (row + top).astype(jnp.uint32), (col + left).astype(jnp.uint32)
            noise = parts.drawn(words, layer, row, col)
        new = parts.written(w[place], step, n, noise)
        w_out[place] = new

    _platform.in_chunks(s, parts.CHUNK, write)


def _dot(x, y, transpose=False):
    contracted = (1,), (int(transpose),)
    batch = (), ()
    return jax.lax.dot_general(x, y, (contracted, batch), preferred_element_type=jnp.float32)


def _columns(rows: int, cols: int) -> pl.BlockSpec:
    """The block `(rows, cols)` of a tile of columns, of stacks that begin at `first`."""
    return pl.BlockSpec((None, rows, cols), lambda layer, tile, first: (first[0] + layer, 0, tile))


def _blocks(w: Array, cols: int, moments: list[Array], choice: parts.Choice):
    """`(w, moments)`: the blocks of one tile of `cols` columns in the stacks from `first` on."""
    if choice.side == "rows":
        w_block = _columns(w.shape[1], cols)
    else:
        w_block = pl.BlockSpec(
            (None, cols, w.shape[2]),
            lambda layer, tile, first: (first[0] + layer, tile, 0),
        )

    def block(i: int, x: Array) -> pl.BlockSpec:
        if not (choice.coded and i % 2):
            return _columns(x.shape[1], cols)
        # scales of a matrix stay in VMEM for all tiles
        return pl.BlockSpec(
            (None, *x.shape[1:]),
            lambda layer, tile, first: (first[0] + layer, 0, 0),
        )

    return w_block, [block(i, x) for i, x in enumerate(moments)]


def _tpu(numbers, words, w, basis, low, mu, nu, first=0, *, choice):
    """Moments and weights of a tile of columns in one program.

    The matrices of `basis`, which has numbers and words too, are those of the other stacks from
    `first` on.
    """
    (count, s, r), k = basis.shape, low.shape[2]
    if choice.implementation is None and (s % _platform.LANES or k % _platform.LANES):
        raise _platform.Misfit(f"low_rank_adam: XLA would copy w {w.shape} to the kernel's layout")
    moments, treedef = jax.tree.flatten((mu, nu))
    # of codes and scales, the codes
    stored = moments[:: 1 + choice.coded]
    of_moment = max(x.dtype.itemsize for x in stored)
    sizes = (w.dtype.itemsize, basis.dtype.itemsize, of_moment)
    _, cols = parts.tiles((s, r, k), sizes, choice.block, "tpu", choice.chip)
    scalars = pl.BlockSpec(memory_space=pltpu.SMEM)
    basis_block = pl.BlockSpec(
        (None, s, r),
        lambda layer, tile, first: (layer, 0, 0),
        pipeline_mode=pl.Buffered(1),
    )
    w_block, moment_blocks = _blocks(w, cols, moments, choice)
    # the direction, and its transpose for the product dᵀ Pᵀ
    scratch = [pltpu.VMEM((r, cols), basis.dtype)]
    if choice.side == "cols":
        scratch.append(pltpu.VMEM((cols, r), basis.dtype))
    # operands after `first`: numbers, words, basis, w, low, moments
    aliases = {4: 0} | {6 + i: 1 + i for i in range(len(moments))}
    # scales are filled in turn, tile after tile
    order: Any = "arbitrary" if choice.coded else "parallel"
    w, *moments = pl.pallas_call(
        functools.partial(_tpu_kernel, choice=choice, k=k),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(count, pl.cdiv(k, cols)),
            in_specs=[scalars, scalars, basis_block, w_block, _columns(r, cols), *moment_blocks],
            out_specs=[w_block, *moment_blocks],
            scratch_shapes=scratch,
        ),
        out_shape=[_platform.output(x.shape, x) for x in (w, *moments)],
        input_output_aliases=aliases,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary", order),
            vmem_limit_bytes=_platform.vmem_limit(choice.chip),
        ),
        interpret=choice.interpret,
        name="low_rank_adam",
    )(jnp.asarray(first, jnp.int32).reshape(1), numbers, words, basis, w, low, *moments)
    return w, *jax.tree.unflatten(treedef, moments)
