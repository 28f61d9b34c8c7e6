"""The configuration of a run: frozen dataclasses, built from an ml_collections ConfigDict.

`template()` gives the dictionary with every key and its default, for a config file to change and
for the command line to override; `from_dict` turns it back into a checked `RunConfig`. A key that
is None means "the default of the preset or method".

A value is checked alone where it is declared; what depends on several sections (a rank that no
matrix has, a batch that does not divide) is checked by `RunConfig`, and what depends on the data by
`experiments.harness.training`, all before any work.
"""

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

from experiments.data import DataConfig
from experiments.data.tokenizer import vocabulary_of
from experiments.harness import methods, versions
from experiments.models import llama
from experiments.settings.sections import ConfigurationError as ConfigurationError
from experiments.settings.sections import (
    Section,
    build,
    choice,
    number,
    one_of,
    plain,
    reject_unknown,
    require,
    table,
)

BACKPROP = ("projected", "full")
SIDES = ("paper", "larger", "rows", "cols", "sharding")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Section):
    """Which optimizer, and what differs from its own defaults.

    Attributes:
      name: a row of the table in `experiments.harness.methods`.
      learning_rate: peak of the schedule.
      rank: of the projection: an integer, or a fraction of the shrunk dimension; None is the
        method's own, where it has one (APOLLO-Mini's is 1).
      projector: a subspace in place of the method's own, for methods that take one; "sketch"
        is "randomized" by one product.
      side: which dimension is shrunk, one of SIDES, in place of the method's own; "sharding" keeps
        the one whole that the mesh divides, and a resumed run keeps the sides that it began with,
        whatever its mesh.
      refresh_every: steps between two changes of the subspace.
      refresh_when: "before" the update, as in the papers, or "after" it; None is after it where a
        refresh then does without full gradients, which are "alternating" and "sketch", and else
        before it.
      backprop: "projected" takes low-rank gradients through taps wherever the method allows it and
        steps in place, "full" takes full gradients and steps in place; both clip what the method
        keeps of the gradient. None is the optax form, which clips the full gradient.
      scale, weight_decay, b1, b2, eps, momentum: the method's own when None; setting one it does
        not have is an error.
      options: further settings of the method, as keyword arguments in Python: "error_feedback=True".
      clip_norm: largest global norm of the gradient; None does not clip (1.0: GaLore's and FRUGAL's
        scripts).
    """

    SECTION: ClassVar[str] = "optimizer"

    name: str = choice("adamw", methods.names("pretrain"))
    learning_rate: float = number(1e-3, above=0)
    rank: int | float | None = number(None, above=0)
    projector: str | None = choice(None, methods.PROJECTORS)
    side: str | None = choice(None, SIDES)
    refresh_every: int | None = number(None, at_least=1)
    refresh_when: str | None = choice(None, ("before", "after"))
    backprop: str | None = choice(None, BACKPROP)
    scale: float | None = number(None, above=0)
    weight_decay: float | None = number(None, at_least=0)
    b1: float | None = number(None, at_least=0, below=1)
    b2: float | None = number(None, at_least=0, below=1)
    eps: float | None = number(None, above=0)
    momentum: float | None = number(None, at_least=0, below=1)
    options: str | None = None
    clip_norm: float | None = number(1.0, above=0)

    def __post_init__(self):
        super().__post_init__()
        method = methods.METHODS[self.name]
        needed = f"{self.name} needs a rank, such as a quarter of the width"
        lacks_rank = self.rank is None and method.needs_rank(self.projector)
        require(not lacks_rank, "optimizer.rank", None, needed)
        if isinstance(self.rank, float):
            remedy = "a fraction lies in (0, 1]; ranks above 1 are integers"
            require(self.rank <= 1, "optimizer.rank", self.rank, remedy)
        projects = (
            f"{self.name} projects nothing; leave it None, or choose one of "
            f"{', '.join(methods.projections())}"
        )
        for key in methods.OF_PROJECTIONS:
            value = getattr(self, key)
            require(value is None or method.projects, f"optimizer.{key}", value, projects)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduleConfig(Section):
    """Linear warm-up to the peak, then a cosine to `final_fraction` of it (0.1: GaLore's scripts).

    Attributes:
      steps: optimizer updates of the whole run.
      warmup_steps: updates of the linear ramp; None is a tenth of the steps.
      final_fraction: learning rate at the end, as a fraction of the peak.
      accumulation: microbatches per update; they divide the batch.
    """

    SECTION: ClassVar[str] = "schedule"

    steps: int = number(1000, at_least=1)
    warmup_steps: int | None = number(None, at_least=0)
    final_fraction: float = number(0.1, at_least=0, at_most=1)
    accumulation: int = number(1, at_least=1)

    def __post_init__(self):
        super().__post_init__()
        warmup = self.warmup_steps
        fits = warmup is None or warmup < self.steps
        require(fits, "schedule.warmup_steps", warmup, f"stay below steps={self.steps}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Section):
    """When to save.

    Attributes:
      every: updates between saves; 0 saves only at the end and when asked to stop.
      keep: finished checkpoints that stay.
      verify: compare checksums when restoring.
    """

    SECTION: ClassVar[str] = "checkpoint"

    every: int = number(200, at_least=0)
    keep: int = number(2, at_least=1)
    verify: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopConfig(Section):
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
      start_from: a run folder whose newest checkpoint is the start of this run; None starts anew.
      start_with: what is taken from it: its "parameters", which None is too, or its optimizer's
        "state" besides.
    """

    SECTION: ClassVar[str] = "run"

    seed: int = number(0, at_least=0)
    log_every: int = number(50, at_least=1)
    evaluate_every: int = number(200, at_least=0)
    evaluation_tokens: int | None = number(None, at_least=1)
    evaluation_batch_size: int | None = number(None, at_least=1)
    sample_tokens: int = number(128, at_least=0)
    sample_prompt: str = "def "
    temperature: float = number(0.8, at_least=0)
    tensorboard: bool = False
    profile_steps: tuple[int, ...] | None = None
    compile_cache: bool = True
    trigram: bool = False
    start_from: str | None = None
    start_with: str | None = choice(None, ("parameters", "state"))

    def __post_init__(self):
        super().__post_init__()
        window = self.profile_steps
        ordered = window is None or (len(window) == 2 and 1 <= window[0] <= window[1])
        require(ordered, "run.profile_steps", window, "give (first, last) with 1 <= first <= last")
        remedy = "names what run.start_from gives; name a run there, or leave it None"
        require(
            self.start_from or self.start_with is None, "run.start_with", self.start_with, remedy
        )
        require(
            len(self.sample_prompt) > 0,
            "run.sample_prompt",
            self.sample_prompt,
            "give at least one character",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig(Section):
    """How the devices share the work; see `lrx.meshes`.

    Attributes:
      data, fsdp, sequence, tensor: sizes of the mesh's axes; one may be -1, which is what the
        others leave. data and fsdp together divide the batch.
      spread: divide the low-rank optimizer state as far as the parameters are
        (`lrx.state_shardings`), which needs an auto mesh; None does so there.
      explicit: array types carry their sharding, and an operation that would need a choice by the
        compiler is an error in place of a silent gather; otherwise the compiler completes the
        shardings.
    """

    SECTION: ClassVar[str] = "mesh"

    data: int = number(-1, at_least=-1)
    fsdp: int = number(1, at_least=-1)
    sequence: int = number(1, at_least=-1)
    tensor: int = number(1, at_least=-1)
    spread: bool | None = None
    explicit: bool = False

    def __post_init__(self):
        super().__post_init__()
        for name in ("data", "fsdp", "sequence", "tensor"):
            size = getattr(self, name)
            require(size != 0, f"mesh.{name}", size, "give a positive integer, or -1 for the rest")
        remedy = "an explicit mesh keeps the rank whole; leave it None, or set mesh.explicit=False"
        require(not (self.spread and self.explicit), "mesh.spread", self.spread, remedy)

    @property
    def spreads(self) -> bool:
        """Whether low-rank state is divided as far as the parameters are."""
        return not self.explicit if self.spread is None else self.spread

    def parts(self, devices: int) -> int:
        """How many parts a batch is cut into on so many devices."""
        sizes = self.sizes
        if -1 in (self.data, self.fsdp):  # the rest, whichever of the two takes it
            return max(1, devices // (self.sequence * self.tensor))
        return sizes["data"] * sizes["fsdp"]

    @property
    def sizes(self) -> dict[str, int]:
        """Of the axes, for `meshes.make_mesh`."""
        return {name: getattr(self, name) for name in ("data", "fsdp", "sequence", "tensor")}


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
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)

    def __post_init__(self):
        """What depends on several sections: each check names the key to change."""
        smallest = smallest_dimension(self.model)
        rank = self.optimizer.rank
        if isinstance(rank, int):
            remedy = f"the model's smallest matrix dimension is {smallest}; go no higher"
            require(rank <= smallest, "optimizer.rank", rank, remedy)
        batch, parts = self.data.batch_size, self.schedule.accumulation
        remedy = f"choose a divisor of data.batch_size={batch}"
        require(batch % parts == 0, "schedule.accumulation", parts, remedy)
        length, longest = self.data.sequence_length, self.model.sequence_length
        remedy = f"the model takes {longest}; shorten it or raise model.sequence_length"
        require(length <= longest, "data.sequence_length", length, remedy)
        pads = self.run.trigram and self.data.packing == "pad"
        remedy = "a trigram model reads the packed stream; set data.packing='pack' or "
        require(not pads, "run.trigram", True, remedy + "run.trigram=False")
        check_method(self, methods.METHODS[self.optimizer.name])


def check_method(config: Any, method: methods.Method) -> None:
    """ConfigurationError for the first value elsewhere that the method does not work with."""
    for refused in method.refuses:
        value = getattr(getattr(config, refused.section, None), refused.key, None)
        name = f"{refused.section}.{refused.key}"
        require(value != refused.value, name, value, refused.remedy)


def tokenizers_size(name: str) -> int | None:
    """How many ids an own tokenizer has; None for "bytes", and where the file is missing.

    Raises ConfigurationError.
    """
    try:
        return vocabulary_of(name)
    except (ValueError, OSError, ImportError) as error:
        raise ConfigurationError(str(error)) from error


def smallest_dimension(model: llama.LlamaConfig) -> int:
    """The smallest dimension among the matrices of a block: the largest rank of a projection."""
    return min(model.width, model.hidden, model.kv_heads * model.head_size)


def to_dict(config: RunConfig) -> dict:
    """Plain JSON values; `from_dict` reads them back.

    >>> from_dict(to_dict(RunConfig())) == RunConfig()
    True
    """
    sections = dataclasses.asdict(config)
    # the preset is a key of the section model, which it is the default of
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
    for section, kind in SECTIONS.items():
        result[section] = table(kind, defaults[section], free=section == "model")
    return result


def with_present_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values by present names of keys; a DeprecationWarning for each old one."""
    found, notes = versions.present_keys(values)
    for note in notes:
        warnings.warn(note, DeprecationWarning, stacklevel=3)
    return found


def from_dict(values: Mapping) -> RunConfig:
    """A checked RunConfig from a ConfigDict or a dictionary; missing keys take their defaults.

    Raises ConfigurationError for an unknown key (with the nearest known one), a value of the wrong
    type, or one out of range.

    >>> from_dict({"optimizer": {"nmae": "sgd"}})
    Traceback (most recent call last):
    experiments.settings.sections.ConfigurationError: optimizer.nmae='sgd': unknown key; did you mean optimizer.name?
    """
    values = with_present_keys(plain(values))
    reject_unknown("", values, ("name", *SECTIONS))
    sections: dict[str, Any] = {}
    for section, kind in SECTIONS.items():
        given = dict(values.get(section) or {})
        if section == "model":
            sections["preset"], sections["model"] = _model(
                given, (values.get("data") or {}).get("tokenizer")
            )
        else:
            sections[section] = build(kind, section, given)
    require(isinstance(values.get("name", "run"), str), "name", values.get("name"), "give a string")
    return RunConfig(name=values.get("name", "run"), **sections)


SECTIONS = {
    "model": llama.LlamaConfig,
    "data": DataConfig,
    "optimizer": OptimizerConfig,
    "schedule": ScheduleConfig,
    "checkpoint": CheckpointConfig,
    "run": LoopConfig,
    "mesh": MeshConfig,
}


def _model(given: dict, tokenizer: Any) -> tuple[str, llama.LlamaConfig]:
    """(preset, model); the file of an own tokenizer sets a vocabulary that is not given."""
    name = given.pop("preset", "nano")
    one_of("model.preset", name, tuple(llama.PRESETS))
    base = dataclasses.asdict(llama.PRESETS[name])
    if given.get("vocabulary_size") is None and isinstance(tokenizer, str):
        base["vocabulary_size"] = tokenizers_size(tokenizer) or base["vocabulary_size"]
    # None is the preset's
    chosen = {key: value for key, value in given.items() if value is not None}
    return name, build(llama.LlamaConfig, "model", base | chosen)
