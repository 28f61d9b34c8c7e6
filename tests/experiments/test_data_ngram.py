"""The trigram baseline against dictionaries and loops."""

import collections
import time

import numpy as np
import pytest

from experiments.data.ngram import KneserNeyTrigram, trigram_loss


def brute_force(train, V):
    """P(c | a b) by dictionaries, from the formula in Chen and Goodman."""
    n3 = collections.Counter(zip(train, train[1:], train[2:], strict=False))
    n2 = collections.Counter((b, c) for _, b, c in n3)
    n1 = collections.Counter(c for _, c in n2)

    def discount(table):
        once, twice = (sum(v == k for v in table.values()) for k in (1, 2))
        return once / (once + 2 * twice) if once and twice else 0.5

    def mix(table, context, word, lower):
        row = {key[-1]: v for key, v in table.items() if key[:-1] == context}
        if not row:
            return lower
        D = discount(table)
        return (max(row.get(word, 0) - D, 0) + D * len(row) * lower) / sum(row.values())

    unigrams = {(c,): v for c, v in n1.items()}
    p1 = lambda c: mix(unigrams, (), c, 1 / V)  # noqa: E731
    p2 = lambda b, c: mix(n2, (b,), c, p1(c))  # noqa: E731
    return lambda a, b, c: mix(n3, (a, b), c, p2(b, c))


@pytest.fixture(scope="module")
def streams():
    rng = np.random.default_rng(0)
    # word 6 is never seen, word 5 seldom
    return rng.choice(6, 300, p=[0.4, 0.25, 0.2, 0.1, 0.04, 0.01]), rng.integers(0, 7, 40)


def test_probabilities_equal_the_formula_and_sum_to_one(streams):
    V, model = 7, KneserNeyTrigram(streams[0], 7)
    oracle = brute_force(streams[0].tolist(), V)
    grid = np.stack(np.meshgrid(np.arange(-1, V), np.arange(-1, V), np.arange(V), indexing="ij"))
    probabilities = model.probability(*grid)
    np.testing.assert_allclose(probabilities.sum(-1), 1, rtol=1e-12)
    assert probabilities.min() > 0
    expected = [[[oracle(a, b, c) for c in range(V)] for b in range(-1, V)] for a in range(-1, V)]
    np.testing.assert_allclose(probabilities, expected, rtol=1e-12)


def test_loss_is_the_mean_over_all_targets_but_the_first(streams):
    train, validation = (x.tolist() for x in streams)
    oracle = brute_force(train, 7)
    padded = [-1, *validation]
    expected = -np.mean([np.log(oracle(*padded[i : i + 3])) for i in range(len(validation) - 1)])
    np.testing.assert_allclose(
        trigram_loss(streams[0], streams[1].astype(np.uint16), 7), expected, rtol=1e-12
    )


def test_approaches_the_entropy_of_a_trigram_source():
    """Each token copies the one before the last with probability 0.9: entropy -0.9 ln(0.9 + 0.1/8)
    - ..."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, 8, 60_000)
    for i in np.flatnonzero(rng.random(60_000) < 0.9):
        if i >= 2:
            tokens[i] = tokens[i - 2]
    keep, other = 0.9 + 0.1 / 8, 0.1 / 8
    entropy = -keep * np.log(keep) - 7 * other * np.log(other)
    assert abs(trigram_loss(tokens[:50_000], tokens[50_000:], 8) - entropy) < 0.03


def test_speed():
    tokens = (np.random.default_rng(2).normal(0, 12, 3_000_000).astype(int) % 256).astype(np.uint16)
    start = time.process_time()
    trigram_loss(tokens[:2_900_000], tokens[2_900_000:], 259)
    assert time.process_time() - start < 10


def test_errors():
    with pytest.raises(ValueError, match="vocabulary_size=3000000: trigram keys overflow"):
        KneserNeyTrigram(np.zeros(9, int), 3_000_000)
    with pytest.raises(ValueError, match="2 training tokens"):
        KneserNeyTrigram(np.zeros(2, int), 4)
    with pytest.raises(ValueError, match="1 validation tokens"):
        trigram_loss(np.zeros(9, int), np.zeros(1, int), 4)
