"""JSON lines, TFDS features and images as data for fine-tuning; every bad line is an error that
names it."""

import json
import zlib
from typing import ClassVar

import numpy as np
import pytest
import tensorflow_datasets as tfds

from experiments.data.digits import digits
from experiments.data.records import jsonl_source
from experiments.data.sources import builder_source
from experiments.data.tuning import TuningDataConfig, load_tuning

TEXT = {"text_key": "text"}
LABELLED = TEXT | {"label_key": "label"}
INSTRUCTION = {"prompt_key": "prompt", "response_key": "response"}


def write(path, rows):
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    )
    return str(path)


def test_text_keeps_its_order_and_is_split_by_content(tmp_path):
    rows = [{"text": f"text {i % 90}", "more": i} for i in range(100)]
    source = jsonl_source(write(tmp_path / "a.jsonl", rows), TEXT)
    found = {split: list(source.documents(split)) for split in ("train", "validation")}
    held_out = {
        f"text {i}".encode()
        for i in range(90)
        if zlib.crc32(json.dumps([f"text {i}"]).encode()) % 20 == 0
    }
    assert found["validation"] == [
        text for i in range(100) if (text := f"text {i % 90}".encode()) in held_out
    ]
    assert found["train"] == [
        text for i in range(100) if (text := f"text {i % 90}".encode()) not in held_out
    ]
    assert source.splits == {split: len(documents) for split, documents in found.items()}
    assert source.splits["validation"] > 0


def test_two_files_are_the_two_splits(tmp_path):
    rows = [{"prompt": f"q{i}", "response": f"a{i}"} for i in range(3)]
    train, other = write(tmp_path / "a.jsonl", rows), write(tmp_path / "b.jsonl", rows[:1])
    source = jsonl_source(train, INSTRUCTION, other)
    assert list(source.documents("train")) == [(b"q0", b"a0"), (b"q1", b"a1"), (b"q2", b"a2")]
    assert list(source.documents("validation")) == [(b"q0", b"a0")]
    assert jsonl_source(train, INSTRUCTION, train).identity != source.identity
    write(tmp_path / "a.jsonl", [*rows[:2], {"prompt": "q2", "response": "other"}])
    assert jsonl_source(train, INSTRUCTION, other).identity != source.identity


@pytest.mark.parametrize("labels", [("b", "a", "b", "c"), (7, -1, 7, 10)])
def test_classes_are_the_sorted_labels_of_the_training_file(tmp_path, labels):
    path = write(
        tmp_path / "a.jsonl", [{"text": f"t{i}", "label": label} for i, label in enumerate(labels)]
    )
    source = jsonl_source(path, LABELLED, path)
    assert source.classes == tuple(str(label) for label in sorted(set(labels)))
    assert [number for _, number in source.documents("train")] == [
        sorted(set(labels)).index(label) for label in labels
    ]


BAD = [
    ("{", TEXT, r"line 2 is not JSON"),
    ("", TEXT, r"line 2 is not JSON"),
    ("[1]", TEXT, r"line 2 is \[1\], where an object is needed"),
    ({"txet": "a"}, TEXT, r"line 2: no 'text' \(data\.text_key\) among its keys 'txet'"),
    ({"text": 3}, TEXT, r"line 2: 'text' is 3, where a string is needed"),
    ({"text": ""}, TEXT, r"line 2: 'text' is empty"),
    ({"text": "a"}, LABELLED, r"line 2: no 'label'"),
    (
        {"text": "a", "label": None},
        LABELLED,
        r"line 2: 'label' is None, where a string or an integer is needed",
    ),
    ({"text": "a", "label": True}, LABELLED, r"line 2: 'label' is True"),
    (
        {"text": "a", "label": 3},
        LABELLED,
        r"line 2: 'label' is 3, but line 1 has 'x': not of one type",
    ),
    ({"prompt": "a", "response": ""}, INSTRUCTION, r"line 2: 'response' is empty"),
    ({"prompt": ["a"], "response": "b"}, INSTRUCTION, r"line 2: 'prompt' is \['a'\]"),
    ('{"text": "a \\ud83d"}', TEXT, r"line 2 holds half of a surrogate pair"),
]


@pytest.mark.parametrize("line, keys, message", BAD, ids=[str(i) for i in range(len(BAD))])
def test_a_bad_line_is_an_error_with_file_and_number(tmp_path, line, keys, message):
    good = {"text": "a", "label": "x", "prompt": "", "response": "b"}
    path = write(tmp_path / "bad.jsonl", [good, line, good])
    with pytest.raises(ValueError, match=rf"bad\.jsonl, {message}.*; correct or remove the line"):
        jsonl_source(path, keys, path)


def test_other_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.jsonl.*no such file"):
        jsonl_source(str(tmp_path / "absent.jsonl"), TEXT)
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "\xe9"}\n')
    with pytest.raises(
        ValueError, match=r"latin\.jsonl, line 1 is not UTF-8: byte 0xe9 at offset 10"
    ):
        jsonl_source(str(tmp_path / "latin.jsonl"), TEXT)
    one = write(tmp_path / "one.jsonl", [{"text": "a", "label": "x"}])
    with pytest.raises(
        ValueError, match="the validation split is empty; add lines, or give data.validation"
    ):
        jsonl_source(one, TEXT)
    with pytest.raises(ValueError, match="1 labels; a classification needs at least 2"):
        jsonl_source(one, LABELLED, one)
    two = write(tmp_path / "two.jsonl", [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}])
    unseen = write(
        tmp_path / "unseen.jsonl", [{"text": "a", "label": "y"}, {"text": "a", "label": "z"}]
    )
    with pytest.raises(
        ValueError, match=r"unseen\.jsonl, line 2: the label 'z' is none of .*two\.jsonl.*'x', 'y'"
    ):
        jsonl_source(two, LABELLED, unseen)


