"""Where documents come from, and the small file-system rules that all sources share.

A `Source` is a function from a split's name to its documents, with an identity that changes
whenever the documents may have changed. A folder of text is read in place; TFDS datasets are read
through `as_data_source`, without TensorFlow.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import zlib
from collections.abc import Callable, Iterator, Mapping

from experiments.data.chat import Conversation

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

TEXT: Mapping[str, str] = {"text_key": "text"}
Document = bytes | tuple[bytes, bytes] | tuple[bytes, int] | Conversation


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """Documents by split.

    Attributes:
      name: short, usable as a file name.
      identity: equal for equal documents.
      splits: {split: number of documents}.
      documents: `documents(split)` iterates over them in a fixed order: text as bytes, a prompt and
        its response as two of them, a text and the number of its class, or a conversation.
      classes: names of the classes, where there are any.
      has_chats: some documents are conversations of named roles, which want a template.
    """

    name: str
    identity: str
    splits: dict[str, int]
    documents: Callable[[str], Iterator[Document]]
    classes: tuple[str, ...] = ()
    has_chats: bool = False


def split_of(relative_path: str) -> str:
    """Every file goes to "validation" (one in twenty) or "train" by its path's CRC-32.

    The same on every machine.

    >>> split_of("abc.py"), split_of("json/decoder.py")
    ('train', 'train')
    """
    return "validation" if zlib.crc32(relative_path.encode()) % 20 == 0 else "train"


def data_directory(directory: str = "") -> str:
    """`directory`, or $LOWRANK_JAX_DATA, or ~/.cache/lowrank_jax/datasets."""
    directory = (
        directory or os.environ.get("LOWRANK_JAX_DATA", "") or "~/.cache/lowrank_jax/datasets"
    )
    return os.path.expanduser(directory)


@contextlib.contextmanager
def exclusive(path: str) -> Iterator[bool]:
    """Holds a lock file: other processes of this machine wait.

    The system frees the lock of a killed process.

    Yields whether the lock is held: some file systems have none. What is prepared under it is
    renamed into place, so that without a lock the worst is work done twice.
    """
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "a") as file:
        held = False
        with contextlib.suppress(OSError):
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX)
                held = True
        yield held


def folder_source(path: str, pattern: str = "**/*.txt") -> Source:
    """The files under a folder that match a glob pattern, one document each, split by file.

    The identity follows names, sizes and modification times. Raises FileNotFoundError when nothing
    matches.
    """
    root = pathlib.Path(path).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(
            f"data.name={path!r}: no such folder; give an existing one, or the name of a dataset"
        )
    files: dict[str, list[pathlib.Path]] = {"train": [], "validation": []}
    digest = hashlib.sha256()
    for file in sorted(f for f in root.glob(pattern) if f.is_file()):
        status, relative = file.stat(), file.relative_to(root).as_posix()
        files[split_of(relative)].append(file)
        digest.update(json.dumps([relative, status.st_size, status.st_mtime_ns]).encode())
    for split, found in files.items():
        if not found:
            total = sum(map(len, files.values()))
            raise FileNotFoundError(
                f"data.name={path!r}: the {split} split is empty ({total} files match "
                f"data.file_pattern={pattern!r}; one in twenty is for validation by its name): "
                "correct the pattern, or cut the text into more files"
            )
    return Source(
        name=root.resolve().name,
        identity=f"folder-{digest.hexdigest()[:16]}",
        splits={split: len(found) for split, found in files.items()},
        documents=lambda split: (file.read_bytes() for file in files[split]),
    )


def directory_source(path: str, text_key: str = "text") -> Source:
    """A prepared TFDS dataset by its version directory, such as `.../c4/en/3.1.0`."""
    return builder_source(directory_builder(path), {"text_key": text_key})


def named_source(name: str, directory: str, text_key: str = "text") -> Source:
    """A prepared dataset by name, such as `lm1b` or `c4/en`.

    Under `directory` or TFDS's own data directory.
    """
    return builder_source(named_builder(name, directory), {"text_key": text_key})


def directory_builder(path: str):
    """The TFDS builder of a version directory."""
    import tensorflow_datasets as tfds

    return tfds.builder_from_directory(os.path.expanduser(path))


def named_builder(name: str, directory: str):
    """The TFDS builder of a dataset that is prepared.

    Under `directory` or TFDS's own data directory.

    Its code is not needed when its files are there. Raises FileNotFoundError when they are not.
    """
    import tensorflow_datasets as tfds

    for data_dir in (directory, None):
        try:
            builder = tfds.builder(name, data_dir=data_dir)
        except Exception:  # unknown, or its builder cannot be imported without TensorFlow
            continue
        if builder.data_path.exists():
            return builder
    raise FileNotFoundError(
        f"data.name={name!r} is not prepared under {directory} or TFDS's data directory. Prepare "
        f"it with `python -m experiments.data.prepare {name} --directory={directory}`, or give its "
        "version directory as "
        f'data.name. A folder is written as a path: "./{name}".'
    )


def builder_source(builder, keys: Mapping[str, str] = TEXT) -> Source:
    """Reads a prepared TFDS builder that has random access and the features asked for.

    Args:
      builder: of a prepared dataset.
      keys: {field of the configuration: feature}: {"text_key": ...} alone, with "label_key" (a
        `ClassLabel`), or {"prompt_key": ..., "response_key": ...}.
    """
    info = builder.info
    where = f"{info.full_name} in {builder.data_path}"
    if info.file_format is None or info.file_format.value != "array_record":
        kind = info.file_format and info.file_format.value
        raise ValueError(
            f"{where} was prepared as {kind}: prepare it again with file_format='array_record'"
        )
    features = dict(info.features or {})
    for field, name in keys.items():
        if name not in features:
            raise ValueError(
                f"data.{field}={name!r}: {where} has the features {', '.join(features)}; name one "
                "of them"
            )
        if field == "label_key" and not hasattr(features[name], "names"):
            raise ValueError(
                f"data.{field}={name!r}: {where} has no class names there; name a ClassLabel "
                "feature"
            )
    classes = tuple(features[keys["label_key"]].names) if "label_key" in keys else ()

    def value(example, field, name):
        found = example[name]
        if field == "label_key":
            return int(found)
        return found.encode() if isinstance(found, str) else bytes(found)

    def documents(split):
        for example in builder.as_data_source(split, decoders=None):
            values = tuple(value(example, field, name) for field, name in keys.items())
            yield values if len(values) > 1 else values[0]

    metadata = {
        name: [split.num_examples, split.num_bytes, split.shard_lengths]
        for name, split in info.splits.items()
    }
    read = [*keys.values()] if len(keys) > 1 else next(iter(keys.values()))
    digest = hashlib.sha256(json.dumps([info.full_name, read, metadata], sort_keys=True).encode())
    return Source(
        name=info.full_name.replace("/", "-"),
        identity=f"{info.full_name}-{digest.hexdigest()[:16]}",
        splits={name: split.num_examples for name, split in info.splits.items()},
        documents=documents,
        classes=classes,
    )
