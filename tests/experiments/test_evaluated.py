"""What an evaluation was of: equal for equal tokens, bytes of the text, and one text whatever its
tokenizer."""

import numpy as np
import pytest

from experiments.data import DataConfig, load
from experiments.data.dataset import Dataset
from experiments.data.digits import Images
from experiments.harness.evaluated import identity, spelled
from tests.experiments import runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluated")
    runs.write_text(folder / "text")
    return folder


class Pairs:
    """Two bytes a token, 0x10000 for the end: a tokenizer whose tokens are others than bytes."""

    identity, eos, pad, vocabulary_size = "pairs", 0x10000, 0x10000, 0x10001

    def encode(self, text):
        raw = text if isinstance(text, bytes) else text.encode()
        raw += b" " * (len(raw) % 2)
        return np.frombuffer(raw, ">u2").astype(np.int32)

    def decode(self, ids):
        ids = np.asarray(ids)
        return ids[ids < 0x10000].astype(">u2").tobytes().decode()


def dataset(folder, monkeypatch=None, **options):
    config = {
        "name": str(folder / "text"),
        "directory": str(folder / "cache"),
        "sequence_length": 16,
        "batch_size": 4,
    }
    if monkeypatch is not None:
        monkeypatch.setattr("experiments.data.dataset.make_tokenizer", lambda name: Pairs())
    return load(DataConfig(**config | options))


@pytest.fixture(autouse=True)
def few_rows(monkeypatch):
    """So that the data do not fit into one reading."""
    monkeypatch.setattr("experiments.harness.evaluated.ROWS", 32)


def test_the_same_tokens_however_they_are_cut(folder):
    found = identity(dataset(folder), 512)
    assert found == identity(dataset(folder, batch_size=2), 512)
    assert identity(dataset(folder), None) == identity(dataset(folder, sequence_length=32), None)
    assert found["evaluated"] != identity(dataset(folder), 256)["evaluated"]
    assert found["evaluated"] != identity(dataset(folder, packing="pad"), 512)["evaluated"]
    assert found["text"] is None  # not the whole split


def test_bytes_are_those_of_the_targets(folder):
    data = dataset(folder)
    for limit in (512, None):
        targets = [
            batch["targets"][batch["weights"] > 0] for batch in data.validation.evaluation(4, limit)
        ]
        assert identity(data, limit)["bytes"] == sum(int((part < 256).sum()) for part in targets)


def test_one_text_by_two_tokenizers(folder, monkeypatch):
    plain = identity(dataset(folder), None)
    # an even number of bytes a document, so that pairs spell the same text
    documents = [path for path in (folder / "text").iterdir() if path.stat().st_size % 2]
    for path in documents:
        path.write_text(path.read_text() + "x")
    again, pairs = identity(dataset(folder), None), identity(dataset(folder, monkeypatch), None)
    assert again["text"] == pairs["text"] != plain["text"]
    assert again["evaluated"] != pairs["evaluated"]
    # the first token of the stream is no target: one byte, or two
    assert again["bytes"] == pairs["bytes"] + 1


def test_bytes_that_are_no_text_and_ends_of_documents():
    pieces = [b"ab", b"cd", b""]
    ids = np.concatenate([[*Pairs().encode(b"ab"), Pairs.eos], [*Pairs().encode(b"cd"), Pairs.eos]])
    assert list(spelled(Pairs(), ids)) == pieces


def test_classes_have_no_bytes():
    images = np.zeros((3, 2, 2, 1), np.float32)
    part = Images(images, np.arange(3), 3, 0)
    data = Dataset(
        train=part,
        validation=part,
        tokenizer=None,
        vocabulary_size=0,
        description="",
        fingerprint="",
        classes=("a", "b", "c"),
    )
    found = identity(data, None)
    other = Images(images, np.array([0, 2, 1]), 3, 0)
    assert (found["bytes"], found["text"]) == (None, None)
    swapped = Dataset(
        train=other,
        validation=other,
        tokenizer=None,
        vocabulary_size=0,
        description="",
        fingerprint="",
        classes=("a", "b", "c"),
    )
    assert identity(swapped, None)["evaluated"] != found["evaluated"]
