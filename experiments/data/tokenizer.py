"""Text to token ids and back: bytes, a SentencePiece model, or a `tokenizer.json`.

The latter is of Hugging Face's tokenizers.

Text never becomes a control token. What a document, a prompt or a user of a chat writes as "</s>"
or "<|im_end|>" is spelled out; the ids of control tokens come from `Tokenizer.token` alone, for who
builds a conversation of them (`experiments.data.chat`).
"""

import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from lowrank_jax.interop import documents

# Tokens that delimit the turns of a conversation, under the names that models have given them. Some
# files declare them as ordinary words, which text would turn into them.
MARKERS = ("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")

# File names in a folder that brings a tokenizer, in order: a tokenizer.json has the tokens that
# were added later, too.
FILES = ("tokenizer.json", "tokenizer.model")
SETTINGS = "tokenizer_config.json"

_ADDED = {"content": str, "special": bool}

# How a tokenizer.json without SETTINGS beside it spells its special tokens.
_SPELLINGS = {
    "bos": ("<s>", "<|begin_of_text|>", "<bos>", "[BOS]"),
    "eos": ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "[EOS]"),
    "pad": ("<pad>", "<|pad|>", "[PAD]"),
}


class Tokenizer:
    """What all kinds share.

    Attributes:
      vocabulary_size: ids are smaller than it.
      bos, eos, pad: ids; bos is -1 where there is none, and pad is eos then (padding has weight 0).
      identity: equal for equal ids of equal text.
      files: {name: content} of what a folder needs to bring this tokenizer (`found_in`).
    """

    vocabulary_size: int
    bos: int
    eos: int
    pad: int
    identity: str
    files: Mapping[str, bytes] = {}

    def encode(self, text: str | bytes) -> np.ndarray:
        """Text to int32 ids, without bos and eos."""
        raise NotImplementedError

    def decode(self, ids) -> str:
        """Ids to text; control tokens vanish."""
        raise NotImplementedError

    def token(self, text: str) -> int | None:
        """The id of the control token of this name, where there is one."""
        raise NotImplementedError


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes 0..255, then bos 256, eos 257, pad 258.

    >>> tokenizer = ByteTokenizer()
    >>> tokenizer.encode("né")
    array([110, 195, 169], dtype=int32)
    >>> tokenizer.decode([110, 195, 169, tokenizer.eos])
    'né'
    """

    vocabulary_size = 259
    bos, eos, pad = 256, 257, 258
    identity = "bytes"

    def encode(self, text: str | bytes) -> np.ndarray:
        """Text, or bytes that are taken as they are, to int32 ids."""
        raw = text.encode() if isinstance(text, str) else text
        return np.frombuffer(raw, np.uint8).astype(np.int32)

    def decode(self, ids) -> str:
        """Ids to text; special ids vanish and broken UTF-8 becomes U+FFFD."""
        ids = np.asarray(ids)
        return ids[ids < 256].astype(np.uint8).tobytes().decode(errors="replace")

    def token(self, text: str) -> int | None:
        """None: bytes spell every name."""
        return None


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece `.model` file.

    Raises FileNotFoundError for a missing file, ImportError without sentencepiece, ValueError
    without an eos.
    """

    def __init__(self, path: str):
        model = _read(path)
        try:
            import sentencepiece
            from sentencepiece import sentencepiece_model_pb2
        except ImportError as error:
            message = (
                f"data.tokenizer={path!r} needs the sentencepiece package: pip install -e "
                "'.[experiments]'"
            )
            raise ImportError(message) from error
        self.files = {"tokenizer.model": model}
        try:
            kind: Any = sentencepiece_model_pb2
            proto, types = kind.ModelProto.FromString(model), kind.ModelProto.SentencePiece
            declared = [
                piece
                for piece in proto.pieces
                if piece.type == types.USER_DEFINED and piece.piece in MARKERS
            ]
            for piece in declared:
                piece.type = types.CONTROL
            model = proto.SerializeToString() if declared else model
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except Exception as error:  # protobuf's and SentencePiece's own have no common class
            raise ValueError(
                f"data.tokenizer={path!r} is no SentencePiece model ({error}): copy it again"
            ) from error
        self.identity = f"sentencepiece-{hashlib.sha256(model).hexdigest()[:16]}"
        self.vocabulary_size = self._processor.vocab_size()
        self.bos, self.eos = self._processor.bos_id(), self._processor.eos_id()
        if self.eos < 0:
            raise ValueError(
                f"data.tokenizer={path!r} has no eos piece, which separates documents: train it "
                "with one"
            )
        self.pad = self._processor.pad_id() if self._processor.pad_id() >= 0 else self.eos

    def encode(self, text: str | bytes) -> np.ndarray:
        """Text to int32 ids, without bos and eos."""
        text = text.decode(errors="replace") if isinstance(text, bytes) else text
        return np.asarray(self._processor.encode(text), np.int32)

    def decode(self, ids) -> str:
        """Ids to text; control pieces vanish."""
        return self._processor.decode([int(i) for i in ids])

    def token(self, text: str) -> int | None:
        """The id of the control piece of this name, where there is one."""
        found = self._processor.piece_to_id(text)
        return found if self._processor.is_control(found) else None


