"""What reading a program costs: models of other packages, plain, adapted and tapped.

    make .venv-zoo/installed
    .venv-zoo/bin/python -m experiments.benchmarks.any_function

For each model of `experiments.models.foreign`, and our own LLaMA at the preset nano, four programs
of a loss and its gradients: `plain` with respect to all parameters, `adapted` with respect to LoRA
factors through thin products, `effective` with respect to the same factors through `W + delta`
formed before the model runs, and `tapped`, which takes `PᵀG` in place of every matrix's gradient.
FLOPs, bytes read and written, and temporaries are those of the programs compiled for the CPU; tracing is the
fastest of several traces without what those before it had made. Errors are the largest difference
of a gradient from that of `effective`, of a tap from `PᵀG`, over the largest entry.
"""

import dataclasses
import importlib.metadata
import re
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

import lowrank_jax as lrx
from experiments.benchmarks import commandline
from experiments.harness import outputs
from experiments.models import foreign, llama
from lowrank_jax import trees
from lowrank_jax.projection.taps import is_projected

RANK = 2
OWN = "llama"  # ours, among the others
KINDS = ("plain", "adapted", "effective", "tapped")
PACKAGES = ("jax", "flax", "google-tunix", "gemma", "equinox", "dm-haiku", "flaxmodels")


@dataclasses.dataclass(frozen=True)
class Case:
    """A loss of parameters and a batch, and the views of what is adapted and what is tapped."""

    loss: Callable[[Any, Any], jax.Array]
    params: Any
    batch: Any
    adapted: lrx.Views
    tapped: lrx.Views


def case(name: str) -> Case:
    """A model of another package by its name, or ours."""
    if name != OWN:
        other = foreign.MODELS[name]()
        views = [other.rules(everything) for everything in (False, True)]
        return Case(other.loss, other.params, other.batch, *views)
    model = llama.Llama(llama.preset("nano", sequence_length=64))
    tokens = jax.random.randint(jax.random.key(1), (4, 64), 0, 256)
    params = model.init(jax.random.key(0), tokens)["params"]

    def loss(params: Any, tokens: Any) -> jax.Array:
        logits = model.apply({"params": params}, tokens)
        return llama.loss_and_metrics(logits, tokens, jnp.ones(tokens.shape))[0]

    blocks = lrx.Views(stacked=(r"layers/.*",))
    return Case(loss, params, tokens, blocks, blocks)


def moved(given: Case) -> lrx.adapters.Adaptation:
    """LoRA on what the model's authors would adapt, away from its start.

    There one factor is zero, and so is half of the gradients.
    """
    report = lrx.galore(1e-3, rank=RANK, views=given.adapted).projection.report(given.params)
    rules = {re.escape(view.path): lrx.adapters.lora(rank=RANK) for view in report.projected}
    adaptation = lrx.adapt(given.params, rules, jax.random.key(0), views=given.adapted)
    leaves, treedef = jax.tree.flatten(adaptation.train)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    drawn = [x + 0.1 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)]
    return adaptation.replace(train=jax.tree.unflatten(treedef, drawn))


def programs(given: Case, taps: Any) -> dict[str, tuple[Callable[..., Any], Any]]:
    """By name, loss and gradients as a function of its first argument and a batch, and that
    argument."""
    adaptation = moved(given)

    def adapted(train: Any, batch: Any) -> jax.Array:
        attached = lrx.attach(given.params, adaptation.replace(train=train))
        return lrx.adapted(given.loss)(attached, batch)

    def effective(train: Any, batch: Any) -> jax.Array:
        return given.loss(lrx.effective(given.params, adaptation.replace(train=train)), batch)

    tapped = lrx.projected_value_and_grad(given.loss, taps)
    return {
        "plain": (jax.value_and_grad(given.loss), given.params),
        "adapted": (jax.value_and_grad(adapted), adaptation.train),
        "effective": (jax.value_and_grad(effective), adaptation.train),
        "tapped": (tapped, given.params),
    }


