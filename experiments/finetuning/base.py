"""A model to start from: what is known of it before its parameters are read, and how to read them."""

import dataclasses
import hashlib
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.data.tuning import TuningDataConfig
from experiments.harness import checkpoint
from experiments.models import axes, huggingface, llama, vit
from experiments.settings import sections
from experiments.settings.sections import ConfigurationError
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


def parameter_shapes(config, classes: int = 0) -> Any:
    """Shapes of the parameters of a model; with a classifier where text has classes."""
    if isinstance(config, vit.VitConfig):
        images = jax.ShapeDtypeStruct((1, config.image, config.image, config.channels), jnp.float32)
        return jax.eval_shape(vit.Vit(config).init, jax.random.key(0), images)["params"]
    found = huggingface.shapes(config)
    if classes:  # a head beside the one for tokens
        dtype = llama.DTYPES[config.param_dtype]
        kernel = jax.ShapeDtypeStruct((config.width, classes), dtype)
        found = found | {"classifier": {"kernel": kernel}}
    return found


def parameter_digest(params) -> str:
    """sha256 over path, shape, dtype and bytes of every leaf, wherever it lies.

    Leaves that several devices divide are put together block by block.

    >>> parameter_digest({"a": np.zeros(2)}) == parameter_digest({"a": jnp.zeros(2, jnp.float32)})
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
        replicated, rows = jax.NamedSharding(leaf.sharding.mesh, jax.P()), len(leaf)
        # as many rows as make up a block, gathered by one compiled slice
        size = min(rows, max(1, BLOCK // (leaf.nbytes // rows)))
        block = jax.jit(
            lambda x, i: jax.lax.dynamic_slice_in_dim(x, i, size), out_shardings=replicated
        )
        for i in range(0, rows - rows % size, size):
            yield np.asarray(block(leaf, i).addressable_data(0))
        if rows % size:
            rest = jax.jit(lambda x: x[rows - rows % size :], out_shardings=replicated)
            yield np.asarray(rest(leaf).addressable_data(0))


def read_document(path: pathlib.Path, shape: Any, source: str) -> Any:
    """A JSON document of the folder `source`. Raises ConfigurationError that names the folder."""
    try:
        return documents.read(path, shape, remedy="restore it, or name another base")
    except DocumentError as error:
        raise ConfigurationError(f"base.source={source!r}: {error}") from error


def read_description(path: pathlib.Path) -> dict[str, Any]:
    """The checked description of a model: model.json of a run, config.json of an exported folder.

    Raises ConfigurationError.
    """
    values = read_document(path, _DESCRIPTION, str(path.parent))
    read_sections(values, str(path.parent))
    return values


def read_sections(values: dict[str, Any], source: str) -> tuple[Any, TuningDataConfig]:
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


def meaning_of(description: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """{section: {key: value}} of a description that arrays need to mean anything."""
    named = {key: description[key] for key in ("architecture", "tokenizer", "classes")}
    return {"model": description["model"], "description": named}


def read_parameters(folder: pathlib.Path, like, place: Place, meaning: dict[str, dict[str, Any]]):
    """The parameters of the newest good checkpoint of a folder."""
    return restore_newest(folder, {"params": like}, {"params": place(like)}, meaning).tree["params"]


def restore_newest(
    folder: pathlib.Path, like, shardings, meaning: dict[str, dict[str, Any]]
) -> checkpoint.Restored:
    """The newest good checkpoint of a folder, as far as `like` goes.

    Raises ConfigurationError when there is none.
    """
    # `partial`: the folder's step may hold more, such as an optimizer's state
    placed = lambda leaf, own: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=own)  # noqa: E731
    target = jax.tree.map(placed, like, shardings)
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
