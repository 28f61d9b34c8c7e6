"""What one optimizer step costs: time, state, temporaries, and its refresh as a TPU program.

    python -m experiments.benchmarks.optimizer_step --preset 60M --output experiments/results/optimizer_step.json

Every optimizer updates the preset's matrices (the kernels of the scanned blocks, stacked by layer,
float32) from the same normal gradients, as one jitted update with its application and with
parameters and state donated. All run in one process, interleaved; times are medians.
`optax.contrib.galore` gets the layers one by one, because it skips stacks.

* normal: a step that refreshes nothing (for T=1 and LDAdam every step refreshes).
* refresh: the worst step of a period. Staggered schedules: the slowest of their working steps.
* amortised: the mean over a period of T=200 steps.
* own arithmetic: the operations of the two thin products `PᵀG` and `P low` over the rate of one
  2048 x 2048 x 2048 product, measured in the same run. The products themselves, batched by layer,
  are timed too.
* AdamW's memory traffic: reading p, g, m, v and writing p, m, v of the same sizes, with one
  addition each.

Aims: normal < 1.2 (own arithmetic + traffic); normal < `optax.contrib.galore`'s; refresh of power,
randomized and DCT < 3 normal; TPU programs of their refreshes, and of random bases', < 5 MB.
"""

import datetime
import re
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

import lowrank_jax as lrx
from experiments.benchmarks import commandline, timing, tpu_programs, workload
from experiments.harness import outputs
from lowrank_jax.typing import Pytree

SLACK, NORMAL_STEPS = 1.2, 3.0


class Runner:
    """One optimizer with its parameters and state; `step` times an update at a given step."""

    def __init__(self, case: workload.Case, shapes: Any, gradients: Pytree):
        self.case = case
        self.gradients = workload.unstacked(gradients) if case.unstacked else gradients
        shapes = workload.unstacked(shapes) if case.unstacked else shapes
        self.compiled = lrx.memory.compile_update(case.tx, shapes)
        self.params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        self.state = jax.jit(case.tx.init)(self.params)
        # a staggered schedule works at most steps; normal is one at which no layer is refreshed
        working = case.working_steps(shapes) if case.staggered else []
        self.quiet = next(step for step in range(1, workload.PERIOD) if step not in working)
        self.state_bytes = lrx.memory.ledger(case.tx, shapes).state_bytes
        self.temporary_bytes = lrx.memory.measure(self.compiled).temporaries

    def step(self, step: int) -> float:
        """Seconds of one update at this step."""
        state = self.case.at(self.state, step)
        jax.block_until_ready(state)

        def run():
            self.params, self.state = self.compiled(self.params, self.gradients, state)
            return self.params, self.state

        return timing.seconds(run)


def measure_references(shapes: Any, rank: int) -> tuple[dict[str, Any], dict[str, float]]:
    """The reference programs, warmed up, and their operations."""
    products, operations = workload.thin_products(shapes, rank)
    square, square_operations = workload.square_product()
    programs = {
        "thin products": products,
        "square product": square,
        "traffic": workload.adamw_traffic(shapes),
    }
    for program in programs.values():
        timing.seconds(program)
    return programs, {"thin products": operations, "square product": square_operations}


def times(runners: dict[str, Runner], references: dict[str, Any], repetitions: int, refreshes: int):
    """Medians of normal steps and references, then of refreshes, each by name."""
    for runner in runners.values():
        runner.step(1)  # loads the programs
    cases: dict[str, Any] = {
        name: lambda program=program: timing.seconds(program)
        for name, program in references.items()
    }
    cases |= {
        name: lambda runner=runner: runner.step(runner.quiet) for name, runner in runners.items()
    }
    # interleaved, so that whatever else the machine does meets all of them
    normal = timing.interleave(cases, repetitions)
    due = {
        n: lambda runner=r: runner.step(runner.case.refresh)
        for n, r in runners.items()
        if r.case.refresh
    }
    return normal, timing.interleave(due, refreshes) if due else {}


