"""What one pass over x, or dY, could save of a tapped product.

XLA's programs, the fewest bytes, and a roofline.

    python -m experiments.benchmarks.tapped_bounds --target v5e:2x2     with `.venv-tpu/bin/python`: needs libtpu
    python -m experiments.benchmarks.tapped_bounds --target h100        with `.venv-cuda/bin/python`: needs its plugin

Replaces the target's rows in `experiments/results/tapped_bounds.json`. "forward" is `xW` and `xP`
(rows shrunk), "backward" is `dY Wᵀ` and `(xP)ᵀ dY`, or where the columns are shrunk `dY Wᵀ`, `dY Q`
and `xᵀ (dY Q)`; as `lrx.projection.tapped` computes them, bfloat16, 4096 tokens. Nothing is run.

    moved_bytes, least_bytes   XLA's, counted as in `kernels`; every operand and result once, dY
                               once of three readings
    arithmetic_us, memory_us   operations over peak, moved_bytes over bandwidth
    gain                       1 - max(arithmetic, least memory) / max(arithmetic, memory): 0 where
                               arithmetic is longer
    largest_gain               the same by formula, one reading of x or dY saved, at that power of
                               two up to 4096 tokens where it is largest
"""

import functools
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from experiments.benchmarks import commandline
from experiments.benchmarks.kernels import traffic
from experiments.harness import outputs
from experiments.planning import targets
from lowrank_jax.interop import documents
from lowrank_jax.projection.projectors.base import thin_product

RESULTS = Path(__file__).parents[1] / "results" / "tapped_bounds.json"
TOKENS = 4096
MATRICES = (
    ("7B up", 4096, 11008, (1024, 512, 256)),
    ("7B down", 11008, 4096, (1024, 256)),
    ("1B up", 2048, 5461, (512, 128)),
)
# Bytes/s of one chip: Google Cloud, Cloud TPU documentation, system architecture of each; NVIDIA's
# data sheets.
BANDWIDTH = {"v5e": 819e9, "v6e": 1640e9, "v5p": 2765e9, "h100": 3.35e12, "h200": 4.8e12}

_contract: Callable = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)


def forward(x, w, p):
    """`(y, xP)`."""
    return x @ w, thin_product(x, p)


def backward_rows(dy, w, low):
    """`(dx, Pᵀ G)`."""
    return dy @ w.T, _contract(low, dy, (((0,), (0,)), ((), ())))


def backward_cols(dy, w, q, x):
    """`(dx, G Q)`."""
    return dy @ w.T, _contract(x, thin_product(dy, q), (((0,), (0,)), ((), ())))


Program = tuple[Callable, list[jax.ShapeDtypeStruct], int, int]


def programs(n: int, m: int, r: int, tokens: int) -> dict[str, Program]:
    """`{part: (program, operands, operations, fewest bytes)}` of one matrix.

    The first operand is what XLA rereads.
    """

    def program(function, thin, *shapes):
        operands = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
        arrays = (*operands, *jax.eval_shape(function, *operands))
        least = sum(leaf.size * leaf.dtype.itemsize for leaf in arrays)
        return function, operands, 2 * tokens * (n * m + thin * r), least

    if n <= m:
        return {
            "forward": program(forward, n, (tokens, n), (n, m), (n, r)),
            "backward": program(backward_rows, m, (tokens, m), (n, m), (tokens, r)),
        }
    function, operands, operations, least = program(
        backward_cols, n + m, (tokens, m), (n, m), (m, r), (tokens, n)
    )
    least += 4 * tokens * r  # dY Q is written and read
    return {"backward": (function, operands, operations, least)}


def gain(chip: str, operations: int, moved: int, least: int) -> float:
    """The part of the time that the saved bytes take, where each of both bounds hides the other."""
    arithmetic = operations / targets.CHIPS[chip].peak_flops
    before, after = (max(arithmetic, count / BANDWIDTH[chip]) for count in (moved, least))
    return 1 - after / before


def largest_gain(n: int, m: int, r: int, part: str, chip: str) -> tuple[float, int]:
    """`(gain, tokens)` at the token count where it is largest."""
    best = (0.0, 1)
    for tokens in (2**power for power in range(13)):
        _, (first, *_), operations, least = programs(n, m, r, tokens)[part]
        best = max(
            best, (gain(chip, operations, least + first.size * first.dtype.itemsize, least), tokens)
        )
    return best


def rows(target: targets.Target) -> Iterator[dict[str, Any]]:
    """Every matrix, rank and part."""
    chip, place = target.chip, SingleDeviceSharding(target.devices()[0])
    for matrix, n, m, ranks in MATRICES:
        for r in ranks:
            for part, (program, operands, operations, least) in programs(n, m, r, TOKENS).items():
                placed = [
                    jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
                    for leaf in operands
                ]
                compiled: Any = jax.jit(program).lower(*placed).compile()
                moved, _ = traffic(compiled.as_text())
                largest, tokens = largest_gain(n, m, r, part, chip)
                yield {
                    "target": target.name,
                    "matrix": matrix,
                    "rank": r,
                    "part": part,
                    "moved_bytes": moved,
                    "least_bytes": least,
                    "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
                    "arithmetic_us": round(1e6 * operations / targets.CHIPS[chip].peak_flops, 1),
                    "memory_us": round(1e6 * moved / BANDWIDTH[chip], 1),
                    "gain": round(gain(chip, operations, moved, least), 3),
                    "largest_gain": round(largest, 3),
                    "at_tokens": tokens,
                }


@commandline.command
def main(arguments: Sequence[str]) -> None:
    """Replaces the rows of a target."""
    parser = commandline.parser(__doc__)
    commandline.add_replace(parser)
    parser.add_argument("--target", required=True, help="v5e:2x2, v6e:2x2, v5p:2x2x1, h100 or h200")
    options = parser.parse_args(arguments)
    outputs.check("output", RESULTS, is_folder=False)
    target = targets.parse(options.target)
    if target.chip not in BANDWIDTH:
        parser.error(
            f"--target {target.name}: no bandwidth is noted for it; one of {tuple(BANDWIDTH)}"
        )
    missing = {k: v for k, v in target.environment().items() if os.environ.get(k) != v}
    if missing:
        os.execve(
            sys.executable,
            [sys.executable, "-m", "experiments.benchmarks.tapped_bounds", *sys.argv[1:]],
            os.environ | missing,
        )
    found = []
    for row in rows(target):
        found.append(row)
        print(json.dumps(row), flush=True)
    data = documents.read(RESULTS, {"rows": [dict]}) if RESULTS.exists() else {"rows": []}
    data["command"] = "python -m experiments.benchmarks.tapped_bounds --target TARGET"
    data["time on a device"] = "not measured"
    data["rows"] = [row for row in data["rows"] if row["target"] != target.name] + found
    outputs.write_result(RESULTS, data, replace=options.replace)


if __name__ == "__main__":
    sys.exit(main())
