"""How a run came to be: its extensions, and the run that it started from.

`history.json` in its folder says so.

An extension goes on with a run, finished or not, under other values of EXTENSION (`--extend`): it
repeats, bit for bit, what a run does that has the old configuration up to the step of the
checkpoint and the new one after it. Where the schedule does not depend on the number of steps
(`schedule.final_fraction=1` and `schedule.warmup_steps` given), that is the longer run from its
start.

A new run starts from another's newest checkpoint by `run.start_from`: from its parameters, with an
optimizer that knows nothing; or, with `run.start_with="state"`, from its optimizer state too:
moments, bases and their counts stay, and the learning rate follows the new run's schedule from its
beginning (`optimizers.restarted`).
"""

import contextlib
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from experiments.harness import checkpoint, distributed, optimizers, runs
from experiments.settings.configuration import LoopConfig
from experiments.settings.sections import ConfigurationError

# What an extension may change: the shape of a state follows from none of them, or else it is
# refused.
EXTENSION: dict[str, tuple[str, ...]] = {
    "schedule": ("steps", "warmup_steps", "final_fraction"),
    "optimizer": (
        "learning_rate",
        "refresh_every",
        "scale",
        "weight_decay",
        "b1",
        "b2",
        "eps",
        "momentum",
        "clip_norm",
        "ratio",
        "damping",
    ),
    "run": ("evaluate_every",),
}


# What another model may have on the same parameters: how it computes, not what.
COMPUTES = (
    "dtype",
    "param_dtype",
    "remat",
    "scan",
    "attention_chunk",
    "init_std",
    "sequence_length",
)


def may_change(key: str) -> bool:
    """Whether an extension may change "section.key"."""
    section, _, name = key.partition(".")
    return name in EXTENSION.get(section, ())


@contextlib.contextmanager
def fitting(changed: Mapping[str, list], workdir: pathlib.Path) -> Iterator[None]:
    """A checkpoint of another state than an extension has is a ConfigurationError inside."""
    try:
        yield
    except checkpoint.MismatchError as error:
        if not changed:
            raise
        raise ConfigurationError(
            f"{', '.join(changed)}: under the new value the optimizer keeps another state "
            f"({error}); start a new run from the parameters, with "
            f"--config.run.start_from={workdir} and another --workdir"
        ) from error


def extend(
    workdir: pathlib.Path,
    changed: Mapping[str, list],
    step: int,
    steps: int,
    say: Callable[[str], None],
) -> None:
    """From here on the run is that of the new configuration, of `steps` updates.

    Called when the state is known to fit.

    Notes the extension, with the summary that the run had if it was over, which then is no longer
    its summary. Safe to repeat: a process that dies in the middle leaves a run that can be extended
    again.
    """
    if step >= steps:
        raise ConfigurationError(
            f"schedule.steps={steps}: the run has done {step} updates; give more"
        )
    say(runs.history_lines([{"step": step, "changed": changed, "before": None}])[0])
    if not distributed.leads():
        return
    summary = workdir / "summary.json"
    before = runs.read_summary(summary) if summary.is_file() else None
    entries = runs.read_history(workdir)
    entry = {"extended": True, "step": step, "changed": dict(changed), "before": before}
    # the process that noted it may have died before its first update
    same = bool(entries) and all(
        entries[-1].get(key) == entry[key] for key in ("extended", "step", "changed")
    )
    if not same:
        checkpoint.write_json(workdir / runs.HISTORY, [*entries, entry])
    summary.unlink(missing_ok=True)


def initial(task: Any, workdir: pathlib.Path, say: Callable[[str], None]) -> dict[str, Any]:
    """The state before the first update, from another run where the configuration names one."""
    state, settings = task.initial(), task.config.run
    if not settings.start_from:
        return state
    entry, state = started(settings, task, state, say)
    if distributed.leads():
        checkpoint.write_json(workdir / runs.HISTORY, [entry])
    say(runs.history_lines([entry])[0])
    return state


def started(
    settings: LoopConfig, task: Any, state: dict[str, Any], say: Callable[[str], None]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The entry of a new run's history, and its state, from the run that `settings` names.

    Raises ConfigurationError where there is none, or it is of another model or optimizer.
    """
    folder = pathlib.Path(settings.start_from or "").expanduser()
    with_state = settings.start_with == "state"
    where = f"run.start_from={settings.start_from!r}"
    if not (folder / "checkpoints").is_dir():
        raise ConfigurationError(f"{where}: holds no checkpoints; name the folder of a run")
    # what is taken over; the frozen arrays of adapters belong to their parameters
    parts = {
        name: tree
        for name, tree in task.abstract.items()
        if with_state or name in ("params", "fixed")
    }
    sides = optimizers.sides(task.abstract["opt_state"])
    # how the other run computed may differ, as long as the arrays mean the same
    meaning = {section: dict(entries) for section, entries in task.meaning().items()}
    for key in COMPUTES:
        meaning.get("model", {}).pop(key, None)
    checkpoints = checkpoint.Checkpoints(
        folder / "checkpoints", sides=sides, meaning=meaning, say=say
    )
    try:
        found = checkpoints.restore(parts, partial=not with_state)
    except checkpoint.CheckpointError as error:
        remedy = "; run.start_with='parameters' takes the parameters alone" if with_state else ""
        raise ConfigurationError(f"{where}: {error}{remedy}") from error
    finally:
        checkpoints.close()
    if found is None:
        raise ConfigurationError(f"{where}: holds no finished checkpoint yet; let its run save one")
    if "fixed" in parts and found.extra.get("base") != task.record()["base"][0]:
        raise ConfigurationError(
            f"{where}: its adapters belong to another base than base.source; name that one"
        )
    state = state | found.tree
    if with_state:
        state["opt_state"] = optimizers.restarted(state["opt_state"])
    what = "parameters and state" if with_state else "parameters"
    return {"started_from": str(folder.absolute()), "step": found.step, "with": what}, state
