"""Models to start from: run folders, exported folders, folders of transformers, new ones.

`open_base` reads only what describes a model; `Base.read` reads its parameters.
"""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from experiments.data.tokenizer import found_in
from experiments.data.tuning import TuningDataConfig
from experiments.finetuning.base import (
    EXPORTED,
    Base,
    Place,
    meaning_of,
    parameter_digest,
    parameter_shapes,
    read_description,
    read_document,
    read_parameters,
    read_sections,
    restore_newest,
)
from experiments.finetuning.model import MODEL, Model
from experiments.harness.workdir import read_config
from experiments.models import huggingface, llama, vit
from experiments.settings import configuration, finetuning_configuration
from experiments.settings.finetuning_configuration import BaseConfig, TuningConfig
from experiments.settings.sections import ConfigurationError


def open_base(config: BaseConfig, seed: int, tokenizer: str = "") -> Base:
    """The model that `config` names. Raises ConfigurationError for a folder that holds none.

    Args:
      config: the folder, or the preset of new parameters.
      seed: of new parameters.
      tokenizer: of the data; one that is not "bytes" sets the vocabulary of a new language model.

    Its `read` raises ConfigurationError, too, where a parameter is not finite: a run from it could
    only diverge.
    """
    if not config.source:
        return _new(config, seed, tokenizer)
    base = _opened(config)

    # an overflow of the base's own training shows here, not after the first update
    def read(place):
        params = base.read(place)
        _check_finite(params, config.source)
        return params

    return dataclasses.replace(base, read=read)


def _check_finite(params, source: str) -> None:
    """ConfigurationError that names the first leaf with a value that is not finite."""
    count = jax.jit(lambda tree: jax.tree.map(lambda leaf: jnp.sum(~jnp.isfinite(leaf)), tree))
    for path, found in jax.tree_util.tree_leaves_with_path(jax.device_get(count(params))):
        if found:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ConfigurationError(
                f"base.source={source!r}: {found} values of {name} are not finite; restore it, or "
                "name another base"
            )


def _opened(config: BaseConfig) -> Base:
    """The model of a folder, whatever kind of folder it is."""
    folder = pathlib.Path(config.source).expanduser()
    path = folder / "config.json"
    if not path.is_file():
        what = "has no config.json" if folder.is_dir() else "does not exist"
        raise ConfigurationError(
            f"base.source={config.source!r} {what}: name a run folder (`make train` makes "
            "runs/default), an exported folder, or one of Hugging Face's transformers"
        )
    values = read_document(path, dict, config.source)
    overrides = _overrides(config)
    # what its config.json holds says who wrote it
    if "model_type" in values or "architectures" in values:
        return _of_transformers(folder, config, overrides)
    if "adapter" in values:
        base = tuned_base(folder, read_config(folder))
    elif values.get("format") == EXPORTED:
        base = _exported(folder)
    else:
        base = _pretrained(folder)
    return _with(base, config, overrides)


def _overrides(config: BaseConfig) -> dict[str, Any]:
    """What the configuration says of the model in place of the folder or the preset."""
    given = {name: getattr(config, name) for name in ("dtype", "param_dtype", "remat")}
    return {name: value for name, value in given.items() if value is not None}


def _new(config: BaseConfig, seed: int, tokenizer: str) -> Base:
    """A model of new parameters, drawn from the seed."""
    preset = finetuning_configuration.PRESETS[config.preset or ""]
    model_config = dataclasses.replace(preset, **_overrides(config))
    is_vit = isinstance(model_config, vit.VitConfig)
    if not is_vit:
        size = configuration.tokenizers_size(tokenizer) if tokenizer else None
        model_config = dataclasses.replace(
            model_config, vocabulary_size=size or model_config.vocabulary_size
        )
    # one example of what the model reads, which decides no shape of a parameter
    model = vit.Vit(model_config) if is_vit else llama.Llama(model_config)
    example = jnp.zeros((1, *_image(model_config))) if is_vit else jnp.zeros((1, 1), jnp.int32)

    def read(place):
        shardings = place(parameter_shapes(model_config))
        init = jax.jit(lambda key: model.init(key, example)["params"], out_shardings=shardings)
        return init(jax.random.key(seed))

    base = Base(
        source=config.preset or "",
        config=model_config,
        read=read,
        tokenizer="" if is_vit else "bytes",
    )
    return dataclasses.replace(base, domain=_domain(config, base))


def _image(config: vit.VitConfig) -> tuple[int, int, int]:
    return config.image, config.image, config.channels


def _of_transformers(folder: pathlib.Path, config: BaseConfig, overrides: dict) -> Base:
    """A folder of Hugging Face's transformers."""
    try:
        values = huggingface.read_config(folder / "config.json")
        model_config = huggingface.config_from(values, **overrides)
    except ValueError as error:
        raise ConfigurationError(f"base.source={config.source!r}: {error}") from error

    def read(place):
        shardings = place(parameter_shapes(model_config))
        try:
            return huggingface.load(folder, shardings=shardings, **overrides)[1]
        except (ValueError, OSError, ImportError) as error:
            raise ConfigurationError(f"base.source={config.source!r}: {error}") from error

    base = Base(source=config.source, config=model_config, read=read, tokenizer=found_in(folder))
    return dataclasses.replace(base, domain=_domain(config, base))


