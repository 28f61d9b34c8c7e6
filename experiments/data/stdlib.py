"""The embedded dataset: the source of the running Python's standard library.

30 MB of real text and no download.
"""

import os
import pathlib
import sys
import sysconfig
from typing import ClassVar

import tensorflow_datasets as tfds

from experiments.data.sources import Source, builder_source, exclusive, split_of

SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__"}


class PythonStdlib(tfds.core.GeneratorBasedBuilder):
    """One example per non-empty UTF-8 `.py` file, by path; the version is Python's own."""

    # nothing is downloaded; the default look-up of checksums needs importlib_resources
    url_infos: ClassVar[dict] = {}
    VERSION = tfds.core.Version("{}.{}.{}".format(*sys.version_info[:3]))

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            description="Source files of Python's standard library, installed with Python under "
            "the PSF licence.",
            features=tfds.features.FeaturesDict(
                {"text": tfds.features.Text(), "path": tfds.features.Text()}
            ),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        del dl_manager
        files = library_files()
        return {split: self._generate_examples(files[split]) for split in ("train", "validation")}

    def _generate_examples(self, files):
        for number, (path, text) in enumerate(files):
            yield number, {"path": path, "text": text}


def library_files(root: str | None = None) -> dict[str, list[tuple[str, str]]]:
    """{split: [(relative path, text)]}, without files that are not UTF-8.

    Those are fixtures of Python's own tests.
    """
    base = pathlib.Path(root or sysconfig.get_path("stdlib"))
    files: dict[str, list[tuple[str, str]]] = {"train": [], "validation": []}
    for path in sorted(base.rglob("*.py")):
        relative = path.relative_to(base)
        if SKIPPED_FOLDERS.isdisjoint(relative.parts):
            try:
                text = path.read_bytes().decode()
            except UnicodeDecodeError:
                continue
            if text:
                files[split_of(relative.as_posix())].append((relative.as_posix(), text))
    if not files["train"] or not files["validation"]:
        raise FileNotFoundError(
            f"no .py files under {base}: this Python comes without sources; give data.name another "
            "dataset"
        )
    return files


def stdlib_source(directory: str) -> Source:
    """Prepares the dataset under `directory` unless it is there, and reads it.

    Safe in several processes at once.
    """
    return prepared_here(PythonStdlib, directory)


def prepared_here(builder_of: type[tfds.core.GeneratorBasedBuilder], directory: str) -> Source:
    """The dataset of a builder that downloads nothing, prepared by whichever process is first."""
    builder = builder_of(data_dir=directory)
    if not builder.data_path.exists():
        with exclusive(os.path.join(directory, f".{builder.name}.lock")):
            builder = builder_of(data_dir=directory)
            try:  # does nothing when it was prepared meanwhile
                builder.download_and_prepare(file_format="array_record")
            except OSError:
                # another process that the lock did not see may have been first
                if not builder.data_path.exists():
                    raise
    return builder_source(builder_of(data_dir=directory))
