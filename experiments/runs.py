"""Reading finished, unfinished and interrupted run folders, for whoever compares runs."""

import dataclasses
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import metrics


class RunError(ValueError):
    """A folder that cannot be read as a run; the message names the folder and the remedy."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """What a run folder holds. Whatever the run has not written yet is empty.

    Attributes:
      name: of the folder, with as much of its path as tells it from the others.
      config: config.json.
      train, evaluations: the lines of metrics.jsonl of that kind, by step; of a step that was repeated, the last line.
      ledger: rows of ledger.json, without a row of totals.
      summary: summary.json, which is only there when the run has ended.
    """

    name: str
    config: dict[str, Any]
    train: list[dict]
    evaluations: list[dict]
    ledger: list[dict]
    summary: dict[str, Any]

    @property
    def finished(self) -> bool:
        """Whether the run reached its end."""
        return bool(self.summary)

    @property
    def steps(self) -> int:
        """The last step that was recorded."""
        return max((row["step"] for row in self.train + self.evaluations), default=0)

    @property
    def step_seconds(self) -> list[float]:
        """Seconds of each step, without the first, in which programs are loaded and caches are cold."""
        times = [row["step_seconds"] for row in self.train if row.get("step_seconds") is not None]
        return times[1:]

    def final(self, key: str) -> Any:
        """A headline figure: from the summary, else from what was recorded so far, else None.

        Keys are those of summary.json.
        """
        if self.summary.get(key) is not None:
            return self.summary[key]
        last_evaluation = self.evaluations[-1] if self.evaluations else {}
        last_step = self.train[-1] if self.train else {}
        optimizer = self.config.get("optimizer") or {}
        so_far = {
            "optimizer": optimizer.get("name") if isinstance(optimizer, dict) else optimizer,
            "steps": self.steps,
            "tokens": last_step.get("tokens"),
            "validation_loss": last_evaluation.get("loss"),
            "perplexity": last_evaluation.get("perplexity"),
            "validation_accuracy": last_evaluation.get("accuracy"),
            "domain_loss": last_evaluation.get("domain_loss"),
            "median_step_seconds": statistics.median(self.step_seconds) if self.step_seconds else None,
            "total_seconds": last_step.get("seconds"),
        }
        return so_far.get(key)


def read_run(folder: str | Path, name: str | None = None) -> Run:
    """One run folder. Raises RunError when it is none, or when a file of it is not what a run writes."""
    folder = Path(folder)
    lines_file = folder / "metrics.jsonl"
    if not lines_file.is_file():
        what = "has no metrics.jsonl" if folder.is_dir() else "does not exist"
        raise RunError(f"{folder} {what}: give the folder that `python -m experiments.pretrain` or `finetune` wrote")
    try:
        rows = metrics.read(lines_file)
        kinds: dict[str, dict[int, dict]] = {"train": {}, "eval": {}}
        for row in rows:
            if row["kind"] in kinds:
                kinds[row["kind"]][row["step"]] = row
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise RunError(f"{lines_file} is damaged ({error}): remove the broken line, or leave this run out") from error
    train, evaluations = ([kind[step] for step in sorted(kind)] for kind in kinds.values())
    ledger = _json(folder / "ledger.json", [])
    return Run(
        name=name or folder.resolve().name,
        config=_json(folder / "config.json", {}),
        train=train,
        evaluations=evaluations,
        ledger=[row for row in ledger if row["component"].lower() != "total"],
        summary=_json(folder / "summary.json", {}),
    )


def read_runs(folders: Sequence[str | Path]) -> list[Run]:
    """Several run folders, in the order given, each once, under names that tell them apart."""
    paths = list(dict.fromkeys(Path(folder).resolve() for folder in folders))
    if not paths:
        raise RunError("no run folders: name at least one, such as runs/default")
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    return [read_run(path, "/".join(path.parts[-depth:])) for path in paths]


def _json(path: Path, otherwise: Any) -> Any:
    if not path.is_file():
        return otherwise
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise RunError(f"{path} is not JSON ({error}): leave this run out, or run it again") from error