def _pretrained(folder: pathlib.Path) -> Base:
    """A run of `experiments.pretrain`."""
    try:
        config = configuration.from_dict(read_config(folder))
    except ConfigurationError as error:
        raise ConfigurationError(
            f"base.source={str(folder)!r} holds no run of this program: {error}"
        ) from error
    # the run's own copy, where it has one: the file that was named may be gone
    tokenizer = found_in(folder) or config.data.tokenizer
    shapes, meaning = parameter_shapes(config.model), {"model": dataclasses.asdict(config.model)}
    return Base(
        source=str(folder),
        config=config.model,
        read=lambda place: read_parameters(folder, shapes, place, meaning),
        tokenizer=tokenizer,
        domain=TuningDataConfig(**dataclasses.asdict(config.data) | {"tokenizer": tokenizer}),
    )


def _exported(folder: pathlib.Path) -> Base:
    """What `experiments.finetune --export` wrote for `base.source`."""
    values = read_description(folder / "config.json")
    config, domain = read_sections(values, str(folder))
    classes = tuple(values["classes"])
    # a vision transformer's head is part of its own configuration
    count = len(classes) if isinstance(config, llama.LlamaConfig) else 0
    shapes = parameter_shapes(config, count)
    return Base(
        source=str(folder),
        config=config,
        read=lambda place: read_parameters(folder, shapes, place, meaning_of(values)),
        tokenizer=found_in(folder) or values["tokenizer"],
        classes=classes,
        domain=dataclasses.replace(domain, tokenizer=found_in(folder) or domain.tokenizer),
    )


def _with(base: Base, config: BaseConfig, overrides: dict) -> Base:
    """The base with another domain, dtypes and rematerialisation."""
    model_config = dataclasses.replace(base.config, **overrides)

    def read(place):
        params = base.read(place)
        if model_config.param_dtype == base.config.param_dtype:
            return params
        dtype = llama.DTYPES[model_config.param_dtype]
        cast = lambda tree: jax.tree.map(lambda leaf: leaf.astype(dtype), tree)  # noqa: E731
        return jax.jit(cast, out_shardings=place(params))(params)

    domain = _domain(config, base)
    return dataclasses.replace(
        base, source=config.source, config=model_config, read=read, domain=domain
    )


def _domain(config: BaseConfig, base: Base) -> TuningDataConfig | None:
    """The data on which forgetting is measured; None where it is not."""
    if config.domain == "none":
        return None
    if config.domain is None:
        return base.domain
    try:
        length = None if base.is_vit else min(256, base.config.sequence_length)
        task = "classification" if base.is_vit else "language_modelling"
        return TuningDataConfig(
            name=config.domain, task=task, tokenizer=base.tokenizer, sequence_length=length
        )
    except ValueError as error:
        raise ConfigurationError(f"base.domain={config.domain!r}: {error}") from error


def tuned_base(folder: pathlib.Path, values: dict) -> Base:
    """The tuned model of the run in `folder`, whose config.json holds `values`."""
    config = finetuning_configuration.from_dict(values)
    description = read_description(folder / MODEL)
    tokenizer = found_in(folder) or description["tokenizer"]
    # which may be a tuned one again
    base = open_base(config.base, config.run.seed, tokenizer)
    model = Model(config, base, tuple(description["classes"]))
    return Base(
        source=str(folder),
        config=model.config,
        read=lambda place: _merged(folder, config, model, place),
        tokenizer=tokenizer,
        classes=model.classes,
        domain=TuningDataConfig(**description["domain"] | {"tokenizer": tokenizer}),
    )


def _merged(folder: pathlib.Path, config: TuningConfig, model: Model, place: Place) -> Any:
    """Plain parameters of the newest good checkpoint."""
    return model.parts.merged(*read_tuned(folder, config, model, place))


def read_tuned(folder: pathlib.Path, config: TuningConfig, model: Model, place: Place) -> tuple:
    """Of the newest good checkpoint: what trained, the rest of the state, and frozen arguments."""
    parts, digest = model.parts, None
    frozen: tuple = ()
    if parts.needs_base:
        params = model.base.read(place)
        digest = parameter_digest(params)
        frozen = parts.cut_off(model.with_head(params, config.run.seed, place))
    # the key of dropout is no part of the model
    shardings = parts.shardings(place(model.shapes))
    like = {name: tree for name, tree in parts.abstract.items() if name != "key"}
    places = {name: tree for name, tree in shardings.items() if name != "key"}
    restored = restore_newest(folder, like, places, model.meaning())
    if digest is not None and restored.extra["base"] != digest:
        raise ConfigurationError(
            f"base.source={config.base.source!r}: its parameters changed since {folder} was "
            "trained; restore them"
        )
    rest = {name: tree for name, tree in restored.tree.items() if name != "params"}
    return restored.tree["params"], rest, *frozen
