"""The study of optimizers behind docs/results/compare.md: `python -m experiments.study --time`, or
`make compare`.

Every method pre-trains the `nano` preset on the standard library's source for the same number of
updates, with the same batches, AdamW and Muon tuned exactly as the others. Learning rates lie on a
log grid of half decades: three around the method's usual one with one seed, one more (at most two a
side) while the best is at the edge, then two more seeds at the best. AdamW's spread over seeds says
how large a difference must be to mean anything.

The queue is resumable: a run that is finished is not repeated, one that was stopped goes on from
its checkpoint. Runs are processes of one core each. After the budget no new run starts; the table
then says what is missing. Results go to `experiments/results/compare.json`; `--known` that file
goes on from it in another clone.

What a step keeps, reduces and takes: bytes of the optimizer's state; bytes of the gradients that
data parallelism would reduce between two refreshes, low-rank ones where the method needs no others;
and seconds of whole steps in turns, on one core with nothing beside them.
"""

import argparse
import dataclasses
import itertools
import json
import math
import os
import pathlib
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from experiments.benchmarks import commandline
from experiments.harness import methods, outputs, runs
from lowrank_jax.interop import documents

GRID = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
SEEDS = (0, 1, 2)
EXTENSIONS = 2
RESULTS = pathlib.Path(__file__).parents[1] / "results" / "compare.json"
COMMAND = "python -m experiments.study --time"
LENGTH = 64  # tokens of a sequence
TOKENS = 256  # of an update

RANK = 32  # a quarter of the width

# {title: (the centre of the grid, the optimizer's settings)}
METHODS: dict[str, tuple[float, dict]] = {
    row.title: (
        row.learning_rate,
        {"name": name} | ({"rank": RANK} if method.needs_rank(None) else {}) | dict(row.settings),
    )
    for name, method in methods.METHODS.items()
    for row in method.studied
}

