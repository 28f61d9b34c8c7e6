"""What an evaluation was of: which tokens, and how many bytes of text they are.

Losses are compared on the same tokens, and across tokenizers in bits per byte.

evaluated   digest of the tokenizer and of every token (or image) and target of the evaluation
bytes       of the text that its targets spell; what a tokenizer's own marks (eos) stand for has
            none
text        digest of the text, where the evaluation is of a whole split in one stream: equal for
            equal text, whatever the tokenizer
"""

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from experiments.data import Dataset
from experiments.data.loader import Batches
from experiments.data.tokenizer import ByteTokenizer

ROWS = 256  # that are read at once


def identity(dataset: Dataset, limit: int | None) -> dict[str, Any]:
    """What `limit` tokens of the validation data are: {"evaluated", "bytes", "text"}.

    Digests of the tokens and of the text, and its bytes; the last two None where they are not
    known. Classes have no bytes: their loss is that of a label.
    """
    part, tokenizer = dataset.validation, dataset.tokenizer
    # one digest of each, so that it does not matter how many rows are read at once
    digests = {name: hashlib.sha256() for name in ("inputs", "targets")}
    spells = tokenizer is not None and not dataset.classes
    size = 0
    for batch in part.evaluation(ROWS, limit):
        counted = batch["weights"] > 0  # tokens have a weight each, images one a row
        for name, digest in digests.items():
            digest.update(np.asarray(batch[name])[counted].tobytes())
        size += sum(map(len, spelled(tokenizer, batch["targets"][counted]))) if spells else 0
    # the text is known where all of a packed stream is evaluated
    is_stream = isinstance(part, Batches) and part.mode == "pack"
    text = None
    if spells and is_stream and part.evaluated(limit) == part.evaluated():
        whole = hashlib.sha256()
        for piece in spelled(tokenizer, np.asarray(part.tokens)):
            whole.update(piece)
        text = whole.hexdigest()[:16]
    words = [
        getattr(tokenizer, "identity", ""),
        *(digest.hexdigest() for digest in digests.values()),
    ]
    found = hashlib.sha256(" ".join(words).encode())
    return {"evaluated": found.hexdigest()[:16], "bytes": size if spells else None, "text": text}


def spelled(tokenizer: Any, ids: np.ndarray) -> Iterator[bytes]:
    """The text of a run of tokens, document by document.

    >>> list(spelled(ByteTokenizer(), np.array([110, 195, 257, 169])))
    [b'n\\xc3', b'\\xa9']
    """
    ends = np.flatnonzero(ids == tokenizer.eos)
    for piece in np.split(ids, ends + 1):
        if isinstance(tokenizer, ByteTokenizer):
            yield piece[piece < 256].astype(np.uint8).tobytes()  # bytes that are no whole UTF-8 too
        else:
            yield tokenizer.decode(piece).encode()
