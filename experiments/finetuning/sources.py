"""Models to start from: run folders, exported folders and folders of Hugging Face's transformers.

`open_base` reads only what describes a model; `Base.read` reads its parameters.
"""

import dataclasses
import hashlib
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.data.tokenizer import found_in
from experiments.data.tuning import TuningDataConfig
from experiments.harness import checkpoint
from experiments.harness.workdir import read_config
from experiments.models import axes, huggingface, llama, vit
from experiments.settings import configuration, finetuning_configuration, sections
from experiments.settings.configuration import ConfigurationError
from experiments.settings.finetuning_configuration import BaseConfig
from lowrank_jax.interop import documents
from lowrank_jax.interop.documents import DocumentError
from lowrank_jax.sharding import meshes

# Shapes of parameters, or of some of them, to their shardings.
Place = Callable[[Any], Any]

# Bytes of a divided leaf that a device puts together at once, for its digest.
BLOCK = 64 * 2**20

# config.json of a folder that finetune exported begins with it
EXPORTED = "lowrank_jax model"
_DESCRIPTION = {
    "format": str,
    "architecture": str,
    "model": dict,
    "tokenizer": str,
    "classes": [str],
    "domain": dict,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Base:
    """A model to start from.

    Attributes:
      source: the folder, or the preset of new parameters.
      config: a `llama.LlamaConfig` or `vit.VitConfig`.
      read: `read(place) -> parameters`, where `place` makes shardings of shapes, as `placing` does.
      tokenizer: its name, "" where there is none.
      classes: of its head, where it has one for classes.
      domain: what it was trained on, or None.
    """

    source: str
    config: Any
    read: Callable[[Place], Any]
    tokenizer: str = ""
    classes: tuple[str, ...] = ()
    domain: TuningDataConfig | None = None

    @property
    def is_vit(self) -> bool:
        """It reads images."""
        return isinstance(self.config, vit.VitConfig)

    def placing(self, mesh: jax.sharding.Mesh | None = None) -> Place:
        """Where parameters of this kind of model lie on a mesh; by default on one device."""
        mesh = meshes.make_mesh(devices=jax.devices()[:1]) if mesh is None else mesh
        table = axes.VIT if self.is_vit else axes.LLAMA
        return lambda shapes: meshes.shardings(shapes, table, mesh)


def shapes(config, classes: int = 0) -> Any:
    """Parameters of the model of `config` as `jax.ShapeDtypeStruct`s; with a classifier where text
    has classes."""
    if isinstance(config, vit.VitConfig):
        images = jax.ShapeDtypeStruct((1, config.image, config.image, config.channels), jnp.float32)
        return jax.eval_shape(vit.Vit(config).init, jax.random.key(0), images)["params"]
    found = huggingface.shapes(config)
    if classes:
        dtype = llama.DTYPES[config.param_dtype]
        found = found | {
            "classifier": {"kernel": jax.ShapeDtypeStruct((config.width, classes), dtype)}
        }
    return found


def digest(params) -> str:
    """sha256 over path, shape, dtype and bytes of every leaf, wherever it lies.

    Leaves that several devices divide are put together block by block.

    >>> digest({"a": np.zeros(2)}) == digest({"a": jnp.zeros(2, jnp.float32)})
    False
    """
    found = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        found.update(f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype} ".encode())
        for piece in _pieces(leaf):
            found.update(np.ascontiguousarray(piece).view(np.uint8).data if piece.size else b"")
    return found.hexdigest()


def _pieces(leaf) -> Iterator[np.ndarray]:
    """The array, or blocks of its rows of some megabytes where devices divide it."""
    if not isinstance(leaf, jax.Array):
        yield np.asarray(leaf)
    elif leaf.is_fully_replicated:
        yield np.asarray(leaf.addressable_data(0))
    else:
        leaf = meshes.on_auto_axes(leaf)
        whole, rows = jax.NamedSharding(leaf.sharding.mesh, jax.P()), len(leaf)
        size = min(rows, max(1, BLOCK // (leaf.nbytes // rows)))
        block = jax.jit(lambda x, i: jax.lax.dynamic_slice_in_dim(x, i, size), out_shardings=whole)
        for i in range(0, rows - rows % size, size):
            yield np.asarray(block(leaf, i).addressable_data(0))
        if rows % size:
            rest = jax.jit(lambda x: x[rows - rows % size :], out_shardings=whole)
            yield np.asarray(rest(leaf).addressable_data(0))


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
    folder = pathlib.Path(config.source).expanduser()
    path = folder / "config.json"
    if not path.is_file():
        what = "has no config.json" if folder.is_dir() else "does not exist"
        raise ConfigurationError(
            f"base.source={config.source!r} {what}: name a run folder (`make train` makes "
            "runs/default), an exported folder, or one of Hugging Face's transformers"
        )
    values = _documented(path, dict, config.source)
    overrides = {
        name: value
        for name in ("dtype", "param_dtype", "remat")
        if (value := getattr(config, name)) is not None
    }
    if "model_type" in values or "architectures" in values:
        return _of_transformers(folder, config, overrides)
    if "adapter" in values:
        from experiments.finetuning import export  # which reads the base of that run by this module

        base = export.merged_base(folder, read_config(folder))
    elif values.get("format") == EXPORTED:
        base = _exported(folder)
    else:
        base = _pretrained(folder)
    return _with(base, config, overrides)


def _new(config: BaseConfig, seed: int, tokenizer: str) -> Base:
    overrides = {name: getattr(config, name) for name in ("dtype", "param_dtype", "remat")}
    chosen = {name: value for name, value in overrides.items() if value is not None}
    model_config = dataclasses.replace(
        finetuning_configuration.PRESETS[config.preset or ""], **chosen
    )
    is_vit = isinstance(model_config, vit.VitConfig)
    if not is_vit:
        size = configuration.tokenizers_size(tokenizer) if tokenizer else None
        model_config = dataclasses.replace(
            model_config, vocabulary_size=size or model_config.vocabulary_size
        )

    def read(place):
        def init(key):
            if is_vit:
                return vit.Vit(model_config).init(key, jnp.zeros((1, *_image(model_config))))[
                    "params"
                ]
            return llama.Llama(model_config).init(key, jnp.zeros((1, 1), jnp.int32))["params"]

        return jax.jit(init, out_shardings=place(shapes(model_config)))(jax.random.key(seed))

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
    try:
        model_config = huggingface.config_from(
            huggingface.read_config(folder / "config.json"), **overrides
        )
    except ValueError as error:
        raise ConfigurationError(f"base.source={config.source!r}: {error}") from error

    def read(place):
        try:
            return huggingface.load(folder, shardings=place(shapes(model_config)), **overrides)[1]
        except (ValueError, OSError, ImportError) as error:
            raise ConfigurationError(f"base.source={config.source!r}: {error}") from error

    base = Base(source=config.source, config=model_config, read=read, tokenizer=found_in(folder))
    return dataclasses.replace(base, domain=_domain(config, base))


def _pretrained(folder: pathlib.Path) -> Base:
    try:
        config = configuration.from_dict(read_config(folder))
    except ConfigurationError as error:
        raise ConfigurationError(
            f"base.source={str(folder)!r} holds no run of this program: {error}"
        ) from error
    tokenizer = found_in(folder) or config.data.tokenizer
    return Base(
        source=str(folder),
        config=config.model,
        read=lambda place: read_run(
            folder, shapes(config.model), place, {"model": dataclasses.asdict(config.model)}
        ),
        tokenizer=tokenizer,
        domain=TuningDataConfig(**dataclasses.asdict(config.data) | {"tokenizer": tokenizer}),
    )


def _documented(path: pathlib.Path, shape: Any, source: str) -> Any:
    try:
        return documents.read(path, shape, remedy="restore it, or name another base")
    except DocumentError as error:
        raise ConfigurationError(f"base.source={source!r}: {error}") from error


def read_description(path: pathlib.Path) -> dict[str, Any]:
    """What `Model.describe` wrote, to model.json of a run or config.json of an exported folder; all
    sections checked.

    Raises ConfigurationError.
    """
    values = _documented(path, _DESCRIPTION, str(path.parent))
    _described(values, str(path.parent))
    return values


def _described(values: dict[str, Any], source: str) -> tuple[Any, TuningDataConfig]:
    """(configuration of the model, what it was trained on) of a description."""
    kinds = {"llama": llama.LlamaConfig, "vit": vit.VitConfig}
    try:
        sections.one_of("architecture", values["architecture"], kinds)
        kind = kinds[values["architecture"]]
        model = sections.build(kind, "model", values["model"])
        return model, sections.build(TuningDataConfig, "domain", values["domain"])
    except ConfigurationError as error:
        raise ConfigurationError(
            f"base.source={source!r}: its description is damaged: {error}"
        ) from error


def _exported(folder: pathlib.Path) -> Base:
    values = read_description(folder / "config.json")
    (config, domain), classes = _described(values, str(folder)), tuple(values["classes"])
    kind = type(config)
    count = len(classes) if kind is llama.LlamaConfig else 0
    return Base(
        source=str(folder),
        config=config,
        read=lambda place: read_run(folder, shapes(config, count), place, meaning(values)),
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
        cast = jax.jit(
            lambda tree: jax.tree.map(lambda leaf: leaf.astype(dtype), tree),
            out_shardings=place(params),
        )
        return cast(params)

    domain = _domain(config, base)
    return dataclasses.replace(
        base, source=config.source, config=model_config, read=read, domain=domain
    )


def _domain(config: BaseConfig, base: Base) -> TuningDataConfig | None:
    if config.domain is None or config.domain == "none":
        return None if config.domain == "none" else base.domain
    try:
        length = None if base.is_vit else min(256, base.config.sequence_length)
        task = "classification" if base.is_vit else "language_modelling"
        return TuningDataConfig(
            name=config.domain, task=task, tokenizer=base.tokenizer, sequence_length=length
        )
    except ValueError as error:
        raise ConfigurationError(f"base.domain={config.domain!r}: {error}") from error


def meaning(description: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """{section: {key: value}} of a description without which the arrays of a folder mean
    nothing."""
    named = {key: description[key] for key in ("architecture", "tokenizer", "classes")}
    return {"model": description["model"], "description": named}


def read_run(folder: pathlib.Path, like, place: Place, meaning: dict[str, dict[str, Any]]):
    """The parameters of the newest good checkpoint of a folder."""
    return restored(folder, {"params": like}, {"params": place(like)}, meaning).tree["params"]


def restored(
    folder: pathlib.Path, like, shardings, meaning: dict[str, dict[str, Any]]
) -> checkpoint.Restored:
    """The newest good checkpoint of a folder, as far as `like` goes. Raises ConfigurationError when
    there is none."""
    put = lambda leaf, own: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=own)  # noqa: E731
    target = jax.tree.map(put, like, shardings)
    where, found = f"base.source={str(folder)!r}", None
    if (folder / "checkpoints").is_dir():
        checkpoints = checkpoint.Checkpoints(
            folder / "checkpoints", meaning=meaning, say=lambda line: print(line, file=sys.stderr)
        )
        try:
            found = checkpoints.restore(target, partial=True)
        except checkpoint.CheckpointError as error:
            raise ConfigurationError(f"{where}: {error}") from error
        finally:
            checkpoints.close()
    if found is None:
        raise ConfigurationError(f"{where}: holds no finished checkpoint yet; let its run save one")
    return found
