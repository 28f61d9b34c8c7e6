"""From a `DataConfig` to a `Dataset`: whatever can be wrong is found here, before any work."""

import dataclasses
import os
from typing import Any

from experiments.data.loader import MODES, Batches
from experiments.data.packing import tokenized
from experiments.data.sources import (
    Source,
    data_directory,
    directory_source,
    folder_source,
    named_source,
)
from experiments.data.tokenizer import Tokenizer, make_tokenizer
from experiments.settings.sections import number
from lowrank_jax.typing import Pytree


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read, and how it is cut into batches.

    Attributes:
      name: "stdlib" (the embedded default: Python's own source, prepared on demand); a prepared
        TFDS dataset by name, such as "lm1b" or "c4/en"; or a path that begins with / . ~ or a
        scheme such as gs://: the version directory of a prepared TFDS dataset, or a folder of text
        files.
      directory: where datasets and cached tokens live; "" is $LOWRANK_JAX_DATA, else
        ~/.cache/lowrank_jax/datasets.
      tokenizer: "bytes", or the path of a SentencePiece model, of a tokenizer.json (which needs the
        tokenizers package) or of a folder with one of them. Its size is the model's vocabulary
        where model.vocabulary_size is not given.
      text_key: feature of a TFDS dataset that holds the text.
      file_pattern: glob for the files of a folder.
      train_split, validation_split: names or slices ("train[:1%]"); folders and "stdlib" have
        "train", "validation".
      packing: "pack" (contiguous windows of a stream of documents) or "pad" (the papers' protocol:
        a document per row).
      sequence_length: tokens per row (256: GaLore's scripts).
      batch_size: rows of a global batch.
    """

    name: str = "stdlib"
    directory: str = ""
    tokenizer: str = "bytes"
    text_key: str = "text"
    file_pattern: str = "**/*.txt"
    train_split: str = "train"
    validation_split: str = "validation"
    packing: str = "pack"
    sequence_length: int = number(256, at_least=2)
    batch_size: int = number(16, at_least=1)

    def __post_init__(self):
        for name in (
            "name",
            "tokenizer",
            "text_key",
            "file_pattern",
            "train_split",
            "validation_split",
        ):
            value = getattr(self, name)
            if not isinstance(value, str) or not value:
                raise ValueError(f"data.{name}={value!r}: give a non-empty string")
        if self.packing not in MODES:
            raise ValueError(f"data.packing={self.packing!r}: choose one of {', '.join(MODES)}")
        for name, least in (("sequence_length", 2), ("batch_size", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"data.{name}={value!r}: give an integer of at least {least}")
        if self.train_split == self.validation_split:
            raise ValueError(
                f"data.validation_split={self.validation_split!r} is the training split: choose "
                "another"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dataset:
    """The data of a run.

    train, validation: `Numbered`; description: one line; fingerprint: equal for equal tokens,
    to check on resume.

    Data that are only evaluated have train = None, images have no tokenizer, and only labelled data
    has classes.
    """

    train: Pytree
    validation: Any
    tokenizer: Tokenizer | None
    vocabulary_size: int
    description: str
    fingerprint: str
    classes: tuple[str, ...] = ()


def load(config: DataConfig, seed: int = 0) -> Dataset:
    """Opens, and for "stdlib" prepares, a dataset; tokenises both splits once.

    Raises FileNotFoundError (not prepared, no such folder or tokenizer) or ValueError (split,
    feature, file format), each naming field, value and remedy.
    """
    tokenizer = make_tokenizer(config.tokenizer)
    directory = data_directory(config.directory)
    source = open_source(config, directory)
    splits = [
        tokenized(source, name, tokenizer, directory)
        for name in (config.train_split, config.validation_split)
    ]
    train, validation = (
        Batches(s, config.batch_size, config.sequence_length, seed, config.packing) for s in splits
    )
    if train.examples == 0:
        train.batch(0)  # raises
    sizes = " + ".join(f"{len(part.tokens):,}" for part in (train, validation))
    return Dataset(
        train=train,
        validation=validation,
        tokenizer=tokenizer,
        vocabulary_size=tokenizer.vocabulary_size,
        description=f"{source.name}: {sizes} tokens (train + validation), {tokenizer.identity}, "
        f"{config.packing}",
        fingerprint=f"{splits[0].fingerprint}/{splits[1].fingerprint}",
    )


def open_source(config: DataConfig, directory: str) -> Source:
    """The documents that `config.name` stands for."""
    if config.name == "stdlib":
        from experiments.data.stdlib import stdlib_source

        return stdlib_source(directory)
    if config.name.startswith(("/", ".", "~")) or "://" in config.name:
        prepared = os.path.isfile(
            os.path.join(os.path.expanduser(config.name), "dataset_info.json")
        )
        if prepared or "://" in config.name:
            return directory_source(config.name, config.text_key)
        return folder_source(config.name, config.file_pattern)
    return named_source(config.name, directory, config.text_key)
