"""The smallest change that makes a case fit, found by compiling candidates.

Changes are tried in an order that costs least of the run first: rematerialisation (a third more
forward work), more microbatches, projected backprop, another optimizer, and at last a mesh that
divides the parameters. Each is added to the ones before it; of the first combination that fits,
every change that it can do without is taken back.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from experiments.harness.methods import METHODS
from experiments.planning.cases import Case, with_mesh, with_optimizer
from experiments.settings import configuration
from experiments.settings.configuration import RunConfig
from experiments.settings.sections import ConfigurationError

Change = Callable[[RunConfig], RunConfig]
RANK = 0.25  # of the width, as in GaLore's experiments, where the configuration has no rank


@dataclasses.dataclass(frozen=True, kw_only=True)
class Advice:
    """What was found.

    Attributes:
      overrides: command-line flags that make it fit; None if nothing did.
      row: of the program with them.
      tried: `(flags, peak bytes or None)` of every compiled candidate, in order.
    """

    overrides: tuple[str, ...] | None
    row: dict[str, Any] | None
    tried: tuple[tuple[tuple[str, ...], int | None], ...]


def flags(before: RunConfig, after: RunConfig) -> tuple[str, ...]:
    """The command-line flags that lead from one configuration to another.

    >>> after = dataclasses.replace(
    ...     RunConfig(), schedule=configuration.ScheduleConfig(accumulation=4)
    ... )
    >>> flags(RunConfig(), after)
    ('--config.schedule.accumulation=4',)
    """
    old, new = configuration.to_dict(before), configuration.to_dict(after)
    return tuple(
        f"--config.{section}.{key}={value}"
        for section, table in new.items()
        if isinstance(table, dict)
        for key, value in table.items()
        if old[section][key] != value
    )


def _replaced(config: RunConfig, section: str, **values: Any) -> RunConfig:
    return dataclasses.replace(
        config, **{section: dataclasses.replace(getattr(config, section), **values)}
    )


def _accumulations(case: Case) -> Iterator[int]:
    """Larger numbers of microbatches, doubled as long as every device still has whole rows."""
    sizes, parts = case.mesh_sizes(), case.config.schedule.accumulation
    rows = case.config.data.batch_size // (sizes["data"] * sizes["fsdp"])
    while rows % (2 * parts) == 0:
        parts *= 2
        yield parts


def _optimizers(case: Case) -> Iterator[Change]:
    """Projected backprop where it is not used yet, then other optimizers with it."""
    own = case.config.optimizer
    if METHODS[own.name].projects and own.backprop != "projected":
        yield lambda config: _replaced(config, "optimizer", backprop="projected")
    has_rank = own.rank is not None and METHODS[own.name].own_rank is None
    for name, method in METHODS.items():
        if name == own.name or method.advice is None:
            continue
        settings: dict[str, Any] = {"backprop": "projected"} if method.projects else {}
        if method.needs_rank(method.advice.get("projector")) and not has_rank:
            settings["rank"] = RANK
        words = [f"{key}={value}" for key, value in (settings | dict(method.advice)).items()]
        text = ":".join([name, *words])
        yield lambda config, text=text: with_optimizer(config, text)  # type: ignore[misc]


def candidates(case: Case, row: dict[str, Any]) -> Iterator[dict[str, Change]]:
    """Combinations of named changes, in the order in which they are tried.

    Where what the step keeps is already more than the chip has, only optimizer and mesh can help:
    the others are not tried alone.
    """
    kept: dict[str, Change] = {}  # what later combinations hold, too
    hopeless = row["argument_bytes"] > row["limit_bytes"]
    if not case.config.model.remat:
        kept = {"remat": lambda config: _replaced(config, "model", remat=True)}
        if not hopeless:
            yield kept
    largest = None
    for parts in _accumulations(case):
        largest = {
            "parts": lambda config, parts=parts: _replaced(config, "schedule", accumulation=parts)
        }
        if not hopeless:
            yield kept | largest
    # smaller batches cost nothing of the result, so the largest number of them stays
    kept |= largest or {}
    last: Change | None = None
    for change in _optimizers(case):
        last = change
        yield kept | {"optimizer": change}
    # at last a mesh that divides the parameters: alone, and with all the rest
    sizes = case.mesh_sizes()
    if sizes["fsdp"] == 1 and case.target.chips > 1:
        rest = case.target.chips // (sizes["tensor"] * sizes["sequence"])
        text = f"data=1,fsdp={rest},tensor={sizes['tensor']},sequence={sizes['sequence']}"
        own: dict[str, Change] = {"mesh": lambda config: with_mesh(config, text)}
        yield own
        yield kept | own
        if last is not None:
            yield kept | {"optimizer": last} | own


def advise(case: Case, row: dict[str, Any], evaluate: Callable[[Case], dict[str, Any]]) -> Advice:
    """The smallest change that makes a case fit.

    Args:
      case: one that does not fit.
      row: its judged row.
      evaluate: compiles a case and gives its judged row; may raise ConfigurationError.
    """
    tried: list[tuple[tuple[str, ...], int | None]] = []
    known: dict[str, dict[str, Any] | None] = {}

    def attempt(changes: dict[str, Change]) -> tuple[tuple[str, ...], dict[str, Any]] | None:
        config = case.config
        for change in changes.values():
            config = change(config)
        candidate = dataclasses.replace(case, config=config)
        # several combinations come to one program
        words = flags(case.config, config)
        if candidate.key not in known:
            try:
                candidate.check()
                found = evaluate(candidate)
            except ConfigurationError:
                known[candidate.key] = None
                return None
            known[candidate.key] = found if found.get("fits") else None
            tried.append((words, found.get("peak_bytes")))
        result = known[candidate.key]
        return None if result is None else (words, result)

    for changes in candidates(case, row):
        best = attempt(changes)
        if best is None:
            continue
        # the last change made it fit; which of those before it can it do without?
        for name in [*changes][:-1]:
            fewer = {key: change for key, change in changes.items() if key != name}
            shorter = attempt(fewer)
            if shorter is not None:
                best, changes = shorter, fewer
        return Advice(overrides=best[0], row=best[1], tried=tuple(tried))
    return Advice(overrides=None, row=None, tried=tuple(tried))
