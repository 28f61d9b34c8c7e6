"""Plans of the 1B and 7B presets on five kinds of hardware: what methods take of a chip.

    python -m experiments.benchmarks.plans --budget_minutes 60

compiles one program after another, the most telling ones first, and puts each row into
`experiments/results/plans.json` as soon as it is known. The same command goes on where it stopped;
rows that the budget did not reach are listed there. A row of 1B takes one to three minutes on two
cores, one of 7B several and up to 7 GB. TPU rows need libtpu, the GPU's the CUDA plugin
(`experiments.plan` says how to get them).

The step is that of `experiments/configs/llama_1b.py` and `llama_7b.py` (512 rows of 256 tokens,
float32 parameters, products in bfloat16, every layer rematerialised) at rank width / 8. No row
takes an exact SVD: GaLore's basis comes from `alternating` after the update, FRUGAL's from `power`.
"projected" is projected backprop; FRUGAL and APOLLO-Mini read the whole gradient, so that for them
it is the full one. 256-way data parallelism is compiled for v6e:16x16, because AdamW's replicated
state does not fit a v5e.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from experiments.benchmarks import commandline
from experiments.configs import llama_1b, llama_7b
from experiments.harness import outputs
from experiments.planning import queue, report
from experiments.planning.cases import Case, with_mesh, with_optimizer
from experiments.planning.queue import CompileError
from experiments.settings import configuration
from experiments.settings.sections import ConfigurationError
from lowrank_jax.interop import documents

OUTPUT = Path("experiments/results/plans.json")
COMMAND = "python -m experiments.benchmarks.plans"
CONFIGS: dict[str, Callable[[], Any]] = {"1B": llama_1b.get_config, "7B": llama_7b.get_config}
RANKS = {"1B": 256, "7B": 512}
METHODS = {
    "adamw": "adamw",
    "galore projected": "galore:projector=alternating:refresh_when=after:backprop=projected",
    "galore": "galore:projector=alternating:refresh_when=after:backprop=full",
    "dct_adamw projected": "dct_adamw:backprop=projected",
    "apollo_mini": "apollo_mini:backprop=full",
    "frugal": "frugal:projector=power:backprop=full",
    "dct_adamw": "dct_adamw:backprop=full",
}
# Preset, target, mesh, microbatches, methods: from the most telling to the least.
QUEUE: tuple[tuple[str, str, str, int, tuple[str, ...]], ...] = (
    ("1B", "v5e:4x4", "fsdp=16", 8, ("adamw", "galore projected")),
    ("1B", "v6e:16x16", "data=256", 1, ("adamw", "galore projected")),
    ("1B", "h200", "data=1", 8, ("adamw", "galore projected", "apollo_mini")),
    (
        "1B",
        "v5e:4x4",
        "fsdp=16",
        8,
        ("apollo_mini", "dct_adamw projected", "frugal", "galore", "dct_adamw"),
    ),
    ("1B", "v5e:16x16", "data=16,fsdp=16", 1, ("adamw", "galore projected")),
    ("7B", "v5e:4x4", "fsdp=16", 16, ("adamw", "galore projected", "apollo_mini")),
    ("1B", "v5p:2x2x1", "fsdp=4", 8, ("adamw", "galore projected")),
    ("1B", "v6e:4x4", "fsdp=16", 8, ("adamw", "galore projected")),
    ("7B", "h200", "data=1", 16, ("adamw", "galore projected", "apollo_mini")),
    ("7B", "v5p:2x2x1", "fsdp=4", 16, ("adamw", "galore projected")),
    ("7B", "v6e:4x4", "fsdp=16", 16, ("adamw", "galore projected")),
    ("7B", "v5e:16x16", "data=16,fsdp=16", 1, ("adamw", "galore projected")),
    ("7B", "v5e:4x4", "fsdp=16", 16, ("galore", "dct_adamw projected", "frugal", "dct_adamw")),
    ("1B", "h200", "data=1", 8, ("galore", "dct_adamw projected", "frugal", "dct_adamw")),
    (
        "1B",
        "v5e:16x16",
        "data=16,fsdp=16",
        1,
        ("galore", "dct_adamw projected", "apollo_mini", "frugal"),
    ),
    ("1B", "v6e:4x4", "fsdp=16", 8, ("galore", "dct_adamw projected", "apollo_mini", "frugal")),
    ("1B", "v5p:2x2x1", "fsdp=4", 8, ("galore", "dct_adamw projected", "apollo_mini", "frugal")),
    ("7B", "h200", "data=1", 16, ("galore", "dct_adamw projected", "frugal")),
    (
        "7B",
        "v5e:16x16",
        "data=16,fsdp=16",
        1,
        ("galore", "dct_adamw projected", "apollo_mini", "frugal"),
    ),
    ("7B", "v6e:4x4", "fsdp=16", 16, ("galore", "dct_adamw projected", "apollo_mini", "frugal")),
    ("7B", "v5p:2x2x1", "fsdp=4", 16, ("galore", "dct_adamw projected", "apollo_mini", "frugal")),
    ("7B", "h200", "data=1", 16, ("dct_adamw",)),
    ("1B", "v5e:16x16", "data=16,fsdp=16", 1, ("dct_adamw",)),
    ("1B", "v6e:4x4", "fsdp=16", 8, ("dct_adamw",)),
    ("1B", "v5p:2x2x1", "fsdp=4", 8, ("dct_adamw",)),
    ("7B", "v5e:16x16", "data=16,fsdp=16", 1, ("dct_adamw",)),
    ("7B", "v6e:4x4", "fsdp=16", 16, ("dct_adamw",)),
    ("7B", "v5p:2x2x1", "fsdp=4", 16, ("dct_adamw",)),
)


def case(preset: str, topology: str, mesh: str, accumulation: int, method: str) -> Case:
    """One row's case."""
    values = CONFIGS[preset]()
    values.optimizer.rank = RANKS[preset]
    values.schedule.accumulation = accumulation
    config = with_mesh(configuration.from_dict(values), mesh)
    return Case(config=with_optimizer(config, METHODS[method]), topology=topology)


