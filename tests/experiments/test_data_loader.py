"""Batches: pure in (seed, step), the same for any number of processes, every example once."""

import os
import subprocess
import sys

import numpy as np
import pytest

from experiments.data.loader import Batches, permute
from experiments.data.packing import TokenizedSplit

EOS, PAD = 1000, 1001
LENGTHS = (5, 1, 40, 3, 9, 33)


def make_split():
    """Documents of distinct, recognisable tokens, each followed by eos."""
    documents = [np.append(100 * i + np.arange(n), EOS) for i, n in enumerate(LENGTHS)]
    starts = np.cumsum([0, *map(len, documents)])
    return TokenizedSplit(
        tokens=np.concatenate(documents).astype(np.uint16),
        starts=starts,
        eos=EOS,
        pad=PAD,
        fingerprint="x",
    )


def stream(size):
    tokens = np.arange(size, dtype=np.uint16)
    return TokenizedSplit(
        tokens=tokens, starts=np.array([0, size]), eos=EOS, pad=PAD, fingerprint="x"
    )


def join(parts):
    parts = list(parts)
    return {
        key: np.concatenate([part[key] for part in parts])
        for key in ("inputs", "targets", "weights")
    }


def assert_equal(a, b):
    for key in ("inputs", "targets", "weights"):
        np.testing.assert_array_equal(a[key], b[key])


@pytest.mark.parametrize("mode", ["pack", "pad"])
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_same_batch(mode, processes):
    batches = Batches(make_split(), 8, 4, seed=3, mode=mode)
    for step in (0, 1, 5, 10**9):
        whole = batches.batch(step)
        assert_equal(whole, join(batches.batch(step, p, processes) for p in range(processes)))
    whole = join(batches.evaluation(8))
    parts = zip(
        *(
            batches.evaluation(8, process_index=p, process_count=processes)
            for p in range(processes)
        ),
        strict=True,
    )
    assert_equal(whole, join([join(part) for part in parts]))


def test_purity_and_seeds():
    fresh = lambda seed: Batches(stream(500), 4, 8, seed)  # noqa: E731
    batches = fresh(0)
    forwards = [batches.batch(step) for step in range(40)]
    for step in reversed(range(40)):
        assert_equal(forwards[step], fresh(0).batch(step))
    assert not np.array_equal(
        join(forwards)["inputs"], join(fresh(1).batch(s) for s in range(40))["inputs"]
    )


def test_shapes_and_types():
    batch = Batches(stream(500), 4, 8, seed=0).batch(0)
    kinds = {key: (value.shape, value.dtype) for key, value in batch.items()}
    assert kinds == {
        "inputs": ((4, 8), np.int32),
        "targets": ((4, 8), np.int32),
        "weights": ((4, 8), np.float32),
    }
    np.testing.assert_array_equal(batch["targets"], batch["inputs"] + 1)
    assert batch["weights"].all()


@pytest.mark.parametrize("mode", ["pack", "pad"])
def test_every_example_once_per_epoch_in_new_orders(mode):
    """103 windows or documents do not divide into batches of 8, so epochs begin inside batches."""
    documents, S = 103, 4
    tokens = np.arange(documents * S + 1, dtype=np.uint16)
    starts = (
        np.append(np.arange(documents) * S, len(tokens))
        if mode == "pad"
        else np.array([0, len(tokens)])
    )
    split = TokenizedSplit(tokens=tokens, starts=starts, eos=EOS, pad=PAD, fingerprint="x")
    batches = Batches(split, 8, S, seed=0, mode=mode)
    assert batches.examples == documents
    first = np.concatenate([batches.batch(step)["inputs"][:, 0] for step in range(52)])
    epochs = first[: 4 * documents].reshape(4, documents)
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(documents) * S)
    assert len({tuple(epoch) for epoch in epochs}) == 4


@pytest.mark.parametrize("size", [*range(1, 20), 63, 64, 65, 1000, 4097])
def test_permutation_is_a_bijection(size):
    out = permute(np.arange(size), size, 7, np.full(size, 2))
    np.testing.assert_array_equal(np.sort(out), np.arange(size))


