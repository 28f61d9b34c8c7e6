"""Datasets from Python's library, prepared directories, names and folders; tokenizers; the token
cache."""

import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from typing import ClassVar

import numpy as np
import pytest
import tensorflow_datasets as tfds

from experiments.data import DataConfig, load, prepare, sources, stdlib
from experiments.data.packing import tokenized
from experiments.data.tokenizer import ByteTokenizer, make_tokenizer

TEXTS = {
    "train": ["first text", "zweiter Text: é", "x" * 40, "four"],
    "validation": ["held out", "and this"],
}


class C4(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """C4's name, config, version and features; unregistered, as TFDS's own is where TensorFlow is
    missing."""

    url_infos: ClassVar = {}
    VERSION = tfds.core.Version("3.1.0")
    BUILDER_CONFIGS: ClassVar = [tfds.core.BuilderConfig(name="en")]

    def _info(self):
        keys = ("text", "timestamp", "url", "content-length", "content-type")
        features = tfds.features.FeaturesDict({key: tfds.features.Text() for key in keys})
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in TEXTS}

    def _generate_examples(self, split):
        for i, text in enumerate(TEXTS[split]):
            rest = {
                "timestamp": "2019-04-25T12:57:54Z",
                "url": "https://example.org",
                "content-length": "9",
            }
            yield i, {"text": text, "content-type": "text/plain", **rest}


@pytest.fixture(scope="module")
def c4_directory(tmp_path_factory):
    root = tmp_path_factory.mktemp("tfds")
    C4(data_dir=root).download_and_prepare(file_format="array_record")
    return root


@pytest.fixture(scope="module")
def library_directory(tmp_path_factory):
    """The embedded dataset, prepared by two processes that start together."""
    root = tmp_path_factory.mktemp("stdlib")
    code = (
        "from experiments.data import DataConfig, load; import sys; "
        "d = load(DataConfig(directory=sys.argv[1])); print(d.fingerprint)"
    )
    start = time.monotonic()
    runs = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", code, str(root)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    outputs = [run.communicate(timeout=120) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], outputs
    assert outputs[0][0].splitlines()[-1] == outputs[1][0].splitlines()[-1]
    assert time.monotonic() - start < 60
    return root


def expected_stream(texts):
    return np.concatenate(
        [np.append(np.frombuffer(text.encode(), np.uint8).astype(int), 257) for text in texts]
    )


def test_library_prepared_once_by_two_processes(library_directory):
    prepared = os.listdir(library_directory / "python_stdlib")
    assert prepared == [
        f"{sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro}"
    ]
    leftovers = [path for path in library_directory.rglob("*") if "incomplete" in path.name]
    assert leftovers == []
    dataset = load(DataConfig(directory=str(library_directory)))
    again = load(DataConfig(directory=str(library_directory)), seed=1)
    assert dataset.fingerprint == again.fingerprint
    assert dataset.vocabulary_size == 259
    assert "python_stdlib" in dataset.description


def test_library_splits_by_file(library_directory):
    source = stdlib.stdlib_source(str(library_directory))
    files = stdlib.library_files()
    for split in ("train", "validation"):
        assert source.splits[split] == len(files[split])
        assert [text.decode() for text in source.documents(split)] == [
            text for _, text in files[split]
        ]
        assert not any("site-packages" in path for path, _ in files[split])
        assert [path for path, _ in files[split]] == sorted(
            (p for p, _ in files[split]), key=lambda p: p.split("/")
        )
    size = {split: sum(len(text) for _, text in files[split]) for split in files}
    assert sum(size.values()) > 5e6
    assert 0.02 < size["validation"] / sum(size.values()) < 0.09


def test_library_skips_what_is_not_text(tmp_path):
    names = [f"m{i}.py" for i in range(60)]
    for name in names:
        (tmp_path / name).write_text(f"# {name}")
    (tmp_path / "latin.py").write_bytes(b"# \xe9")
    (tmp_path / "empty.py").touch()
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "other.py").write_text("other")
    files = stdlib.library_files(str(tmp_path))
    assert sorted(path for split in files.values() for path, _ in split) == sorted(names)
    with pytest.raises(FileNotFoundError, match=r"no \.py files under"):
        stdlib.library_files(str(tmp_path / "absent"))


def test_second_process_without_a_working_lock(library_directory, monkeypatch, tmp_path):
    """Where the lock does nothing, the later rename fails, and the earlier result is used."""
    target = tmp_path / "python_stdlib" / os.listdir(library_directory / "python_stdlib")[0]

    def lose_the_race(self, **_):
        shutil.copytree(library_directory / "python_stdlib" / target.name, target)
        raise OSError("directory not empty")

    monkeypatch.setattr(stdlib.PythonStdlib, "download_and_prepare", lose_the_race)
    assert stdlib.stdlib_source(str(tmp_path)).splits["train"] > 100
    shutil.rmtree(target)
    monkeypatch.setattr(
        stdlib.PythonStdlib,
        "download_and_prepare",
        lambda self, **_: (_ for _ in ()).throw(OSError("full")),
    )
    with pytest.raises(OSError, match="full"):
        stdlib.stdlib_source(str(tmp_path))