def wanted() -> list[Case]:
    """Every case, in order."""
    return [
        case(preset, topology, mesh, parts, method)
        for preset, topology, mesh, parts, methods in QUEUE
        for method in methods
    ]


# What is told when it ran on this CPU: predicted bytes against those that a process took.
def reality() -> list[Case]:
    """Small cases that run here: one device and eight, AdamW and projected GaLore."""
    found = []
    for topology, mesh in (("cpu:1", "data=1"), ("cpu:8", "fsdp=8")):
        for method in ("adamw", "galore projected"):
            config = configuration.from_dict(
                {
                    "model": {"preset": "35M"},
                    "data": {"sequence_length": 64, "batch_size": 8},
                    "optimizer": {"name": "adamw"},
                }
            )
            text = METHODS[method] + (":rank=96" if method != "adamw" else "")
            own = with_optimizer(with_mesh(config, mesh), text)
            found.append(Case(config=own, topology=topology, execute=True))
    return found


def aims(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each aim with its value, its bound and whether it is met; None where rows are missing."""
    found = []
    # fully divided parameters: the state of a chip should be its share of the whole
    shares = []
    for row in rows:
        own, share = report.state_bytes(row)
        if row["mesh"].get("fsdp", 1) == row["chips"]:
            shares.append((own / share - 1, f"{row['preset']} {row['topology']} {row['name']}"))
    worst = max(shares, default=None)
    found.append(
        {
            "aim": "optimizer state of a chip over the whole state / chips - 1, parameters fully "
            "divided",
            "of": worst and worst[1],
            "value": worst and worst[0],
            "bound": 0.01,
            "met": None if worst is None else worst[0] <= 0.01,
        }
    )
    # replicas alone: what they add up is all that they send
    replicas = [row for row in rows if row["mesh"] == {"data": 256} and row["placed"]]
    sent = {row["optimizer"]: row["collectives"] for row in replicas if "collectives" in row}
    value = None
    if {"adamw", "galore"} <= sent.keys():
        full, low = (sent[name]["block_reduced_bytes"] for name in ("adamw", "galore"))
        value = full / low
    found.append(
        {
            "aim": "reduced bytes of the blocks' matrices, AdamW's over projected backprop's, 256 "
            "replicas",
            "of": "1B, rank width / 8",
            "value": value,
            "bound": 4.0,
            "met": None if value is None else value >= 4.0,
        }
    )
    return found


def identity(one: Case) -> str:
    """What tells rows apart: `queue.describe` without the key, which new options change."""
    return json.dumps({name: value for name, value in queue.describe(one).items() if name != "key"})


def known(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Rows of an earlier result by `identity`."""
    names = [name for name in queue.describe(wanted()[0]) if name != "key"]
    rows = [*result.get("rows", ()), *result.get("reality", ())]
    return {json.dumps({name: row.get(name) for name in names}): row for row in rows}


def collect(rows: dict[str, dict[str, Any]], failed: dict[str, str]) -> dict[str, Any]:
    """What is written: rows by preset, target and optimizer, and what is not there."""
    listed = {identity(one): one for one in wanted()}
    found = [queue.judged(rows[name]) for name in listed if name in rows]
    targets = list(dict.fromkeys(topology for _, topology, *_ in QUEUE))
    found.sort(
        key=lambda row: (
            row["preset"],
            targets.index(row["topology"]),
            row["optimizer"],
            row["backprop"] or "",
        )
    )
    compared = [queue.judged(rows[name]) for name in map(identity, reality()) if name in rows]
    return {
        "command": COMMAND,
        "length": 256,
        "wanted": len(listed),
        "rows": found,
        "reality": compared,
        "aims": aims(found),
        "failed": [
            {"case": one.label, "error": failed[name]}
            for name, one in listed.items()
            if name in failed
        ],
        "not_reached": [
            one.label for name, one in listed.items() if name not in rows and name not in failed
        ],
    }


@commandline.command
def main(arguments: Sequence[str]) -> None:
    """The command line."""
    parser = commandline.parser(__doc__, OUTPUT)
    parser.add_argument(
        "--budget_minutes",
        type=commandline.positive,
        default=60.0,
        help="no program is begun after this",
    )
    parser.add_argument("--python_tpu", help="an interpreter with libtpu")
    parser.add_argument("--python_cuda", help="an interpreter with the CUDA plugin")
    parser.add_argument("--only", default="", help="only cases whose words contain this")
    options = parser.parse_args(arguments)
    shape = {"rows?": [dict], "reality?": [dict]}
    rows = known(documents.read(options.output, shape) if options.output.exists() else {})
    pythons = {"tpu": options.python_tpu, "cuda": options.python_cuda, "cpu": None}
    failed: dict[str, str] = {}
    begin, listed = time.monotonic(), wanted()
    for one in [*reality(), *listed]:
        if identity(one) in rows or options.only not in one.label:
            continue
        if time.monotonic() - begin > 60 * options.budget_minutes:
            break
        print(f"[{(time.monotonic() - begin) / 60:.1f} min] {one.label}", flush=True)
        try:
            one.check()
            row = queue.describe(one) | queue.compile_case(one, pythons[one.target.kind])
            rows[identity(one)] = row
            print(f"    {queue.summary(queue.judged(row))}", flush=True)
        except (CompileError, ConfigurationError) as error:
            failed[identity(one)] = str(error)
            print(f"    failed: {error}", flush=True)
        outputs.write_result(options.output, collect(rows, failed), replace=options.replace)
    final = collect(rows, failed)
    outputs.write_result(options.output, final, replace=options.replace)
    print(report.table(final["rows"]))
    for aim in final["aims"]:
        print(aim)
    print(
        f"{len(final['rows'])} of {final['wanted']} rows; {len(final['not_reached'])} not reached"
    )


if __name__ == "__main__":
    sys.exit(main())
