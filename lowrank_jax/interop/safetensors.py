"""Folders of safetensors files: read tensor by tensor, and written so that no reader meets half of
them.

    model.safetensors                                  one file, or
    model-00001-of-00003.safetensors, ...              several, and
    model.safetensors.index.json                       {"weight_map": {name: file}}

A file is the length of a JSON header (eight bytes, little endian), the header {name: {"dtype",
"shape", "data_offsets"}}, and the tensors' bytes one after the other. Headers are checked against
their files by the `safetensors` package, and read by `documents`, which refuses a name that stands
twice. The package's writer wants all tensors of a file in memory at once, so files are written
here, one tensor at a time.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import itertools
import json
import os
import pathlib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax.interop import documents

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_LISTED = 20
_AGAIN = "copy or download it again"


class Reader(Mapping[str, np.ndarray]):
    """{name: array}: an array is read from its file each time it is asked for, and nothing stays
    open or in memory.

    Attributes:
      path: what `read` was given.
      shapes: {name: jax.ShapeDtypeStruct}, without reading a tensor.
    """

    def __init__(
        self, path: pathlib.Path, files: Mapping[str, pathlib.Path], shapes: Mapping[str, Any]
    ):
        self.path, self.shapes = path, shapes
        self._files = files

    def __getitem__(self, name: str) -> np.ndarray:
        """The array. KeyError for an unknown name, with the nearest known one."""
        if name not in self._files:
            near = difflib.get_close_matches(name, self._files, n=1)
            raise KeyError(
                f"{self.path} holds no {name!r}" + (f"; did you mean {near[0]!r}?" if near else "")
            )
        with _open(self._files[name]) as file:
            return file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def __repr__(self) -> str:
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in self.shapes.values())
        files = len(set(self._files.values()))
        return f"Reader({str(self.path)!r}: {len(self)} tensors in {files} files, {size} bytes)"


def read(path: str | os.PathLike) -> Reader:
    """A reader of one file, or of a folder with `model.safetensors`, or with shards and their
    index.

    All headers are read and checked at once, the tensors only when asked for.

    Raises:
      FileNotFoundError: there is no such file, or a folder lacks its weights or a shard that the
        index names.
      ValueError: a file is truncated or no safetensors file, a tensor has a dtype that NumPy does
        not know, or index and shards disagree; the message lists the tensors.
      ImportError: the safetensors package is missing.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = write(
    ...         folder,
    ...         {
    ...             "norm.weight": np.ones(4, np.float32),
    ...             "up.weight": np.zeros((8, 4), jnp.bfloat16),
    ...         },
    ...     )
    ...     reader = read(folder)
    ...     print(sorted(reader), reader["norm.weight"], reader.shapes["up.weight"])
    ['norm.weight', 'up.weight'] [1. 1. 1. 1.] ShapeDtypeStruct(shape=(8, 4), dtype=bfloat16)
    """
    path = pathlib.Path(path)
    index = _index(path)
    single = path if path.is_file() else path / SINGLE
    shards = [single] if index is None else sorted(set(index.values()))
    files: dict[str, pathlib.Path] = {}
    shapes: dict[str, Any] = {}
    for shard in shards:
        if not shard.is_file():
            raise FileNotFoundError(
                f"{shard} is missing, though {path / INDEX} names it: copy or download it again"
            )
        for name, entry in _header(shard).items():
            files[name], shapes[name] = shard, _shape(shard, name, entry)
        if index is not None:
            named = [name for name, place in index.items() if place == shard]
            check_names(
                [name for name in files if files[name] == shard], named, f"{shard}, by {INDEX},"
            )
    return Reader(path, files, shapes)


def write(
    path: str | os.PathLike, tensors: Mapping[str, Any], *, max_shard_bytes: int = 5 * 10**9
) -> list[pathlib.Path]:
    """Write `tensors` to one file (a path that ends in .safetensors) or to a folder, and return the
    files.

    In a folder, tensors are split into shards in the order given, and what `write` left there
    before is replaced. Files get their names when all of them are complete, the index last: a crash
    leaves the old files, the new ones, or a folder that `read` refuses, never a mixture.

    Args:
      path: made when missing.
      tensors: {name: array}; NumPy and JAX arrays, and whatever else has `shape` and `dtype` and
        becomes an array by `np.asarray`, which is called on one at a time.
      max_shard_bytes: of a file of a folder, without its header (5 GB: transformers 4); a larger
        tensor stands alone.

    Raises:
      ValueError: for a dtype that the format lacks, a `max_shard_bytes` below 1, or no tensors.

    >>> import tempfile
    >>> tensors = {f"layers.{i}.weight": np.full((2, 4), i, np.float32) for i in range(3)}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     print([file.name for file in write(folder, tensors, max_shard_bytes=64)])
    ['model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors', 'model.safetensors.index.json']
    """
    path = pathlib.Path(path)
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes={max_shard_bytes}: give a positive number")
    if not tensors:
        raise ValueError(f"tensors={tensors!r}: nothing to write to {path}")
    for name, tensor in tensors.items():
        if np.dtype(tensor.dtype) not in _NAMES:
            raise ValueError(
                f"{name} is of dtype {tensor.dtype}: convert it to one of "
                f"{', '.join(map(str, _NAMES))}"
            )
    if path.suffix == ".safetensors":
        return _replace(path.parent, {path.name: tensors}, index=None, stale=())
    shards = _split(tensors, max_shard_bytes)
    stale = [
        old
        for old in path.glob("model*")
        if old.name in (SINGLE, INDEX) or _SHARD.fullmatch(old.name)
    ]
    if len(shards) == 1:
        return _replace(path, {SINGLE: shards[0]}, index=None, stale=stale)
    named = {
        f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors": shard
        for i, shard in enumerate(shards)
    }
    index = {
        "metadata": {"total_size": sum(map(_bytes, tensors.values()))},
        "weight_map": {name: file for file, shard in named.items() for name in shard},
    }
    return _replace(path, named, index=index, stale=stale)


def check_names(found: Collection[str], expected: Collection[str], where: str) -> None:
    """Nothing when both hold the same names; else a ValueError that lists the missing and the
    unexpected ones.

    >>> check_names(
    ...     ["q_proj.weight", "k.weight"], ["k.weight", "model.q_proj.weight"], "model.safetensors"
    ... )
    Traceback (most recent call last):
    ValueError: model.safetensors lacks 1 tensor: model.q_proj.weight (near: q_proj.weight); 1 is not expected:
    q_proj.weight
    """
    present, wanted = set(found), set(expected)
    missing, superfluous = (
        [name for name in expected if name not in present],
        [n for n in found if n not in wanted],
    )
    if not missing and not superfluous:
        return
    parts = []
    if missing:
        lines = []
        for name in missing[:_LISTED]:
            near = difflib.get_close_matches(name, superfluous[: 10 * _LISTED], n=1)
            lines.append(name + (f" (near: {near[0]})" if near else ""))
        count = f"{len(missing)} tensor" + ("s" if len(missing) > 1 else "")
        parts.append(f"lacks {count}: {_listed(lines, len(missing))}")
    if superfluous:
        count = f"{len(superfluous)} " + ("are" if len(superfluous) > 1 else "is")
        parts.append(f"{count} not expected: {_listed(superfluous, len(superfluous))}")
    raise ValueError(f"{where} " + "; ".join(parts))


def _listed(names: Sequence[str], count: int) -> str:
    shown = list(names[:_LISTED])
    return ", ".join(shown) + (f", and {count - len(shown)} more" if count > len(shown) else "")


def _package() -> Any:
    try:
        return importlib.import_module(
            "safetensors"
        )  # an extra's package: no import statement of the library names it
    except ImportError as error:
        raise ImportError(
            "this needs the safetensors package: pip install 'lowrank_jax[huggingface]'"
        ) from error


def _open(file: pathlib.Path) -> Any:
    package = _package()
    try:
        return package.safe_open(file, framework="numpy")
    except (package.SafetensorError, ValueError) as error:
        raise ValueError(
            f"{file} is truncated or no safetensors file ({error}): copy or download it again"
        ) from error


def _header(file: pathlib.Path) -> dict[str, Any]:
    """{name: {"dtype", "shape", "data_offsets"}} of a file that the package has checked."""
    with _open(file):
        pass
    with open(file, "rb") as raw:
        length = int.from_bytes(raw.read(8), "little")
        words = raw.read(length).decode()
    shape = {"__metadata__?": {str: str}, str: {"dtype": str, "shape": [int]}}
    header = documents.parse(words, shape, where=f"the header of {file}", remedy=_AGAIN)
    return {name: entry for name, entry in header.items() if name != "__metadata__"}


def _shape(file: pathlib.Path, name: str, entry: Mapping[str, Any]) -> jax.ShapeDtypeStruct:
    if entry["dtype"] not in _DTYPES:
        raise ValueError(
            f"{file}: {name} is of type {entry['dtype']}; known are {', '.join(_DTYPES)}"
        )
    return jax.ShapeDtypeStruct(tuple(entry["shape"]), _DTYPES[entry["dtype"]])


def _index(path: pathlib.Path) -> dict[str, pathlib.Path] | None:
    """{tensor: shard} of a folder with an index; None of a file, or of a folder with one."""
    if path.is_file():
        return None
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    single, index = path / SINGLE, path / INDEX
    if single.is_file() and index.is_file():
        raise ValueError(
            f"{path} holds both {single.name} and {index.name}: remove the one that is out of date"
        )
    if single.is_file():
        return None
    if not index.is_file():
        others = sorted(
            file.name for file in path.glob("*.safetensors") if not _SHARD.fullmatch(file.name)
        )
        hint = f"; to read {others[0]}, give its own path" if others else ""
        raise FileNotFoundError(f"{path} holds neither {single.name} nor {index.name}{hint}")
    files = documents.read(index, {"weight_map": {str: str}}, remedy=_AGAIN)["weight_map"]
    for name, file in files.items():
        if pathlib.PurePath(file).name != file or not file:
            raise ValueError(
                f"{index}: weight_map[{name!r}] is {file!r}, which leaves the folder; {_AGAIN}"
            )
    return {name: path / file for name, file in files.items()}


def _bytes(tensor: Any) -> int:
    return int(np.prod(tensor.shape, dtype=np.int64)) * np.dtype(tensor.dtype).itemsize


def _split(tensors: Mapping[str, Any], limit: int) -> list[dict[str, Any]]:
    shards: list[dict[str, Any]] = []
    room = -1
    for name, tensor in tensors.items():
        size = _bytes(tensor)
        if size > room:
            shards.append({})
            room = limit
        shards[-1][name] = tensor
        room -= size
    return shards


def _replace(
    folder: pathlib.Path, files: Mapping[str, Mapping], index: Mapping | None, stale
) -> list[pathlib.Path]:
    """Write under temporary names; then remove the stale, and rename, the index last."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [*files, *([] if index is None else [INDEX])]
    temporary = {name: folder / f".{name}.{os.getpid()}" for name in names}
    try:
        for name, tensors in files.items():
            _write_file(temporary[name], tensors)
        if index is not None:
            _write_parts(temporary[INDEX], [json.dumps(index, indent=1).encode()])
        # an old single file is replaced by its name; anything else goes first, so that no index
        # names new shards
        for old in sorted(stale, key=lambda file: file.name != INDEX):
            if old.name not in files:
                old.unlink()
        for name in names:
            os.replace(temporary[name], folder / name)
    finally:
        for file in temporary.values():
            file.unlink(missing_ok=True)
    return [folder / name for name in names]


def _write_file(path: pathlib.Path, tensors: Mapping[str, Any]) -> None:
    """Larger items first, as the package does, so that every tensor is aligned to its own items."""
    order = sorted(tensors, key=lambda name: -np.dtype(tensors[name].dtype).itemsize)
    header: dict[str, Any] = {
        "__metadata__": {"format": "pt"}
    }  # transformers refuses files without it
    offset = 0
    for name in order:
        end = offset + _bytes(tensors[name])
        dtype, shape = (
            _NAMES[np.dtype(tensors[name].dtype)],
            [int(size) for size in tensors[name].shape],
        )
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    # bfloat16 has no buffer interface of its own
    bodies = (
        np.asarray(tensors[name], order="C").reshape(-1).view(np.uint8).data for name in order
    )
    _write_parts(path, itertools.chain([len(text).to_bytes(8, "little"), text], bodies))


def _write_parts(path: pathlib.Path, parts: Iterable[Any]) -> None:
    with open(path, "wb") as file:
        for part in parts:
            file.write(part)
        file.flush()
        os.fsync(file.fileno())


__all__ = ["Reader", "check_names", "read", "write"]
__dir__ = functools.partial(sorted, __all__)