@pytest.mark.parametrize("by", ["directory", "name"])
def test_c4_like_dataset(c4_directory, tmp_path, by):
    if by == "directory":
        config = DataConfig(
            name=str(c4_directory / "c4" / "en" / "3.1.0"),
            directory=str(tmp_path),
            sequence_length=8,
        )
    else:
        config = DataConfig(name="c4/en", directory=str(c4_directory), sequence_length=8)
    dataset = load(config)
    np.testing.assert_array_equal(dataset.train.tokens, expected_stream(TEXTS["train"]))
    np.testing.assert_array_equal(dataset.validation.tokens, expected_stream(TEXTS["validation"]))
    assert dataset.train.batch(0)["inputs"].shape == (16, 8)
    sliced = load(
        DataConfig(
            name=config.name, directory=config.directory, sequence_length=8, train_split="train[:2]"
        )
    )
    np.testing.assert_array_equal(sliced.train.tokens, expected_stream(TEXTS["train"][:2]))


def test_tfds_errors(c4_directory, tmp_path, monkeypatch):
    monkeypatch.setattr("tensorflow_datasets.core.constants.DATA_DIR", str(tmp_path / "default"))
    name = str(c4_directory / "c4" / "en" / "3.1.0")
    with pytest.raises(
        ValueError, match=r"data\.text_key='body'.*features.*text.*name one of them"
    ):
        load(DataConfig(name=name, directory=str(tmp_path), text_key="body"))
    with pytest.raises(
        ValueError,
        match=r"split 'test'.*has the splits 'train', 'validation'.*data\.validation_split",
    ):
        load(DataConfig(name=name, directory=str(tmp_path), validation_split="test"))
    for missing in ("tiny_shakespeare", "lm1b", "no_such_dataset"):
        with pytest.raises(
            FileNotFoundError,
            match=rf"data\.name='{missing}' is not prepared.*prepare {missing} --directory=",
        ):
            load(DataConfig(name=missing, directory=str(tmp_path)))
    other = tmp_path / "tfrecord"
    shutil.copytree(name, other)
    info = json.loads((other / "dataset_info.json").read_text())
    (other / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    with pytest.raises(
        ValueError, match="prepared as tfrecord: prepare it again with file_format='array_record'"
    ):
        load(DataConfig(name=str(other), directory=str(tmp_path)))


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "books"
    for i in range(60):
        path = root / f"part{i % 3}" / f"{i}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"book number {i}\n")
    (root / "notes.md").write_text("not a book")
    return root


def test_text_folder_splits_by_file(folder, tmp_path):
    config = DataConfig(name=str(folder), directory=str(tmp_path / "cache"), sequence_length=8)
    dataset = load(config)
    texts = {
        split: set(dataset_texts(part))
        for split, part in (("train", dataset.train), ("valid", dataset.validation))
    }
    assert texts["train"] | texts["valid"] == {f"book number {i}\n" for i in range(60)}
    assert not texts["train"] & texts["valid"]
    assert 1 <= len(texts["valid"]) <= 9
    next(folder.rglob("*.txt")).write_text("another text, longer")
    assert load(config).fingerprint != dataset.fingerprint
    with pytest.raises(FileNotFoundError, match=r"\(0 files match data\.file_pattern='\*\.csv'"):
        load(DataConfig(name=str(folder), directory=str(tmp_path), file_pattern="*.csv"))
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load(DataConfig(name=str(folder / "absent"), directory=str(tmp_path)))


def dataset_texts(batches):
    tokenizer = ByteTokenizer()
    starts = batches.split.starts
    return [tokenizer.decode(batches.tokens[a:b]) for a, b in itertools.pairwise(starts)]


def fake_source(documents, identity="a"):
    return sources.Source(
        name="fake",
        identity=identity,
        splits={"train": len(documents)},
        documents=lambda split: iter(documents),
    )


def test_tokens_are_cached_by_identity(tmp_path):
    first = tokenized(fake_source([b"ab", b"c"]), "train", ByteTokenizer(), str(tmp_path))
    np.testing.assert_array_equal(first.tokens, [97, 98, 257, 99, 257])
    np.testing.assert_array_equal(first.starts, [0, 3, 5])
    assert first.tokens.dtype == np.uint16
    cached = tokenized(fake_source([b"not read"]), "train", ByteTokenizer(), str(tmp_path))
    assert cached.fingerprint == first.fingerprint
    other = tokenized(fake_source([b"not read"], "b"), "train", ByteTokenizer(), str(tmp_path))
    assert other.fingerprint != first.fingerprint


def test_interrupted_tokenisation_leaves_nothing_behind(tmp_path):
    def interrupted(split):
        yield b"abc"
        raise KeyboardInterrupt

    broken = sources.Source(name="fake", identity="a", splits={"train": 1}, documents=interrupted)
    with pytest.raises(KeyboardInterrupt):
        tokenized(broken, "train", ByteTokenizer(), str(tmp_path))
    (lock,) = (tmp_path / "tokens").iterdir()
    killed = tmp_path / "tokens" / lock.name.replace(".lock", ".1.incomplete")
    killed.mkdir()
    assert len(tokenized(fake_source([b"ab"]), "train", ByteTokenizer(), str(tmp_path)).tokens) == 3
    assert not killed.exists()
    (cache,) = (path for path in (tmp_path / "tokens").iterdir() if path.is_dir())
    (cache / "tokens.bin").write_bytes(b"\0\0")
    with pytest.raises(ValueError, match="holds 1 tokens in place of 3: delete the folder"):
        tokenized(fake_source([b"ab"]), "train", ByteTokenizer(), str(tmp_path))
    with pytest.raises(ValueError, match="has 1 tokens: too few"):
        tokenized(fake_source([b""], "c"), "train", ByteTokenizer(), str(tmp_path))


def test_large_vocabularies_are_stored_in_32_bits(tmp_path):
    class Large(ByteTokenizer):
        vocabulary_size, eos, identity = 70_000, 69_999, "large"

    split = tokenized(fake_source([b"a"]), "train", Large(), str(tmp_path))
    np.testing.assert_array_equal(split.tokens, [97, 69_999])
    assert split.tokens.dtype == np.int32


def test_byte_tokenizer():
    tokenizer = ByteTokenizer()
    for text in ("plain", "né ∀x 🙂", ""):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode(b"\xff").tolist() == [255]
    assert tokenizer.decode([256, 97, 257, 258]) == "a"


def test_sentencepiece_tokenizer(tmp_path, monkeypatch):
    sentencepiece = pytest.importorskip("sentencepiece")
    text = ["the quick brown fox jumps over the lazy dog", "pack my box with five dozen jugs"] * 20
    prefix = str(tmp_path / "tiny")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_prefix=prefix,
        vocab_size=60,
        minloglevel=2,
        hard_vocab_limit=False,
    )
    tokenizer = make_tokenizer(prefix + ".model")
    ids = tokenizer.encode(text[0])
    assert ids.dtype == np.int32
    assert len(ids) < len(text[0])
    assert tokenizer.decode(ids) == tokenizer.decode(np.append(ids, tokenizer.eos)) == text[0]
    assert tokenizer.encode(text[0].encode()).tolist() == ids.tolist()
    assert (tokenizer.pad, tokenizer.eos) == (2, 2)  # no padding piece: eos
    assert tokenizer.identity != ByteTokenizer.identity
    assert tokenizer.vocabulary_size > ids.max()
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ImportError, match=r"needs the sentencepiece package: pip install"):
        make_tokenizer(prefix + ".model")
    with pytest.raises(FileNotFoundError, match=r"data\.tokenizer='absent\.model'.*bytes"):
        make_tokenizer("absent.model")


