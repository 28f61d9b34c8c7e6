"""The library's kernels against XLA's own fusions, compiled for devices not there.

    python -m experiments.benchmarks.kernels --target v5e:2x2     with `.venv-tpu/bin/python`: needs libtpu
    python -m experiments.benchmarks.kernels --target h100        with `.venv-cuda/bin/python`: needs its plugin

Replaces the target's rows in `experiments/results/kernels.json`, of one kernel with
`--kernel NAME`. Nothing is run: time on a device is not measured. What is compared stands in
`experiments/benchmarks/kernel_cases/`.

    moved_bytes   what the launched programs read from and write to device memory, from the compiled
                  HLO: every operand and result of every fusion and custom call, but those that XLA
                  keeps in VMEM, and every prefetch once; for a TPU kernel also what its grid reads
                  again. XLA's own tiles are not visible: its count is a lower bound.
    launches      fusions, custom calls and copies of the entry computation, prefetches left out
    temporary_bytes   `memory_analysis`
    fast_bytes    of one tile: VMEM, or shared memory, by the kernel's own formula
"""

import importlib
import json
import math
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding

from experiments.benchmarks import commandline
from experiments.benchmarks.kernel_cases.base import Case
from experiments.harness import outputs
from experiments.planning import targets
from lowrank_jax.interop import documents
from lowrank_jax.kernels import _platform

RESULTS = Path(__file__).parents[1] / "results" / "kernels.json"
KERNELS = ("dct_scores", "low_rank_adam", "nf4_linear", "lora_linear")
_BYTES = {
    "bf16": 2,
    "c64": 8,
    "f32": 4,
    "s32": 4,
    "u32": 4,
    "s8": 1,
    "u8": 1,
    "pred": 1,
    "f8e4m3fn": 1,
}
_ARRAY = re.compile(r"\b(" + "|".join(_BYTES) + r")\[([\d,]*)\](\{[^}]*\})?")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%(\S+) = (\(.*?\)|\S+) ([a-z\-]+)\((.*)$")
_FREE = ("parameter", "bitcast", "tuple", "get-tuple-element", "constant", "after-all")


def _arrays(kind: str) -> int:
    """Bytes of the arrays in an HLO type that are not in VMEM."""
    sizes = ((_BYTES[t], d, layout or "") for t, d, layout in _ARRAY.findall(kind))
    return sum(
        b * math.prod(map(int, filter(None, d.split(","))))
        for b, d, layout in sizes
        if "S(" not in layout
    )


def traffic(text: str) -> tuple[int, int]:
    """`(bytes, launches)` of the entry computation of an optimised HLO module.

    >>> text = (
    ...     "ENTRY %m {"
    ...     + chr(10)
    ...     + "  %x = f32[8]{0} parameter(0)"
    ...     + chr(10)
    ...     + "  %y = f32[8]{0} fusion(%x)"
    ... )
    >>> traffic(text)
    (64, 1)
    """
    kinds: dict[str, str] = {}
    moved = launches = 0
    for line in text[text.index("ENTRY") :].splitlines()[1:]:
        found = _INSTRUCTION.match(line)
        if not found:
            continue
        name, kind, operation, rest = found.groups()
        kinds[name] = kind
        if operation.endswith("-start"):  # a prefetch: one way, or within device memory both
            moved += _arrays(kind.replace("S(1)", "")) // 2 if "S(1)" in kind else _arrays(kind)
        elif (
            operation not in _FREE
            and not operation.endswith("-done")
            and "ConcatBitcast" not in rest
        ):
            operands = dict.fromkeys(re.findall(r"%([\w.\-]+)", rest.split("), ")[0]))
            moved += _arrays(kind) + sum(_arrays(kinds[o]) for o in operands if o in kinds)
            launches += 1
    return moved, launches


def row(case: Case, device: Any) -> dict[str, Any]:
    """XLA's program and the kernel's, side by side."""
    place = SingleDeviceSharding(device)
    put = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)  # noqa: E731
    operands = jax.tree.map(put, case.operands)
    result: dict[str, Any] = dict(case.labels)
    for label, program in (("xla", case.xla), ("pallas", case.pallas)):
        compiled: Any = jax.jit(program, donate_argnums=case.donate).lower(*operands).compile()
        moved, launches = traffic(compiled.as_text())
        result[label] = {
            "moved_bytes": moved + (case.reread if label == "pallas" else 0),
            "launches": launches,
            "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
        }
    less = round(1 - result["pallas"]["moved_bytes"] / result["xla"]["moved_bytes"], 3)
    return result | dict(case.facts) | {"less_moved": less}


def with_environment(target: targets.Target, module: str) -> None:
    """Starts the program again with what compiling for the target takes, unless it is there."""
    missing = {k: v for k, v in target.environment().items() if os.environ.get(k) != v}
    if missing:
        os.execve(
            sys.executable, [sys.executable, "-m", module, *sys.argv[1:]], os.environ | missing
        )


@commandline.command
def main(arguments: Sequence[str]) -> None:
    """Compiles both programs for each case and replaces the rows of target and kernel."""
    parser = commandline.parser(__doc__)
    commandline.add_replace(parser)
    parser.add_argument("--target", required=True, help="v5e:2x2, v6e:2x2, v5p:2x2x1, h100 or h200")
    parser.add_argument("--kernel", choices=KERNELS, help="one kernel only")
    options = parser.parse_args(arguments)
    outputs.check("output", RESULTS, is_folder=False)
    target = targets.parse(options.target)
    if target.kind == "cpu" or target.chip not in _platform.CHIPS:
        parser.error(
            f"--target {target.name}: there is no kernel for it; one of {tuple(_platform.CHIPS)}"
        )
    with_environment(target, "experiments.benchmarks.kernels")
    device, kind = target.devices()[0], "tpu" if target.kind == "tpu" else "gpu"
    chosen, found = (options.kernel,) if options.kernel else KERNELS, []
    for kernel in chosen:
        module = importlib.import_module(f"experiments.benchmarks.kernel_cases.{kernel}")
        for case in module.cases(kind, target.chip):
            found.append({"target": target.name, "kernel": kernel} | row(case, device))
            print(json.dumps(found[-1]), flush=True)
    data = documents.read(RESULTS, {"rows": [dict]})
    replaced = {(target.name, kernel) for kernel in chosen}
    data["rows"] = [
        old for old in data["rows"] if (old["target"], old["kernel"]) not in replaced
    ] + found
    outputs.write_result(RESULTS, data, replace=options.replace)


if __name__ == "__main__":
    sys.exit(main())
