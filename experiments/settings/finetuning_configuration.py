"""The configuration of a fine-tuning run: what it starts from, what trains, on which data.

`template()` and `from_dict` as in `experiments.settings.configuration`, whose sections optimizer, schedule,
checkpoint and mesh it shares. What depends on the base is checked by `experiments.finetuning.task`,
before any work.
"""

import ast
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import lowrank_jax as lrx
from experiments.data.tuning import TuningDataConfig
from experiments.harness import methods
from experiments.models import llama, vit
from experiments.settings.configuration import (
    CheckpointConfig,
    LoopConfig,
    MeshConfig,
    OptimizerConfig,
    ScheduleConfig,
    check_method,
    with_present_keys,
)
from experiments.settings.sections import (
    ConfigurationError,
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

PRESETS = {**llama.PRESETS, **vit.PRESETS}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaseConfig(Section):
    """What is tuned.

    Attributes:
      source: a run folder of experiments.pretrain or experiments.finetune, a folder that finetune
        exported, or one of Hugging Face's transformers; "" for new parameters.
      preset: of new parameters: a preset of experiments.models.llama or experiments.models.vit.
      domain: the data on which forgetting is measured: None is what the base was trained on, as its
        folder says; or as data.name (text, with the base's tokenizer); "none" measures nothing.
      dtype, param_dtype, remat: in place of the base's own, see `LlamaConfig`; None keeps them.
    """

    SECTION: ClassVar[str] = "base"

    source: str = "runs/default"
    preset: str | None = choice(None, PRESETS)
    domain: str | None = None
    dtype: str | None = choice(None, llama.DTYPES)
    param_dtype: str | None = choice(None, llama.DTYPES)
    remat: bool | str | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.source:
            remedy = "parameters come from base.source; leave it None"
            require(self.preset is None, "base.preset", self.preset, remedy)
        else:
            remedy = "name a folder, such as runs/default, or a base.preset for new parameters"
            require(self.preset is not None, "base.source", self.source, remedy)
        if isinstance(self.remat, str):
            one_of("base.remat", self.remat, llama.REMAT_POLICIES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterConfig(Section):
    """What trains. The patterns are those of `lowrank_jax.adapt`: they match whole paths of leaves.

    Attributes:
      method: an adapter of `lowrank_jax.adapters` as it is written in Python: "lora(rank=8,
        alpha=16)", "dora(rank=4)", "lora(rank=8, init=pissa(iterations=4))"; "" trains the whole
        model.
      targets: pattern of the kernels that get it.
      rules: further (pattern, method) pairs, looked at first; an empty method leaves a kernel as it
        is.
      exclude: patterns of kernels that get none.
      layers: numbers of the layers that get any; None is all of them.
      whole: patterns of leaves that train as they are. A head that the base lacks is among them
        anyway.
      bias: "none"; "adapted" trains the biases beside adapted kernels, "all" every bias.
    """

    SECTION: ClassVar[str] = "adapter"

    method: str = "lora(rank=8)"
    targets: str = lrx.adapters.ALL_LINEAR
    rules: tuple[tuple[str, str], ...] = ()
    exclude: tuple[str, ...] = ()
    layers: tuple[int, ...] | None = None
    whole: tuple[str, ...] = ()
    bias: str = choice("none", ("none", "adapted", "all"))

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "rules", tuple(tuple(rule) for rule in self.rules))
        for rule in self.rules:
            require(len(rule) == 2, "adapter.rules", rule, "give pairs of a pattern and a method")
        for layer in self.layers or ():
            is_layer = isinstance(layer, int) and layer >= 0
            require(is_layer, "adapter.layers", self.layers, "give numbers of layers, from 0")
        others = ("rules", "exclude", "whole")
        if not self.method:
            for name in (*others, *(() if self.layers is None else ("layers",))):
                value = getattr(self, name)
                require(
                    not value,
                    f"adapter.{name}",
                    value,
                    "the whole model trains (adapter.method=''); leave it out",
                )
            require(
                self.bias == "none",
                "adapter.bias",
                self.bias,
                "the whole model trains; leave it 'none'",
            )
        self.parsed()

    def parsed(self) -> tuple[tuple[str, lrx.adapters.Adapter | None], ...]:
        """The rules for `lrx.adapt`; empty when the whole model trains."""
        if not self.method:
            return ()
        rules = [(pattern, method, "adapter.rules") for pattern, method in self.rules]
        rules.append((self.targets, self.method, "adapter.method"))
        return tuple(
            (pattern, parse(method, field) if method else None) for pattern, method, field in rules
        )


def parse(method: str, field: str = "adapter.method") -> lrx.adapters.Adapter:
    """The adapter that an expression describes: calls of `lowrank_jax.adapters` on literals.

    >>> parse("lora(rank=4, alpha=8)").rank
    4
    >>> parse("lara(rank=4)")
    Traceback (most recent call last):
    experiments.settings.sections.ConfigurationError: adapter.method='lara(rank=4)': did you mean 'lora'? ...
    """

    def refuse(remedy: str):
        raise ConfigurationError(f"{field}={method!r}: {remedy}")

    def value(node: ast.expr) -> Any:
        if not isinstance(node, ast.Call):
            try:
                return ast.literal_eval(node)
            except ValueError:
                return refuse(
                    f"{ast.unparse(node)!r} is no literal; write numbers, strings and calls with "
                    "keywords"
                )
        if (
            not isinstance(node.func, ast.Name)
            or node.args
            or any(word.arg is None for word in node.keywords)
        ):
            return refuse("write calls of adapters with keywords alone, such as 'lora(rank=8)'")
        known = [
            name
            for name in lrx.adapters.__all__
            if name.islower() and isinstance(found(name), type)
        ]
        if node.func.id not in known:
            one_of_names(node.func.id, known)
        return called(
            found(node.func.id), {str(word.arg): value(word.value) for word in node.keywords}
        )

    def found(name: str) -> Any:
        return getattr(lrx.adapters, name)

    def one_of_names(name: str, known: list[str]) -> None:
        try:
            one_of(field, name, known)
        except ConfigurationError as error:
            refuse(str(error).split(": ", 1)[1])

    def called(kind: type, arguments: dict[str, Any]) -> Any:
        fields = [item.name for item in dataclasses.fields(kind)]
        unknown = [name for name in arguments if name not in fields]
        if unknown:
            refuse(
                f"{kind.__name__.lower()} has no {unknown[0]}; its settings are {', '.join(fields)}"
            )
        try:
            return kind(**arguments)
        except (TypeError, ValueError) as error:
            return refuse(str(error))

    try:
        tree = ast.parse(method.strip(), mode="eval").body
    except SyntaxError:
        refuse("is no expression; write it as in Python, such as 'lora(rank=8)'")
    adapter = value(tree)
    if not isinstance(adapter, lrx.adapters.Adapter):
        refuse("is no adapter; write one of lowrank_jax.adapters, such as 'lora(rank=8)'")
    return adapter


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuningOptimizerConfig(OptimizerConfig):
    """Which optimizer.

    Beside those of pre-training, some step the two factors of adapters by what they multiply
    to.

    Attributes besides those of `OptimizerConfig`:
      ratio: of lora_plus: learning rate of the second factor, as a multiple.
      damping: of scaled_adamw, altlora and altlora_plus, added to Gram matrices.
    """

    name: str = choice("adamw", methods.names("finetune"))
    ratio: float | None = number(None, above=0)
    damping: float | None = number(None, at_least=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuningLoopConfig(LoopConfig):
    """What surrounds the updates.

    Attributes besides those of `LoopConfig`:
      forgetting: also measure the loss on the base's domain, where the base says what it was
        trained on.
      domain_tokens: most tokens (or images) of the base's domain per evaluation; None is as many as
        the validation has there, in as many rows at most, so that forgetting costs no more than the
        validation.
    """

    sample_tokens: int = number(0, at_least=0)
    forgetting: bool = True
    domain_tokens: int | None = number(None, at_least=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuningConfig:
    """One fine-tuning run: everything that decides its numbers, and how it is watched and saved."""

    name: str = "finetune"
    base: BaseConfig = dataclasses.field(default_factory=BaseConfig)
    adapter: AdapterConfig = dataclasses.field(default_factory=AdapterConfig)
    data: TuningDataConfig = dataclasses.field(default_factory=TuningDataConfig)
    optimizer: TuningOptimizerConfig = dataclasses.field(default_factory=TuningOptimizerConfig)
    schedule: ScheduleConfig = dataclasses.field(default_factory=ScheduleConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    run: TuningLoopConfig = dataclasses.field(default_factory=TuningLoopConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)

    def __post_init__(self):
        adapts, name = bool(self.adapter.method), self.optimizer.name
        method = methods.METHODS[name]
        check_method(self, method)
        if method.kind == methods.PAIRS:
            remedy = (
                "steps the factors of adapters; give an adapter.method that has two, or "
                "optimizer.name='adamw'"
            )
            require(adapts, "optimizer.name", name, remedy)
        if method.projects:
            remedy = (
                "projects kernels, which adapters freeze; set adapter.method='' or "
                "optimizer.name='adamw'"
            )
            require(not adapts, "optimizer.name", name, remedy)
        remedy = (
            "adapters want a trained base; name one, or train the whole model with "
            "adapter.method=''"
        )
        require(self.base.source or not adapts, "base.source", self.base.source, remedy)
        batch, parts = self.data.batch_size, self.schedule.accumulation
        remedy = f"choose a divisor of data.batch_size={batch}"
        require(batch % parts == 0, "schedule.accumulation", parts, remedy)
        samples, task = self.run.sample_tokens, self.data.task
        require(
            not samples or task != "classification",
            "run.sample_tokens",
            samples,
            "classes are no text; set it 0",
        )
        packs = task == "language_modelling" and self.data.packing in (None, "pack")
        remedy = "a trigram model reads a packed stream of text; set it False"
        require(packs or not self.run.trigram, "run.trigram", self.run.trigram, remedy)


SECTIONS = {
    "base": BaseConfig,
    "adapter": AdapterConfig,
    "data": TuningDataConfig,
    "optimizer": TuningOptimizerConfig,
    "schedule": ScheduleConfig,
    "checkpoint": CheckpointConfig,
    "run": TuningLoopConfig,
    "mesh": MeshConfig,
}


def to_dict(config: TuningConfig) -> dict:
    """Plain JSON values; `from_dict` reads them back.

    >>> from_dict(to_dict(TuningConfig())) == TuningConfig()
    True
    """
    return dataclasses.asdict(config)


def template():
    """A ConfigDict with every key, for a config file to change and the command line to override.

    >>> template().adapter.method
    'lora(rank=8)'
    """
    from ml_collections import config_dict

    defaults = to_dict(TuningConfig())
    result = config_dict.ConfigDict({"name": defaults["name"]})
    for section, kind in SECTIONS.items():
        result[section] = table(kind, defaults[section])
    return result


def from_dict(values: Mapping) -> TuningConfig:
    """A checked TuningConfig from a ConfigDict or a dictionary; missing keys take their defaults.

    Raises ConfigurationError, as `experiments.settings.configuration.from_dict`.

    >>> from_dict({"adapter": {"method": "lora"}})
    Traceback (most recent call last):
    experiments.settings.sections.ConfigurationError: adapter.method='lora': 'lora' is no literal; ...
    """
    values = with_present_keys(plain(values))
    reject_unknown("", values, ("name", *SECTIONS))
    given = {section: dict(values.get(section) or {}) for section in SECTIONS}
    sections: dict[str, Any] = {
        section: build(kind, section, given[section]) for section, kind in SECTIONS.items()
    }
    require(isinstance(values.get("name", ""), str), "name", values.get("name"), "give a string")
    return TuningConfig(name=values.get("name", "finetune"), **sections)