def tracing_seconds(function: Callable[..., Any], *args: Any, repetitions: int) -> float:
    """The fastest of several traces, each without what those before it had made."""
    seconds = []
    for _ in range(repetitions):
        jax.clear_caches()
        start = time.perf_counter()
        jax.make_jaxpr(function)(*args)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def difference(got: Any, want: Any) -> float:
    """The largest difference over the largest entry."""
    pairs = list(zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True))
    largest = max(float(jnp.abs(b).max()) for _, b in pairs)
    return max(float(jnp.abs(a - b).max()) for a, b in pairs) / largest


def projected(taps: Any, gradients: Any) -> dict[str, jax.Array]:
    """By path, `PᵀG` of every tapped leaf of a tree of full gradients."""
    full = {path: leaf for path, leaf, _ in trees.leaves_with_metadata(gradients)}
    return {
        path: tap.projector.down(tap.view, tap.basis, tap.view.orient(full[path]))
        for path, tap in taps.taps.items()
    }


def measure(name: str, repetitions: int) -> dict[str, Any]:
    """The row of a model: its four programs and the two errors."""
    given = case(name)
    # taps of a random basis, which needs no gradient to be made
    projector = lrx.projectors.random(rank=RANK)
    state = lrx.scale_by_projection(projector, views=given.tapped).init(given.params)
    taps = lrx.taps(state)
    row: dict[str, Any] = {"model": name}
    gradients: dict[str, Any] = {}
    for kind, (function, first) in programs(given, taps).items():
        # compiled once: its costs are read, and its gradients compared
        compiled = jax.jit(function).lower(first, given.batch).compile()
        costs: Any = compiled.cost_analysis()
        memory: Any = compiled.memory_analysis()
        gradients[kind] = compiled(first, given.batch)[1]
        seconds = tracing_seconds(function, first, given.batch, repetitions=repetitions)
        row[kind] = {
            "flops": costs["flops"],
            "bytes": costs["bytes accessed"],
            "temporary_bytes": memory.temp_size_in_bytes,
            "tracing_seconds": seconds,
        }
    # the low-rank gradients stand in the tree in the order of the sorted paths
    low = [
        x.low for x in jax.tree.leaves(gradients["tapped"], is_leaf=is_projected) if is_projected(x)
    ]
    want = projected(taps, gradients["plain"])
    row["adapted_error"] = difference(gradients["adapted"], gradients["effective"])
    row["tapped_error"] = difference(low, [want[path] for path in sorted(want)])
    return row


@commandline.command
def main(arguments: Sequence[str]) -> None:
    """Compiles and runs each program once, prints a line a model and writes the JSON."""
    parser = commandline.parser(__doc__, "experiments/results/any_function.json")
    names = [OWN, *foreign.MODELS]
    parser.add_argument("--models", nargs="+", choices=names, default=names)
    parser.add_argument("--repetitions", type=commandline.count, default=5, help="of each trace")
    options = parser.parse_args(arguments)
    words = " ".join(arguments)
    result: dict[str, Any] = {
        "command": f"python -m experiments.benchmarks.any_function {words}".strip(),
        "rank": RANK,
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "rows": [],
    }
    for name in options.models:
        row = measure(name, options.repetitions)
        result["rows"].append(row)
        of_plain = {kind: row[kind]["flops"] / row["plain"]["flops"] for kind in KINDS[1:]}
        ratios = ", ".join(f"{kind} {ratio:.2f}" for kind, ratio in of_plain.items())
        errors = f"errors {row['adapted_error']:.1e}, {row['tapped_error']:.1e}"
        print(f"{name:<20} operations of plain: {ratios}; {errors}", flush=True)
    outputs.write_result(options.output, result, replace=options.replace)


if __name__ == "__main__":
    sys.exit(main())
