"""The manifest of a checkpoint: what a step folder must hold, sealed, so that damage shows.

    {"format", "step", "leaves": {path: [shape, dtype]}, "files": {name: {"bytes", "sha256"}},
    "sides", "extra",
     "meaning": {section: {key: value}}, "states": {kind: format of the optimizer's state}, ...,
     "digest"}

A step verifies when the folder's name, the manifest's step, the files on disk, their contents, and
the shapes and dtypes of the arrays that orbax stored all agree.
"""

import concurrent.futures
import contextlib
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from experiments.harness import outputs
from lowrank_jax.interop import documents
from lowrank_jax.interop.documents import DocumentError

FORMAT = 1
NAME = "manifest.json"
STATE = "state"
SHAPE = {
    "format": int,
    "step": int,
    "leaves": {str: [([int], str)]},
    "files": {str: {"bytes": int, "sha256": str}},
    "sides": {str: [(int, str)]},
    "extra": dict,
    "meaning?": {str: dict},
    "states?": {str: int},
    "digest": str,
}

# {path: (shape, dtype)}
Table = dict[str, tuple[tuple[int, ...], str]]


def steps(directory: pathlib.Path) -> list[int]:
    """Steps with a folder, newest first, finished or not; by names as `save` writes them."""
    names = [path.name for path in directory.glob("*") if path.is_dir()]
    return sorted(
        (int(name) for name in names if re.fullmatch("0|[1-9][0-9]*", name)), reverse=True
    )


def strays(directory: pathlib.Path) -> list[pathlib.Path]:
    """Folders that hold a manifest, but whose name is no step's."""
    known = {str(step) for step in steps(directory)}
    return sorted(
        path for path in directory.glob("*") if path.name not in known and (path / NAME).exists()
    )


def digest(value: Any) -> str:
    """sha256 of a JSON value, independent of the order of keys.

    >>> digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    True
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write(folder: pathlib.Path, step: int, leaves: Table, entries: Mapping[str, Any]) -> None:
    """Seal what is in a step folder.

    Args:
      folder: of the step.
      step: its number.
      leaves: of the tree that was saved.
      entries: the others of the manifest.
    """
    values = {
        "format": FORMAT,
        "step": step,
        "leaves": leaves,
        "files": checksums(folder / STATE, files(folder / STATE)),
        "versions": {"jax": jax.__version__, "orbax": ocp.__version__, "numpy": np.__version__},
        **entries,
    }
    values = json.loads(json.dumps(values))  # tuples become lists, as they are read back
    outputs.write_json(folder / NAME, {**values, "digest": digest(values)})


def read(folder: pathlib.Path) -> dict[str, Any]:
    """The sealed manifest of a step folder. Raises DocumentError for any other."""
    values = documents.read(folder / NAME, SHAPE, remedy="restore it from a backup")
    sealed = values.pop("digest")
    if sealed != digest(values):
        raise DocumentError(f"{NAME} does not match its own digest")
    if values["format"] != FORMAT:
        raise DocumentError(f"{NAME} has format {values['format']}, this program reads {FORMAT}")
    if str(values["step"]) != folder.name:
        raise DocumentError(f"the folder {folder.name} holds step {values['step']}")
    for path, leaf in values["leaves"].items():
        if [type(part) for part in leaf] != [list, str]:
            raise DocumentError(
                f"{NAME}: leaves[{path!r}] is {leaf}, where a shape and a dtype are needed"
            )
    return values


def table(values: Mapping[str, Any]) -> Table:
    """The leaves of a manifest."""
    return {path: (tuple(shape), dtype) for path, (shape, dtype) in values["leaves"].items()}


def problem(
    folder: pathlib.Path,
    values: Mapping[str, Any],
    stored: Callable[[pathlib.Path], Mapping[str, Any]],
    verify: bool,
) -> str | None:
    """What is wrong with a step folder, by its manifest; None where nothing is.

    Args:
      folder: of the step.
      values: what `read` returned.
      stored: gives orbax's metadata of a step's arrays, {path: something with a shape and a dtype}.
      verify: compare checksums.
    """
    # names first, then contents, then what orbax makes of them
    present, listed = files(folder / STATE), values["files"]
    different = sorted(set(present) ^ set(listed))
    if different:
        name = different[0]
        return f"file {STATE}/{name} is {'missing' if name in listed else f'not in {NAME}'}"
    try:
        for name, found in checksums(folder / STATE, present).items() if verify else ():
            if found != listed[name]:
                return f"file {STATE}/{name} has {found}, expected {listed[name]}"
    except OSError as error:
        return f"a file cannot be read ({error})"
    try:
        arrays = stored(folder)
    except Exception as error:  # of tensorstore, orbax and Python: whatever a damaged file comes to
        return f"orbax cannot read what it stored ({type(error).__name__}: {error})"
    return _difference(table(values), arrays)


def _difference(leaves: Table, arrays: Mapping[str, Any]) -> str | None:
    """How the arrays that orbax stored differ from the leaves of the manifest.

    Leaves of size zero are not stored.
    """
    expected = {path: leaf for path, leaf in leaves.items() if 0 not in leaf[0]}
    for path in [*expected, *arrays]:
        if path not in arrays or path not in expected:
            return (
                f"leaf {path} is "
                f"{'not stored' if path in expected else f'stored but not in {NAME}'}"
            )
        (shape, dtype), array = expected[path], arrays[path]
        there = tuple(array.shape), str(np.dtype(array.dtype))
        if dtype.startswith("key<"):  # random keys are stored as their words
            shape, dtype = (*shape, *there[0][len(shape) :]), "uint32"
        if there != (shape, dtype):
            return (
                f"leaf {path} is stored as {there[1]}{list(there[0])}, {NAME} says "
                f"{dtype}{list(shape)}"
            )
    return None


def files(directory: pathlib.Path) -> list[str]:
    """Relative paths of all files below a folder."""
    return sorted(
        str(path.relative_to(directory)) for path in directory.rglob("*") if not path.is_dir()
    )


def checksums(directory: pathlib.Path, names: list[str]) -> dict[str, dict]:
    """{relative path: size and sha256}.

    Hashing releases the interpreter lock, so files are hashed side by side.
    """
    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return dict(
            zip(names, pool.map(lambda name: _sha256(directory / name), names), strict=True)
        )


def _sha256(path: pathlib.Path) -> dict:
    with open(path, "rb") as file:
        return {
            "bytes": os.fstat(file.fileno()).st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }


def stored_sides(directory: pathlib.Path) -> dict[str, list]:
    """{path: [side, rank]} of the newest finished checkpoint; {} where there is none to read."""
    for step in steps(directory):
        with contextlib.suppress(DocumentError):
            return read(directory / str(step))["sides"]
    return {}
