"""Batches of documents that are pairs or conversations.

A prompt and its response, or a text and its class.
"""

import numpy as np

from experiments.data.loader import Numbered
from experiments.data.packing import TokenizedSplit


class Rows(Numbered):
    """What both kinds share: example i is document i."""

    def __init__(self, split: TokenizedSplit, batch_size: int, sequence_length: int, seed: int):
        if split.marks is None:
            raise ValueError("the split holds plain text, not pairs")
        self.split, self.marks, self.sequence_length = split, split.marks, sequence_length
        self._room = sequence_length  # tokens of a row
        super().__init__(len(split.marks), len(split.marks), batch_size, seed, sequence_length)

    @property
    def tokens(self) -> np.ndarray:
        """All tokens of the split, flat."""
        return self.split.tokens

    @property
    def cut(self) -> int:
        """How many documents are longer than a row."""
        return int(np.sum(np.diff(self.split.starts) > self._room))

    def _window(self, start, length, width):
        """(b, width) tokens from `start`, padded after `length`."""
        offset = np.arange(width)
        index = np.minimum(start[:, None] + offset, len(self.tokens) - 1)
        return np.where(
            offset < length[:, None], self.tokens[index].astype(np.int32), self.split.pad
        )


class Instructions(Rows):
    """{"inputs", "targets", "weights"} of prompts and responses.

    (b, S) int32 and float32; weights are 1 on the tokens of the response and its eos.

    Of a conversation, 1 on the tokens of every reply and of what ends it. A row holds at most S + 1
    tokens. When prompt and first response do not fit, the prompt loses its beginning, down to one
    token, and then the response its end; later turns lose what is left over. So every row has a
    loss.

    >>> split = TokenizedSplit(
    ...     tokens=np.array([1, 2, 3, 4, 9]),
    ...     starts=np.array([0, 5]),
    ...     eos=9,
    ...     pad=0,
    ...     fingerprint="",
    ...     marks=np.array([2]),
    ... )
    >>> batch = Instructions(split, batch_size=1, sequence_length=5, seed=0).batch(0)
    >>> batch["inputs"].tolist(), batch["targets"].tolist(), batch["weights"].tolist()
    ([[1, 2, 3, 4, 9]], [[2, 3, 4, 9, 0]], [[0.0, 1.0, 1.0, 1.0, 0.0]])
    """

    def __init__(self, split: TokenizedSplit, batch_size: int, sequence_length: int, seed: int):
        super().__init__(split, batch_size, sequence_length, seed)
        self._room = sequence_length + 1

    def _read(self, examples):
        S, starts = self.sequence_length, self.split.starts
        prompt = self.marks[examples]
        after = starts[examples + 1] - starts[examples] - prompt  # tokens from the first reply on
        # the first reply stays whole, as far as a row goes; the prompt loses its beginning for it
        response = np.minimum(self._first_reply(starts[examples] + prompt, after), S)
        kept = np.minimum(prompt, S + 1 - response)
        length = kept + np.minimum(after, np.minimum(S, S + 1 - kept))
        first = starts[examples] + prompt - kept
        window = self._window(first, length, S + 1)
        place = np.arange(1, S + 1)  # of a target in its window
        weights = (place >= kept[:, None]) & (place < length[:, None])
        if self.split.counted is not None:  # a conversation: only some of what follows are replies
            index = np.minimum(first[:, None] + place, len(self.tokens) - 1)
            weights &= self.split.counted[index] > 0
        return {
            "inputs": window[:, :-1].copy(),
            "targets": window[:, 1:].copy(),
            "weights": weights.astype(np.float32),
        }

    def _first_reply(self, start, after):
        """Tokens of the first reply, of a longer one as many as a row has.

        It begins at `start` and is followed by `after` tokens, itself included.
        """
        if self.split.counted is None:
            return after
        offset = np.arange(self._room)
        index = np.minimum(start[:, None] + offset, len(self.tokens) - 1)
        is_reply = (self.split.counted[index] > 0) & (offset < after[:, None])
        return np.where(is_reply.all(axis=1), self._room, np.argmin(is_reply, axis=1))


class Labelled(Rows):
    """{"inputs": (b, S) int32, "last", "targets": (b,) int32, "weights": (b,) float32}.

    A row is a text, cut to S - 1 tokens, and eos, which is token number "last": there the class is
    read.

    >>> split = TokenizedSplit(
    ...     tokens=np.array([1, 2, 3, 9]),
    ...     starts=np.array([0, 4]),
    ...     eos=9,
    ...     pad=0,
    ...     fingerprint="",
    ...     marks=np.array([5]),
    ... )
    >>> batch = Labelled(split, batch_size=1, sequence_length=3, seed=0).batch(0)
    >>> batch["inputs"].tolist(), batch["last"].tolist(), batch["targets"].tolist()
    ([[1, 2, 9]], [2], [5])
    """

    def _read(self, examples):
        starts = self.split.starts
        length = np.minimum(starts[examples + 1] - starts[examples], self.sequence_length)
        window = self._window(starts[examples], length, self.sequence_length)
        window[np.arange(len(window)), length - 1] = self.split.eos
        targets = self.marks[examples].astype(np.int32)
        weights = np.ones(len(examples), np.float32)
        return {
            "inputs": window,
            "last": (length - 1).astype(np.int32),
            "targets": targets,
            "weights": weights,
        }
