"""What data parallelism reduces: bytes by tensor in the compiled training step, AdamW's against projected backprop's.

    python -m experiments.benchmarks.data_parallel --preset 60M --output experiments/results/data_parallel.json

Parameters and state are replicated over eight (fake) devices, the batch is split. The numbers are read from the
compiled program: every all-reduce with its shapes, times the trips of the loops that it stands in. Nothing is run. The
basis is a random orthonormal one that moves after the update, so that every step takes low-rank gradients; at a refresh
by exact SVD a step reduces what AdamW's does.
"""

import argparse
import collections
import json
import math
import os
import re
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as Spec

import lowrank_jax as lr
from experiments.benchmarks import training_step, workload
from experiments.models import llama

DEVICES = 8


def reductions(text: str) -> dict[tuple[int, ...], int]:
    """`{shape: how often it is all-reduced in a step}` of float32 tensors, from a compiled program's text.

    >>> text = '''%body.1 (x: f32[]) -> f32[] {
    ...   %r = (f32[2,3]{1,0}, f32[]) all-reduce(%a, %b), channel_id=1
    ... }
    ... ENTRY %main (x: f32[]) -> f32[] {
    ...   %w = f32[] while(%x), condition=%c, body=%body.1, backend_config={"known_trip_count":{"n":"4"}}
    ...   %s = f32[5]{0} all-reduce(%d), channel_id=2
    ... }'''
    >>> reductions(text)
    {(2, 3): 4, (): 4, (5,): 1}
    """
    inside: dict[str, list[str]] = {}
    name = ""
    for line in text.splitlines():
        opened = re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        name = opened.group(1) if opened else name
        inside.setdefault(name, []).append(line)
    trips: dict[str, tuple[str, int]] = {}
    for name, lines in inside.items():
        for line in lines:
            loop = re.search(r"while\(.*body=%?([\w.\-]+)", line)
            if loop:
                count = re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', line)
                trips[loop.group(1)] = (name, int(count.group(1)) if count else 1)
    found: collections.Counter[tuple[int, ...]] = collections.Counter()
    for name, lines in inside.items():
        times, where = 1, name
        while where in trips:
            where, count_of = trips[where]
            times *= count_of
        for line in lines:
            result = re.search(r"= (.*?) all-reduce(?:-start)?\(", line)
            for shape in re.findall(r"f32\[([\d,]*)\]", result.group(1)) if result else ():
                found[tuple(int(n) for n in shape.split(",") if n)] += times
    return dict(found)


def compiled(preset: str, rank: int, length: int) -> Any:
    """The step on eight devices: AdamW's for rank 0."""
    config = llama.preset(preset, sequence_length=length)
    model = llama.Llama(config)
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    whole, rows = NamedSharding(mesh, Spec()), NamedSharding(mesh, Spec("data"))

    def loss(params, tokens):
        return llama.loss_and_metrics(model.apply({"params": params}, tokens), tokens, jnp.ones(tokens.shape))[0]

    tx: Any = optax.adamw(1e-3)
    step = training_step.optax_step(tx, loss)
    if rank:
        clock = lr.clocks.every(period=workload.PERIOD, when="after")
        projector = lr.projectors.random(rank=rank, kind="orthonormal")
        tx = lr.galore(1e-2, projector=projector, clock=clock, views=workload.VIEWS)
        step = lr.train_step(lr.linen.tapped(loss), tx)
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    place = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), tree)  # noqa: E731
    tokens = jax.ShapeDtypeStruct((DEVICES, length), jnp.int32, sharding=rows)
    state = jax.eval_shape(tx.init, params)
    return jax.jit(step, donate_argnums=(0, 1)).lower(place(params), place(state), tokens).compile()


def measure(preset: str, length: int = 64) -> dict[str, Any]:
    """Rows of `{"case", "rank", "tensors": [{"shape", "times", "bytes"}], "block_bytes", "bytes"}`."""
    config, rows = llama.preset(preset), []
    for rank in (0, *(config.width // part for part in (4, 8, 16))):
        found = reductions(compiled(preset, rank, length).as_text())
        tensors: list[dict[str, Any]] = [
            {"shape": list(shape), "times": times, "bytes": 4 * times * math.prod(shape)}
            for shape, times in sorted(found.items(), key=lambda item: -item[1] * math.prod(item[0]))
        ]
        blocks = [row["bytes"] for row in tensors if row["times"] >= config.layers and len(row["shape"]) > 1]
        rows.append({"case": f"galore, rank {rank}" if rank else "optax.adamw", "rank": rank, "tensors": tensors,
                     "block_bytes": sum(blocks), "bytes": sum(row["bytes"] for row in tensors)})  # fmt: skip
    return {"preset": preset, "devices": DEVICES, "rows": rows}


def main(arguments: list[str] | None = None) -> None:
    """Compiles on eight fake devices, prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="60M")
    parser.add_argument("--output", type=Path, default=Path("experiments/results/data_parallel.json"))
    words = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(words)
    flag = f"--xla_force_host_platform_device_count={DEVICES}"
    if jax.device_count() < DEVICES and flag not in os.environ.get("XLA_FLAGS", ""):
        environment = {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flag}", "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-m", "experiments.benchmarks.data_parallel", *words]
        os.execve(sys.executable, command, os.environ | environment)
    result: dict[str, Any] = {"command": f"python -m experiments.benchmarks.data_parallel {' '.join(words)}".strip()}
    result |= measure(options.preset)
    for row in result["rows"]:
        total, blocks = (row[name] / 2**20 for name in ("bytes", "block_bytes"))
        print(f"{row['case']:<24}{total:>10.2f} MiB, kernels of the blocks {blocks:.2f}")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
