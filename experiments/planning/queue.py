"""Runs cases one after another, each in a process, and keeps every finished row in a file."""

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax

from experiments.harness.methods import METHODS
from experiments.harness.metrics import format_bytes
from experiments.planning import measured, targets
from experiments.planning.cases import Case
from lowrank_jax.interop import documents
from lowrank_jax.version import __version__

# What a row depends on besides its case.
SOURCES = (
    "lowrank_jax",
    "experiments/models",
    "experiments/planning",
    "experiments/harness/updates.py",
    "experiments/harness/tasks.py",
    "experiments/harness/methods.py",
    "experiments/harness/optimizers.py",
    "experiments/harness/collectives.py",
)

_ENTRY = {"key": str, "source": str, "row": dict, "digest": str}


def source_digest(root: Path = targets.ROOT) -> str:
    """A digest of the code that makes a row, so that a changed step is compiled anew."""
    digest = hashlib.sha256(f"{__version__} {jax.__version__}".encode())
    for name in SOURCES:
        path = root / name
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


@dataclasses.dataclass
class Cache:
    """Rows by key, one JSON line each; a line is there whole or not at all.

    Attributes:
      path: the file; None keeps nothing.
      source: only rows with this digest of the code are read.
    """

    path: Path | None
    source: str = ""
    rows: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if self.path is None or not self.path.exists():
            return
        say = lambda error: print(error, file=sys.stderr)  # noqa: E731
        entries = documents.lines(
            self.path, _ENTRY, remedy="it is compiled anew", torn=True, passed_over=say
        )
        for number, entry in entries:
            sealed = entry.pop("digest")
            if entry["source"] != self.source:
                continue
            if sealed != _seal(entry):
                say(f"{self.path}, line {number} was changed; it is compiled anew")
                continue
            self.rows[entry["key"]] = entry["row"]

    def keep(self, key: str, row: dict[str, Any]) -> None:
        """Adds a row, and to the file too."""
        self.rows[key] = row
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # a line that a kill cut short would join this one
        if self.path.exists() and documents.is_torn(self.path):
            _drop_torn(self.path)
        entry = {"key": key, "source": self.source, "row": row}
        with open(self.path, "a") as file:
            file.write(json.dumps(entry | {"digest": _seal(entry)}) + "\n")


def _seal(entry: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()[:16]


def _drop_torn(path: Path) -> None:
    """Cut off the last line, which a killed process left without an end."""
    with open(path, "rb+") as file:
        file.truncate(file.read().rfind(b"\n") + 1)


class CompileError(RuntimeError):
    """A case whose process failed; the message is its last line."""


def compile_case(
    case: Case, python: str | None = None, tick: Callable[[float], None] | None = None
) -> dict[str, Any]:
    """The row of one case, from a process of its own, which ends when this call is interrupted.

    Args:
      case: what is compiled.
      python: an interpreter, see `targets.interpreter`.
      tick: called about once a second with the seconds so far.

    Raises:
      CompileError: where the process failed.
    """
    target = case.target
    # its compiler wants an environment of its own, which only a new process can have
    command = [targets.interpreter(target, python), "-m", "experiments.planning.program"]
    environment = os.environ | target.environment() | (measured.ENVIRONMENT if case.execute else {})
    begin = time.monotonic()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=err,
            text=True,
            env=environment,
            cwd=targets.ROOT,
        )
        try:
            assert process.stdin is not None
            process.stdin.write(json.dumps(case.to_json()))
            process.stdin.close()
            while process.poll() is None:  # often at first: small programs take a second
                time.sleep(0.1 if time.monotonic() - begin < 5 else 1.0)
                if tick is not None:
                    tick(time.monotonic() - begin)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        out.seek(0)
        err.seek(0)
        lines, errors = out.read().splitlines(), err.read().strip().splitlines()
    if process.returncode or not lines:
        # of a long output, the line that says what was wrong
        named = [line for line in errors if "Error" in line or "error" in line]
        said = (named or errors or ["it said nothing"])[-1]
        raise CompileError(f"{case.label}: exit code {process.returncode}: {said[:400]}")
    return json.loads(lines[-1])


