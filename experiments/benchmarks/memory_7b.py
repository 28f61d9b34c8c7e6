"""What a whole 7B training step takes, by compilers alone: on one card, on a TPU slice.

    python -m experiments.benchmarks.memory_7b --part card     needs jax-cuda13-plugin and -pjrt of jax's version
    python -m experiments.benchmarks.memory_7b --part slice    needs libtpu: `.venv-tpu/bin/python`

Each part replaces its rows in `experiments/results/memory_7b.json`. Nothing is run: lowering and
memory are proven, not speed and not numbers.

card: one RTX 4090, sequence 2048, batch 1. The layer-wise step of GaLore with projected backprop,
8-bit moments (block-wise, dynamic code), an int8 basis, weights in bfloat16 or in int8 blocks with
stochastic rounding, attention in chunks, embedding and head updated in blocks. "none": the basis
stands, a step between two refreshes. Every other row's program holds a refresh too, as a branch, so
that its peak is that of a step with a refresh:

    random        an orthonormal basis drawn anew (QR of a Gaussian)
    alternating   qr(G Q) by a second tap, without the full gradient; see
                  `benchmarks.refresh_subspaces`
    power         one power step on the full gradient of one layer at a time

slice: v5e:4x4, 16 chips, one sequence of 2048 on each; parameters, moments and bases in float32,
products in bfloat16, each layer rematerialised, rank a quarter of the width. Every matrix is split
over the chips along its larger dimension, which projection keeps, and moments with it
(`lrx.state_shardings`); layers are gathered as they are used. Bases are whole on every chip, as
that function says, or "split" along the dimension that they shrink, by shardings given to
`jax.jit`. Bytes are those of one chip; rows with a refresh are the layer-wise step, which makes one
layer's basis at a time.
"""

import dataclasses
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax
from jax.experimental import topologies
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as Spec

import lowrank_jax as lrx
from experiments.benchmarks import commandline, tpu_programs, training_step, workload
from experiments.harness import outputs
from experiments.models import llama
from experiments.planning.targets import RTX_4090
from lowrank_jax.interop import documents
from lowrank_jax.projection.projectors.random import Random
from lowrank_jax.projection.state import matrix_states
from lowrank_jax.typing import DTypeLike, Pytree

SLICE, CHIPS = "v5e:4x4", 16
ATTENTION_CHUNK, PLAIN_BLOCK = 256, 2**22

# Weights, rank, refresh, and the peak in GiB that a rough prototype took or that was aimed at.
CARD = (
    ("bfloat16", 1024, "none", 21.15),
    ("bfloat16", 256, "none", 16.16),
    ("int8", 1024, "none", None),
    ("int8", 256, "none", 12.0),
    *(
        (weights, 256, refresh, None)
        for weights in ("bfloat16", "int8")
        for refresh in ("random", "alternating", "power")
    ),
)
# Optimizer, form of the step, refresh, and whether bases are split.
PODS = (
    ("adamw", "train_step", "none", False),
    ("galore", "train_step", "none", False),
    ("galore", "train_step", "none", True),
    ("galore", "layerwise_step", "none", True),
    ("galore", "layerwise_step", "random", True),
    ("galore", "layerwise_step", "alternating", True),
)


def stack(config: llama.LlamaConfig) -> lrx.projection.Stack:
    """`experiments.models.llama.Llama` in three parts."""
    block, norm = llama.Block(config), llama.RMSNorm(config)
    dtype = llama.DTYPES[config.dtype]

    def after(rest, x, tokens):
        x = norm.apply({"params": rest["norm"]}, x)
        kernel = rest["lm_head"]["kernel"].astype(dtype)
        logits = jnp.einsum("bsd,dv->bsv", x, kernel, preferred_element_type=jnp.float32)
        return llama.loss_and_metrics(logits, tokens, jnp.ones(tokens.shape))[0]

    return lrx.projection.Stack(
        before=lambda rest, tokens: rest["embed"]["embedding"][tokens].astype(dtype),
        layer=lrx.tapped(lambda layer, x: block.apply({"params": layer}, x)[0]),
        after=after,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Standing(Random):
    """A stored orthonormal basis between two refreshes."""

    moves: ClassVar[bool] = False


def optimizer(refresh: str, rank: int, *, dtype: DTypeLike, **options: Any) -> Any:
    """GaLore whose basis moves as the row says, every 200 steps."""
    projectors = {
        "none": Standing(rank=rank, kind="orthonormal", dtype=dtype),
        "random": lrx.projectors.random(rank=rank, kind="orthonormal", dtype=dtype),
        "alternating": lrx.projectors.alternating(rank=rank, dtype=dtype),
        "power": lrx.projectors.power(rank=rank, dtype=dtype),
    }
    schedule = lrx.refresh_schedules.every(
        period=workload.PERIOD, when="before" if refresh == "power" else "after"
    )
    return lrx.galore(
        1e-2,
        projector=projectors[refresh],
        refresh_schedule=schedule,
        views=workload.VIEWS,
        **options,
    )


def abstract_parameters(config: llama.LlamaConfig) -> Any:
    """Shapes of the model's parameters."""
    return jax.eval_shape(
        llama.Llama(config).init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32)
    )["params"]


