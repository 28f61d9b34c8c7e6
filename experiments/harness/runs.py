"""Reading finished, unfinished and interrupted run folders, for whoever compares runs."""

import dataclasses
import hashlib
import json
import math
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.harness import metrics
from lowrank_jax.interop import documents
from lowrank_jax.interop.documents import DocumentError

# Figures of summary.json; one that a run does not have is null, and a fine-tuning run also has some
# from before it.
_MEASURED = (
    "validation_loss",
    "validation_accuracy",
    "perplexity",
    "domain_loss",
    "domain_accuracy",
)
_FIGURES = (
    *_MEASURED,
    *(f"{name}_before" for name in _MEASURED),
    "median_step_seconds",
    "trigram_loss",
    "script_perplexity",
    "state_bytes",
    "peak_memory_bytes",
    "skipped",
    "parameters",
    "trainable_parameters",
)
_SUMMARY = {
    "status": str,
    "steps": int,
    "tokens": int,
    "total_seconds": float,
    "versions?": ({str: str}, None),
    "sample?": (str, None),
    **{f"{name}?": (float, None) for name in _FIGURES},
}
_CONFIG = {"name": str, "optimizer": (dict, str)} | {
    f"{name}?": dict for name in ("model", "data", "schedule", "run")
}
_BYTES = (float, None)
_LEDGER = [{"component": str, "bytes_formula?": _BYTES, "bytes_measured?": _BYTES}]
HISTORY = "history.json"
# How a run came to be: see `experiments.harness.history`, which writes it.
_STARTED = {"started_from": str, "step": int, "with": str}
_BEFORE = {"validation_loss?": (float, None)}
_EXTENDED = {"extended": bool, "step": int, "changed": {str: [object]}, "before": (_BEFORE, None)}
_REMEDY = "leave this run out, or run it again"


