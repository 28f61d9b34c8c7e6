"""Rows of prompts with responses and of texts with classes, against a transcription in plain
Python."""

import json

import numpy as np
import pytest

from experiments.data.packing import TokenizedSplit, tokenized
from experiments.data.rows import Instructions, Labelled
from experiments.data.sources import Source
from experiments.data.tokenizer import ByteTokenizer
from experiments.data.tuning import TuningDataConfig, load_tuning

EOS, PAD = 1000, 1001
PAIRS = [
    (2, 3),
    (0, 4),
    (5, 1),
    (9, 2),
    (3, 9),
    (1, 12),
    (12, 12),
    (6, 1),
]  # tokens of prompt and response
TEXTS = [(3, 0), (1, 2), (8, 1), (7, 0), (20, 2)]  # tokens of a text, and its class


def split_of(lengths, marks):
    documents = [np.append(100 * i + np.arange(n), EOS) for i, n in enumerate(lengths)]
    starts = np.cumsum([0, *map(len, documents)])
    tokens = np.concatenate(documents).astype(np.uint16)
    return TokenizedSplit(
        tokens=tokens, starts=starts, eos=EOS, pad=PAD, fingerprint="", marks=np.asarray(marks)
    )


def instructions(S, batch_size=3, seed=0):
    split = split_of(
        [prompt + response for prompt, response in PAIRS], [prompt for prompt, _ in PAIRS]
    )
    return Instructions(split, batch_size, S, seed)


def join(parts):
    parts = list(parts)
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


@pytest.mark.parametrize("S", [4, 8, 30])
def test_loss_falls_on_the_response_alone(S):
    batch = join(instructions(S).evaluation(len(PAIRS)))
    for row, (p, r) in enumerate(PAIRS):
        prompt = [100 * row + i for i in range(p)]
        response = ([100 * row + p + i for i in range(r)] + [EOS])[:S]
        prompt = prompt[max(0, p + len(response) - (S + 1)) :]
        ids = prompt + response
        padded = ids + [PAD] * (S + 1 - len(ids))
        np.testing.assert_array_equal(batch["inputs"][row], padded[:S])
        np.testing.assert_array_equal(batch["targets"][row], padded[1:])
        counted = [len(prompt) <= place < len(ids) for place in range(1, S + 1)]
        np.testing.assert_array_equal(batch["weights"][row], np.array(counted, np.float32))
        assert batch["weights"][row].sum() == len(response) - (
            not prompt
        )  # without a prompt its first token is given


def test_batches_are_pure_and_shared_among_processes():
    whole = [instructions(8, 4, seed=5).batch(step) for step in range(5)]
    for step in (4, 0, 2):
        parts = join(instructions(8, 4, seed=5).batch(step, process, 2) for process in range(2))
        for name, array in whole[step].items():
            np.testing.assert_array_equal(array, parts[name])
    first = {tuple(row) for batch in whole[:2] for row in batch["inputs"]}
    assert len(first) == len(PAIRS)  # every row once in an epoch


@pytest.mark.parametrize("S", [4, 8])
def test_a_text_ends_with_eos_where_its_class_is_read(S):
    batches = Labelled(split_of([n for n, _ in TEXTS], [c for _, c in TEXTS]), 2, S, 0)
    batch = join(batches.evaluation(4))
    assert len(batch["targets"]) == 8
    np.testing.assert_array_equal(batch["weights"], [1] * 5 + [0] * 3)
    for row, (n, label) in enumerate(TEXTS):
        ids = [100 * row + i for i in range(min(n, S - 1))] + [EOS]
        np.testing.assert_array_equal(batch["inputs"][row], ids + [PAD] * (S - len(ids)))
        assert batch["last"][row] == len(ids) - 1
        assert batch["targets"][row] == label


def source_of(documents, identity):
    return Source(
        name="fake",
        identity=identity,
        splits={"train": len(documents)},
        documents=lambda split: iter(documents),
    )


def test_marks_are_cached_with_the_tokens(tmp_path):
    pairs = source_of([(b"ab", b"c"), (b"", b"de")], "pairs")
    for _ in range(2):  # written, then read
        split = tokenized(pairs, "train", ByteTokenizer(), str(tmp_path))
        np.testing.assert_array_equal(split.tokens, [97, 98, 99, 257, 100, 101, 257])
        np.testing.assert_array_equal(split.marks, [2, 0])
    begun = tokenized(pairs, "train", ByteTokenizer(), str(tmp_path), bos=True)
    np.testing.assert_array_equal(begun.tokens, [256, 97, 98, 99, 257, 256, 100, 101, 257])
    np.testing.assert_array_equal(begun.marks, [3, 1])
    one, other = (
        tokenized(
            source_of([(b"a", label)], f"class {label}"), "train", ByteTokenizer(), str(tmp_path)
        )
        for label in (1, 2)
    )
    np.testing.assert_array_equal(one.tokens, other.tokens)
    assert one.fingerprint != other.fingerprint
    plain = tokenized(source_of([b"a"], "plain"), "train", ByteTokenizer(), str(tmp_path))
    assert plain.marks is None
    with pytest.raises(ValueError, match="plain text, not pairs"):
        Labelled(plain, 1, 4, 0)


def test_tasks_give_their_own_batches(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [
        {"text": f"t{i}", "label": "ab"[i % 2], "prompt": f"p{i}", "response": "r"}
        for i in range(8)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {
        "name": str(path),
        "validation": str(path),
        "directory": str(tmp_path),
        "sequence_length": 6,
    }
    shapes = {}
    for task in ("language_modelling", "instruction", "classification"):
        dataset = load_tuning(TuningDataConfig(task=task, batch_size=4, **options), "bytes")
        shapes[task] = {name: array.shape for name, array in dataset.train.batch(0).items()}
        assert dataset.tokenizer.identity == "bytes"
    tokens = {"inputs": (4, 6), "targets": (4, 6), "weights": (4, 6)}
    assert shapes["language_modelling"] == shapes["instruction"] == tokens
    assert shapes["classification"] == {
        "inputs": (4, 6),
        "last": (4,),
        "targets": (4,),
        "weights": (4,),
    }
    begun = load_tuning(TuningDataConfig(task="instruction", bos=True, **options), "bytes")
    assert next(begun.validation.evaluation(1))["inputs"][0].tolist() == [
        256,
        112,
        48,
        114,
        257,
        258,
    ]
    pad = load_tuning(TuningDataConfig(packing="pad", **options), "bytes")
    assert pad.train.examples == 8


def test_data_that_are_only_evaluated_leave_the_training_split_alone(tmp_path):
    (tmp_path / "text").mkdir()
    for number in range(60):
        (tmp_path / "text" / f"{number}.txt").write_text("some text")
    config = TuningDataConfig(
        name=str(tmp_path / "text"), directory=str(tmp_path / "cache"), sequence_length=4
    )
    found = load_tuning(config, "bytes", trains=False)
    assert found.train is None
    folders = [path.name for path in (tmp_path / "cache" / "tokens").iterdir() if path.is_dir()]
    assert len(folders) == 1 and "validation" in folders[0]
    both = load_tuning(config, "bytes")
    for ours, theirs in zip(
        found.validation.evaluation(2), both.validation.evaluation(2), strict=True
    ):
        assert {key: value.tolist() for key, value in ours.items()} == {
            k: v.tolist() for k, v in theirs.items()
        }