def step_of(
    config: llama.LlamaConfig, rank: int, refresh: str, *, int8: bool
) -> tuple[Any, Any, Any]:
    """The card's `(step, abstract parameters, abstract state)`."""
    params = abstract_parameters(config)
    inner = lrx.inner.stored8(inner=lrx.inner.adam(eps=1e-6, convention="hf"))
    tx = optimizer(refresh, rank, dtype=jnp.int8, inner=inner)
    if int8:
        paths = {view.path for view in lrx.explain(tx, params).projected}

        def small(x):
            return jax.eval_shape(lambda: lrx.linalg.quantize_blocks(jnp.zeros(x.shape), "linear"))

        params = jax.tree_util.tree_map_with_path(
            lambda keys, x: small(x) if "/".join(key.key for key in keys) in paths else x, params
        )
    form = lrx.fused(tx, rounding="stochastic", plain_block=PLAIN_BLOCK)
    return lrx.layerwise_step(stack(config), form), params, jax.eval_shape(form.init, params)


def nbytes(tree: Pytree) -> int:
    """Bytes of a tree of abstract arrays; of sharded ones, on one device."""
    sizes = [
        math.prod(x.shape if x.sharding is None else x.sharding.shard_shape(x.shape))
        * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    ]
    return sum(sizes)


def parts(params: Pytree, state: Pytree) -> dict[str, int]:
    """What a step takes as arguments."""
    if not hasattr(state, "projection"):
        return {
            "parameter_bytes": nbytes(params),
            "plain_bytes": nbytes(state),
            "basis_bytes": 0,
            "moment_bytes": 0,
        }
    matrices = matrix_states(state.projection)
    return {
        "parameter_bytes": nbytes(params),
        "plain_bytes": nbytes(state.projection.plain),
        "basis_bytes": nbytes([matrix.basis for matrix in matrices]),
        "moment_bytes": nbytes([matrix.inner for matrix in matrices]),
    }


def compiled(
    step: Callable[..., Any], params: Pytree, state: Pytree, tokens: Any, kept: int, **jit: Any
) -> dict[str, int]:
    """Bytes of the compiled step; of its temporaries `kept` are the inputs of the layers."""
    begin = time.perf_counter()
    jitted = jax.jit(step, donate_argnums=(0, 1), **jit)
    program = lrx.memory.measure(jitted.lower(params, state, tokens).compile())
    return parts(params, state) | {
        "argument_bytes": program.arguments,
        "input_bytes": kept,
        "temporary_bytes": program.temporaries,
        "peak_bytes": program.peak,
        "compile_seconds": round(time.perf_counter() - begin),
    }


def card(preset: str, length: int) -> Iterator[dict[str, Any]]:
    """The rows of one RTX 4090."""
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="x", target_config=RTX_4090, topology="1x1x1"
    )
    device = SingleDeviceSharding(topology.devices[0])
    config = llama.preset(
        preset,
        sequence_length=length,
        dtype="bfloat16",
        param_dtype="bfloat16",
        attention_chunk=ATTENTION_CHUNK,
    )
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
    for weights, rank, refresh, bound in CARD:
        step, *arguments = step_of(config, rank, refresh, int8=weights == "int8")
        place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device)  # noqa: E731
        params, state, batch = jax.tree.map(place, (*arguments, tokens))
        row = compiled(step, params, state, batch, 2 * config.layers * length * config.width)
        met = None if bound is None else row["peak_bytes"] < bound * 2**30
        yield (
            {"weights": weights, "rank": rank, "refresh": refresh}
            | row
            | {"bound_gib": bound, "met": met}
        )


