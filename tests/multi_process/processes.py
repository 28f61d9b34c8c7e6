"""Runs of several processes on this machine, over loopback; none of them outlives its test."""

import contextlib
import os
import socket
import subprocess
import sys
import time

from experiments.harness import metrics
from tests.experiments.commands import ENVIRONMENT
from tests.experiments.runs import ROOT

STEPS = 60
FLAGS = {
    "model.width": 16,
    "model.hidden": 32,
    "model.heads": 2,
    "model.kv_heads": 1,
    "data.sequence_length": 16,
    "data.batch_size": 8,
    "optimizer.rank": 4,
    "optimizer.refresh_every": 25,
    "schedule.steps": STEPS,
    "checkpoint.every": 10,
    "checkpoint.keep": 6,
    "run.evaluate_every": 30,
    "run.evaluation_tokens": 1024,
    "run.sample_tokens": 0,
    "run.trigram": False,
}


def free_port() -> int:
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        return chosen.getsockname()[1]


class Processes:
    """`count` processes of one run, started at once; a context that kills what is left.

    Args:
      folder: holds the "text" that they train on, the "cache" of its tokens, and their output.
      workdir: of the run, or one for each process.
      changes: configuration keys; a list has one value for each process.
      flags: further flags of all.
    """

    def __init__(
        self,
        folder,
        workdir,
        count,
        *flags,
        program="pretrain",
        config="tiny.py",
        values=FLAGS,
        **changes,
    ):
        self.port, self.logs, self.children = free_port(), [], []
        values = values | {
            "data.name": str(folder / "text"),
            "data.directory": str(folder / "cache"),
        }
        values |= {key.replace("__", "."): value for key, value in changes.items()}
        environment = (
            os.environ
            | ENVIRONMENT
            | {
                # of the Makefile, and one device a process
                "XLA_FLAGS": "--xla_cpu_use_fusion_emitters=false "
                "--xla_cpu_parallel_codegen_split_count=1",
                "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
                "JAX_COMPILATION_CACHE_DIR": str(folder / "xla"),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            }
        )
        for process in range(count):
            own = {
                key: value[process] if isinstance(value, list) else value
                for key, value in values.items()
            }
            place = workdir[process] if isinstance(workdir, list) else workdir
            command = [
                sys.executable,
                "-m",
                f"experiments.{program}",
                f"--config=experiments/configs/{config}",
            ]
            command += [f"--config.{key}={value}" for key, value in own.items()]
            command += [
                f"--workdir={place}",
                "--noreport",
                "--join_timeout=60",
                "--silence_timeout=10",
                *flags,
            ]
            if count > 1:
                command += [
                    f"--coordinator=127.0.0.1:{self.port}",
                    f"--processes={count}",
                    f"--process={process}",
                ]
            log = folder / f"{self.port}.{process}.log"
            with open(log, "w") as file:
                child = subprocess.Popen(
                    command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT
                )
            self.logs.append(log)
            self.children.append(child)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for child in self.children:
            with contextlib.suppress(ProcessLookupError):
                child.kill()
            child.wait()

    def codes(self, seconds=240) -> list[int]:
        """The exit codes, once all have ended."""
        end = time.monotonic() + seconds
        for child in self.children:
            try:
                child.wait(max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise AssertionError(
                    f"still running after {seconds} s:\n" + "\n".join(self.outputs())
                ) from None
        return [child.returncode for child in self.children]

    def outputs(self) -> list[str]:
        return [log.read_text() for log in self.logs]

    def finish(self) -> list[str]:
        """Wait for an orderly end; what each process said."""
        codes = self.codes()
        assert codes == [0] * len(codes), "\n".join(self.outputs())
        return self.outputs()

    def wait_for(self, workdir, step, seconds=60) -> None:
        """Return when the run in `workdir` has ended update `step`."""
        end, path = time.monotonic() + seconds, workdir / "metrics.jsonl"
        while not (
            path.exists()
            and any(row["kind"] == "train" and row["step"] >= step for row in metrics.read(path))
        ):
            ended = [child.poll() for child in self.children]
            assert ended == [None] * len(ended) and time.monotonic() < end, (
                ended,
                "\n".join(self.outputs()),
            )
            time.sleep(0.01)
