"""What a refresh of the bases sends under FSDP, by three ways to lay out its matrices.

    python -m experiments.benchmarks.collectives --preset 60M --output experiments/results/collectives.json

The gradients of the blocks' kernels, `(L, m, n)` each, are divided along "embed" over eight (fake)
devices: of half of them the shrunk dimension s, of the others the kept one k. A refresh works on

    as they lie  the compiler adds up `Gᵀ P (k, r)` or `G (Gᵀ P) (s, r)`, and for a DCT along a
                 divided s whole matrices
    rows whole   an all-to-all of what a device has gives every device all of s and a part of k;
                 transforms and Gram matrices of rows are then its own, `G (Gᵀ P) (s, r)` is added
                 up (`sharding.unshard_rows`)
    by layers    an all-to-all gives every device L / 8 whole layers; bases are sent back to all

The bases are whole on every device before and after. Bytes are what one device receives; with N
devices and results of b bytes that is (N - 1) / N b for an all-gather and an all-to-all, twice that
for an all-reduce, which is a reduction to parts and their gather, and (N - 1) b for a
reduce-scatter. All is read from the compiled programs; nothing is run.

The library takes rows whole, inside `meshes.use`: at a DCT it is as good as by layers and needs no
stack that the devices divide; at a power step it sends least at the papers' rank, a quarter of the
width, and about as much as the other two at small ranks. An exact SVD has no divided form: each
matrix is gathered, however it is placed.
"""

import os
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

import lowrank_jax as lrx
from experiments.benchmarks import commandline, workload
from experiments.harness import collectives, outputs
from experiments.models import axes, llama
from lowrank_jax import sharding
from lowrank_jax.sharding import meshes

DEVICES = 8
WAYS = ("as they lie", "rows whole", "by layers")
PROJECTORS = {"power": lrx.projectors.power, "dct": lrx.projectors.dct, "svd": lrx.projectors.svd}


def received(found: list[collectives.Collective]) -> int:
    """Bytes that a device receives, see above."""
    whole = (DEVICES - 1) / DEVICES
    factor = {"all-reduce": 2 * whole, "reduce-scatter": DEVICES - 1, "collective-permute": 1}
    return round(sum(factor.get(one.kind, whole) * one.bytes for one in found))


def refresh(preset: str, name: str, rank: int, way: str) -> list[collectives.Collective]:
    """The collectives of one refresh of all kernels of the blocks."""
    mesh = meshes.make_mesh(fsdp=DEVICES)
    kernels = workload.matrices(preset)
    kinds = meshes.shardings(kernels, axes.LLAMA, mesh)
    projector = PROJECTORS[name](rank=rank)
    views = lrx.resolution.resolve(kernels, workload.VIEWS, rank=projector.rank_for).projected
    whole = jax.NamedSharding(mesh, PartitionSpec())
    layers = jax.NamedSharding(mesh, PartitionSpec("fsdp"))
    keys = [jax.random.split(jax.random.key(0), view.batch) for view in views]
    shapes = [
        jax.eval_shape(partial(projector.init, view), own)
        for view, own in zip(views, keys, strict=True)
    ]
    constrain = jax.lax.with_sharding_constraint

    def run(gradients, bases):
        new = []
        for view, x, basis in zip(views, jax.tree.leaves(gradients), bases, strict=True):
            if way == "by layers":
                x, basis = constrain((x, basis), layers)
            x = view.orient(x)
            if way == "rows whole":
                with meshes.use(mesh):
                    x = sharding.unshard_rows(x)
            inputs = lrx.projectors.RefreshInputs(target=x, step=jnp.ones((), jnp.int32))
            moved = projector.refresh(view, *basis, inputs)
            new.append(constrain(moved, layers) if way == "by layers" else moved)
        return new

    place = lambda x, kind: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=kind)  # noqa: E731
    gradients = jax.tree.map(place, kernels, kinds)
    bases = jax.tree.map(lambda x: place(x, whole), shapes)
    out = jax.tree.map(lambda x: whole, shapes)
    return collectives.read(
        jax.jit(run, out_shardings=out).lower(gradients, bases).compile().as_text() or ""
    )


def measure(preset: str) -> dict[str, Any]:
    """Rows of a projector, a rank and the bytes received by each way.

    `{"projector", "rank", "received": {way: bytes}, "kinds": {way: {kind: bytes of results}}}`.
    """
    width, rows = llama.preset(preset).width, []
    for name in PROJECTORS:
        for rank in (width // 4, width // 16):
            found = {way: refresh(preset, name, rank, way) for way in WAYS}
            sizes = {way: received(own) for way, own in found.items()}
            kinds = {way: collectives.by_kind(own) for way, own in found.items()}
            rows.append({"projector": name, "rank": rank, "received": sizes, "kinds": kinds})
    return {"preset": preset, "devices": DEVICES, "rows": rows}


@commandline.command
def main(arguments: Sequence[str]) -> None:
    """Compiles on eight fake devices, prints the table and writes the JSON."""
    parser = commandline.parser(__doc__, "experiments/results/collectives.json")
    parser.add_argument("--preset", type=commandline.preset, default="60M")
    options, words = parser.parse_args(arguments), [*arguments]
    flag = f"--xla_force_host_platform_device_count={DEVICES}"
    if jax.device_count() < DEVICES and flag not in os.environ.get("XLA_FLAGS", ""):
        environment = {
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flag}",
            "JAX_PLATFORMS": "cpu",
        }
        command = [sys.executable, "-m", "experiments.benchmarks.collectives", *words]
        os.execve(sys.executable, command, os.environ | environment)
    result: dict[str, Any] = {
        "command": f"python -m experiments.benchmarks.collectives {' '.join(words)}".strip()
    }
    result |= measure(options.preset)
    print(f"{'received in a refresh, MiB':<28}" + "".join(f"{way:>14}" for way in WAYS))
    for row in result["rows"]:
        case = f"{row['projector']}, rank {row['rank']}"
        print(f"{case:<28}" + "".join(f"{row['received'][way] / 2**20:>14.2f}" for way in WAYS))
    outputs.write_result(options.output, result, replace=options.replace)


if __name__ == "__main__":
    sys.exit(main())
