"""Batches as a pure function of (seed, step): nothing to save, nothing to get wrong on resume.

Examples are numbered; epoch e visits them in the order of a permutation keyed by (seed, e). Batch t
takes the global positions t B ... (t + 1) B - 1, and process p of P the p-th contiguous part of
them.
"""

from collections.abc import Iterator

import numpy as np

from experiments.data.packing import TokenizedSplit

MODES = ("pack", "pad")
_ROUNDS = 6


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser: a bijection of 64-bit words (Steele, Lea, Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(index: np.ndarray, size: int, seed: int, epoch: np.ndarray) -> np.ndarray:
    """Where a pseudo-random permutation of range(size) takes each index; O(1) memory.

    One permutation for each (seed, epoch).

    A Feistel network of six rounds on the smallest even number of bits that holds `size`, walked
    along its cycle until it falls below `size` again, which keeps it a bijection.

    >>> sorted(permute(np.arange(10), 10, seed=0, epoch=np.zeros(10, int)).tolist())
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    """
    # an even number of bits, split into two halves
    half = np.uint64(max(1, (int(size - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    with np.errstate(over="ignore"):
        # one key of seed and epoch, and of it one for each round (the golden ratio's bits apart)
        seeds = np.full(np.shape(index), seed % 2**64, np.uint64)
        key = _mix(np.asarray(epoch, np.uint64) + _mix(seeds + np.uint64(1)))
        step = np.uint64(0x9E3779B97F4A7C15)
        keys = [_mix(key + np.uint64(r + 1) * step) for r in range(_ROUNDS)]
        x = np.asarray(index, np.uint64)
        outside = np.ones(x.shape, bool)
        while outside.any():  # at most four times as many values as wanted: few walk far
            left, right = x >> half, x & mask
            for round_key in keys:
                left, right = right, left ^ (_mix(right ^ round_key) & mask)
            x = np.where(outside, (left << half) | right, x)
            outside = x >= np.uint64(size)
    return x.astype(np.int64)


class Numbered:
    """Fixed-shape batches of examples 0 ... n - 1; a subclass reads them by number.

    Args:
      count: examples to train on.
      evaluated: examples of an evaluation, which may be one more.
      length: tokens of an example, which an evaluation's limit counts.
    """

    def __init__(self, count: int, evaluated: int, batch_size: int, seed: int, length: int = 1):
        self.examples, self._all = count, evaluated
        self.batch_size, self.seed, self.length = batch_size, seed, length

    def batch(
        self, step: int, process_index: int = 0, process_count: int = 1
    ) -> dict[str, np.ndarray]:
        """The part of batch `step` (from 0) of a process; joined, they are the whole batch.

        Raises ValueError when the split has no example, or `process_count` does not divide the
        batch.
        """
        own = self._slice(self.batch_size, process_index, process_count)
        # places in the endless sequence of epochs
        positions = step * self.batch_size + own
        epoch, place = positions // self.examples, positions % self.examples
        return self._read(permute(place, self.examples, self.seed, epoch))

    def evaluated(self, limit_tokens: int | None = None) -> int:
        """How many examples an evaluation takes: all, or limit_tokens // length, at least one."""
        if limit_tokens is None:
            return self._all
        return min(self._all, max(1, limit_tokens // self.length))

    def evaluation(
        self,
        batch_size: int,
        limit_tokens: int | None = None,
        process_index: int = 0,
        process_count: int = 1,
    ) -> Iterator[dict[str, np.ndarray]]:
        """The first `evaluated(limit_tokens)` examples; weight 0 pads the last batch."""
        count = self.evaluated(limit_tokens)
        own = self._slice(batch_size, process_index, process_count)
        for first in range(0, count, batch_size):
            # beyond the end the last example stands again, and has no weight
            batch = self._read(np.minimum(first + own, count - 1))
            batch["weights"][first + own >= count] = 0
            yield batch

    def _slice(self, batch_size, process_index, process_count):
        if batch_size % process_count:
            raise ValueError(
                f"data.batch_size={batch_size} is not a multiple of the {process_count} processes: "
                "make it one"
            )
        part = batch_size // process_count
        return np.arange(process_index * part, (process_index + 1) * part)

    def _read(self, examples: np.ndarray) -> dict[str, np.ndarray]:
        """The batch of numbered examples."""
        raise NotImplementedError


class Batches(Numbered):
    """Fixed-shape batches of a tokenised split: "inputs", "targets" and "weights".

    (b, S) int32 the first two, (b, S) float32 the last.

    mode "pack": example i reads tokens[i S : i S + S + 1], so that every token but the first is the
    target of one example; the remainder, shorter than S + 1, is not trained on but is evaluated.
    Documents are separated by eos.

    mode "pad", the protocol of the GaLore-descended scripts: example i is document i, cut to S - 1
    tokens, eos, and padding with weight 0 (their labels are shifted inside the model, so that S
    inputs give at most S - 1 losses).

    >>> tokens = np.arange(8, dtype=np.uint16)
    >>> split = TokenizedSplit(tokens=tokens, starts=np.array([0, 8]), eos=7, pad=9, fingerprint="")
    >>> batches = Batches(split, batch_size=2, sequence_length=3, seed=0)
    >>> sorted(batches.batch(0)["targets"].tolist())
    [[1, 2, 3], [4, 5, 6]]
    """

    def __init__(
        self,
        split: TokenizedSplit,
        batch_size: int,
        sequence_length: int,
        seed: int,
        mode: str = "pack",
    ):
        if mode not in MODES:
            raise ValueError(f"data.packing={mode!r}: choose one of {', '.join(MODES)}")
        self.split, self.sequence_length, self.mode = split, sequence_length, mode
        # every token but the first is a target
        targets, documents = len(split.tokens) - 1, len(split.starts) - 1
        if mode == "pack":  # whole windows are trained on, the remainder is evaluated too
            count, evaluated = targets // sequence_length, -(-targets // sequence_length)
        else:
            count = evaluated = documents
        super().__init__(count, evaluated, batch_size, seed, sequence_length)

    @property
    def tokens(self) -> np.ndarray:
        """All tokens of the split, flat."""
        return self.split.tokens

    def batch(
        self, step: int, process_index: int = 0, process_count: int = 1
    ) -> dict[str, np.ndarray]:
        if self.examples == 0:
            raise ValueError(
                f"data.sequence_length={self.sequence_length}: the split has only "
                f"{len(self.tokens)} tokens; shorten the sequences"
            )
        return super().batch(step, process_index, process_count)

    def _read(self, examples):
        """The (b, S + 1) tokens of numbered examples, as inputs, targets and weights."""
        tokens, S = self.split.tokens, self.sequence_length
        offset = np.arange(S + 1)
        if self.mode == "pack":
            start = examples * S
            length = np.minimum(len(tokens) - start, S + 1)
        else:
            start = self.split.starts[examples]
            length = np.minimum(self.split.starts[examples + 1] - start, S)
        # (b, S + 1): inputs, and one to the right of them the targets
        index = np.minimum(start[:, None] + offset, len(tokens) - 1)
        window = tokens[index].astype(np.int32)
        if self.mode == "pad":  # a document that was cut ends with eos nevertheless
            window[np.arange(len(window)), length - 1] = self.split.eos
        window[offset >= length[:, None]] = self.split.pad
        weights = (offset[1:] < length[:, None]).astype(np.float32)
        return {
            "inputs": window[:, :-1].copy(),
            "targets": window[:, 1:].copy(),
            "weights": weights,
        }
