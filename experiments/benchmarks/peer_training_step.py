"""A whole training step here and in PyTorch: transformers' LLaMA, same shapes and weights.

The same batch and loss, in one run.

    python -m experiments.benchmarks.peer_training_step

It needs the extra `peer` (`make test-peer` makes such an environment, .venv-peer). PyTorch runs in
a child process on the same cores; the two take turns, step by step, so that they neither share
threads nor run at once. Both start from one folder of weights, and the difference of their first
losses is recorded. Times are medians of interleaved steps that refresh nothing, float32, on as many
threads as `--threads` says; processor time is that of all threads.

A ratio to one's own baseline says nothing about that baseline. The aim is on AdamW's step, against
the faster of `torch.optim.AdamW` as it is and with `fused=True`.
"""

from __future__ import annotations

import datetime
import importlib.util
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import jax
import numpy as np
import optax

import lowrank_jax as lrx
from experiments.benchmarks import commandline, timing, training_step, workload
from experiments.harness import outputs
from experiments.models import huggingface, llama

AIM = 1.25
PEERS = ("torch.optim.AdamW", "torch.optim.AdamW, fused")


def require() -> None:
    """ImportError, naming the extra, where PyTorch or transformers is missing."""
    missing = [
        name
        for name in ("torch", "transformers", "safetensors")
        if importlib.util.find_spec(name) is None
    ]
    if missing:
        raise ImportError(
            f"this benchmark needs {' and '.join(missing)}: pip install -e "
            "'.[experiments,peer]', or run it as .venv-peer/bin/python -m "
            "experiments.benchmarks.peer_training_step after `make test-peer`"
        )


def peer(folder: str, tokens: np.ndarray, threads: int, pipe: Any) -> None:
    """The child: one step for each name that it receives.

    Sends (loss, seconds, processor seconds).
    """
    import torch
    import transformers

    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    inputs = torch.tensor(tokens, dtype=torch.long)

    def start(fused: bool) -> tuple[Any, Any]:
        model = transformers.LlamaForCausalLM.from_pretrained(folder, local_files_only=True).train()
        return model, torch.optim.AdamW(
            model.parameters(), lr=1e-3, weight_decay=1e-4, fused=fused or None
        )

    cases = {name: start("fused" in name) for name in PEERS}
    while (name := pipe.recv()) is not None:
        model, optimizer = cases[name]
        wall, processor = time.perf_counter(), time.process_time()
        optimizer.zero_grad(set_to_none=True)
        logits = model(input_ids=inputs, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), inputs.flatten())
        loss.backward()
        optimizer.step()
        pipe.send(
            (float(loss.detach()), time.perf_counter() - wall, time.process_time() - processor)
        )


def own_cases(
    config: llama.LlamaConfig, of: training_step.Work, rank: int
) -> list[training_step.Case]:
    """Our AdamW, and GaLore by projected backprop with thin refreshes after the update."""
    adamw = optax.adamw(1e-3, weight_decay=1e-4)
    schedule = lrx.refresh_schedules.every(
        period=workload.PERIOD, phase=workload.PERIOD - 1, first=False, when="after"
    )
    galore = lrx.galore(
        1e-2,
        projector=lrx.projectors.alternating(rank=rank),
        refresh_schedule=schedule,
        views=workload.VIEWS,
    )
    name = f"galore, rank {rank}, projected backprop, alternating"
    return [
        training_step.make("optax.adamw", training_step.optax_step(adamw, of.loss), adamw, of),
        training_step.make(
            name, lrx.train_step(of.loss, galore), galore, of, rank=rank, tapped=True
        ),
    ]


def benchmark(
    preset: str, batch: int, length: int, repetitions: int, threads: int
) -> dict[str, Any]:
    """Rows of both programs, the difference of their first losses, and the aims."""
    config = llama.preset(preset, sequence_length=length)
    of, rank = training_step.work(config, batch), config.width // 8
    first_loss = float(jax.jit(of.loss)(of.params, of.batch))
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        huggingface.save(folder, config, of.params)
        pipe, far = context.Pipe()
        child = context.Process(
            target=peer, args=(folder, np.asarray(of.batch), threads, far), daemon=True
        )
        child.start()
        far.close()  # a child that dies is then the end of the pipe, and no endless wait
        try:
            losses = [_turn(pipe, name)[0] for name in PEERS]
            rows = _timed(pipe, own_cases(config, of, rank), repetitions)
            pipe.send(None)
        finally:
            child.join(timeout=5)
            child.terminate()
    return {
        "rows": rows,
        "loss_difference": max(abs(loss - first_loss) for loss in losses),
        "aims": aims(rows),
    }