class RunError(ValueError):
    """A folder that cannot be read as a run; the message names the folder and the remedy."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """What a run folder holds. Whatever the run has not written yet is empty.

    Attributes:
      name: of the folder, with as much of its path as tells it from the others.
      config: config.json.
      train, evaluations: the lines of metrics.jsonl of that kind, by step; of a step that was
        repeated, the last line.
      ledger: rows of ledger.json, without a row of totals.
      summary: summary.json, which is only there when the run has ended.
      history: history.json, extensions and the run that it started from; the oldest first.
    """

    name: str
    config: dict[str, Any]
    train: list[dict]
    evaluations: list[dict]
    ledger: list[dict]
    summary: dict[str, Any]
    history: list[dict[str, Any]] = dataclasses.field(default_factory=list)

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
        """Seconds of each step but the first, which loads programs and fills caches."""
        times = [row["step_seconds"] for row in self.train if row.get("step_seconds") is not None]
        return times[1:]

    @property
    def records_tokens(self) -> bool:
        """Whether the last evaluation says by a digest what it was of, as old runs do not."""
        return bool(self.evaluations and self.evaluations[-1].get("evaluated"))

    @property
    def evaluated(self) -> str:
        """Equal for runs whose validation losses are of the same tokens, as far as is known.

        Runs that do not record it are told apart by their configurations, and never equal one that
        does.
        """
        if self.records_tokens:
            return self.evaluations[-1]["evaluated"]
        # what changes no token is left out
        data = {
            key: value
            for key, value in self.data.items()
            if not key.endswith(("batch_size", "directory"))
        }
        return json.dumps(data, sort_keys=True)

    @property
    def text(self) -> str:
        """Equal for runs whose bits per byte are of the same text, whatever their tokenizers."""
        last = self.evaluations[-1] if self.evaluations else {}
        return last.get("text") or self.evaluated

    @property
    def data(self) -> dict[str, Any]:
        """What the configuration says of the data that are evaluated: {"section.key": value}."""
        sections = {name: self.config.get(name) or {} for name in ("data", "run", "base")}
        if not all(isinstance(section, dict) for section in sections.values()):
            return {}
        found = {f"data.{key}": value for key, value in sections["data"].items()}
        if not sections["data"].get("tokenizer", "bytes"):
            found["base.source"] = sections["base"].get("source")  # which brings the tokenizer
        return found | {"run.evaluation_tokens": sections["run"].get("evaluation_tokens")}

    def final(self, key: str) -> Any:
        """A headline figure: from the summary, else from what was recorded so far, else None.

        Keys are those of summary.json.
        """
        if self.summary.get(key) is not None:
            return self.summary[key]
        last_evaluation = self.evaluations[-1] if self.evaluations else {}
        last_step = self.train[-1] if self.train else {}
        optimizer = self.config.get("optimizer") or {}
        times = self.step_seconds
        so_far = {
            "optimizer": optimizer.get("name") if isinstance(optimizer, dict) else optimizer,
            "steps": self.steps,
            "tokens": last_step.get("tokens"),
            "validation_loss": last_evaluation.get("loss"),
            "perplexity": last_evaluation.get("perplexity"),
            "validation_accuracy": last_evaluation.get("accuracy"),
            "domain_loss": last_evaluation.get("domain_loss"),
            "bits_per_byte": bits_per_byte(last_evaluation),
            "median_step_seconds": statistics.median(times) if times else None,
            "total_seconds": last_step.get("seconds"),
        }
        return so_far.get(key)


def on_one_domain(evaluations: list[dict]) -> list[dict]:
    """Lines of metrics.jsonl whose domain's losses are of as many tokens as the last one's.

    A run that an older version began may have measured it on others, and did not say on how many.

    >>> lines = [{"domain_loss": 2.0}, {"domain_loss": 3.0, "domain_tokens": 64}, {"loss": 1.0}]
    >>> on_one_domain(lines)
    [{'domain_loss': 3.0, 'domain_tokens': 64}]
    """
    measured = [row for row in evaluations if row.get("domain_loss") is not None]
    return [
        row for row in measured if row.get("domain_tokens") == measured[-1].get("domain_tokens")
    ]


def bits_per_byte(evaluation: dict[str, Any]) -> float | None:
    """Bits per byte of a line of metrics.jsonl, from its mean loss in nats a token; or None.

    >>> bits_per_byte({"loss": math.log(2), "tokens": 100, "bytes": 50})
    2.0
    """
    loss, tokens, size = (evaluation.get(name) for name in ("loss", "tokens", "bytes"))
    if loss is None or not tokens or not size:
        return None
    # nats a token -> nats of the text -> nats a byte -> bits a byte
    return loss * tokens / size / math.log(2)


def read_run(folder: str | Path, name: str | None = None) -> Run:
    """One run folder.

    Raises RunError when it is none, or when a file of it is not what a run writes.
    """
    folder = Path(folder)
    lines_file = folder / "metrics.jsonl"
    if not os.path.isfile(lines_file):  # False of a name that is none
        what = "has no metrics.jsonl" if os.path.isdir(folder) else "does not exist"
        raise RunError(
            f"{folder} {what}: give the folder that `python -m experiments.pretrain` or `finetune` "
            "wrote"
        )
    try:
        rows = metrics.read(lines_file)
        config = _optional(folder / "config.json", _CONFIG)
        ledger = _optional(folder / "ledger.json", _LEDGER)
        ending = folder / "summary.json"
        summary = read_summary(ending) if ending.exists() else None
        history = read_history(folder)
    except DocumentError as error:
        raise RunError(str(error)) from error
    # of a step that was repeated, the last line stays
    kinds: dict[str, dict[int, dict]] = {"train": {}, "eval": {}}
    for row in rows:
        if row["kind"] in kinds:
            kinds[row["kind"]][row["step"]] = row
    train, evaluations = ([kind[step] for step in sorted(kind)] for kind in kinds.values())
    return Run(
        name=name or folder.resolve().name,
        config=config or {},
        train=train,
        evaluations=evaluations,
        ledger=[row for row in ledger or () if row["component"].lower() != "total"],
        summary=summary or {},
        history=history,
    )


def _optional(path: Path, shape: Any) -> Any:
    """A document of a run folder; None where the run has not written it yet."""
    return documents.read(path, shape, remedy=_REMEDY) if path.exists() else None


def read_runs(folders: Sequence[str | Path]) -> list[Run]:
    """Several run folders, in the order given, each once, under names that tell them apart."""
    paths = list(dict.fromkeys(Path(folder).resolve() for folder in folders))
    if not paths:
        raise RunError("no run folders: name at least one, such as runs/default")
    # as many parts of the paths as it takes to tell them apart
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    return [read_run(path, "/".join(path.parts[-depth:])) for path in paths]


def read_history(folder: Path) -> list[dict[str, Any]]:
    """What history.json says, [] where there is none. Raises documents.DocumentError."""
    path = folder / HISTORY
    entries = documents.read(path, [(_STARTED, _EXTENDED)], remedy=_REMEDY) if path.exists() else []
    for entry in entries:
        changed = {} if "started_from" in entry else entry["changed"]
        for key, values in changed.items():
            if len(values) != 2:
                needed = "where the value before and the one after are needed"
                raise documents.Unexpected(
                    f"{path}: changed[{key!r}] is {values!r}, {needed}; {_REMEDY}"
                )
    return entries


def history_lines(entries: list[dict[str, Any]]) -> list[str]:
    """One line of text for each entry.

    >>> history_lines(
    ...     [
    ...         {
    ...             "extended": True,
    ...             "step": 12,
    ...             "changed": {"schedule.steps": [12, 20]},
    ...             "before": None,
    ...         }
    ...     ]
    ... )
    ['extended after update 12: schedule.steps 12 -> 20']
    """
    found = []
    for entry in entries:
        if "started_from" in entry:
            found.append(
                f"started from {entry['started_from']}, update {entry['step']}: its {entry['with']}"
            )
            continue
        changed = ", ".join(
            f"{key} {old!r} -> {new!r}" for key, (old, new) in entry["changed"].items()
        )
        loss = (entry["before"] or {}).get("validation_loss")
        was = "" if loss is None else f" (validation loss {loss:.4f} before)"
        found.append(f"extended after update {entry['step']}: {changed}{was}")
    return found


def sealed(summary: dict[str, Any]) -> dict[str, Any]:
    """A summary as summary.json holds it: with a digest of itself."""
    return summary | {"digest": _digest(summary)}


def read_summary(path: str | Path) -> dict[str, Any]:
    """What summary.json says.

    Raises documents.DocumentError, also where it was changed since the run wrote it.
    """
    summary = documents.read(path, _SUMMARY, remedy=_REMEDY)
    digest = summary.pop("digest", None)  # older runs have none
    if digest is not None and digest != _digest(summary):
        raise DocumentError(f"{path} was changed since its run wrote it; {_REMEDY}")
    return summary


def _digest(summary: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(summary, sort_keys=True).encode()).hexdigest()