def test_permutation_looks_random():
    """Over 6000 epochs and seeds each index of range(6) lands everywhere as often: chi-square, p =
    1e-6."""
    epoch = np.repeat(np.arange(3000), 6)
    for seed in (0, 2**63 + 11):
        out = permute(np.tile(np.arange(6), 3000), 6, seed, epoch).reshape(3000, 6)
        counts = np.stack([np.bincount(column, minlength=6) for column in out.T])
        assert ((counts - 500) ** 2 / 500).sum() < 76
    identity = permute(np.arange(100_000), 100_000, 0, np.zeros(100_000, int))
    assert abs(np.corrcoef(identity, np.arange(100_000))[0, 1]) < 0.02
    assert np.mean(np.abs(np.diff(identity)) < 100) < 0.004  # neighbours part: 0.002 by chance


@pytest.mark.parametrize("size", [2, 8, 9, 41, 48, 50])
@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_packed_evaluation_covers_every_token_once_in_order(size, batch_size):
    batches = Batches(stream(size), 2, 8, seed=0)
    parts = list(batches.evaluation(batch_size))
    assert {part["inputs"].shape for part in parts} == {(batch_size, 8)}
    batch = join(parts)
    kept = batch["weights"] == 1
    np.testing.assert_array_equal(batch["targets"][kept], np.arange(1, size))
    np.testing.assert_array_equal(batch["inputs"][kept], np.arange(size - 1))
    assert batch["weights"].sum() == size - 1
    assert len(batch["inputs"]) - batch_size < -(-(size - 1) // 8) <= len(batch["inputs"])


def test_limited_evaluation():
    batches = Batches(stream(100), 2, 8, seed=0)
    assert join(batches.evaluation(3, limit_tokens=40))["weights"].sum() == 40
    assert join(batches.evaluation(3, limit_tokens=1))["weights"].sum() == 8
    assert join(batches.evaluation(3, limit_tokens=10**6))["weights"].sum() == 99


def test_pad_mode_follows_the_papers_protocol():
    S, split = 8, make_split()
    batch = join(Batches(split, 2, S, seed=0, mode="pad").evaluation(4))
    assert len(batch["inputs"]) == 8  # six documents, two rows of filling
    for row, length in enumerate(LENGTHS):
        ids = [100 * row + i for i in range(min(length, S - 1))] + [EOS]
        padded = ids + [PAD] * (S + 1 - len(ids))
        np.testing.assert_array_equal(batch["inputs"][row], padded[:S])
        np.testing.assert_array_equal(batch["targets"][row], padded[1:])
        np.testing.assert_array_equal(
            batch["weights"][row], [1.0] * (len(ids) - 1) + [0.0] * (S + 1 - len(ids))
        )
    assert batch["weights"][6:].sum() == 0


def test_equal_for_any_hash_seed():
    code = (
        "import numpy as np, zlib; from experiments.data.loader import Batches; "
        "from experiments.data.packing import TokenizedSplit; t = np.arange(5000, "
        "dtype=np.uint16); s = TokenizedSplit(tokens=t, starts=np.array([0, 5000]), eos=0, pad=0, "
        "fingerprint=''); b = Batches(s, 16, 8, seed=5); "
        "print(zlib.crc32(b''.join(b.batch(i)['inputs'].tobytes() for i in range(50))))"
    )
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in ("0", "1")
    ]
    first, second = (run.communicate(timeout=60)[0] for run in runs)
    assert first == second != ""


def test_errors():
    batches = Batches(stream(50), 4, 8, seed=0)
    with pytest.raises(
        ValueError, match=r"data\.batch_size=4 is not a multiple of the 3 processes"
    ):
        batches.batch(0, 0, 3)
    with pytest.raises(ValueError, match=r"data\.sequence_length=50: the split has only 50 tokens"):
        Batches(stream(50), 4, 50, seed=0).batch(0)
    with pytest.raises(ValueError, match=r"data\.packing='rows': choose one of pack, pad"):
        Batches(stream(50), 4, 8, seed=0, mode="rows")
