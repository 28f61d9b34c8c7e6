"""JSON lines as documents, one object a line: texts, texts with labels, instructions.

`{"text"}`, `{"text", "label"}`, or an instruction in one of many forms.

An instruction is a prompt and a response under one of PAIRS of keys, or a conversation:
{"messages": [{"role": "user", "content": "..."}, ...]}, or with "conversations", "from" and "value"
in their place. An object with "prompt" and "response" is read by these; one that may be read in
several other ways is an error, until the keys are named.

The whole file is checked when it is opened: the first line that is not what the task needs is an
error that names file, line and remedy, before any work.
"""

import hashlib
import json
import os
import pathlib
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

from experiments.data.chat import Conversation
from experiments.data.sources import Document, Source
from lowrank_jax.interop import documents

MAY_BE_EMPTY = ("prompt_key",)

# Keys of the usual files: the prompt, what it is about (where there is such a key it may be missing
# or empty), and the response. The first are those of the configuration.
PAIRS: tuple[tuple[str, str | None, str], ...] = (
    ("prompt", None, "response"),
    ("prompt", None, "completion"),
    ("instruction", "input", "output"),  # Alpaca
    ("instruction", "context", "response"),  # Dolly
    ("question", None, "answer"),
)
USUAL: Mapping[str, str] = {"prompt_key": "prompt", "response_key": "response"}

# Keys of conversations: the list, and of one of its messages who speaks and what.
CHATS = (("messages", "role", "content"), ("conversations", "from", "value"))
_SPEAKERS = {"human": "user", "gpt": "assistant"}


def jsonl_source(path: str, keys: Mapping[str, str], validation: str = "") -> Source:
    """The lines of a JSON lines file.

    Args:
      path: the file.
      keys: {field of the configuration: key in the objects}, as in
        `experiments.data.sources.builder_source`; labels are strings or integers, and the classes
        are the labels of `path`, sorted. USUAL stands for all forms of an instruction, which each
        line tells by its keys. Other keys are ignored.
      validation: a second file, for validation; without one, one line in twenty of the first, by
        the CRC-32 of what is read of it, so that equal lines are in the same split.

    Raises FileNotFoundError for a missing file, ValueError for a line that cannot be used or an
    empty split.
    """
    files = {"train": path, "validation": validation or path}
    labels = _labels(path, keys["label_key"], keys) if "label_key" in keys else {}
    digest = hashlib.sha256(json.dumps([*keys.values()]).encode())
    splits, has_chats = dict.fromkeys(files, 0), False

    def documents(split: str) -> Iterator[Document]:
        for number, values in _lines(files[split], keys):
            if not validation and _split_of(values) != split:
                continue
            if labels and values[1] not in labels:
                known = ", ".join(map(repr, labels))
                _refuse(
                    files[split],
                    number,
                    f"the label {values[1]!r} is none of {path}, which has {known}",
                )
            yield _document(values, labels)

    for split in files:
        for document in documents(split):
            splits[split] += 1
            has_chats |= isinstance(document, Conversation) and document.has_roles
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
        has_chats=has_chats,
    )


def _document(values: tuple, labels: Mapping[Any, int]) -> Document:
    if isinstance(values[0], tuple):
        return Conversation(tuple((role, text.encode()) for role, text in values))
    first = values[0].encode()
    if labels:
        return first, labels[values[1]]
    return (first, values[1].encode()) if len(values) > 1 else first


def _split_of(values) -> str:
    return "validation" if zlib.crc32(json.dumps(values).encode()) % 20 == 0 else "train"


def _refuse(path: str, number: int, problem: str) -> None:
    raise ValueError(f"{path}, line {number}: {problem}; correct or remove the line")


def _lines(path: str, keys: Mapping[str, str]) -> Iterator[tuple[int, tuple]]:
    """(line number from 1, the values of `keys`), checked."""
    if not os.path.isfile(os.path.expanduser(path)):
        raise FileNotFoundError(
            f"data.name or data.validation={path!r}: no such file; give a .jsonl file"
        )
    for number, found in documents.lines(
        os.path.expanduser(path), dict, remedy="correct or remove the line"
    ):
        if keys == USUAL:
            yield number, _instruction(path, number, found)
            continue
        for field, key in keys.items():
            if key not in found:
                _refuse(
                    path,
                    number,
                    f"no {key!r} (data.{field}) among its keys {', '.join(map(repr, found))}",
                )
            _check(path, number, field, key, found[key])
        yield number, tuple(found[key] for key in keys.values())


