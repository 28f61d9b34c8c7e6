"""JSON documents from disk, read so that nothing but what was asked for gets through; and files
written whole.

A file that another program wrote, that was cut short, or that somebody edited is one of three
things:

    Missing      there is no such file, or it cannot be opened
    Malformed    its bytes are no JSON in UTF-8: encoding, syntax, nesting, NaN, a key that stands
                 twice
    Unexpected   sound JSON of another shape: another type, a missing key, a value out of its type

Each is a `DocumentError` whose message names the file, the line or key, the value and the remedy.
Whoever reads a document turns it into the error of its own program. What a document must hold is
said by a shape:

    int, float, str, bool, None     a number (an integer is also a float; true and false are
                                    neither, nor is an integer beyond the largest float), ...
    dict, list, object              any object, any array, anything
    [shape]                         an array of it
    {"key": shape, "other?": shape} an object with these keys; one that ends in "?" may be absent;
    others are let be
    {str: shape}                    an object whose values are of it, those of keys that are named
                                    beside it aside
    (shape, ...)                    any one of them
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

# Bytes of the largest document: an index of a model of a hundred thousand tensors takes a tenth of
# it.
LARGEST = 2**28
_DEEPEST = 100
_AGAIN = "restore it, or make it again"


class DocumentError(ValueError):
    """A document that cannot be used; the message names file, place, value and remedy."""


class Missing(DocumentError, FileNotFoundError):
    """No such file, or one that cannot be opened."""


class Malformed(DocumentError):
    """No JSON in UTF-8."""


class Unexpected(DocumentError):
    """JSON of another shape."""


def read(path: str | os.PathLike, shape: Any = object, *, remedy: str = _AGAIN) -> Any:
    """The document in a file, of the given shape.

    Args:
      path: the file.
      shape: what it must hold, as the module's text says.
      remedy: what to do when it does not; ends the messages.

    Raises:
      Missing, Malformed, Unexpected: see above.

    >>> import tempfile
    >>> file = pathlib.Path(tempfile.mkdtemp(), "model.json")
    >>> _ = file.write_text('{"layers": 2, "names": ["a"]}')
    >>> read(file, {"layers": int, "names": [str]})
    {'layers': 2, 'names': ['a']}
    >>> read(file, {"layers": int, "width": int})
    Traceback (most recent call last):
    lowrank_jax.interop.documents.Unexpected: /.../model.json has no 'width'; restore it, or make it again
    """
    return parse(text(path, remedy=remedy), shape, where=str(path), remedy=remedy)


def text(path: str | os.PathLike, *, remedy: str = _AGAIN) -> str:
    """The text of a file in UTF-8, without a byte order mark."""
    return _decoded(_bytes(pathlib.Path(path), remedy), str(path), remedy)


def lines(
    path: str | os.PathLike,
    shape: Any = object,
    *,
    remedy: str = _AGAIN,
    torn: bool = False,
    passed_over: Callable[[DocumentError], None] | None = None,
) -> Iterator[tuple[int, Any]]:
    """(line number from 1, document) of a file with one JSON document a line, read line by line.

    Args:
      path, shape, remedy: as of `read`.
      torn: leave out a last line without an end: a writer that was killed leaves one.
      passed_over: receives what is wrong with a line, which is then left out; by default it is
        raised.

    >>> import tempfile
    >>> file = pathlib.Path(tempfile.mkdtemp(), "rows.jsonl")
    >>> _ = file.write_text('{"a": 1}\\n{"a": "x"}\\n')
    >>> for number, row in lines(file, {"a": int}):
    ...     print(number, row)
    Traceback (most recent call last):
    lowrank_jax.interop.documents.Unexpected: /.../rows.jsonl, line 2: a is 'x', where an integer is needed; ...
    """
    path = pathlib.Path(path)
    with _opened(path, remedy) as file:
        for number, line in enumerate(file, 1):
            where = f"{path}, line {number}"
            if torn and not line.endswith(b"\n"):
                return
            try:
                if len(line) > LARGEST:
                    raise Malformed(f"{where}: is longer than {LARGEST} bytes; {remedy}")
                # only the file begins with a byte order mark
                words = (_decoded if number == 1 else _decoded_part)(
                    line.rstrip(b"\r\n"), where, remedy
                )
                value = parse(words, shape, where=where, remedy=remedy)
            except DocumentError as error:
                if passed_over is None:
                    raise
                passed_over(error)
                continue
            yield number, value


def parse(words: str, shape: Any = object, *, where: str, remedy: str = _AGAIN) -> Any:
    """The document in a text, of the given shape.

    Args:
      words: the text.
      shape: what it must hold.
      where: the file, or the file and a line; begins the messages.
      remedy: ends them.

    >>> parse('{"a": NaN}', where="x.json")
    Traceback (most recent call last):
    lowrank_jax.interop.documents.Malformed: x.json is not JSON: NaN is no number of JSON; restore it, or make it again
    """
    try:
        value = json.loads(
            words, parse_constant=_no_number, parse_float=_finite, object_pairs_hook=_once
        )
        depth = _depth(value)
        if "\\ud" in words.lower():
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        line = "" if ", line " in where else f"line {error.lineno}, "
        place = f"{line}column {error.colno}"
        raise Malformed(f"{where} is not JSON: {error.msg} ({place}); {remedy}") from error
    except UnicodeEncodeError as error:
        raise Malformed(
            f"{where} holds half of a surrogate pair, which is no character; {remedy}"
        ) from error
    except ValueError as error:  # of the hooks, and of an integer with thousands of digits
        raise Malformed(f"{where} is not JSON: {str(error).split(';')[0]}; {remedy}") from error
    except RecursionError:
        depth = _DEEPEST + 1
    if depth > _DEEPEST:
        raise Malformed(f"{where} is nested deeper than {_DEEPEST} levels; {remedy}")
    return check(value, shape, where=where, remedy=remedy)


def check(value: Any, shape: Any, *, where: str, remedy: str = _AGAIN) -> Any:
    """The value, if it is of the given shape. Raises Unexpected, which names the first key that is
    not.

    >>> check({"rows": [{"name": "a"}, {"name": True}]}, {"rows": [{"name": str}]}, where="x.json")
    Traceback (most recent call last):
    lowrank_jax.interop.documents.Unexpected: x.json: rows[1].name is True, where a string is needed; ...
    """
    problem = _problem(value, shape, "")
    if problem is not None:
        raise Unexpected(f"{where}{problem}; {remedy}")
    return value


def write(path: str | os.PathLike, data: bytes) -> pathlib.Path:
    """Write a file so that it holds either what it held or all of the data, whenever the process
    dies; returns it.

    Folders above it are made. What a failed write leaves behind is removed.

    >>> import tempfile
    >>> write(pathlib.Path(tempfile.mkdtemp(), "some", "file.json"), b"{}").read_text()
    '{}'
    """
    path = pathlib.Path(path)
    target = path.resolve()  # of a link, the file that it names
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name[:200]}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return path


def is_torn(path: str | os.PathLike) -> bool:
    """Whether the last line of a file has no end, as a killed writer leaves it."""
    with _opened(pathlib.Path(path), _AGAIN) as file:
        if not file.seek(0, os.SEEK_END):
            return False
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def _opened(path: pathlib.Path, remedy: str):
    try:
        if not path.is_file():
            what = "is no file" if os.path.lexists(path) else "does not exist"
            raise Missing(f"{path} {what}; {remedy}")
        return open(path, "rb")
    except Missing:
        raise
    except OSError as error:
        raise Missing(f"{path} cannot be opened ({error.strerror}); {remedy}") from error


def _bytes(path: pathlib.Path, remedy: str) -> bytes:
    with _opened(path, remedy) as file:
        size = os.fstat(file.fileno()).st_size
        if size > LARGEST:
            raise Malformed(
                f"{path} has {size} bytes, where at most {LARGEST} are expected; {remedy}"
            )
        try:
            return file.read()
        except OSError as error:
            raise Missing(f"{path} cannot be read ({error.strerror}); {remedy}") from error


def _decoded(raw: bytes, where: str, remedy: str) -> str:
    """The text of a whole file, which may begin with a byte order mark."""
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise Malformed(f"{where} is UTF-16; save it as UTF-8")
    return _decoded_part(raw.removeprefix(b"\xef\xbb\xbf"), where, remedy)


def _decoded_part(raw: bytes, where: str, remedy: str) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        place = "" if ", line " in where else f", line {line},"
        message = (
            f"{where}{place} is not UTF-8: byte {raw[error.start]:#04x} at offset {error.start}; "
            f"{remedy}"
        )
        raise Malformed(message) from error


def _no_number(word: str) -> NoReturn:
    raise ValueError(f"{word} is no number of JSON")


def _finite(word: str) -> float:
    value = float(word)
    if math.isinf(value):
        raise ValueError(f"{word} is too large for a number")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} stands twice")
    return found


def _depth(value: Any) -> int:
    """How deep arrays and objects are nested, at most one more than is allowed."""
    level, depth = [value], 0
    while level and depth <= _DEEPEST:
        inside = [
            node.values() if isinstance(node, dict) else node
            for node in level
            if isinstance(node, (dict, list))
        ]
        level, depth = [child for children in inside for child in children], depth + 1
    return depth


_NAMES = {
    int: "an integer",
    float: "a number",
    str: "a string",
    bool: "true or false",
    None: "null",
    dict: "an object",
    list: "an array",
}


def _named(shape: Any) -> str:
    if isinstance(shape, tuple):
        return " or ".join(_named(one) for one in shape)
    kind = type(shape) if isinstance(shape, (dict, list)) else shape
    return _NAMES[kind]


def _is_of(value: Any, shape: Any) -> bool:
    """Whether a value is of the outer type of a shape."""
    if shape is object:
        return True
    if shape is None:
        return value is None
    if isinstance(shape, (dict, list)):
        return isinstance(value, type(shape))
    if isinstance(value, bool):
        return shape is bool
    if isinstance(value, int) and shape in (int, float):
        return abs(value) <= sys.float_info.max  # whoever reads a number may compute with it
    return isinstance(value, shape)


def _problem(value: Any, shape: Any, key: str) -> str | None:
    """What is wrong with a value, as the rest of a sentence that begins with the file; None when
    nothing is."""
    choices = shape if isinstance(shape, tuple) else (shape,)
    fitting = [choice for choice in choices if _is_of(value, choice)]
    if not fitting:
        shown = repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:60]}..."
        return f"{f': {key}' if key else ''} is {shown}, where {_named(shape)} is needed"
    problems = [_inside(value, choice, key) for choice in fitting]
    return None if None in problems else problems[0]


def _inside(value: Any, shape: Any, key: str) -> str | None:
    """As `_problem`, of the elements of an array or an object."""
    if isinstance(shape, list):
        found = (
            _problem(element, shape[0], f"{key}[{number}]") for number, element in enumerate(value)
        )
        return next((problem for problem in found if problem is not None), None)
    if not isinstance(shape, Mapping):
        return None
    named = {name.removesuffix("?") for name in shape if name is not str}
    for name, inner in shape.items():
        if name is str:
            others = ((own, element) for own, element in value.items() if own not in named)
            found = (_problem(element, inner, f"{key}[{own!r}]") for own, element in others)
            problem = next((problem for problem in found if problem is not None), None)
            if problem is not None:
                return problem
            continue
        own = name.removesuffix("?")
        if own not in value:
            if own == name:
                return f"{f': {key}' if key else ''} has no {name!r}"
            continue
        problem = _problem(value[own], inner, f"{key}.{own}" if key else own)
        if problem is not None:
            return problem
    return None