def staggered_times(runner: Runner, shapes: Any) -> list[float]:
    """Seconds of each working step of one period."""
    return [runner.step(step) for step in runner.case.working_steps(shapes)]


def summarize(
    runner: Runner, normal: float, refresh: float | None, working: list[float], adamw: float
) -> dict[str, Any]:
    """One row of the table."""
    period = workload.PERIOD
    # mean seconds over one period of refreshes
    if working:
        worst, amortised = max(working), (sum(working) + (period - len(working)) * normal) / period
    elif refresh is not None:
        worst, amortised = refresh, (refresh + (period - 1) * normal) / period
    else:
        worst, amortised = normal, normal
    return {
        "optimizer": runner.case.name,
        "normal_seconds": normal,
        "normal_over_adamw": normal / adamw,
        "worst_seconds": worst,
        "worst_over_normal": worst / normal,
        "amortised_seconds": amortised,
        "amortised_over_adamw": amortised / adamw,
        "state_bytes": runner.state_bytes,
        "temporary_bytes": runner.temporary_bytes,
        "every_step_refreshes": runner.case.every_step,
    }


def aims(
    rows: list[dict[str, Any]], cases: list[workload.Case], bound: float, tpu: dict[str, Any]
) -> list[dict[str, Any]]:
    """Each aim with its value, its bound and whether it is met (None where it was not measured)."""
    pairs = zip(rows, cases, strict=True)
    ours = [(row, case) for row, case in pairs if hasattr(case.tx, "projection")]
    peers = [row for row in rows if row["optimizer"] == "optax.contrib.galore"]
    contrib = peers[0]["normal_seconds"]
    result = []

    def add(aim, what, value, limit):
        result.append(
            {
                "aim": aim,
                "of": what,
                "value": value,
                "bound": limit,
                "met": None if value is None else value < limit,
            }
        )

    for row, case in ours:
        if not case.every_step:
            seconds, by_bound = (
                row["normal_seconds"],
                "normal step, own arithmetic + traffic, 20 % (s)",
            )
            add(by_bound, case.name, seconds, bound)
            add("normal step, optax.contrib.galore's (s)", case.name, seconds, contrib)
    for row, case in ours:
        if case.aim:
            add("refresh, in normal steps", case.name, row["worst_over_normal"], NORMAL_STEPS)
    for row in tpu["rows"] or [{"projector": name} for name in tpu_programs.projectors(1)]:
        name = " ".join([row["projector"], *map(str, row.get("shape", []))])
        size = row.get("program_bytes")
        add("TPU program of a refresh (bytes)", name, size, tpu_programs.LIMIT_BYTES)
    return result