def _instruction(path: str, number: int, found: Mapping[str, Any]) -> tuple:
    """(prompt, response), or (role, text) of the turns of a conversation."""
    pairs = [form for form in PAIRS if form[0] in found and form[2] in found]
    chats = [form for form in CHATS if form[0] in found]
    # the first keys are those that the configuration names, whatever else is there
    if pairs[:1] == [PAIRS[0]]:
        pairs, chats = pairs[:1], []
    if len(pairs) + len(chats) != 1:
        _refuse_form(path, number, found, _named(pairs, chats))
    if chats:
        return _turns(path, number, chats[0], found)
    prompt, about, response = pairs[0]
    _check(path, number, "prompt_key", prompt, found[prompt])
    _check(path, number, "response_key", response, found[response])
    if about is None or found.get(about) in (None, ""):
        return found[prompt], found[response]
    _check(path, number, "prompt_key", about, found[about])
    return ("user", found[prompt]), ("context", found[about]), ("assistant", found[response])


def _named(pairs, chats) -> list[str]:
    return [f"{first!r} with {last!r}" for first, _, last in pairs] + [
        repr(form[0]) for form in chats
    ]


def _refuse_form(path: str, number: int, found: Mapping[str, Any], fitting: list[str]) -> None:
    told = f"may be read as {' or as '.join(fitting)}" if fitting else "are those of no instruction"
    raise ValueError(
        f"{path}, line {number}: its keys {', '.join(map(repr, found))} {told}; known are "
        f"{', '.join(_named(PAIRS, CHATS))}; rename them, remove the line, or name the keys of a "
        "prompt and its response by data.prompt_key and data.response_key"
    )


def _turns(path: str, number: int, form: tuple[str, str, str], found: Mapping[str, Any]) -> tuple:
    """(role, text) of the turns of a conversation, up to the last reply."""
    key, speaker, content = form
    messages, turns = found[key], list[tuple[str, str]]()
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        _refuse(path, number, f"{key!r} is {messages!r}, where a list of objects is needed")
    for place, message in enumerate(messages, 1):
        where = f"{key!r}, message {place}"
        if speaker not in message or content not in message:
            _refuse(
                path,
                number,
                f"{where}: no {speaker!r} and {content!r} among {', '.join(map(repr, message))}",
            )
        told = message[speaker]
        role = _SPEAKERS.get(told, told) if isinstance(told, str) else told
        due = ("user", "assistant")[sum(other != "system" for other, _ in turns) % 2]
        if role != due and not (role == "system" and not turns):
            order = "a system's message may come first, then user and assistant take turns"
            _refuse(
                path, number, f"{where}: {speaker!r} is {told!r}, where {due!r} is due ({order})"
            )
        if message.get("weight") not in (None, 1):
            _refuse(
                path,
                number,
                f"{where}: 'weight' is {message['weight']!r}, but all replies count alike",
            )
        field = "response_key" if role == "assistant" else "prompt_key"
        _check(path, number, field, content, message[content], f"{where}: ")
        turns.append((role, message[content]))
    while turns and turns[-1][0] != "assistant":
        turns.pop()
    if not turns:
        _refuse(path, number, f"{key!r} has no reply, the turn of 'assistant' whose loss is taken")
    return tuple(turns)


def _check(path: str, number: int, field: str, key: str, value: Any, where: str = "") -> None:
    if field == "label_key":
        if not isinstance(value, (str, int)) or isinstance(value, bool):
            _refuse(path, number, f"{key!r} is {value!r}, where a string or an integer is needed")
    elif not isinstance(value, str):
        _refuse(path, number, f"{where}{key!r} is {value!r}, where a string is needed")
    elif not value and field not in MAY_BE_EMPTY:
        _refuse(path, number, f"{where}{key!r} is empty")


def _labels(path: str, key: str, keys: Mapping[str, str]) -> dict[Any, int]:
    """{label: class} of a file, in order."""
    first: dict[Any, int] = {}
    place = [*keys.values()].index(key)
    for number, values in _lines(path, keys):
        label = values[place]
        if first and type(label) is not type(next(iter(first))):
            _refuse(
                path,
                number,
                f"{key!r} is {label!r}, but line 1 has {next(iter(first))!r}: not of one type",
            )
        first.setdefault(label, number)
    if len(first) < 2:
        raise ValueError(
            f"data.name={path!r}: {len(first)} labels; a classification needs at least 2"
        )
    return {label: number for number, label in enumerate(sorted(first))}