def pod_shardings(mesh: Any, tx: Any, params: Pytree, *, split: bool) -> tuple[Any, Any]:
    """NamedShardings of parameters and state: matrices along their larger dimension.

    Of equal ones the last.
    """
    axis = mesh.axis_names[0]

    def of_parameter(keys, x):
        if keys[-1].key not in ("kernel", "embedding"):
            return NamedSharding(mesh, Spec())
        rows, cols = x.shape[-2:]
        return NamedSharding(
            mesh, Spec(*[None] * (x.ndim - 2), *((None, axis) if cols >= rows else (axis, None)))
        )

    placed = jax.tree_util.tree_map_with_path(of_parameter, params)
    state = lrx.state_shardings(tx, params, placed)
    if split:
        is_matrix = lambda node: isinstance(node, lrx.projection.MatrixState)  # noqa: E731
        by_rows = NamedSharding(mesh, Spec(None, axis, None))

        def divided(node):
            return dataclasses.replace(node, basis=jax.tree.map(lambda _: by_rows, node.basis))

        state = jax.tree.map(
            lambda node: divided(node) if is_matrix(node) else node, state, is_leaf=is_matrix
        )
    return placed, state


def pod(preset: str, length: int) -> Iterator[dict[str, Any]]:
    """The rows of the TPU slice; rank is a quarter of the width."""
    topology = topologies.get_topology_desc(platform="tpu", topology_name=SLICE)
    mesh = topologies.make_mesh(topology, (CHIPS,), ("chips",))
    config = llama.preset(
        preset,
        sequence_length=length,
        dtype="bfloat16",
        remat=True,
        attention_chunk=ATTENTION_CHUNK,
    )
    model = llama.Llama(config)

    def loss(params, tokens):
        return llama.loss_and_metrics(
            model.apply({"params": params}, tokens), tokens, jnp.ones(tokens.shape)
        )[0]

    rows, params, rank = (
        NamedSharding(mesh, Spec("chips")),
        abstract_parameters(config),
        workload.rank(preset),
    )
    tokens = jax.ShapeDtypeStruct((CHIPS, length), jnp.int32, sharding=rows)
    for name, form, refresh, split in PODS:
        adamw = name == "adamw"
        tx: Any = optax.adamw(1e-3) if adamw else optimizer(refresh, rank, dtype=jnp.float32)
        step = training_step.optax_step(tx, loss) if adamw else lrx.train_step(loss, tx)
        step = lrx.layerwise_step(stack(config), tx) if form == "layerwise_step" else step
        placed, state_placed = pod_shardings(mesh, tx, params, split=split)
        place = lambda x, kind: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=kind)  # noqa: E731
        state = jax.tree.map(place, jax.eval_shape(tx.init, params), state_placed)
        results = (placed, state_placed, NamedSharding(mesh, Spec()))
        kept = 2 * config.layers * length * config.width
        row = compiled(
            step, jax.tree.map(place, params, placed), state, tokens, kept, out_shardings=results
        )
        yield {
            "optimizer": name,
            "form": form,
            "rank": 0 if adamw else rank,
            "refresh": refresh,
            "split": split,
        } | row


PARTS: dict[str, Callable[[str, int], Iterator[dict[str, Any]]]] = {"card": card, "slice": pod}


@commandline.command
def main(arguments: Sequence[str]) -> None:
    """Compiles the rows of one part, prints them and puts them into the JSON."""
    parser = commandline.parser(__doc__, "experiments/results/memory_7b.json")
    parser.add_argument("--part", choices=tuple(PARTS), required=True)
    parser.add_argument("--preset", type=commandline.preset, default="7B")
    parser.add_argument("--length", type=commandline.count, default=2048)
    options, words = parser.parse_args(arguments), [*arguments]
    needed = tpu_programs.ENVIRONMENT if options.part == "slice" else {"JAX_PLATFORMS": "cpu"}
    if any(os.environ.get(name) != value for name, value in needed.items()):
        command = [sys.executable, "-m", "experiments.benchmarks.memory_7b", *words]
        os.execve(sys.executable, command, os.environ | needed)
    rows = []
    for row in PARTS[options.part](options.preset, options.length):
        rows.append(row)
        print(
            {name: f"{v / 2**30:.2f}" if name.endswith("bytes") else v for name, v in row.items()},
            flush=True,
        )
    of = {"device": "RTX 4090", "slice": SLICE, "preset": options.preset, "length": options.length}
    there = documents.read(options.output, dict) if options.output.exists() else {}
    other_part = there if all(there.get(key) == value for key, value in of.items()) else {}
    result = other_part | {"command": "python -m experiments.benchmarks.memory_7b"} | of
    result[f"{options.part}_rows"] = rows
    outputs.write_result(options.output, result, replace=options.replace)


if __name__ == "__main__":
    sys.exit(main())
