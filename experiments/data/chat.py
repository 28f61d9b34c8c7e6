"""Conversations as tokens: templates that delimit their turns, and which of the tokens have a loss.

A reply has the loss of its own tokens and of what ends it, whichever turn it is; everything else is
given. Text between two markers is encoded at once, but a reply apart from what stands before it, as
when a model is asked for one.

Templates are data. The Jinja programs of other people's `tokenizer_config.json` are not run: a
tokenizer that has the markers of one of TEMPLATES chooses it.
"""

import dataclasses
import itertools
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from experiments.data.tokenizer import MARKERS, Tokenizer

ROLES = ("system", "user", "context", "assistant")

# "{bos}" and "{eos}" stand for these tokens, a marker for one token where the tokenizer has it,
# else for its letters.
_MARKED = re.compile("(" + "|".join(map(re.escape, ("{bos}", "{eos}", *MARKERS))) + ")")


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Turns in order, (role, text in UTF-8): a system's, then a user's and an assistant's in turn.

    A "context" follows a user's turn: what an instruction is about, where records have it apart.
    """

    turns: tuple[tuple[str, bytes], ...]

    @property
    def has_roles(self) -> bool:
        """Its record named the roles; one with a context is an instruction."""
        return all(role != "context" for role, _ in self.turns)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Template:
    """What stands around the turns.

    Attributes:
      begin: before the first turn.
      system, user, assistant: before and behind a turn; behind a reply that is what ends it and has
        a loss.
      context: between a user's turn and what it is about.
      after_system: in place of `user` for the turn that follows a system's.
      after_reply: behind what ends a reply, where another turn follows.
      strip: white space around a turn is left out.
    """

    begin: str = ""
    system: tuple[str, str] = ("", "\n\n")
    user: tuple[str, str] = ("", "")
    assistant: tuple[str, str] = ("", "{eos}")
    context: str = "\n\n"
    after_system: tuple[str, str] | None = None
    after_reply: str = ""
    strip: bool = False

    @property
    def markers(self) -> tuple[str, ...]:
        """Those of its strings that are tokens of tokenizers made for it."""
        text = "".join((*self.system, *self.user, *self.assistant))
        return tuple(marker for marker in MARKERS if marker in text)


TEMPLATES = {
    "plain": Template(),
    "alpaca": Template(
        user=("### Instruction:\n", "\n\n"),
        assistant=("### Response:\n", "{eos}"),
        context="\n\n### Input:\n",
    ),
    "chatml": Template(
        system=("<|im_start|>system\n", "<|im_end|>\n"),
        user=("<|im_start|>user\n", "<|im_end|>\n"),
        assistant=("<|im_start|>assistant\n", "<|im_end|>"),
        after_reply="\n",
    ),
    "llama2": Template(
        system=("{bos}[INST] <<SYS>>\n", "\n<</SYS>>\n\n"),
        user=("{bos}[INST] ", " [/INST]"),
        after_system=("", " [/INST]"),
        strip=True,
    ),
    "llama3": Template(
        begin="{bos}",
        system=("<|start_header_id|>system<|end_header_id|>\n\n", "<|eot_id|>"),
        user=("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),
        assistant=("<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>"),
        strip=True,
    ),
}


def chosen(name: str | None, tokenizer: Tokenizer) -> str:
    """The template of this name, or the one of which the tokenizer has the markers.

    Raises ValueError where there is no name and no such template.
    """
    if name is not None:
        return name
    fitting = [
        name
        for name, template in TEMPLATES.items()
        if template.markers
        and all(tokenizer.token(marker) is not None for marker in template.markers)
    ]
    if len(fitting) != 1:
        raise ValueError(
            f"data.template=None: the tokenizer {tokenizer.identity} has the markers of "
            f"{' and of '.join(fitting) or 'no template'} (a chat_template in Jinja is not run); "
            f"choose one of {', '.join(TEMPLATES)}"
        )
    return fitting[0]


def spelled(template: str, tokenizer: Tokenizer) -> tuple[str, ...]:
    """The markers that the tokenizer does not have, which are spelled out."""
    return tuple(
        marker for marker in TEMPLATES[template].markers if tokenizer.token(marker) is None
    )


def encoded(
    conversation: Conversation, template: str, tokenizer: Tokenizer
) -> tuple[np.ndarray, np.ndarray]:
    """Its tokens up to the end of the last reply, int32, and which of them have a loss, bool.

    >>> from experiments.data.tokenizer import ByteTokenizer
    >>> tokens, counted = encoded(
    ...     Conversation((("user", b"a"), ("assistant", b"b"))), "alpaca", ByteTokenizer()
    ... )
    >>> ByteTokenizer().decode(tokens), ByteTokenizer().decode(tokens[counted]), int(tokens[-1])
    ('### Instruction:\\na\\n\\n### Response:\\nb', 'b', 257)
    """
    pieces = [piece for piece in _pieces(conversation.turns, TEMPLATES[template]) if piece.text]
    while not pieces[-1].counts:
        pieces.pop()
    runs: list[tuple[list[bytes | int], bool]] = []  # of texts and markers that count alike
    for piece in pieces:
        if not runs or runs[-1][1] != piece.counts:
            runs.append(([], piece.counts))
        runs[-1][0].extend(_parts(piece, tokenizer))
    tokens = [_tokens(parts, tokenizer) for parts, _ in runs]
    counted = [np.full(len(own), counts) for own, (_, counts) in zip(tokens, runs, strict=True)]
    return np.concatenate(tokens), np.concatenate(counted)


class _Piece(NamedTuple):
    text: bytes
    counts: bool = False
    is_frame: bool = False  # the template's, not a turn's


def _pieces(turns, template: Template) -> Iterator[_Piece]:
    yield _Piece(template.begin.encode(), is_frame=True)
    for place, (role, content) in enumerate(turns):
        before, following = (
            (turns[i][0] if 0 <= i < len(turns) else None) for i in (place - 1, place + 1)
        )
        if role == "context":
            first, last = template.context, template.user[1]
        elif role == "user" and before == "system" and template.after_system is not None:
            first, last = template.after_system
        else:
            first, last = getattr(template, role)
        if following == "context":  # which the same turn holds
            last = ""
        is_reply = role == "assistant"
        yield _Piece(first.encode(), is_frame=True)
        yield _Piece(content.strip() if template.strip else content, is_reply)
        yield _Piece(last.encode(), is_reply, is_frame=True)
        if is_reply:
            yield _Piece(template.after_reply.encode(), is_frame=True)


def _parts(piece: _Piece, tokenizer: Tokenizer) -> Iterator[bytes | int]:
    """Texts, and the ids of markers; only a template's own text has markers."""
    if not piece.is_frame:
        yield piece.text
        return
    for text in _MARKED.split(piece.text.decode()):
        if text == "{eos}":
            yield tokenizer.eos
        elif text == "{bos}":
            yield from [tokenizer.bos] if tokenizer.bos >= 0 else []
        else:
            marker = tokenizer.token(text) if text in MARKERS else None
            yield text.encode() if marker is None else marker


def _tokens(parts: list[bytes | int], tokenizer: Tokenizer) -> np.ndarray:
    """Their ids; neighbouring texts are encoded as one."""
    found = [np.zeros(0, np.int32)]
    for is_text, group in itertools.groupby(parts, lambda part: isinstance(part, bytes)):
        own = [*group]
        found.append(tokenizer.encode(b"".join(own)) if is_text else np.asarray(own, np.int32))  # type: ignore[arg-type]
    return np.concatenate(found)
