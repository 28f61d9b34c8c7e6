"""What the programs write: tested before any work, put in place whole, and never replaced by less.

A place is tested by writing there what leaves no trace, so that a file in the way, a folder that
may only be read and a full disk are a `ConfigurationError` before anything is computed.
"""

import collections
import errno
import json
import math
import os
import pathlib
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

from experiments.settings.sections import ConfigurationError
from lowrank_jax.interop import documents
from lowrank_jax.interop.documents import DocumentError
from lowrank_jax.typing import Pytree

# Entries of a result that say what was measured: where they differ, one result is not more of the
# other.
SUBJECT = ("preset", "steps", "length", "tokens", "tokens_per_update", "rank", "device", "slice")
# Lists of what is missing, which are better shorter.
MISSING = ("failed", "not_reached", "diverged", "aims")
_PROBE = bytes(4096)
_FULL = (errno.ENOSPC, errno.EDQUOT)


def write_text(path: str | os.PathLike, text: str) -> pathlib.Path:
    """Write so that `path` holds what it held or all of the new text, whenever the process dies."""
    return documents.write(path, text.encode())


def write_bytes(path: str | os.PathLike, data: bytes) -> pathlib.Path:
    """As `write_text`."""
    return documents.write(path, data)


def write_json(path: str | os.PathLike, value: Any) -> pathlib.Path:
    """As `write_text`. A number that is not finite is written as null: JSON has none."""
    return write_text(path, json.dumps(_plain(value), indent=1) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(element) for key, element in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(element) for element in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def problem(path: str | os.PathLike, *, is_folder: bool) -> str | None:
    """Why nothing can be written there, as the rest of a sentence about the path; or None.

    Args:
      path: of a file that is replaced, or of a folder in which files are made; its parents are made
        when it is written.
      is_folder: which of the two.

    >>> problem(__file__, is_folder=True)
    'is a file, where a folder is to be written'
    >>> problem(os.path.join(__file__, "report.html"), is_folder=False)
    'lies below a file, /.../outputs.py'
    """
    place = pathlib.Path(path)
    try:
        place = place.resolve()  # of a link, what it names
        if place.exists() and is_folder != place.is_dir():
            there, wanted = ("file", "folder") if is_folder else ("folder", "file")
            return f"is a {there}, where a {wanted} is to be written"
        if place.exists() and not (is_folder or place.is_file()):
            return "is no ordinary file"
        # what is there already of its path, and whether a file of some size can be made in it
        places = (place, *place.parents) if is_folder else place.parents
        nearest = next(parent for parent in places if os.path.lexists(parent))
        if not nearest.is_dir():
            return f"lies below a file, {nearest}"
        with tempfile.TemporaryFile(dir=nearest) as file:
            file.write(_PROBE)
            file.flush()
            os.fsync(file.fileno())
    # a name that is too long, or is none; a loop of links
    except (OSError, ValueError, RuntimeError) as error:
        return f"cannot be written ({getattr(error, 'strerror', None) or error})"
    return None


def check(name: str, path: str | os.PathLike, *, is_folder: bool) -> pathlib.Path:
    """The path, if something can be written there; else a ConfigurationError."""
    found = problem(path, is_folder=is_folder)
    if found is not None:
        raise ConfigurationError(f"{name}={str(path)!r}: {found}; give another place")
    return pathlib.Path(path)


def is_full(error: BaseException) -> bool:
    """Whether an error says that a disk is full."""
    return isinstance(error, OSError) and error.errno in _FULL


def write_result(
    path: str | os.PathLike, result: Mapping[str, Any], *, replace: bool = False
) -> pathlib.Path:
    """Write a result, beside the file there if that holds more; returns the file written.

    It is then NAME.partial.json. More is a list with more rows, at whatever depth; an entry that the
    new result lacks or has as null, of rows one that fewer of them have; or another SUBJECT, which
    one of the two may lack.

    Args:
      path: the file.
      result: of a benchmark or a study.
      replace: write it whatever is there.
    """
    path = pathlib.Path(path)
    partial = path.with_suffix(".partial.json")
    kept = None if replace else _more(path, result)
    if kept is None:
        write_json(path, result)
        partial.unlink(missing_ok=True)
        return path
    print(
        f"{path} is kept: it holds {kept}. The new result is in {partial}; --replace puts it there",
        file=sys.stderr,
    )
    return write_json(partial, result)


def _more(path: pathlib.Path, result: Mapping[str, Any]) -> str | None:
    """What the file holds that the result does not; None where it holds no more."""
    if not path.exists():
        return None
    try:
        there = documents.read(path, dict)
    except DocumentError as error:
        return f"what cannot be compared ({error})"
    for key in SUBJECT:
        if there.get(key) != result.get(key):
            return f"{key} {there.get(key)!r}, where this one has {result.get(key)!r}"
    # lists first: what a whole table lacks says more than what its rows lack
    for key, value in sorted(there.items(), key=lambda entry: not isinstance(entry[1], list)):
        found = None if key in MISSING else lacking(value, result.get(key), key)
        if found is not None:
            return found
    return None


def lacking(old: Pytree, new: Pytree, key: str) -> str | None:
    """What an entry of a result holds that a new one does not; None where it holds no more.

    >>> lacking([{"a": 1}, {"a": 2}], [{"a": 3}], "rows"), lacking({"x": 1}, {"y": 1}, "runs")
    ('2 rows, where this one has 1', "runs['x']")
    >>> lacking([{"seconds": 1.5}, {"seconds": 2.5}], [{"seconds": 1.0}, {"seconds": None}], "rows")
    "2 rows['seconds'], where this one has 1"
    """
    before, now = known(old, key), known(new, key)
    for name, count in before.items():
        if now[name] < count:
            return name if count == 1 else f"{count} {name}, where this one has {now[name]}"
    return None


def known(value: Any, key: str) -> collections.Counter[str]:
    """How much a result holds under each name: elements of lists, and values that are not null.

    The rows of a list share their names, so that they may stand in another order; what is in
    MISSING is left out.
    """
    counts: collections.Counter[str] = collections.Counter()
    if isinstance(value, Mapping):
        for name, element in value.items():
            if name not in MISSING:
                counts += known(element, f"{key}[{name!r}]")
    elif isinstance(value, (list, tuple)):
        counts[key] = len(value)
        for element in value:
            if isinstance(element, Mapping):
                counts += known(element, key)
    elif value is not None:
        counts[key] = 1
    return counts


def copy(source: str | os.PathLike, target: str | os.PathLike) -> pathlib.Path:
    """A copy of a file, put in place whole."""
    return write_bytes(target, pathlib.Path(source).read_bytes())
