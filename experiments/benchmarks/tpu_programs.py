"""Sizes of refreshes as TPU programs, from libtpu's compiler, on a machine without a TPU.

    python -m experiments.benchmarks.tpu_programs --preset 60M

prints a line of JSON for each. `experiments.benchmarks.optimizer_step` runs it in a process of its
own, because the compiler's plugin and its environment variables do not belong in a process that
measures times. An SVD is left out: it takes minutes and hundreds of megabytes.
"""

import importlib.util
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

import lowrank_jax as lrx
from experiments.benchmarks import commandline, workload
from experiments.planning.targets import TPU_ENVIRONMENT as ENVIRONMENT

TOPOLOGY = "v5e:2x2"
LIMIT_BYTES = 5_000_000


def projectors(rank: int) -> dict[str, Any]:
    """The refreshes whose programs are to be small."""
    return {
        "dct2": lrx.projectors.dct2(rank=rank),
        "dct3": lrx.projectors.dct3(rank=rank),
        "random gaussian": lrx.projectors.random(rank=rank),
        "random orthonormal": lrx.projectors.random(rank=rank, kind="orthonormal"),
        "random structured": lrx.projectors.random(rank=rank, kind="structured"),
        "power": lrx.projectors.power(rank=rank),
        "randomized": lrx.projectors.randomized(rank=rank),
    }


def refresh_of(projector: Any, view: lrx.resolution.ResolvedView):
    """One refresh of a stack as the optimizer makes it, a function to compile.

    `((basis, memory), gradient, momentum, step, seed) -> (basis, memory)`.
    """

    def refresh(state, gradient, momentum, step, seed):
        keys = jax.random.split(jax.random.key(seed), view.batch)
        inputs = lrx.projectors.RefreshInputs(
            target=gradient, momentum=momentum, step=step, key=keys
        )
        if not projector.starts:
            return projector.refresh(view, *state, inputs)
        first = lambda: projector.start(view, inputs)  # noqa: E731
        return jax.lax.cond(step == 0, first, lambda: projector.refresh(view, *state, inputs))

    return refresh


def compile_row(
    name: str, projector: Any, view: lrx.resolution.ResolvedView, device: Any
) -> dict[str, Any]:
    """Bytes of the program and of its memory for one leaf on one chip."""
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), view.batch))
    basis = jax.eval_shape(lambda keys: projector.init(view, keys), keys)
    float32 = lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    scalar = jax.ShapeDtypeStruct((), jnp.int32)
    low = (*view.batch, *projector.low_shape(view))
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=SingleDeviceSharding(device))  # noqa: E731
    arguments = jax.tree.map(place, (basis, float32(view.oriented), float32(low), scalar, scalar))
    start = time.perf_counter()
    program = lrx.memory.measure(jax.jit(refresh_of(projector, view)).lower(*arguments).compile())
    return {
        "projector": name,
        "shape": list(view.oriented),
        "rank": view.rank,
        "program_bytes": program.code,
        "temporary_bytes": program.temporaries,
        "peak_bytes": program.peak,
        "compile_seconds": time.perf_counter() - start,
        "met": program.code < LIMIT_BYTES,
    }


def rows(preset: str) -> Iterator[dict[str, Any]]:
    """A row for each projector, on the largest of the preset's stacks."""
    device = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGY).devices[0]
    shapes = workload.matrices(preset)
    for name, projector in projectors(workload.rank(preset)).items():
        tx = lrx.scale_by_projection(projector, views=workload.VIEWS)
        view = max(lrx.explain(tx, shapes).projected, key=lambda view: math.prod(view.oriented))
        yield compile_row(name, projector, view, device)


def measure(preset: str, python: str | None = None) -> dict[str, Any]:
    """The rows from a process of its own, or the reason why there are none.

    Args:
      preset: of `experiments.models.llama`.
      python: an interpreter whose environment has libtpu; by default this one, else `.venv-tpu`'s.
    """
    if python is None:
        own = Path(".venv-tpu/bin/python")
        python = (
            str(own)
            if importlib.util.find_spec("libtpu") is None and own.exists()
            else sys.executable
        )
    probe = subprocess.run([python, "-c", "import libtpu"], capture_output=True, text=True)
    if probe.returncode:
        return {
            "rows": [],
            "reason": "not measured: no libtpu here; `make test-tpu` makes .venv-tpu, which has it",
        }
    command = [python, "-m", "experiments.benchmarks.tpu_programs", "--preset", preset]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | ENVIRONMENT)
    if run.returncode:
        return {
            "rows": [],
            "reason": f"not measured: {(run.stderr.strip().splitlines() or ['failed'])[-1]}",
        }
    return {
        "rows": [json.loads(line) for line in run.stdout.splitlines()],
        "topology": TOPOLOGY,
        "reason": None,
    }


@commandline.command
def main(arguments: Sequence[str]) -> None:
    """Prints a line of JSON for each row, as soon as it is known."""
    parser = commandline.parser(__doc__)
    parser.add_argument("--preset", type=commandline.preset, default="60M")
    for row in rows(parser.parse_args(arguments).preset):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    sys.exit(main())