class JsonTokenizer(Tokenizer):
    """A `tokenizer.json`, as Hugging Face's tokenizers and transformers write it.

    Special tokens have the names that `tokenizer_config.json` beside it gives, else the usual ones.
    Truncation and padding that the file asks for are left out, and so is its template of a
    sequence.

    Raises FileNotFoundError for a missing file, ImportError without the tokenizers package,
    ValueError for a file that it cannot read, or without an eos.
    """

    def __init__(self, path: str):
        raw = _read(path)
        settings = _settings(path)
        model = documents.read(
            pathlib.Path(path).expanduser(), {"added_tokens?": [_ADDED]}, remedy="copy it again"
        )
        try:
            import tokenizers
        except ImportError as error:
            raise ImportError(
                f"data.tokenizer={path!r} needs the tokenizers package: pip install -e "
                "'.[tokenizers]', or name "
                'a SentencePiece .model file or "bytes"'
            ) from error
        added = {token["content"]: token for token in model.get("added_tokens", ())}
        for name in {*MARKERS, *filter(None, map(_spelled, settings.values()))} & added.keys():
            added[name]["special"] = True
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(model))
        except Exception as error:  # the package raises Exception itself
            raise ValueError(
                f"data.tokenizer={path!r} is no tokenizer.json ({error}): copy it again"
            ) from error
        self._tokenizer.encode_special_tokens = True  # special tokens in text are text
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        special = [name for name, token in added.items() if token["special"]]
        self._special = {name: int(self._tokenizer.token_to_id(name) or 0) for name in special}
        self._control = frozenset(self._special.values())
        self.vocabulary_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        names = {use: self._name(path, use, settings) for use in _SPELLINGS}
        ids = {use: -1 if name is None else self._special[name] for use, name in names.items()}
        self.bos, self.eos, self.pad = ids["bos"], ids["eos"], ids["pad"]
        if self.eos < 0:
            raise ValueError(
                f'data.tokenizer={path!r} says no eos, which separates documents: write {{"eos_token": "..."}} into '
                f"{SETTINGS} beside it, with one of its special tokens "
                f"({', '.join(self._special) or 'it has none'})"
            )
        self.pad = self.eos if self.pad < 0 else self.pad
        own = {f"{use}_token": name for use, name in names.items() if name is not None}
        settings = {"tokenizer_class": "PreTrainedTokenizerFast"} | own | settings
        self.files = {
            "tokenizer.json": raw,
            SETTINGS: (json.dumps(settings, indent=1) + "\n").encode(),
        }
        whole = f"{json.dumps(model)} {self.bos} {self.eos} {self.pad}".encode()
        self.identity = f"tokenizers-{hashlib.sha256(whole).hexdigest()[:16]}"

    def _name(self, path: str, use: str, settings: Mapping[str, Any]) -> str | None:
        """What the special token for `use` is called."""
        told = _spelled(settings.get(f"{use}_token"))
        if told is not None and told not in self._special:
            raise ValueError(
                f"data.tokenizer={path!r}: {SETTINGS} says {use}_token={told!r}, which is none of "
                f"its special tokens ({', '.join(self._special) or 'it has none'}): correct it"
            )
        usual = [name for name in _SPELLINGS[use] if name in self._special]
        if told is None and use == "eos" and len(usual) > 1:
            raise ValueError(
                f"data.tokenizer={path!r} has {' and '.join(usual)}: write the one that ends a "
                "document into "
                f'{SETTINGS} beside it, as {{"eos_token": "..."}}'
            )
        return told if told is not None or not usual else usual[0]

    def encode(self, text: str | bytes) -> np.ndarray:
        """Text to int32 ids, without bos and eos."""
        text = text.decode(errors="replace") if isinstance(text, bytes) else text
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        # the vocabulary of words holds the name of a special token: encode around such names
        if not self._control.isdisjoint(ids):
            pieces = [
                self._tokenizer.encode(piece, add_special_tokens=False)
                for piece in _cut(text, self._special)
            ]
            ids = [i for piece in pieces for i in piece.ids]
            for name in [name for name, i in self._special.items() if i in ids]:
                raise ValueError(
                    f"a text becomes the special token {name!r} of the tokenizer: remove it from "
                    "the text"
                )
        return np.asarray(ids, np.int32)

    def decode(self, ids) -> str:
        """Ids to text; special tokens vanish."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def token(self, text: str) -> int | None:
        """The id of the special token of this name, where there is one."""
        return self._special.get(text)


def _cut(text: str, names: Iterable[str]) -> list[str]:
    """The text in pieces that hold none of the names: cut behind the first character of each.

    >>> _cut("a</s>b</s>", ["</s>"])
    ['a<', '/s>b<', '/s>']
    """
    pieces = [text]
    for name in names:
        whole, pieces = pieces, []
        for piece in whole:
            first, *others = piece.split(name)
            pieces += [first + name[0] if others else first]
            pieces += [
                name[1:] + other + (name[0] if i + 1 < len(others) else "")
                for i, other in enumerate(others)
            ]
    return [piece for piece in pieces if piece]


def _spelled(token: Any) -> str | None:
    """A token of SETTINGS: its name, or a table that holds it."""
    found = token.get("content") if isinstance(token, Mapping) else token
    return found if isinstance(found, str) else None


def _settings(path: str) -> dict[str, Any]:
    beside = pathlib.Path(path).expanduser().with_name(SETTINGS)
    return documents.read(beside, dict, remedy="copy it again") if beside.is_file() else {}


def _read(path: str) -> bytes:
    file = pathlib.Path(path).expanduser()
    if not file.is_file():
        remedy = (
            "give a SentencePiece .model file, a tokenizer.json, a folder that holds one of them, "
            'or "bytes"'
        )
        raise FileNotFoundError(f"data.tokenizer={path!r}: no such file; {remedy}")
    return file.read_bytes()


def found_in(folder: str | os.PathLike) -> str:
    """The path of the tokenizer that a folder brings, "" where it brings none."""
    paths = [pathlib.Path(folder).expanduser() / name for name in FILES]
    return next((str(path) for path in paths if path.is_file()), "")


def make_tokenizer(name: str) -> Tokenizer:
    """The tokenizer that "bytes" or a path names: a JSON file, a SentencePiece model, a folder."""
    if name == "bytes":
        return ByteTokenizer()
    path = found_in(name) or name
    return (JsonTokenizer if path.endswith(".json") else SentencePieceTokenizer)(path)


def vocabulary_of(name: str) -> int | None:
    """How many ids the tokenizer has; None for "bytes", and where its file is missing."""
    if name == "bytes" or not (found_in(name) or pathlib.Path(name).expanduser().is_file()):
        return None
    return make_tokenizer(name).vocabulary_size