class Reviews(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A prepared dataset with text, classes and pairs."""

    url_infos: ClassVar = {}
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {key: tfds.features.Text() for key in ("text", "question", "answer")}
        features["label"] = tfds.features.ClassLabel(names=["bad", "good"])
        features = tfds.features.FeaturesDict(features)
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in ("train", "validation")}

    def _generate_examples(self, split):
        for i in range(3):
            yield (
                i,
                {"text": f"{split} {i}", "question": f"q{i}", "answer": f"a{i}", "label": i % 2},
            )


def test_features_of_a_prepared_dataset(tmp_path):
    builder = Reviews(data_dir=tmp_path)
    builder.download_and_prepare(file_format="array_record")
    source = builder_source(builder, LABELLED)
    assert list(source.documents("train")) == [(b"train 0", 0), (b"train 1", 1), (b"train 2", 0)]
    assert source.classes == ("bad", "good")
    source = builder_source(builder, {"prompt_key": "question", "response_key": "answer"})
    assert list(source.documents("train[:2]")) == [(b"q0", b"a0"), (b"q1", b"a1")]
    assert source.identity != builder_source(builder, LABELLED).identity
    with pytest.raises(ValueError, match=r"data\.response_key='reply'.*name one of them"):
        builder_source(builder, {"prompt_key": "question", "response_key": "reply"})
    with pytest.raises(ValueError, match=r"data\.label_key='answer'.*name a ClassLabel feature"):
        builder_source(builder, {"text_key": "text", "label_key": "answer"})
    config = TuningDataConfig(
        task="classification",
        name=str(builder.data_path),
        directory=str(tmp_path / "cache"),
        sequence_length=8,
    )
    dataset = load_tuning(config, "bytes")
    assert dataset.classes == ("bad", "good")
    assert next(dataset.validation.evaluation(3))["targets"].tolist() == [0, 1, 0]


def test_digits_in_two_domains():
    from sklearn.datasets import load_digits

    upright, rotated = digits("digits"), digits("digits_rotated")
    found = load_digits()
    held_out = np.array(
        [
            zlib.crc32((image / 8 - 1).astype(np.float32).tobytes()) % 5 == 0
            for image in found.images
        ]
    )
    for split, chosen in (("train", ~held_out), ("validation", held_out)):
        images, labels = upright[split]
        np.testing.assert_array_equal(images[..., 0], found.images[chosen] / 8 - 1)
        np.testing.assert_array_equal(labels, found.target[chosen])
        turned, same = rotated[split]
        np.testing.assert_array_equal(same, labels)
        np.testing.assert_array_equal(
            turned[:, 0, :, 0], images[:, :, 7, 0]
        )  # the last column has become the top row
        assert images.min() == -1 and images.max() == 1
    assert 0.1 < held_out.mean() < 0.3
    trained = {image.tobytes() for image in upright["train"][0]}
    assert not any(image.tobytes() in trained for image in upright["validation"][0])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"task": "translation"},
            r"data\.task='translation': choose one of language_modelling, instruction",
        ),
        ({"name": ""}, r"data\.name='': give a non-empty string"),
        ({"packing": "rows"}, r"data\.packing='rows': choose one of pack, pad"),
        (
            {"task": "instruction", "name": "a.jsonl", "packing": "pad"},
            r"packing='pad': instruction has a document",
        ),
        ({"sequence_length": 1}, r"data\.sequence_length=1: give an integer of at least 2"),
        ({"batch_size": True}, r"data\.batch_size=True: give an integer of at least 1"),
        (
            {"validation": "b.jsonl"},
            r"data\.validation='b\.jsonl': goes with a \.jsonl file as data\.name",
        ),
        ({"validation_split": "train"}, r"data\.validation_split='train': is the training split"),
        (
            {"name": "a.jsonl", "train_split": "train[:9]"},
            r"data\.train_split='train\[:9\]': slices are of TFDS",
        ),
        ({"name": "digits"}, r"data\.task='language_modelling': digits has classes"),
        (
            {"name": "digits", "task": "classification", "sequence_length": 8},
            r"data\.sequence_length=8: images have",
        ),
        (
            {"name": "digits", "task": "classification", "bos": True},
            r"data\.bos=True: images have no tokens",
        ),
        (
            {"name": "stdlib", "task": "instruction"},
            r"data\.task='instruction': stdlib is plain text",
        ),
    ],
)
def test_config_errors(overrides, message):
    with pytest.raises(ValueError, match=message):
        TuningDataConfig(**overrides)


def test_a_folder_holds_plain_text(tmp_path):
    config = TuningDataConfig(task="classification", name=str(tmp_path), directory=str(tmp_path))
    with pytest.raises(ValueError, match="a folder holds plain text; give a .jsonl file"):
        load_tuning(config, "bytes")
