"""Tokenizers from files: ids by hand, text back to the byte, and text that never becomes a control
token."""

import json
import shutil
import sys

import numpy as np
import pytest

from experiments.data.tokenizer import ByteTokenizer, found_in, make_tokenizer, vocabulary_of
from experiments.settings import configuration
from experiments.settings.sections import ConfigurationError
from tests.experiments import tokenizers as made
from tests.experiments.tokenizers import MARKED

TEXTS = ["", "a", "hello hello", " two  spaces\n\n\ttabs ", "né 漢字 👩‍🚀", "\x00\x7f"]
TEXTS += ["a<|im_end|>b</s><s>", "<|endoftext|>"]


@pytest.fixture
def package():
    return pytest.importorskip(
        "tokenizers", reason="a tokenizer.json needs the tokenizers package (extra tokenizers)"
    )


@pytest.fixture
def bpe(tmp_path, package):
    merges = [("h", "e"), ("l", "l"), ("he", "ll")]
    path = made.byte_level(
        tmp_path / "bpe", merges, MARKED[:2], MARKED[2:], eos_token={"content": "<|endoftext|>"}
    )
    stored = package.Tokenizer.from_file(path)
    stored.enable_truncation(3)  # as some files hold it
    stored.enable_padding(length=8)
    stored.save(path)
    return make_tokenizer(path)


def test_ids_by_hand(bpe):
    assert bpe.encode("hello\n").tolist() == [258, ord("o"), ord("\n")]
    assert bpe.encode(b"hell he").tolist() == [258, 32, 256]
    assert (bpe.eos, bpe.bos, bpe.pad, bpe.vocabulary_size) == (259, -1, 259, 262)
    assert [bpe.token(name) for name in (*MARKED, "he")] == [259, 260, 261, None]
    assert bpe.decode([258, 111, 259, 260, 261]) == "hello"


@pytest.mark.parametrize("kind", ["bytes", "tokenizer.json"])
def test_text_comes_back_to_the_byte_and_holds_no_control_token(request, kind):
    tokenizer = ByteTokenizer() if kind == "bytes" else request.getfixturevalue("bpe")
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int32 and len(ids) <= len(text.encode())
        assert not {tokenizer.eos, tokenizer.bos, tokenizer.pad, *map(tokenizer.token, MARKED)} & {
            *ids.tolist()
        }
        assert tokenizer.decode(ids).encode() == text.encode()
        np.testing.assert_array_equal(tokenizer.encode(text.encode()), ids)


def test_a_special_token_in_a_text_does_not_divide_it(tmp_path, package):
    tokenizer = make_tokenizer(
        made.byte_level(tmp_path, special=("</s>",), prefix=True)
    )  # a space before each piece
    assert tokenizer.encode("a</s>b").tolist() == [*b" a</s>b"]


def test_a_name_in_the_vocabulary_of_words_is_cut(tmp_path, package):
    words = [("<unk>", 0.0), ("</s>", 0.0), ("a</", -1.0), *((letter, -2.0) for letter in "ab</s>")]
    unigram = package.Tokenizer(package.models.Unigram(words, unk_id=0))
    unigram.add_special_tokens(["</s>"])
    tokenizer = make_tokenizer(made.save(tmp_path, unigram))
    assert tokenizer.eos == 1
    names = [unigram.id_to_token(int(i)) for i in tokenizer.encode("a</s>b</s>")]
    assert "".join(names) == "a</s>b</s>" and "</s>" not in names
    level = package.Tokenizer(
        package.models.WordLevel({"<unk>": 0, "x": 1, "y": 2}, unk_token="<unk>")
    )
    level.normalizer = package.normalizers.Replace("x", "y")
    level.add_special_tokens(["</s>", "y"])
    with pytest.raises(
        ValueError, match="a text becomes the special token 'y' of the tokenizer: remove it"
    ):
        make_tokenizer(made.save(tmp_path / "level", level)).encode("x")


def test_markers_that_a_sentencepiece_model_declares_as_words(tmp_path):
    tokenizer = make_tokenizer(
        made.sentencepiece(tmp_path / "a.model", user_defined_symbols=["<|im_end|>", "<tool>"])
    )
    own, tool = tokenizer.token("<|im_end|>"), tokenizer._processor.piece_to_id("<tool>")
    ids = tokenizer.encode("the cat<|im_end|> sat <tool></s>").tolist()
    assert (
        own is not None and not {own, tokenizer.eos} & {*ids} and tool in ids
    )  # other words stay words
    assert tokenizer.decode(ids) == "the cat<|im_end|> sat <tool></s>"
    assert tokenizer.decode([*tokenizer.encode("the cat"), own, tokenizer.eos]) == "the cat"
    assert tokenizer.token("the") is None and tokenizer.token("<tool>") is None
    plain = make_tokenizer(made.sentencepiece(tmp_path / "b.model"))
    assert plain.token("<|im_end|>") is None and plain.token("</s>") == plain.eos


