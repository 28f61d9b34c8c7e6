"""The documentation of the standard library as a dataset: what is in it, in which split, and
nothing in both."""

import textwrap

import pytest

from experiments.data import documentation, stdlib
from experiments.data.documentation import docstrings, documentation_texts
from experiments.data.sources import split_of

SOURCE = textwrap.dedent('''
    """The module.

        Indented."""
    x = "no docstring"
    "nor this"
    class A:
        """About A."""
        def f(self):
            "About f."
            async def g():
                """   About g.
                Second line.
                """
            def silent(): pass
        def h(self): return "no"
    if x:
        def late():
            """Late."""
''')


def test_docstrings_in_the_order_of_the_source_without_indentation():
    expected = [
        "The module.\n\nIndented.",
        "About A.",
        "About f.",
        "About g.\nSecond line.",
        "Late.",
    ]
    assert list(docstrings(SOURCE)) == expected


@pytest.mark.parametrize("broken", ["def f(:", "\0", "print 'two'"])
def test_what_does_not_parse_documents_nothing(broken):
    assert list(docstrings(broken)) == []


def test_escapes_that_a_later_python_refuses_do_not_warn():
    assert list(docstrings('"a \\\\d"')) == ["a \\d"]
    assert list(docstrings('"a \\d"')) == ["a \\d"]


def test_no_text_is_in_both_splits_or_twice():
    files = {
        "train": [
            ("a.py", '"One."\ndef f():\n  "Two."\ndef g():\n  "Two."'),
            ("b.py", '"Two."'),
            ("c.py", "x = 1"),
            ("test/e.py", '"Three."'),
        ],
        "validation": [("d.py", '"Two."\ndef f():\n  "Three."'), ("e.py", '"One."')],
    }
    assert documentation_texts(files) == {
        "train": [("a.py", "One.\n\nTwo.\n")],
        "validation": [("d.py", "Three.\n")],
    }


def test_a_file_has_the_split_of_its_source(monkeypatch, tmp_path):
    root = tmp_path / "library"
    root.mkdir()
    for i in range(120):
        (root / f"m{i}.py").write_text(f'"Module {i}."\nx = {i}\n')
    original = stdlib.library_files
    monkeypatch.setattr(documentation, "library_files", lambda: original(str(root)))
    source = documentation.documentation_source(str(tmp_path / "data"))
    for split in ("train", "validation"):
        texts = [text.decode() for text in source.documents(split)]
        wanted = sorted(f"m{i}.py" for i in range(120) if split_of(f"m{i}.py") == split)
        assert texts == [f"Module {path[1:-3]}.\n" for path in wanted]
        assert source.splits[split] == len(texts) > 0


def is_test(path):
    return bool({"test", "tests", "idle_test"} & {*path.split("/")})


@pytest.mark.slow
def test_the_library_of_this_python():
    files = stdlib.library_files()
    texts = documentation_texts(files)
    size = {split: sum(len(text) for _, text in texts[split]) for split in texts}
    assert size["train"] > 1e6
    assert 0.01 < size["validation"] / size["train"] < 0.15
    assert all(split_of(path) == split for split in texts for path, _ in texts[split])
    train, validation = (
        {text for path, source in files[split] if not is_test(path) for text in docstrings(source)}
        for split in ("train", "validation")
    )
    held_out = "\n\n".join(text for _, text in texts["validation"])
    for text in train & validation:  # a long one would be seen if it had come along
        assert len(text) < 80 or text not in held_out
