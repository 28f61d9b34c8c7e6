"""What data parallelism and FSDP reduce: bytes by tensor in the compiled step.

AdamW's against projected backprop's.

    python -m experiments.benchmarks.data_parallel --preset 60M --output experiments/results/data_parallel.json

The batch is split over eight (fake) devices. Parameters and state are replicated, or lie as FSDP
keeps them (rows "FSDP"), where kernels are gathered besides, by either optimizer alike. The numbers
are read from the compiled program: every reduction with its shapes, times the trips of the loops
that it stands in. Nothing is run. The basis is a random orthonormal one that moves after the
update, so that every step takes low-rank gradients; at a refresh by exact SVD a step reduces what
AdamW's does.
"""

import os
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

import lowrank_jax as lrx
from experiments.benchmarks import commandline, training_step, workload
from experiments.harness import collectives, outputs
from experiments.models import axes, llama
from lowrank_jax.sharding import meshes

DEVICES = 8


def compiled(preset: str, rank: int, length: int, axis: str = "data") -> Any:
    """The step on eight devices along one axis of the mesh: AdamW's for rank 0."""
    config = llama.preset(preset, sequence_length=length)
    model = llama.Llama(config)
    sizes: dict[str, Any] = {axis: DEVICES}
    mesh = meshes.make_mesh(**sizes)

    def loss(params, tokens):
        with meshes.use(mesh):
            logits = model.apply({"params": params}, tokens)
        return llama.loss_and_metrics(logits, tokens, jnp.ones(tokens.shape))[0]

    tx: Any = optax.adamw(1e-3)
    step = training_step.optax_step(tx, loss)
    if rank:
        schedule = lrx.refresh_schedules.every(period=workload.PERIOD, when="after")
        projector = lrx.projectors.random(rank=rank, kind="orthonormal")
        tx = lrx.galore(1e-2, projector=projector, refresh_schedule=schedule, views=workload.VIEWS)
        step = lrx.train_step(loss, tx)
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    placed = meshes.shardings(params, axes.LLAMA, mesh)
    kinds = lrx.state_shardings(tx, params, placed)
    place = lambda x, kind: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=kind)  # noqa: E731
    state = jax.tree.map(place, jax.eval_shape(tx.init, params), kinds)
    rows = jax.NamedSharding(mesh, meshes.spec(("batch",), mesh))
    tokens = jax.ShapeDtypeStruct((DEVICES, length), jnp.int32, sharding=rows)
    jitted = jax.jit(step, donate_argnums=(0, 1), out_shardings=(placed, kinds, None))
    return jitted.lower(jax.tree.map(place, params, placed), state, tokens).compile()


def measure(preset: str, length: int = 64, parts: Sequence[int] = (4, 8, 16)) -> dict[str, Any]:
    """Rows of a case and an axis of the mesh, with the bytes of each reduced tensor.

    `{"case", "axis", "rank", "tensors": [{"shape", "times", "bytes"}], "block_bytes", "bytes",
    ...}`.

    Ranks are the width over `parts`. `tensors` and bytes are of reductions in float32,
    "gathered_bytes" of all that is gathered.
    """
    config, rows = llama.preset(preset), []
    for axis in ("data", "fsdp"):
        for rank in (0, *(config.width // part for part in parts)):
            found = collectives.read(compiled(preset, rank, length, axis).as_text())
            reduced = [
                one
                for one in found
                if one.kind in ("all-reduce", "reduce-scatter") and one.dtype == "f32"
            ]
            tensors: list[dict[str, Any]] = [
                {"shape": list(one.shape), "times": one.times, "bytes": one.bytes}
                for one in sorted(reduced, key=lambda one: -one.bytes)
            ]
            blocks = [
                row["bytes"]
                for row in tensors
                if row["times"] >= config.layers and len(row["shape"]) > 1
            ]
            name = f"galore, rank {rank}" if rank else "optax.adamw"
            rows.append(
                {
                    "case": name if axis == "data" else f"FSDP: {name}",
                    "axis": axis,
                    "rank": rank,
                    "tensors": tensors,
                    "block_bytes": sum(blocks),
                    "bytes": sum(row["bytes"] for row in tensors),
                    "gathered_bytes": collectives.by_kind(found).get("all-gather", 0),
                }
            )
    return {"preset": preset, "devices": DEVICES, "rows": rows}


@commandline.command
def main(arguments: Sequence[str]) -> None:
    """Compiles on eight fake devices, prints the table and writes the JSON."""
    parser = commandline.parser(__doc__, "experiments/results/data_parallel.json")
    parser.add_argument("--preset", type=commandline.preset, default="60M")
    options, words = parser.parse_args(arguments), [*arguments]
    flag = f"--xla_force_host_platform_device_count={DEVICES}"
    if jax.device_count() < DEVICES and flag not in os.environ.get("XLA_FLAGS", ""):
        environment = {
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flag}",
            "JAX_PLATFORMS": "cpu",
        }
        command = [sys.executable, "-m", "experiments.benchmarks.data_parallel", *words]
        os.execve(sys.executable, command, os.environ | environment)
    result: dict[str, Any] = {
        "command": f"python -m experiments.benchmarks.data_parallel {' '.join(words)}".strip()
    }
    result |= measure(options.preset)
    for row in result["rows"]:
        total, blocks = (row[name] / 2**20 for name in ("bytes", "block_bytes"))
        gathered = (
            f", gathered {row['gathered_bytes'] / 2**20:.2f}" if row["gathered_bytes"] else ""
        )
        print(f"{row['case']:<24}{total:>10.2f} MiB, kernels of the blocks {blocks:.2f}{gathered}")
    outputs.write_result(options.output, result, replace=options.replace)


if __name__ == "__main__":
    sys.exit(main())