def test_data_directory(monkeypatch):
    monkeypatch.setenv("LOWRANK_JAX_DATA", "/somewhere")
    assert sources.data_directory() == "/somewhere"
    assert sources.data_directory("/given") == "/given"
    monkeypatch.delenv("LOWRANK_JAX_DATA")
    assert sources.data_directory() == os.path.expanduser("~/.cache/lowrank_jax/datasets")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"name": ""}, r"data\.name='': give a non-empty string"),
        ({"packing": "rows"}, r"data\.packing='rows': choose one of pack, pad"),
        ({"sequence_length": 1}, r"data\.sequence_length=1: give an integer of at least 2"),
        ({"batch_size": 0}, r"data\.batch_size=0: give an integer of at least 1"),
        ({"batch_size": 2.0}, r"data\.batch_size=2\.0"),
        ({"validation_split": "train"}, r"data\.validation_split='train' is the training split"),
    ],
)
def test_config_errors(overrides, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**overrides)


def test_prepare_command(library_directory, capsys):
    prepare.main(["python_stdlib", f"--directory={library_directory}"])
    path = capsys.readouterr().out.strip().rsplit("=", 1)[1]
    assert load(DataConfig(name=path, directory=str(library_directory))).train.examples > 1000


def test_prepare_without_tensorflow(monkeypatch, tmp_path):
    def unknown(*_, **__):
        raise tfds.core.DatasetNotFoundError("c4 not found")

    monkeypatch.setattr(tfds, "builder", unknown)
    monkeypatch.setattr(prepare, "_installed", lambda module: False)
    with pytest.raises(SystemExit, match=r"error: 'c4/en'.*pip install -e '\.\[prepare\]'"):
        prepare.main(["c4/en", f"--directory={tmp_path}"])
    monkeypatch.setattr(prepare, "_installed", lambda module: True)
    with pytest.raises(tfds.core.DatasetNotFoundError):
        prepare.main(["c4/en", f"--directory={tmp_path}"])
