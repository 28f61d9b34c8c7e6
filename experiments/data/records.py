"""JSON lines as documents: one object a line, `{"text"}`, `{"text", "label"}` or `{"prompt", "response"}`.

The whole file is checked when it is opened: the first line that is not what the task needs is an error that names file,
line and remedy, before any work.
"""

import hashlib
import json
import os
import pathlib
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

from experiments.data.sources import Document, Source
from lowrank_jax.interop import documents

MAY_BE_EMPTY = ("prompt_key",)


def jsonl_source(path: str, keys: Mapping[str, str], validation: str = "") -> Source:
    """The lines of a JSON lines file.

    Args:
      path: the file.
      keys: {field of the configuration: key in the objects}, as in `experiments.data.sources.builder_source`; labels
        are strings or integers, and the classes are the labels of `path`, sorted. Other keys are ignored.
      validation: a second file, for validation; without one, one line in twenty of the first, by the CRC-32 of what is
        read of it, so that equal lines are in the same split.

    Raises FileNotFoundError for a missing file, ValueError for a line that cannot be used or an empty split.
    """
    files = {"train": path, "validation": validation or path}
    labels = _labels(path, keys["label_key"], keys) if "label_key" in keys else {}
    digest = hashlib.sha256(json.dumps([*keys.values()]).encode())
    splits = dict.fromkeys(files, 0)

    def documents(split: str) -> Iterator[Document]:
        for number, values in _lines(files[split], keys):
            if not validation and _split_of(values) != split:
                continue
            if labels and values[1] not in labels:
                known = ", ".join(map(repr, labels))
                _refuse(files[split], number, f"the label {values[1]!r} is none of {path}, which has {known}")
            second = labels[values[1]] if labels else values[-1].encode()
            yield (values[0].encode(), second) if len(values) > 1 else values[0].encode()

    for split in files:
        for document in documents(split):
            splits[split] += 1
            digest.update(repr(document).encode())
        if not splits[split]:
            raise ValueError(
                f"data.name={path!r}: the {split} split is empty; add lines"
                + ("" if validation else ", or give data.validation another file")
            )
        digest.update(split.encode())
    return Source(
        name=pathlib.Path(path).stem,
        identity=f"jsonl-{digest.hexdigest()[:16]}",
        splits=splits,
        documents=documents,
        classes=tuple(map(str, labels)),
    )


def _split_of(values) -> str:
    return "validation" if zlib.crc32(json.dumps(values).encode()) % 20 == 0 else "train"


def _refuse(path: str, number: int, problem: str) -> None:
    raise ValueError(f"{path}, line {number}: {problem}; correct or remove the line")


def _lines(path: str, keys: Mapping[str, str]) -> Iterator[tuple[int, tuple]]:
    """(line number from 1, the values of `keys`), checked."""
    if not os.path.isfile(os.path.expanduser(path)):
        raise FileNotFoundError(f"data.name or data.validation={path!r}: no such file; give a .jsonl file")
    for number, found in documents.lines(os.path.expanduser(path), dict, remedy="correct or remove the line"):
        for field, key in keys.items():
            if key not in found:
                _refuse(path, number, f"no {key!r} (data.{field}) among its keys {', '.join(map(repr, found))}")
            _check(path, number, field, key, found[key])
        yield number, tuple(found[key] for key in keys.values())


def _check(path: str, number: int, field: str, key: str, value: Any) -> None:
    if field == "label_key":
        if not isinstance(value, (str, int)) or isinstance(value, bool):
            _refuse(path, number, f"{key!r} is {value!r}, where a string or an integer is needed")
    elif not isinstance(value, str):
        _refuse(path, number, f"{key!r} is {value!r}, where a string is needed")
    elif not value and field not in MAY_BE_EMPTY:
        _refuse(path, number, f"{key!r} is empty")


def _labels(path: str, key: str, keys: Mapping[str, str]) -> dict[Any, int]:
    """{label: class} of a file, in order."""
    first: dict[Any, int] = {}
    place = [*keys.values()].index(key)
    for number, values in _lines(path, keys):
        label = values[place]
        if first and type(label) is not type(next(iter(first))):
            _refuse(path, number, f"{key!r} is {label!r}, but line 1 has {next(iter(first))!r}: not of one type")
        first.setdefault(label, number)
    if len(first) < 2:
        raise ValueError(f"data.name={path!r}: {len(first)} labels; a classification needs at least 2")
    return {label: number for number, label in enumerate(sorted(first))}
