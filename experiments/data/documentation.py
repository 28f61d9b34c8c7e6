"""The embedded dataset for fine-tuning: the documentation inside Python's standard library.

Prose about its code.

One document per file, tests aside: the docstrings of the module, its classes and functions, in the
order of the source, without their indentation, a blank line between two. A file is in the split
that it has in the embedded pre-training data (`experiments.data.stdlib`), so that a model
pre-trained there has met no docstring of the validation split. A docstring that occurs several
times (copied methods) is kept where it occurs first, and the training split is read first: no text
of the one split is in the other.
"""

import ast
import pathlib
import warnings
from collections.abc import Iterator
from typing import ClassVar

import tensorflow_datasets as tfds

from experiments.data.sources import Source
from experiments.data.stdlib import PythonStdlib, library_files, prepared_here

DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
TESTS = {"test", "tests", "idle_test"}


class PythonDocumentation(tfds.core.GeneratorBasedBuilder):
    """One example per file that documents something, by path; the version is Python's own."""

    # nothing is downloaded; the default look-up of checksums needs importlib_resources
    url_infos: ClassVar[dict] = {}
    VERSION = PythonStdlib.VERSION

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            description="Docstrings of Python's standard library, installed with Python under the "
            "PSF licence.",
            features=tfds.features.FeaturesDict(
                {"text": tfds.features.Text(), "path": tfds.features.Text()}
            ),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        del dl_manager
        texts = documentation_texts(library_files())
        return {split: self._generate_examples(texts[split]) for split in ("train", "validation")}

    def _generate_examples(self, texts):
        for number, (path, text) in enumerate(texts):
            yield number, {"path": path, "text": text}


def docstrings(source: str) -> Iterator[str]:
    """The docstrings of a module's source, in order; none when it does not parse.

    Some files are for other versions.

    >>> list(
    ...     docstrings(
    ...         '"About m."\\nclass A:\\n    "About A."\\n    def f(self):\\n        "About f."'
    ...     )
    ... )
    ['About m.', 'About A.', 'About f.']
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # escapes that a later Python refuses
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return
    nodes: list[ast.AST] = [tree]
    while nodes:
        node = nodes.pop()
        if isinstance(node, DOCUMENTED) and (text := ast.get_docstring(node)):
            yield text
        nodes.extend(reversed([*ast.iter_child_nodes(node)]))


def documentation_texts(
    files: dict[str, list[tuple[str, str]]],
) -> dict[str, list[tuple[str, str]]]:
    r"""{split: [(relative path, documentation)]} of {split: [(relative path, source)]}.

    >>> documentation_texts(
    ...     {"train": [("a.py", '"One."')], "validation": [("b.py", '"One."'), ("c.py", '"Two."')]}
    ... )
    {'train': [('a.py', 'One.\n')], 'validation': [('c.py', 'Two.\n')]}
    """
    seen: set[str] = set()
    texts: dict[str, list[tuple[str, str]]] = {}
    for split in ("train", "validation"):
        texts[split] = []
        for path, source in files[split]:
            if not TESTS.isdisjoint(pathlib.PurePosixPath(path).parts):
                continue
            new = [text for text in dict.fromkeys(docstrings(source)) if text not in seen]
            seen.update(new)
            if new:
                texts[split].append((path, "\n\n".join(new) + "\n"))
    return texts


def documentation_source(directory: str) -> Source:
    """Prepares the dataset under `directory` unless it is there, and reads it.

    Safe in several processes at once.
    """
    return prepared_here(PythonDocumentation, directory)