def describe(case: Case) -> dict[str, Any]:
    """The fields of a row that say what was compiled."""
    config, target = case.config, case.target
    sizes, own = case.mesh_sizes(), config.optimizer
    parts = sizes["data"] * sizes["fsdp"] * config.schedule.accumulation
    return {
        "key": case.key,
        "preset": config.preset,
        "topology": case.topology,
        "chips": target.chips,
        "mesh": {name: size for name, size in sizes.items() if size > 1},
        "optimizer": own.name,
        "name": case.name,
        "rank": own.rank or METHODS[own.name].own_rank,
        "backprop": own.backprop,
        "batch": config.data.batch_size,
        "length": config.data.sequence_length,
        "accumulation": config.schedule.accumulation,
        "rows_per_chip": config.data.batch_size // parts,
        "remat": config.model.remat,
        "dtype": config.model.dtype,
        "param_dtype": config.model.param_dtype,
    }


def judged(row: dict[str, Any], memory: int | None = None) -> dict[str, Any]:
    """The row with `limit_bytes`, `fits` and the least seconds of a step.

    None where the target has no figures.

    Args:
      row: of `describe` and a process.
      memory: bytes a chip has for the program, in place of the chip's own.
    """
    facts = targets.parse(row["topology"]).facts
    # what the compiler said that it may use, else the data sheet
    usable = row.get("usable_bytes") or (None if facts is None else facts.hbm_bytes)
    limit = usable if memory is None else memory
    fits = None if limit is None else row["peak_bytes"] <= limit
    if not row["placed"]:  # the compiler refused it: its peak is a lower bound
        fits = False
    # at the peak rate of all chips
    least = None if facts is None else row["flops"] / row["chips"] / facts.peak_flops
    return row | {"limit_bytes": limit, "fits": fits, "seconds_at_peak": least}


def run(
    cases: Iterable[Case],
    cache: Cache,
    *,
    python: str | None = None,
    memory: int | None = None,
    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
) -> list[dict[str, Any]]:
    """Rows of all cases, in order.

    A case that fails is a row with "error"; Ctrl-C ends the list early.

    Args:
      cases: what is compiled.
      cache: what is there already, and where rows go.
      python: see `targets.interpreter`.
      memory: see `judged`.
      say: takes the lines of progress.
    """
    cases, rows = list(cases), []
    for number, case in enumerate(cases, 1):
        head = f"[{number}/{len(cases)}] {case.label}"
        row = cache.rows.get(case.key)
        try:
            if row is None:
                say(f"{head}: compiling")
                row = describe(case) | compile_case(case, python, _ticker(head))
                cache.keep(case.key, row)
                say(f"{head}: {summary(judged(row, memory))}")
            else:
                say(f"{head}: {summary(judged(row, memory))} (kept from before)")
            rows.append(judged(row, memory))
        except CompileError as error:
            say(f"{head}: failed: {error}")
            rows.append(describe(case) | {"error": str(error)})
        except KeyboardInterrupt:
            say(f"{head}: interrupted; finished rows are kept, the same command goes on here")
            break
    return rows


def summary(row: dict[str, Any]) -> str:
    """One line about a judged row."""
    verdict = {True: "fits", False: "DOES NOT FIT", None: "no limit known"}[row["fits"]]
    limit = "" if row["limit_bytes"] is None else f" of {format_bytes(row['limit_bytes'])}"
    more = "at least " if not row["placed"] else ""
    return (
        f"{verdict}, {more}{format_bytes(row['peak_bytes'])}{limit} a chip, "
        f"{row['compile_seconds']:.0f} s"
    )


def _ticker(head: str) -> Callable[[float], None] | None:
    """Seconds so far, on a terminal only."""
    if not sys.stderr.isatty():
        return None
    return lambda seconds: print(f"\r{head}: {seconds:.0f} s ", end="", file=sys.stderr, flush=True)
