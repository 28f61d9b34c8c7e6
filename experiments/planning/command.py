"""The command line of `experiments.plan`: cases are compiled, shown as a table, and advised on."""

import io
import math
import pathlib
import sys
from typing import Any

from absl import flags, logging

from experiments.harness import optimizers, outputs
from experiments.harness.metrics import format_bytes
from experiments.planning import advice, cases, queue, report
from experiments.settings import arguments, configuration
from experiments.settings.sections import ConfigurationError, require

TOPOLOGY = flags.DEFINE_string("topology", None, "target, such as v5e:4x4, h200 or cpu:8")
TOPOLOGIES = flags.DEFINE_list("topologies", [], "several targets")
OPTIMIZERS = flags.DEFINE_list(
    "optimizers", [], "in place of the configuration's: name, or name:field=value:..."
)
BACKPROP = flags.DEFINE_list(
    "backprop", [], "in place of the configuration's: optax, full, projected"
)
MESHES = flags.DEFINE_string(
    "meshes", "", "in place of the configuration's, such as 'data=16;fsdp=8,tensor=2'"
)
JSON = flags.DEFINE_string("json", None, "file for the rows")
PLOT = flags.DEFINE_string("plot", None, "PNG file for a stacked bar of each row")
CACHE = flags.DEFINE_string(
    "cache", "runs/plan.jsonl", "file that keeps finished rows; '' keeps none"
)
PYTHON = flags.DEFINE_string(
    "python", None, "an interpreter whose environment has the target's compiler"
)
MEMORY = flags.DEFINE_float(
    "memory_gib", None, "what a chip has for the program, in place of the chip's memory"
)
ADVISE = flags.DEFINE_bool(
    "advise", True, "of a single case that does not fit, search the smallest change"
)
EXECUTE = flags.DEFINE_bool(
    "execute", False, "cpu targets: also run the program and measure what it takes"
)


def run(config: configuration.RunConfig) -> int:
    """Everything after parsing; the exit code."""
    topologies = [*TOPOLOGIES.value, *([TOPOLOGY.value] if TOPOLOGY.value else [])]
    if not topologies:
        raise ConfigurationError(
            "topology=None: name a target, such as --topology=v5e:4x4, h200 or cpu:8"
        )
    for flag in (JSON, PLOT, CACHE):
        if flag.value:
            outputs.check(flag.name, flag.value, is_folder=False)
    meshes = [text for text in MESHES.value.split(";") if text.strip()]
    listed, notes = cases.product(
        config,
        topologies,
        meshes=meshes,
        optimizers=OPTIMIZERS.value,
        backprops=BACKPROP.value,
        execute=EXECUTE.value,
    )
    held = {case.name: optimizers.full_gradients(case.config.optimizer) for case in listed}
    for note in [*notes, *(f"{name}: {text}" for name, text in held.items() if text is not None)]:
        print(note, file=sys.stderr)
    for case in listed:
        queue.targets.interpreter(case.target, PYTHON.value)
    cache = queue.Cache(pathlib.Path(CACHE.value) if CACHE.value else None, queue.source_digest())
    if MEMORY.value is not None:
        require(
            0 < MEMORY.value < math.inf, "memory_gib", MEMORY.value, "give a positive number of GiB"
        )
    memory = None if MEMORY.value is None else round(MEMORY.value * 2**30)
    rows = queue.run(listed, cache, python=PYTHON.value, memory=memory)
    found: dict[str, Any] = {
        "command": f"python -m experiments.plan {' '.join(sys.argv[1:])}",
        "rows": rows,
    }
    if len(rows) == 1 and "error" not in rows[0]:
        print(report.details(rows[0]))
    elif rows:
        print(report.table(rows))
    if ADVISE.value and len(listed) == 1 and rows and rows[0].get("fits") is False:
        found["advice"] = _advise(listed[0], rows[0], cache, memory)
    if JSON.value:
        outputs.write_json(JSON.value, found)
    if PLOT.value and any("error" not in row for row in rows):
        buffer = io.BytesIO()
        report.figure(rows).savefig(buffer, format="png")
        outputs.write_bytes(PLOT.value, buffer.getvalue())
    if len(rows) < len(listed):
        return 130
    return int(any("error" in row or row["fits"] is False for row in rows))


def _advise(
    case: cases.Case, row: dict[str, Any], cache: queue.Cache, memory: int | None
) -> dict[str, Any]:
    print("searching the smallest change that makes it fit", file=sys.stderr)

    def evaluate(candidate: cases.Case) -> dict[str, Any]:
        rows = queue.run([candidate], cache, python=PYTHON.value, memory=memory)
        if not rows:
            raise KeyboardInterrupt
        return rows[0]

    try:
        found = advice.advise(case, row, evaluate)
    except KeyboardInterrupt:
        return {"overrides": None, "interrupted": True}
    if found.overrides is None or found.row is None:
        print(
            f"nothing that was tried makes it fit ({len(found.tried)} programs); give it more chips"
        )
    else:
        print(
            f"it fits, at {format_bytes(found.row['peak_bytes'])}, with {' '.join(found.overrides)}"
        )
    return {"overrides": found.overrides, "row": found.row, "tried": found.tried}


def main(argv: list[str]) -> int:
    """The command line."""
    logging.set_verbosity(logging.WARNING)
    try:
        if len(argv) > 1:
            raise ConfigurationError(
                f"unexpected arguments {argv[1:]}: flags are written --name=value"
            )
        config, notes = arguments.configured(configuration)
        for note in notes:
            print(f"note: {note}", file=sys.stderr)
        return run(config)
    except ConfigurationError as error:
        return arguments.refuse(str(error))
