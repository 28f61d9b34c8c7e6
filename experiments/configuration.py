"""The configuration of a run: frozen dataclasses, built from an ml_collections ConfigDict.

`template()` gives the dictionary with every key and its default, for a config file to change and for the command line
to override; `from_dict` turns it back into a checked `RunConfig`. A key that is None means "the default of the preset
or method".

A value is checked alone where it is declared; what depends on several sections (a rank that no matrix has, a batch that
does not divide) is checked by `RunConfig`, and what depends on the data by `experiments.training`, all before any work.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any

from experiments.data import DataConfig
from experiments.models import llama

LOWRANK = ("galore", "dct_adamw", "frugal", "ldadam", "apollo")
OPTIMIZERS = ("adamw", "sgd", "optax_galore", *LOWRANK)
PROJECTORS = ("svd", "power", "randomized", "alternating", "sketch")
BACKPROP = ("projected", "full")


class ConfigurationError(ValueError):
    """A configuration that cannot be run; the message names field, value and remedy."""


def _require(condition: bool, field: str, value: Any, remedy: str) -> None:
    if not condition:
        raise ConfigurationError(f"{field}={value!r}: {remedy}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Which optimizer, and what differs from its own defaults.

    Attributes:
      name: one of OPTIMIZERS; `experiments.optimizers` maps it to a function.
      learning_rate: peak of the schedule.
      rank: of the projection: an integer, or a fraction of the shrunk dimension.
      projector: one of PROJECTORS in place of the method's own, for methods that take one; "sketch" is "randomized"
        by one product.
      refresh_every: steps between two changes of the subspace.
      refresh_when: "before" the update, as in the papers, or "after" it, which "alternating" and "sketch" need to do
        without full gradients.
      backprop: "projected" takes low-rank gradients through taps wherever the method allows it and steps in place,
        "full" takes full gradients and steps in place; both clip what the method keeps of the gradient. None is the
        optax form, which clips the full gradient.
      scale, weight_decay, b1, b2, eps, momentum: the method's own when None; setting one it does not have is an error.
      clip_norm: largest global norm of the gradient; None does not clip (1.0: GaLore's and FRUGAL's scripts).
    """

    name: str = "adamw"
    learning_rate: float = 1e-3
    rank: int | float | None = None
    projector: str | None = None
    refresh_every: int | None = None
    refresh_when: str | None = None
    backprop: str | None = None
    scale: float | None = None
    weight_decay: float | None = None
    b1: float | None = None
    b2: float | None = None
    eps: float | None = None
    momentum: float | None = None
    clip_norm: float | None = 1.0

    def __post_init__(self):
        _one_of("optimizer.name", self.name, OPTIMIZERS)
        _require(self.learning_rate > 0, "optimizer.learning_rate", self.learning_rate, "give a positive number")
        if self.name in (*LOWRANK, "optax_galore"):
            _require(
                self.rank is not None,
                "optimizer.rank",
                None,
                f"{self.name} needs a rank, such as a quarter of the width",
            )
        if isinstance(self.rank, float):
            _require(
                0 < self.rank <= 1, "optimizer.rank", self.rank, "a fraction lies in (0, 1]; ranks above 1 are integers"
            )
        elif self.rank is not None:
            _require(self.rank >= 1, "optimizer.rank", self.rank, "give a positive integer or a fraction in (0, 1]")
        if self.projector is not None:
            _one_of("optimizer.projector", self.projector, PROJECTORS)
        if self.backprop is not None:
            _one_of("optimizer.backprop", self.backprop, BACKPROP)
            remedy = f"{self.name} projects nothing; leave it None, or choose one of {', '.join(LOWRANK)}"
            _require(self.name in LOWRANK, "optimizer.backprop", self.backprop, remedy)
        if self.refresh_when is not None:
            _one_of("optimizer.refresh_when", self.refresh_when, ("before", "after"))
            _require(self.name in LOWRANK, "optimizer.refresh_when", self.refresh_when, f"{self.name} has no basis")
        for name in ("refresh_every", "clip_norm", "eps"):
            value = getattr(self, name)
            _require(value is None or value > 0, f"optimizer.{name}", value, "give a positive number")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Linear warm-up to the peak, then a cosine to `final_fraction` of it (0.1: GaLore's scripts).

    Attributes:
      steps: optimizer updates of the whole run.
      warmup_steps: updates of the linear ramp; None is a tenth of the steps.
      final_fraction: learning rate at the end, as a fraction of the peak.
      accumulation: microbatches per update; they divide the batch.
    """

    steps: int = 1000
    warmup_steps: int | None = None
    final_fraction: float = 0.1
    accumulation: int = 1

    def __post_init__(self):
        _require(self.steps >= 1, "schedule.steps", self.steps, "give a positive integer")
        _require(self.accumulation >= 1, "schedule.accumulation", self.accumulation, "give a positive integer")
        warmup = self.warmup_steps
        _require(
            warmup is None or 0 <= warmup < self.steps,
            "schedule.warmup_steps",
            warmup,
            f"stay below steps={self.steps}",
        )
        _require(
            0 <= self.final_fraction <= 1, "schedule.final_fraction", self.final_fraction, "give a fraction in [0, 1]"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save.

    Attributes:
      every: updates between saves; 0 saves only at the end and when asked to stop.
      keep: finished checkpoints that stay.
      verify: compare checksums when restoring.
    """

    every: int = 200
    keep: int = 2
    verify: bool = True

    def __post_init__(self):
        _require(self.every >= 0, "checkpoint.every", self.every, "give 0 or a positive integer")
        _require(self.keep >= 1, "checkpoint.keep", self.keep, "keep at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """What surrounds the updates.

    Attributes:
      seed: of the parameters, of random projections and of the sampled text.
      log_every: steps between lines of text; every step is in metrics.jsonl.
      evaluate_every: steps between evaluations (0: only at the end).
      evaluation_tokens: most validation tokens per evaluation; None is all of them.
      evaluation_batch_size: sequences per evaluation batch; None is the training batch.
      sample_tokens, sample_prompt, temperature: the text at the end; 0 tokens for none.
      tensorboard: also write event files.
      profile_steps: (first, last) steps recorded by the profiler into `profile/`, or None.
      compile_cache: keep compiled programs between runs.
      trigram: compare the validation loss with a trigram model of the training text.
    """

    seed: int = 0
    log_every: int = 50
    evaluate_every: int = 200
    evaluation_tokens: int | None = None
    evaluation_batch_size: int | None = None
    sample_tokens: int = 128
    sample_prompt: str = "def "
    temperature: float = 0.8
    tensorboard: bool = False
    profile_steps: tuple[int, ...] | None = None
    compile_cache: bool = True
    trigram: bool = False

    def __post_init__(self):
        for name in ("evaluate_every", "sample_tokens", "temperature", "seed"):
            _require(getattr(self, name) >= 0, f"run.{name}", getattr(self, name), "give 0 or more")
        _require(self.log_every >= 1, "run.log_every", self.log_every, "give a positive integer")
        for name in ("evaluation_tokens", "evaluation_batch_size"):
            value = getattr(self, name)
            _require(
                value is None or value >= 1, f"run.{name}", value, "give a positive integer, or None for the default"
            )
        window = self.profile_steps
        ordered = window is None or (len(window) == 2 and 1 <= window[0] <= window[1])
        _require(ordered, "run.profile_steps", window, "give (first, last) with 1 <= first <= last")
        _require(len(self.sample_prompt) > 0, "run.sample_prompt", self.sample_prompt, "give at least one character")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run: everything that decides its numbers, and how it is watched and saved."""

    name: str = "run"
    preset: str = "nano"
    model: llama.LlamaConfig = dataclasses.field(default_factory=lambda: llama.preset("nano"))
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = dataclasses.field(default_factory=ScheduleConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    run: LoopConfig = dataclasses.field(default_factory=LoopConfig)

    def __post_init__(self):
        smallest = smallest_dimension(self.model)
        rank = self.optimizer.rank
        if isinstance(rank, int):
            _require(
                rank <= smallest,
                "optimizer.rank",
                rank,
                f"the model's smallest matrix dimension is {smallest}; go no higher",
            )
        batch, parts = self.data.batch_size, self.schedule.accumulation
        divides = batch % parts == 0
        _require(divides, "schedule.accumulation", parts, f"choose a divisor of data.batch_size={batch}")
        length = self.data.sequence_length
        longest = self.model.sequence_length
        fits = length <= longest
        _require(
            fits,
            "data.sequence_length",
            length,
            f"the model takes {longest}; shorten it or raise model.sequence_length",
        )
        pads = self.run.trigram and self.data.packing == "pad"
        _require(
            not pads,
            "run.trigram",
            True,
            "a trigram model reads the packed stream; set data.packing='pack' or run.trigram=False",
        )
        if self.optimizer.name == "optax_galore":
            remedy = "optax.contrib.galore leaves stacked layers unprojected; set model.scan=False"
            _require(not self.model.scan, "model.scan", True, remedy)


def smallest_dimension(model: llama.LlamaConfig) -> int:
    """The smallest dimension among the matrices of a block: no projection of it has a higher rank."""
    return min(model.width, model.hidden, model.kv_heads * (model.width // model.heads))


def to_dict(config: RunConfig) -> dict:
    """Plain JSON values; `from_dict` reads them back.

    >>> from_dict(to_dict(RunConfig())) == RunConfig()
    True
    """
    sections = dataclasses.asdict(config)
    sections["model"] = {"preset": sections.pop("preset"), **sections["model"]}
    return sections


def template():
    """A ConfigDict with every key, for a config file to change and the command line to override.

    >>> template().optimizer.name
    'adamw'
    """
    from ml_collections import config_dict

    defaults = to_dict(RunConfig())
    result = config_dict.ConfigDict({"name": defaults["name"]})
    for section, kind in _SECTIONS.items():
        hints = typing.get_type_hints(kind)
        table = config_dict.ConfigDict()
        for key, value in defaults[section].items():
            of_preset = section == "model" and key != "preset"
            if of_preset or isinstance(hints.get(key), types.UnionType):
                # takes whatever the command line spells; from_dict checks the type
                table[key] = config_dict.placeholder(object)
                table[key] = None if of_preset else value
            else:
                table[key] = value
        result[section] = table
    return result


def from_dict(values: Mapping) -> RunConfig:
    """A checked RunConfig from a ConfigDict or a nested dictionary; missing keys take their defaults.

    Raises ConfigurationError for an unknown key (with the nearest known one), a value of the wrong type, or one out of
    range.

    >>> from_dict({"optimizer": {"nmae": "sgd"}})
    Traceback (most recent call last):
    experiments.configuration.ConfigurationError: optimizer.nmae='sgd': unknown key; did you mean optimizer.name?
    """
    values = values.to_dict() if hasattr(values, "to_dict") else dict(values)
    _reject_unknown("", values, ("name", *_SECTIONS))
    sections: dict[str, Any] = {}
    for section, kind in _SECTIONS.items():
        given = dict(values.get(section) or {})
        if section == "model":
            sections["preset"], sections["model"] = _model(given)
        else:
            sections[section] = _build(kind, section, given)
    _require(isinstance(values.get("name", "run"), str), "name", values.get("name"), "give a string")
    return RunConfig(name=values.get("name", "run"), **sections)


_SECTIONS = {
    "model": llama.LlamaConfig,
    "data": DataConfig,
    "optimizer": OptimizerConfig,
    "schedule": ScheduleConfig,
    "checkpoint": CheckpointConfig,
    "run": LoopConfig,
}


def _model(given: dict) -> tuple[str, llama.LlamaConfig]:
    name = given.pop("preset", "nano")
    _one_of("model.preset", name, tuple(llama.PRESETS))
    base = dataclasses.asdict(llama.PRESETS[name])
    return name, _build(
        llama.LlamaConfig, "model", base | {key: value for key, value in given.items() if value is not None}
    )


def _build(kind: type, section: str, given: dict):
    hints = typing.get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]
    _reject_unknown(f"{section}.", given, names)
    values = {key: _typed(f"{section}.{key}", value, hints[key]) for key, value in given.items()}
    try:
        return kind(**values)
    except ConfigurationError:
        raise
    except (ValueError, TypeError) as error:
        message = str(error)
        raise ConfigurationError(message if message.startswith(section) else f"{section}.{message}") from error


def _typed(field: str, value: Any, hint: Any) -> Any:
    """`value` as `hint` says: integers become floats and lists tuples, nothing else is converted."""
    choices = (
        typing.get_args(hint)
        if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
        else (hint,)
    )
    if value is None and type(None) in choices:
        return None
    kinds = tuple(typing.get_origin(choice) or choice for choice in choices)
    if isinstance(value, list) and tuple in kinds:
        return tuple(value)
    if isinstance(value, bool) and bool not in kinds:
        matches = False
    else:
        matches = Any in kinds or isinstance(value, tuple(kind for kind in kinds if isinstance(kind, type)))
    if not matches and isinstance(value, int) and not isinstance(value, bool) and float in kinds:
        return float(value)
    named = " or ".join(getattr(kind, "__name__", str(kind)) for kind in kinds if kind is not type(None))
    _require(matches, field, value, f"is of type {type(value).__name__}; give {named}")
    return value


def _reject_unknown(prefix: str, given: Mapping, known) -> None:
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), [*known], n=1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known keys are {', '.join(known)}"
            raise ConfigurationError(f"{prefix}{key}={given[key]!r}: unknown key; {hint}")


def _one_of(field: str, value: Any, choices) -> None:
    near = difflib.get_close_matches(str(value), choices, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    _require(value in choices, field, value, f"{hint}Choose one of {', '.join(choices)}")
