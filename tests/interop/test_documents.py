"""The reader of documents: whatever is wrong is named with file, place, value and remedy."""

import json
import re

import pytest

from lowrank_jax.interop import documents
from lowrank_jax.interop.documents import DocumentError, Malformed, Missing, Unexpected

SHAPE = {
    "format": int,
    "rate": float,
    "files": {str: {"bytes": int}},
    "names": [str],
    "note?": (str, None),
}
SOUND = {"format": 1, "rate": 2, "files": {"a": {"bytes": 3}}, "names": ["x"]}

MALFORMED = {
    "empty": (b"", "Expecting value"),
    "cut short": (b'{"a": [1, 2', "line 1, column 12"),
    "syntax": (b'{\n"a": 1,\n}', "line 3, column 1"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "UTF-16"),
    "encoding": (b'{\n"a": "\xff"}', r"line 2, is not UTF-8: byte 0xff at offset 8"),
    "nesting": (b"[" * 100_000, "nested deeper"),
    "nesting that is complete": (b"[" * 150 + b"]" * 150, "nested deeper than 100 levels"),
    "NaN": (b'{"a": NaN}', "NaN is no number"),
    "infinite": (b'{"a": -Infinity}', "-Infinity is no number"),
    "overflow": (b'{"a": 1e999}', "1e999 is too large"),
    "digits": (b'{"a": ' + b"9" * 5000 + b"}", "is not JSON: Exceeds the limit"),
    "twice": (b'{"a": {"b": 1, "b": 2}}', "the key 'b' stands twice"),
    "surrogate": (rb'{"a": "\uD800"}', "half of a surrogate pair"),
}
UNEXPECTED = {
    "array": ([], "is [], where an object is needed"),
    "null": (None, "is None, where an object is needed"),
    "missing key": ({"format": 1}, "has no 'rate'"),
    "bool": (SOUND | {"format": True}, "format is True, where an integer is needed"),
    "float": (SOUND | {"format": 1.0}, "format is 1.0, where an integer is needed"),
    "large": (SOUND | {"rate": 10**400}, f"rate is 1{'0' * 59}..., where a number is needed"),
    "large integer": (SOUND | {"format": -(10**400)}, "..., where an integer is needed"),
    "string": (SOUND | {"rate": "2"}, "rate is '2', where a number is needed"),
    "inner": (
        SOUND | {"files": {"a": {"bytes": None}}},
        "files['a'].bytes is None, where an integer is needed",
    ),
    "inner key": (SOUND | {"files": {"a": {}}}, "files['a'] has no 'bytes'"),
    "element": (SOUND | {"names": ["x", 2]}, "names[1] is 2, where a string is needed"),
    "optional": (SOUND | {"note": 2}, "note is 2, where a string or null is needed"),
}


@pytest.fixture
def file(tmp_path):
    return tmp_path / "some.json"


def test_a_sound_document_is_what_json_says(file):
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps(SOUND | {"more": [1.5, "é"]}).encode())
    assert documents.read(file, SHAPE) == SOUND | {"more": [1.5, "é"]}
    assert documents.read(file) == documents.read(file, dict)


@pytest.mark.parametrize("kind", MALFORMED)
def test_malformed_bytes_name_file_place_and_remedy(file, kind):
    raw, words = MALFORMED[kind]
    file.write_bytes(raw)
    with pytest.raises(Malformed, match=rf"^{re.escape(str(file))}.*{words}.*") as caught:
        documents.read(file, remedy="copy it again")
    assert str(caught.value).endswith("copy it again") or kind == "UTF-16"


@pytest.mark.parametrize("kind", UNEXPECTED)
def test_another_shape_names_key_and_value(file, kind):
    value, words = UNEXPECTED[kind]
    file.write_text(json.dumps(value))
    with pytest.raises(Unexpected, match=re.escape(words)) as caught:
        documents.read(file, SHAPE)
    assert str(caught.value).startswith(str(file))


def test_what_is_no_file_is_missing(tmp_path):
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").write_text("{}")
    places = {
        "none": "does not exist",
        "": "is no file",
        "dangling": "is no file",
        "file/x": "does not exist",
    }
    for name, words in places.items():
        with pytest.raises(Missing, match=words) as caught:
            documents.read(tmp_path / name)
        assert isinstance(caught.value, FileNotFoundError) and isinstance(
            caught.value, DocumentError
        )


def test_a_file_larger_than_any_document_is_not_read(file, monkeypatch):
    monkeypatch.setattr(documents, "LARGEST", 10)
    file.write_text(json.dumps(SOUND))
    with pytest.raises(Malformed, match="where at most 10 are expected"):
        documents.read(file)
    with pytest.raises(Malformed, match="line 1: is longer than 10 bytes"):
        list(documents.lines(file))


@pytest.mark.parametrize(
    ("second", "words"),
    [
        (b'{"a": 1', "line 2 is not JSON.*column 8"),
        (b"\xff", "line 2 is not UTF-8"),
        (b"3", "line 2 is 3, where"),
    ],
)
def test_lines_name_the_line(file, second, words):
    file.write_bytes(b'\xef\xbb\xbf{"a": 0}\n' + second + b"\n")
    found = documents.lines(file, {"a": int})
    assert next(found) == (1, {"a": 0})
    with pytest.raises(DocumentError, match=words):
        next(found)


def test_a_line_without_an_end_is_torn(file):
    for raw, torn in {b"": False, b'{"a": 1}\n': False, b'{"a": 1}\n{"a"': True}.items():
        file.write_bytes(raw)
        assert documents.is_torn(file) == torn