def benchmark(
    preset: str,
    *,
    repetitions: int,
    refreshes: int,
    only: str = "",
    tpu: bool = True,
    **overrides: Any,
) -> dict[str, Any]:
    """Runs everything and returns what is written as JSON.

    Args:
      preset: of `experiments.models.llama`; `overrides` are fields of its configuration.
      repetitions, refreshes: rounds of normal steps and of refreshes.
      only: pattern that the names of the optimizers contain; AdamW and `optax.contrib.galore` are
        always there.
      tpu: compile the refreshes for a TPU too.
    """
    shapes = workload.matrices(preset, **overrides)
    rank = overrides.get("width", 4 * workload.rank(preset)) // 4
    gradients = workload.gradients(shapes)
    cases = [
        case for case in workload.cases(rank) if re.search(f"adamw$|contrib|{only}", case.name)
    ]
    runners = {}
    for case in cases:
        print(f"compiling {case.name}", file=sys.stderr, flush=True)
        runners[case.name] = Runner(case, shapes, gradients)
    references, operations = measure_references(shapes, rank)
    print("timing", file=sys.stderr, flush=True)
    normal, refresh = times(runners, references, repetitions, refreshes)
    rate = operations["square product"] / normal["square product"]
    arithmetic = operations["thin products"] / rate
    rows = []
    for name, runner in runners.items():
        working = staggered_times(runner, shapes) if runner.case.staggered else []
        rows.append(
            summarize(runner, normal[name], refresh.get(name), working, normal["optax.adamw"])
        )
    programs = (
        tpu_programs.measure(preset) if tpu else {"rows": [], "reason": "not measured: --notpu"}
    )
    bound = SLACK * (arithmetic + normal["traffic"])
    return {
        "preset": preset,
        "rank": rank,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(shapes)),
        "repetitions": repetitions,
        "refresh_repetitions": refreshes,
        "reference": {
            "matmul_flops_per_second": rate,
            "thin_product_operations": operations["thin products"],
            "own_arithmetic_seconds": arithmetic,
            "thin_products_seconds": normal["thin products"],
            "adamw_traffic_seconds": normal["traffic"],
            "normal_step_bound_seconds": bound,
        },
        "rows": rows,
        "tpu": programs,
        "aims": aims(rows, cases, bound, programs),
    }


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    milli, mebi = 1e3, 2**20
    times = {name: milli * value for name, value in result["reference"].items()}
    header = (
        "optimizer",
        "normal ms",
        "x adamw",
        "worst ms",
        "x normal",
        "mean ms",
        "x adamw",
        "state MiB",
        "temp MiB",
    )
    lines = [
        f"{result['preset']}, rank {result['rank']}, {result['parameters'] / 1e6:.2f} M parameters "
        "in matrices",
        f"own arithmetic {times['own_arithmetic_seconds']:.1f} ms "
        f"(at {result['reference']['matmul_flops_per_second'] / 1e9:.0f} GFLOP/s; batched by layer "
        f"{times['thin_products_seconds']:.1f} ms) + AdamW's traffic "
        f"{times['adamw_traffic_seconds']:.1f} ms, and 20 %: "
        f"{times['normal_step_bound_seconds']:.1f} ms",
        f"{header[0]:<26}" + "".join(f"{name:>11}" for name in header[1:]),
    ]
    for row in result["rows"]:
        cells = (
            milli * row["normal_seconds"],
            row["normal_over_adamw"],
            milli * row["worst_seconds"],
            row["worst_over_normal"],
            milli * row["amortised_seconds"],
            row["amortised_over_adamw"],
            row["state_bytes"] / mebi,
            row["temporary_bytes"] / mebi,
        )
        lines.append(f"{row['optimizer']:<26}" + "".join(f"{cell:>11.2f}" for cell in cells))
    lines.append("")
    for aim in result["aims"]:
        verdict = "not measured" if aim["met"] is None else "met" if aim["met"] else "missed"
        value = "-" if aim["value"] is None else f"{aim['value']:.4g}"
        lines.append(f"{aim['aim']:<50}{aim['of']:<32}{value:>10} < {aim['bound']:<9.4g} {verdict}")
    if result["tpu"]["reason"]:
        lines.append(f"TPU programs: {result['tpu']['reason']}")
    return "\n".join(lines)


@commandline.command
def main(arguments: Sequence[str]) -> None:
    """Runs the benchmark, prints the table and writes the JSON."""
    parser = commandline.parser(__doc__, "experiments/results/optimizer_step.json")
    parser.add_argument("--preset", type=commandline.preset, default="60M")
    parser.add_argument("--repetitions", type=commandline.count, default=15)
    parser.add_argument("--refresh_repetitions", type=commandline.count, default=3)
    help_only = "pattern of optimizers; AdamW and optax.contrib.galore always run"
    parser.add_argument("--only", type=commandline.pattern, default="", help=help_only)
    parser.add_argument("--notpu", action="store_true", help="leave out the TPU programs")
    options = parser.parse_args(arguments)
    result = benchmark(
        options.preset,
        repetitions=options.repetitions,
        refreshes=options.refresh_repetitions,
        only=options.only,
        tpu=not options.notpu,
    )
    words = " ".join(arguments)
    result = {
        "command": f"python -m experiments.benchmarks.optimizer_step {words}".strip(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": timing.machine(),
    } | result
    print(table(result))
    outputs.write_result(options.output, result, replace=options.replace)


if __name__ == "__main__":
    sys.exit(main())
