"""The baseline a trained model has to beat: a trigram model of the training text.

Interpolated Kneser-Ney smoothing (Kneser & Ney 1995; Chen & Goodman 1999); on the default data
modified Kneser-Ney and Witten-Bell lie within 0.01 nats of it:

    P(c | a b) = max(n(a b c) - D3, 0) / n(a b .) + D3 N(a b .) / n(a b .) * P(c | b)

and the same for P(c | b) and P(c) with continuation counts, the number of distinct contexts, in
place of n; below the unigram lies 1 / V. n(a b .) is the sum of n over c and N(a b .) the number of
distinct c. A context that was never seen leaves the lower order. Each order has the discount D = n1
/ (n1 + 2 n2), with n1 and n2 the number of n-grams that have count 1 and 2.
"""

import numpy as np


class KneserNeyTrigram:
    """Counts of a training stream.

    `probability(a, b, c)` is for arrays of ids, with a or b = -1 for "no such context".

    >>> model = KneserNeyTrigram(np.array([0, 1, 2, 0, 1, 2, 0, 1, 3]), vocabulary_size=4)
    >>> a, b = np.zeros(4, int), np.ones(4, int)
    >>> float(model.probability(a, b, np.arange(4)).sum())
    1.0
    """

    def __init__(self, tokens: np.ndarray, vocabulary_size: int):
        if vocabulary_size**3 >= 2**63:
            raise ValueError(
                f"vocabulary_size={vocabulary_size}: trigram keys overflow 64 bits; at most "
                f"{2**21 - 1}"
            )
        if len(tokens) < 3:
            raise ValueError(f"{len(tokens)} training tokens: a trigram needs at least 3")
        self.vocabulary_size = V = vocabulary_size
        ids = np.asarray(tokens, np.int64)
        trigrams, counts = np.unique((ids[:-2] * V + ids[1:-1]) * V + ids[2:], return_counts=True)
        bigrams, continuations = np.unique(trigrams % V**2, return_counts=True)
        unigrams, heads = np.unique(bigrams % V, return_counts=True)
        self._orders = [
            _Order(unigrams, heads, V),
            _Order(bigrams, continuations, V),
            _Order(trigrams, counts, V),
        ]

    def probability(self, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        """P(c | a b), float64, the broadcast shape of the arguments."""
        a, b, c = (np.asarray(x, np.int64) for x in np.broadcast_arrays(a, b, c))
        contexts = (
            np.zeros_like(b),
            b,
            np.where((a < 0) | (b < 0), -1, a * self.vocabulary_size + b),
        )
        result = np.full(c.shape, 1.0 / self.vocabulary_size)
        for order, context in zip(self._orders, contexts, strict=True):
            result = order.interpolate(context, c, result)
        return result


class _Order:
    """One order: keys = context * V + word, sorted, and their counts."""

    def __init__(self, keys, counts, vocabulary_size):
        self.keys, self.counts, self.vocabulary_size = keys, counts, vocabulary_size
        # keys are sorted, so each context is a run of them
        self.contexts, first = np.unique(keys // vocabulary_size, return_index=True)
        self.totals = np.add.reduceat(counts, first)
        self.kinds = np.diff(np.append(first, len(keys)))  # different words after a context
        once, twice = np.sum(counts == 1), np.sum(counts == 2)
        # without singletons the estimate is 0, which would leave unseen words nothing
        self.discount = once / (once + 2 * twice) if once and twice else 0.5

    def interpolate(self, context, word, lower):
        """P(word | context) = (max(c - D, 0) + D kinds(context) lower) / c(context)."""
        key = context * self.vocabulary_size + word  # negative without context, and so not found
        count = _look_up(self.keys, self.counts, key)
        total = _look_up(self.contexts, self.totals, context)
        kinds = _look_up(self.contexts, self.kinds, context)
        # what the discount takes from the words that were seen goes to the lower order
        kept = np.maximum(count - self.discount, 0)
        mixed = (kept + self.discount * kinds * lower) / np.maximum(total, 1)
        return np.where(total > 0, mixed, lower)


def _look_up(keys, values, wanted):
    position = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[position] == wanted, values[position], 0)


def trigram_loss(
    train_tokens: np.ndarray, validation_tokens: np.ndarray, vocabulary_size: int
) -> float:
    """Mean negative log-likelihood, in nats, of every validation token but the first.

    Given up to two tokens before it.

    Those are the targets of a packed evaluation, so the two losses compare. The first target has
    one token of context.
    """
    model = KneserNeyTrigram(train_tokens, vocabulary_size)
    ids = np.asarray(validation_tokens, np.int64)
    if len(ids) < 2:
        raise ValueError(
            f"{len(ids)} validation tokens: at least 2 are needed to predict one from another"
        )
    before = np.concatenate([[-1], ids[:-2]])
    total = 0.0
    for first in range(0, len(ids) - 1, 1 << 20):
        part = slice(first, first + (1 << 20))
        total -= float(np.log(model.probability(before[part], ids[:-1][part], ids[1:][part])).sum())
    return total / (len(ids) - 1)
