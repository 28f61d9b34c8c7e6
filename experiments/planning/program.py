"""Compiles one case and prints its row as JSON.

Called as `python -m experiments.planning.program < case.json`.

It runs in a process of its own, with the environment and the compiler of the target. The step is
the one that `experiments.pretrain` would run, on the same mesh with the same shardings and
donation; its state is abstract, no data set is opened and no device is needed.
"""

import contextlib
import dataclasses
import io
import json
import math
import re
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp

import lowrank_jax as lrx
from experiments.harness.tasks import Pretraining
from experiments.models import llama
from experiments.planning import hlo, measured
from experiments.planning.cases import Case, gradients_of
from lowrank_jax.memory import components as state_parts
from lowrank_jax.trees import leaves_with_metadata
from lowrank_jax.typing import Pytree

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}


class Planned(Pretraining):
    """`Pretraining` on devices that need not be there: abstract, and without its data set."""

    def open_dataset(self, config):
        return None

    @property
    def projected(self) -> list[Any]:
        """Views of the projected leaves; empty for an optimizer that projects nothing."""
        bare = self.optimizer_of(dataclasses.replace(self.config.optimizer, clip_norm=None))
        return (
            [*lrx.explain(bare, self.abstract["params"]).projected]
            if hasattr(bare, "projection")
            else []
        )

    def batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of one global batch."""
        shape = (self.config.data.batch_size, self.config.data.sequence_length)
        types = {"inputs": jnp.int32, "targets": jnp.int32, "weights": jnp.float32}
        return {
            name: jax.ShapeDtypeStruct(shape, dtype, sharding=self.rows)
            for name, dtype in types.items()
        }

    def lowered(self) -> jax.stages.Lowered:
        """The update as `experiments.harness.training` compiles it."""
        return jax.jit(self.update(), donate_argnums=0).lower(self.abstract, self.batch_shapes())


def whole_bytes(tree: Pytree) -> int:
    """Bytes of a tree of abstract arrays."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def chip_bytes(tree: Pytree) -> int:
    """Bytes of a tree of abstract arrays on one device."""
    shard = lambda x: x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)  # noqa: E731
    return sum(math.prod(shard(x)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def components(abstract: dict[str, Any], chips: int) -> list[dict[str, Any]]:
    """Rows `{"component", "bytes", "share_bytes"}` of what stays between updates.

    Bytes of one chip, and the whole over the chips.
    """
    parts = {"parameters": abstract["params"]} | state_parts(abstract["opt_state"])
    return [
        {"component": name, "bytes": chip_bytes(tree), "share_bytes": whole_bytes(tree) / chips}
        for name, tree in parts.items()
    ]


def temporaries(task: Planned) -> dict[str, int]:
    """What of a chip's temporaries is known by formula; the compiler does not tell them apart.

    gradients: as the parameters, or r / s of it where they are projected between refreshes.
    layer_inputs: what rematerialisation keeps of the blocks, L B S D; not counted without it.
    logits: B S V in float32, once (the loss and its gradient make two or three of it).
    """
    config, params, sizes = task.config, task.abstract["params"], task.mesh.shape
    # a projected gradient has r of the s rows of a full one
    gradients: float = chip_bytes(params)
    if gradients_of(config) not in ("full", "full at a refresh"):
        views = {view.path: view for view in task.projected}
        for path, leaf, _ in leaves_with_metadata(params):
            if path in views:
                gradients -= chip_bytes(leaf) * (1 - views[path].rank / views[path].shrunk)
    rows = config.data.batch_size // (sizes["data"] * sizes["fsdp"] * config.schedule.accumulation)
    positions = rows * config.data.sequence_length // sizes["sequence"]
    itemsize = jnp.dtype(config.model.dtype).itemsize
    layer_inputs = config.model.layers * positions * config.model.width * itemsize
    logits = 4 * rows * config.data.sequence_length * config.model.vocabulary_size
    return {
        "gradients": round(gradients),
        "layer_inputs": layer_inputs if config.model.remat else 0,
        "logits": logits // sizes["tensor"],
    }


def operations(task: Planned) -> int:
    """Operations of one update by formula, of all chips; recomputation is not counted.

    `llama.flops_per_token`, and for each projected (m, n) at rank r: 2 m n r for down and up each;
    where its gradient is projected, down costs nothing, and the 2 N m n of the weight gradient of N
    tokens become 2 N r (m + n).
    """
    config = task.config
    tokens = config.data.batch_size * config.data.sequence_length
    total = tokens * llama.flops_per_token(config.model, config.data.sequence_length)
    tapped = gradients_of(config) != "full"
    for view in task.projected:
        count, m, n, r = math.prod(view.batch), view.shrunk, view.kept, view.rank
        up = down = 2 * m * n * r
        if tapped:
            # x P and its product with dy, in place of the weight gradient and of down
            thin, weight_gradient = 2 * tokens * r * (m + n), 2 * tokens * m * n
            total += count * (thin - weight_gradient + up)
        else:
            total += count * (down + up)
    return total


def exhausted(message: str) -> dict[str, int] | None:
    """Bytes needed and usable, of a program that XLA:TPU does not place; None for other errors.

    >>> exhausted("Ran out of memory in memory space hbm. Used 21.50G of 15.75G hbm.")
    {'peak_bytes': 23085449216, 'usable_bytes': 16911433728}
    >>> exhausted(
    ...     "the total memory required for HLO temporaries (62.48G) exceeds available HBM (15.75G)."
    ... )
    {'peak_bytes': 67087389164, 'usable_bytes': 16911433728}
    """
    size = r"([\d.]+)([KMG]?)"
    found = re.search(rf"Used {size} of {size} hbm", message) or re.search(
        rf"required for [\w ]+ \({size}\) exceeds available HBM \({size}\)", message
    )
    if not found:
        return None
    used, unit, usable, of = found.groups()
    return {
        "peak_bytes": round(float(used) * UNITS[unit]),
        "usable_bytes": round(float(usable) * UNITS[of]),
    }


def row(case: Case) -> dict[str, Any]:
    """Everything that is known of the case; see `experiments.plan` for what the fields mean."""
    config, begin = case.config, time.perf_counter()
    devices = case.target.devices()
    if len(devices) != case.target.chips:
        raise ValueError(
            f"topology={case.topology!r}: has {len(devices)} devices, not {case.target.chips}"
        )
    task = Planned(config, devices)
    found: dict[str, Any] = {
        "gradients_by": gradients_of(config),
        "components": components(task.abstract, len(devices)),
        "temporaries": temporaries(task),
        "flops": operations(task),
        "argument_bytes": chip_bytes(task.abstract) + chip_bytes(task.batch_shapes()),
    }
    lowered = task.lowered()
    traced = time.perf_counter()
    found["trace_seconds"] = traced - begin
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        size = exhausted(str(error))
        if size is None:
            raise
        return found | size | {"placed": False, "compile_seconds": time.perf_counter() - traced}
    found["compile_seconds"] = time.perf_counter() - traced
    program = lrx.memory.measure(compiled)
    found |= {
        "placed": True,
        "argument_bytes": program.arguments,
        "output_bytes": program.outputs,
        "aliased_bytes": program.aliased,
        "temporary_bytes": program.temporaries,
        "code_bytes": program.code,
        "peak_bytes": program.peak,
        "compiler_flops": (compiled.cost_analysis() or {}).get("flops"),
    }
    model = config.model
    found["collectives"] = hlo.moved(
        compiled.as_text() or "", model.vocabulary_size, (model.layers, model.width)
    )
    if case.execute:
        found["measured"] = measured.run(task, compiled)
    return found


def main() -> None:
    """Reads a case from standard input; the row is the last line of standard output."""
    case = Case.from_json(json.load(sys.stdin))
    with contextlib.redirect_stdout(io.StringIO()):
        found = row(case)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