Key = tuple[str, float, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """What is run.

    Attributes:
      root: folder of the runs.
      steps: updates of a run.
      tokens: of an update.
      titles: of the methods.
    """

    root: pathlib.Path = pathlib.Path("runs/compare")
    steps: int = 1000
    tokens: int = TOKENS
    titles: tuple[str, ...] = tuple(METHODS)

    @property
    def command(self) -> str:
        """That repeats it."""
        words = [COMMAND]
        words += [f"--steps {self.steps}"] * (self.steps != 1000)
        words += [f"--tokens {self.tokens}"] * (self.tokens != TOKENS)
        if self.titles != tuple(METHODS):
            words.append(f"--methods {shlex.join(self.titles)}")
        return " ".join(words)


def values(method: str, learning_rate: float, seed: int, steps: int, tokens: int = TOKENS) -> dict:
    """The configuration of one run, as `experiments.settings.configuration.from_dict` reads it."""
    settings = METHODS[method][1] | {"learning_rate": learning_rate, "weight_decay": 0.0}
    return {
        "name": f"{method}, lr {learning_rate:g}, seed {seed}",
        "model": {"preset": "nano"},
        "data": {"sequence_length": LENGTH, "batch_size": tokens // LENGTH},
        "optimizer": settings,
        "schedule": {"steps": steps},
        "checkpoint": {"every": max(1, steps // 2), "keep": 1},
        "run": {
            "seed": seed,
            "evaluate_every": 0,
            "evaluation_tokens": 128 * 1024,
            "evaluation_batch_size": 64,
            "sample_tokens": 0,
        },
    }


def loss_of(summary: dict) -> float:
    """Final validation loss; infinite for a run that diverged."""
    loss = summary.get("validation_loss")
    return math.inf if summary.get("status") != "finished" or loss is None else loss


def first_seed(done: dict[Key, dict], method: str) -> dict[float, float]:
    """{learning rate: loss} of the search, which uses the first seed."""
    rows = done.items()
    return {
        rate: loss_of(summary)
        for (name, rate, seed), summary in rows
        if name == method and seed == SEEDS[0]
    }


def wanted(done: dict[Key, dict], method: str) -> list[Key]:
    """The runs a method needs next, given the finished ones; empty when it is complete.

    >>> wanted({}, "AdamW")
    [('AdamW', 0.001, 0), ('AdamW', 0.003, 0), ('AdamW', 0.01, 0)]
    """
    # three rates around the usual one, with one seed
    centre = GRID.index(METHODS[method][0])
    searched = first_seed(done, method)
    low, high = centre - 1, centre + 1
    while True:
        missing = [rate for rate in GRID[low : high + 1] if rate not in searched]
        if missing:
            return [(method, rate, SEEDS[0]) for rate in missing]
        # further where the best is at the edge; else more seeds at the best
        best = GRID.index(min(GRID[low : high + 1], key=searched.__getitem__))
        if best == low and low > max(0, centre - 1 - EXTENSIONS):
            low -= 1
        elif best == high and high < min(len(GRID) - 1, centre + 1 + EXTENSIONS):
            high += 1
        else:
            return [key for seed in SEEDS[1:] if (key := (method, GRID[best], seed)) not in done]


def folder(root: pathlib.Path, key: Key) -> pathlib.Path:
    """The run folder of one run."""
    method, rate, seed = key
    name = "".join(c if c.isalnum() else "_" for c in method).strip("_").lower()
    return root / f"{name}-lr{rate:g}-seed{seed}"


def finished(study: Study) -> dict[Key, dict]:
    """Summaries of the runs that are over: in their folders, or known from `<root>/known.json`."""
    path = study.root / "known.json"
    known = read_known(path)["finished"] if path.exists() else {}
    done = {}
    for key in itertools.product(study.titles, GRID, SEEDS):
        own = folder(study.root, key)
        path = own / "summary.json"
        if path.exists():
            done[key] = runs.read_summary(path)
        elif own.name in known:
            done[key] = known[own.name]
    return done


def measure_steps(study: Study, repetitions: int = 20) -> dict[str, dict[str, float]]:
    """{method: median seconds of one whole training step, interleaved, on one core; and the bytes
    of its gradients that replicas reduce}.

    Runs side by side disturb each other, so their own times say little.
    """
    # one core, as the runs have it; jax counts the cores when it is imported
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    import jax

    from experiments.benchmarks import timing
    from experiments.data import load
    from experiments.harness import optimizers, updates
    from experiments.models import llama
    from experiments.settings import configuration

    cases, reduced = {}, {}
    for method in study.titles:
        rate = METHODS[method][0]
        config = configuration.from_dict(values(method, rate, SEEDS[0], 1000, study.tokens))
        model, schedule = llama.Llama(config.model), optimizers.schedule(config.schedule, rate)
        optimizer = optimizers.build(config.optimizer, schedule, stacked=True, seed=SEEDS[0])
        batch = load(config.data).train.batch(0)
        params = model.init(jax.random.key(0), batch["inputs"])["params"]
        # clipping would stand before the projection and hide it
        free = dataclasses.replace(config.optimizer, clip_norm=None)
        bare = optimizers.build(free, schedule, stacked=True, seed=SEEDS[0])
        reduced[method] = reduced_bytes(model, bare, params, batch)
        update = jax.jit(updates.train_step(model, optimizer, 1), donate_argnums=0)
        held = [update({"params": params, "opt_state": optimizer.init(params)}, batch)[0]]

        def step(update=update, held=held, batch=batch):
            def run():
                # the state is donated: each step goes on from the one before
                held[0], _ = update(held[0], batch)
                return held[0]

            return timing.seconds(run)

        step()  # compiles
        cases[method] = step
    seconds = timing.interleave(cases, repetitions)
    return {
        method: {"seconds": seconds[method], "reduced_bytes": reduced[method]} for method in cases
    }


def reduced_bytes(model: Any, optimizer: Any, params: Any, batch: Any) -> int:
    """Bytes of the gradients of a step between two refreshes: low-rank ones by taps where the
    optimizer needs no others, else all."""
    import jax
    import jax.numpy as jnp

    import lowrank_jax as lrx
    from lowrank_jax.projection.training import gradient_mode
    from lowrank_jax.trees import bytes_of

    projection = getattr(optimizer, "projection", None)
    samples = not isinstance(getattr(projection, "sampler", None), lrx.samplers.All)
    if projection is None or samples or gradient_mode(projection) == "full":
        return bytes_of(params)

    def loss(params: Any, batch: Any) -> Any:
        return jnp.mean(model.apply({"params": params}, batch["inputs"]))

    def gradients(params: Any, state: Any, batch: Any) -> Any:
        return lrx.projected_value_and_grad(loss, lrx.taps(state))(params, batch)[1]

    state = jax.eval_shape(optimizer.init, params)
    low = jax.eval_shape(gradients, params, state, batch)
    return bytes_of(low)


def collect(
    study: Study,
    done: dict[Key, dict],
    spent_hours: float,
    budget_hours: float,
    measured: dict[str, dict[str, float]],
) -> dict:
    """The committed result: one row for each method, and every run behind it."""
    rows = []
    for method in study.titles:
        # a rate that diverged is no candidate
        searched = {
            rate: loss for rate, loss in first_seed(done, method).items() if math.isfinite(loss)
        }
        if not searched:
            continue
        best = min(searched, key=searched.__getitem__)
        summaries = [
            s for (name, rate, _), s in sorted(done.items()) if name == method and rate == best
        ]
        losses = [loss_of(summary) for summary in summaries]
        rows.append(
            {
                "method": method,
                "learning_rate": best,
                "seeds": len(losses),
                "validation_loss": statistics.mean(losses),
                "spread": max(losses) - min(losses),
                "state_bytes": summaries[0]["state_bytes"],
                "step_seconds": measured.get(method, {}).get("seconds"),
                "reduced_bytes": measured.get(method, {}).get("reduced_bytes"),
                "complete": not wanted(done, method),
                "search": {
                    f"{rate:g}": loss_of(done[method, rate, SEEDS[0]]) for rate in sorted(searched)
                },
            }
        )
    anything: dict = next(iter(done.values()), {})
    root = pathlib.Path()
    return {
        "command": study.command,
        "steps": study.steps,
        "tokens_per_update": study.tokens,
        "rank": RANK,
        "preset": "nano",
        "budget_hours": budget_hours,
        "spent_hours": round(spent_hours, 2),
        "device": "one CPU core a run",
        "versions": anything.get("versions", {}),
        "runs": len(done),
        # as text: fewer of them are no less of a result
        "missing": ", ".join(title for title in study.titles if title not in {k[0] for k in done}),
        "diverged": sorted(
            folder(root, key).name for key, s in done.items() if not math.isfinite(loss_of(s))
        ),
        "rows": rows,
        "finished": {
            folder(root, key).name: {
                name: s.get(name)
                for name in ("status", "validation_loss", "state_bytes", "versions")
            }
            for key, s in sorted(done.items())
        },
    }


def worker(study: Study, key: Key, core: int) -> None:
    """One run, on one core, in this process."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {core})
    from experiments.harness import training
    from experiments.settings import configuration

    training.run(
        configuration.from_dict(values(*key, study.steps, study.tokens)),
        folder(study.root, key),
        handle_signals=True,
        verbose=False,
    )


def _next(study: Study, done: dict[Key, dict], running: list[Key]) -> Key | None:
    """The next run to start: searches first, breadth first over methods."""
    # of each method what it wants next; searches before seeds, and methods take turns
    wants = [wanted(done, method) for method in study.titles]
    queues = [[key for key in own if key not in running] for own in wants]
    ready = [queue[0] for queue in queues if queue]
    started = [name for name, _, _ in [*done, *running]]
    return min(ready, key=lambda key: (key[2] > 0, started.count(key[0])), default=None)


def _cores() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return [*range(os.cpu_count() or 1)]


def _started(study: Study, key: Key, core: int) -> subprocess.Popen:
    """A process of this command that makes one run on one core."""
    method, rate, seed = key
    command = [sys.executable, "-m", "experiments.study", "--root", str(study.root)]
    sizes = ["--steps", str(study.steps), "--tokens", str(study.tokens)]
    own = ["--run", method, str(rate), str(seed), "--core", str(core)]
    return subprocess.Popen([*command, *sizes, *own])


def queue(
    study: Study,
    *,
    workers: int,
    budget_hours: float,
    results: pathlib.Path,
    replace: bool = False,
) -> dict:
    """Runs what is wanted until nothing is, or the budget is spent.

    Writes the results after every run.

    `results` is replaced only by at least what it holds, or where `replace` says so
    (`outputs.write_result`).
    """
    cores, root = _cores(), study.root
    root.mkdir(parents=True, exist_ok=True)
    clock = root / "spent_hours"  # of all lives of the queue
    before = 0.0
    if clock.exists():
        before = documents.read(clock, float, remedy="write the hours there, or remove it")
    begin = time.monotonic()
    measured = known_steps(root)
    active: dict[int, tuple[Key, subprocess.Popen]] = {}
    stopping = False

    def stop(*_):
        """Runs save and end; no other begins."""
        nonlocal stopping
        stopping = True
        for _, process in active.values():
            process.send_signal(signal.SIGTERM)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    while True:
        spent = before + (time.monotonic() - begin) / 3600
        done = finished(study)
        for slot in range(workers):
            running = [key for key, _ in active.values()]
            idle = not stopping and spent <= budget_hours and slot not in active
            key = _next(study, done, running) if idle else None
            if key is not None:
                active[slot] = key, _started(study, key, cores[slot % len(cores)])
                method, rate, seed = key
                line = f"{len(done)} done; {method}, lr {rate:g}, seed {seed}"
                print(f"[{spent:.2f} of {budget_hours:g} h] {line}", flush=True)
        if not active:
            break
        time.sleep(1)
        for slot, (key, process) in list(active.items()):
            if process.poll() is None:
                continue
            del active[slot]
            if process.returncode and not stopping:
                stop()
                raise SystemExit(
                    f"{key} failed with exit code {process.returncode}; its folder is "
                    f"{folder(root, key)}"
                )
            # after every run, so that a kill loses nothing but what it interrupted
            spent = before + (time.monotonic() - begin) / 3600
            outputs.write_json(clock, spent)
            result = collect(study, finished(study), spent, budget_hours, measured)
            outputs.write_result(results, result, replace=replace)
    spent = before + (time.monotonic() - begin) / 3600
    result = collect(study, finished(study), spent, budget_hours, measured)
    outputs.write_result(results, result, replace=replace)
    return result


def known_steps(root: pathlib.Path) -> dict[str, dict[str, float]]:
    """What `--time` measured, if it ran."""
    path = root / "steps.json"
    shape = {str: {"seconds": float, "reduced_bytes": float}}
    remedy = "remove it, or run --time again"
    return documents.read(path, shape, remedy=remedy) if path.exists() else {}


def read_known(path: pathlib.Path) -> dict:
    """An earlier result, or one of another clone."""
    run = {"status": (str, None), "validation_loss": (float, None), "state_bytes": (int, None)}
    return documents.read(
        path, {"finished": {str: run}}, remedy="give the compare.json of an earlier study"
    )


def tokens(text: str) -> int:
    """A number of tokens that are whole sequences.

    >>> tokens("100")
    Traceback (most recent call last):
    argparse.ArgumentTypeError: 100: give a multiple of 64, the length of a sequence
    """
    value = commandline.count(text)
    if value % LENGTH:
        raise argparse.ArgumentTypeError(
            f"{text}: give a multiple of {LENGTH}, the length of a sequence"
        )
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--root", type=commandline.folder, default="runs/compare", help="folder of the runs"
    )
    parser.add_argument("--steps", type=commandline.count, default=1000, help="updates of a run")
    parser.add_argument("--tokens", type=tokens, default=TOKENS, help="of an update")
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=list(METHODS),
        default=list(METHODS),
        metavar="TITLE",
        help="which are compared, by the titles of their rows (default: all)",
    )
    workers = min(2, os.cpu_count() or 1)
    parser.add_argument(
        "--workers", type=commandline.count, default=workers, help="runs side by side"
    )
    parser.add_argument(
        "--budget-hours", type=commandline.positive, default=9.0, help="no run starts after this"
    )
    parser.add_argument(
        "--results", type=commandline.file, default=str(RESULTS), help="(default: %(default)s)"
    )
    commandline.add_replace(parser)
    parser.add_argument(
        "--known", type=pathlib.Path, help="earlier results whose runs are not repeated"
    )
    parser.add_argument(
        "--time",
        action="store_true",
        help="time one step of each method first, with nothing beside it",
    )
    parser.add_argument("--run", nargs=3, metavar=("METHOD", "LR", "SEED"), help=argparse.SUPPRESS)
    parser.add_argument("--core", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    return parser


@commandline.command
def main(arguments: Sequence[str]) -> None:
    """The command line."""
    options = _parser().parse_args(arguments)
    study = Study(
        root=options.root,
        steps=options.steps,
        tokens=options.tokens,
        titles=tuple(title for title in METHODS if title in options.methods),
    )
    if options.run:
        method, rate, seed = options.run
        worker(study, (method, float(rate), int(seed)), options.core)
        return
    if options.measure:
        print(json.dumps(measure_steps(study)))
        return
    if options.known:
        outputs.write_json(options.root / "known.json", read_known(options.known))
    if options.time:
        # in a process of its own, which holds one core and is gone before the runs begin
        words = ["--tokens", str(study.tokens), "--methods", *study.titles, "--measure"]
        command = [sys.executable, "-m", "experiments.study", "--root", str(study.root), *words]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        outputs.write_json(options.root / "steps.json", json.loads(printed.splitlines()[-1]))
    result = queue(
        study,
        workers=options.workers,
        budget_hours=options.budget_hours,
        results=options.results,
        replace=options.replace,
    )
    for row in result["rows"]:
        loss = f"loss {row['validation_loss']:.4f}, max - min {row['spread']:.4f}"
        print(f"{row['method']:16} lr {row['learning_rate']:<6g} {loss}")


if __name__ == "__main__":
    sys.exit(main())
