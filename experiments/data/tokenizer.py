"""Text to token ids and back: bytes, or a SentencePiece model."""

import hashlib
import os

import numpy as np


class ByteTokenizer:
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


class SentencePieceTokenizer:
    """A SentencePiece `.model` file; `pad` is eos when the model has no padding piece (padding has weight 0).

    Raises FileNotFoundError for a missing file, ImportError without sentencepiece, ValueError without an eos.
    """

    def __init__(self, path: str):
        path = os.path.expanduser(path)
        if not os.path.isfile(path):
            raise FileNotFoundError(
                f'data.tokenizer={path!r}: no such file; give a SentencePiece .model file or "bytes"'
            )
        try:
            import sentencepiece
        except ImportError as error:
            message = f"data.tokenizer={path!r} needs the sentencepiece package: pip install 'lowrank_jax[experiments]'"
            raise ImportError(message) from error
        with open(path, "rb") as file:
            model = file.read()
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.identity = f"sentencepiece-{hashlib.sha256(model).hexdigest()[:16]}"
        self.vocabulary_size = self._processor.vocab_size()
        self.bos, self.eos = self._processor.bos_id(), self._processor.eos_id()
        if self.eos < 0:
            raise ValueError(f"data.tokenizer={path!r} has no eos piece, which separates documents: train it with one")
        self.pad = self._processor.pad_id() if self._processor.pad_id() >= 0 else self.eos

    def encode(self, text: str | bytes) -> np.ndarray:
        """Text to int32 ids, without bos and eos."""
        text = text.decode(errors="replace") if isinstance(text, bytes) else text
        return np.asarray(self._processor.encode(text), np.int32)

    def decode(self, ids) -> str:
        """Ids to text; control pieces vanish."""
        return self._processor.decode([int(i) for i in ids])


def make_tokenizer(name: str) -> ByteTokenizer | SentencePieceTokenizer:
    """The tokenizer that "bytes" or the path of a SentencePiece model names."""
    return ByteTokenizer() if name == "bytes" else SentencePieceTokenizer(name)