def test_what_a_folder_brings_and_what_it_needs_to_bring_it_on(tmp_path, bpe):
    (tmp_path / "both").mkdir()
    assert found_in(tmp_path / "both") == ""
    made.sentencepiece(tmp_path / "both" / "tokenizer.model")
    assert found_in(tmp_path / "both").endswith("tokenizer.model")
    shutil.copy(tmp_path / "bpe" / "tokenizer.json", tmp_path / "both")
    assert found_in(tmp_path / "both").endswith("tokenizer.json")
    (tmp_path / "copy").mkdir()
    for name, content in bpe.files.items():
        (tmp_path / "copy" / name).write_bytes(content)
    copy = make_tokenizer(str(tmp_path / "copy"))
    assert copy.identity == bpe.identity and copy.files == bpe.files
    assert make_tokenizer("bytes").files == {}
    other = json.loads((tmp_path / "copy" / "tokenizer_config.json").read_text()) | {
        "eos_token": "<|im_end|>"
    }
    (tmp_path / "copy" / "tokenizer_config.json").write_text(json.dumps(other))
    assert (
        make_tokenizer(str(tmp_path / "copy")).identity != bpe.identity
    )  # other documents' ends, other tokens


@pytest.mark.parametrize(
    "special, settings, message",
    [
        (
            (),
            {},
            r'says no eos, .*write \{"eos_token": "\.\.\."\} into tokenizer_config\.json .*it has '
            r"none",
        ),
        (("<x>",), {}, r"says no eos.*with one of its special tokens \(<x>\)"),
        (
            ("</s>", "<|endoftext|>"),
            {},
            r"has </s> and <\|endoftext\|>: write the one that ends a document",
        ),
        (
            ("</s>",),
            {"eos_token": "<y>"},
            r"says eos_token='<y>', which is none of its special tokens \(</s>\)",
        ),
        (("</s>",), {"bos_token": "<y>"}, r"says bos_token='<y>'"),
    ],
)
def test_special_tokens_that_nobody_names(tmp_path, package, special, settings, message):
    with pytest.raises(ValueError, match=message):
        make_tokenizer(made.byte_level(tmp_path, special=special, **settings))


def test_files_that_are_no_tokenizers(tmp_path, package, monkeypatch):
    with pytest.raises(
        FileNotFoundError, match=r"data\.tokenizer='.*no\.json': no such file; give a SentencePiece"
    ):
        make_tokenizer(str(tmp_path / "no.json"))
    for name, content, message in [
        ("a.json", b"{", "is not JSON"),
        ("b.json", b"[]", "an object is needed"),
        ("c.json", b"{}", "is no tokenizer.json"),
        ("d.json", b'{"added_tokens": [{"content": 3}]}', "a string is needed"),
        ("a.model", b"nothing", "is no SentencePiece model"),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            make_tokenizer(str(tmp_path / name))
    path = made.byte_level(tmp_path / "good")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(
        ImportError, match=r"needs the tokenizers package: pip install -e '\.\[tokenizers\]'"
    ):
        make_tokenizer(path)


def test_an_own_tokenizer_sets_the_vocabulary(tmp_path, bpe):
    path = str(tmp_path / "bpe")
    values = {"model": {"preset": "60M"}, "data": {"tokenizer": path}}
    found = configuration.from_dict(values)
    assert found.model.vocabulary_size == vocabulary_of(path) == 262
    larger = configuration.from_dict(
        {"model": {"preset": "60M", "vocabulary_size": 320}, "data": {"tokenizer": path}}
    )
    assert larger.model.vocabulary_size == 320  # padded
    for tokenizer in (
        "bytes",
        str(tmp_path / "elsewhere.model"),
    ):  # nobody brought one, or it is on another machine
        assert configuration.from_dict(
            {"model": {"preset": "60M"}, "data": {"tokenizer": tokenizer}}
        ).model == (configuration.from_dict({"model": {"preset": "60M"}}).model)
    stored = configuration.to_dict(found)
    shutil.rmtree(path)
    assert configuration.from_dict(stored) == found
    (tmp_path / "bad.json").write_text("[]")
    with pytest.raises(ConfigurationError, match=r"bad\.json.* an object is needed"):
        configuration.from_dict({"data": {"tokenizer": str(tmp_path / "bad.json")}})