def _turn(pipe: Any, name: str) -> tuple[float, float, float]:
    pipe.send(name)
    try:
        return pipe.recv()
    except EOFError:
        raise RuntimeError(
            f"the process that runs {name} ended; what it printed stands above"
        ) from None


def _timed(pipe: Any, own: list[training_step.Case], repetitions: int) -> list[dict[str, Any]]:
    processor: dict[str, list[float]] = {
        name: [] for name in (*PEERS, *(case.name for case in own))
    }

    def theirs(name: str) -> float:
        _, seconds, used = _turn(pipe, name)
        processor[name].append(used)
        return seconds

    def ours(case: training_step.Case) -> float:
        before = time.process_time()
        seconds = case.run()
        processor[case.name].append(time.process_time() - before)
        return seconds

    cases = {name: lambda name=name: theirs(name) for name in PEERS}
    cases |= {case.name: lambda case=case: ours(case) for case in own}
    for run in cases.values():
        run()
    seconds = timing.interleave(cases, repetitions)
    return rows_of(
        seconds, {name: statistics.median(values[1:]) for name, values in processor.items()}
    )


def rows_of(seconds: dict[str, float], processor: dict[str, float]) -> list[dict[str, Any]]:
    """A row for each case, with its ratios to the faster peer."""
    wall, used = (min(times[name] for name in PEERS) for times in (seconds, processor))
    return [
        {
            "case": name,
            "program": "PyTorch, transformers" if name in PEERS else "lowrank_jax",
            "seconds": seconds[name],
            "processor_seconds": processor[name],
            "of_peer": seconds[name] / wall,
            "processor_of_peer": processor[name] / used,
        }
        for name in seconds
    ]


def aims(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Whether AdamW's whole step here is near the faster one of PyTorch."""
    adamw = next(row for row in rows if row["case"] == "optax.adamw")
    met = adamw["of_peer"] <= AIM
    return [
        {
            "aim": "whole step, of PyTorch's AdamW",
            "of": "optax.adamw",
            "value": adamw["of_peer"],
            "bound": AIM,
            "met": met,
        }
    ]


@commandline.command
def main(arguments: Sequence[str]) -> None:
    """Runs the benchmark, prints it and writes the JSON."""
    parser = commandline.parser(__doc__, "experiments/results/peer_training_step.json")
    parser.add_argument("--preset", type=commandline.preset, default="60M")
    parser.add_argument("--batch", type=commandline.count, default=4, help="sequences")
    parser.add_argument(
        "--length", type=commandline.count, default=256, help="tokens of a sequence"
    )
    parser.add_argument("--repetitions", type=commandline.count, default=15)
    parser.add_argument(
        "--threads", type=commandline.count, default=2, help="cores that both processes may use"
    )
    options = parser.parse_args(arguments)
    try:
        require()
    except ImportError as error:
        parser.exit(2, f"{error}\n")
    if hasattr(os, "sched_setaffinity"):  # before XLA starts its threads; the child inherits it
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    words = " ".join(arguments)
    sizes = (options.preset, options.batch, options.length, options.repetitions, options.threads)
    found = benchmark(*sizes)
    machine = timing.machine()
    machine["versions"] |= {name: version(name) for name in ("torch", "transformers")}
    result = {
        "command": f"python -m experiments.benchmarks.peer_training_step {words}".strip(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": machine,
        "preset": options.preset,
        "tokens": options.batch * options.length,
        "length": options.length,
        "repetitions": options.repetitions,
        "threads": options.threads,
    } | found
    for row in result["rows"]:
        print(
            f"{row['case']:<56}{1e3 * row['seconds']:>8.0f} ms {row['of_peer']:.3f} of PyTorch's, "
            f"processor {1e3 * row['processor_seconds']:.0f} ms {row['processor_of_peer']:.3f}"
        )
    for aim in result["aims"]:
        print(
            f"{aim['aim']}: {aim['value']:.3f} <= {aim['bound']} "
            f"{'met' if aim['met'] else 'missed'}"
        )
    outputs.write_result(options.output, result, replace=options.replace)


if __name__ == "__main__":
    sys.exit(main())
