"""From a `TuningDataConfig` to a `Dataset` for fine-tuning: text, instructions or classes."""

import dataclasses
import os
from typing import Any

from experiments.data import chat
from experiments.data.dataset import Dataset
from experiments.data.digits import CLASSES, NAMES, Images, digits, fingerprint
from experiments.data.documentation import documentation_source
from experiments.data.loader import MODES, Batches
from experiments.data.packing import tokenized
from experiments.data.records import jsonl_source
from experiments.data.rows import Instructions, Labelled, Rows
from experiments.data.sources import (
    Source,
    builder_source,
    data_directory,
    directory_builder,
    folder_source,
    named_builder,
)
from experiments.data.tokenizer import make_tokenizer
from experiments.settings.sections import choice, number, one_of

TASKS = ("language_modelling", "instruction", "classification")
KEYS = {
    "language_modelling": ("text_key",),
    "instruction": ("prompt_key", "response_key"),
    "classification": ("text_key", "label_key"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuningDataConfig:
    """What is read, and how it is cut into batches.

    Attributes:
      task: one of TASKS. An instruction's loss is that of its response alone.
      name: "documentation" (the embedded default: the docstrings of Python's library), "stdlib"
        (its source), "digits" or "digits_rotated" (images, for a vision transformer); the path of a
        .jsonl file; a prepared TFDS dataset by name or by its version directory; or a folder of
        text files.
      validation: a second .jsonl file, for validation; "" holds out one line in twenty of the
        first.
      directory: where datasets and cached tokens live; "" is $LOWRANK_JAX_DATA, else
        ~/.cache/lowrank_jax/datasets.
      tokenizer: "bytes", the path of a SentencePiece model, of a tokenizer.json or of a folder with
        one of them, or "" for the one that the base was trained with.
      bos: begin every document with the tokenizer's bos, as LLaMA's own checkpoints expect.
      template: what delimits prompts, responses and the turns of conversations: "plain" (nothing; a
        response ends with eos), "alpaca", "chatml", "llama2" or "llama3" (experiments.data.chat);
        None is "plain", and for conversations the one of which the tokenizer has the markers.
      text_key, label_key, prompt_key, response_key: names in the JSON objects, or of TFDS features.
        As they are, prompt and response stand for all usual keys of instructions in a .jsonl file,
        and for conversations ("messages"), where an object does not have these two.
      file_pattern: glob for the files of a folder.
      train_split, validation_split: of a TFDS dataset, names or slices ("train[:1%]").
      packing: of language modelling: "pack" (contiguous windows of a stream of documents, the
        default) or "pad" (a document per row).
      sequence_length: tokens per row (256); images have none.
      batch_size: rows of a global batch.
    """

    task: str = "language_modelling"
    name: str = "documentation"
    validation: str = ""
    directory: str = ""
    tokenizer: str = ""
    bos: bool = False
    template: str | None = choice(None, chat.TEMPLATES)
    text_key: str = "text"
    label_key: str = "label"
    prompt_key: str = "prompt"
    response_key: str = "response"
    file_pattern: str = "**/*.txt"
    train_split: str = "train"
    validation_split: str = "validation"
    packing: str | None = None
    sequence_length: int | None = number(None, at_least=2)
    batch_size: int = number(16, at_least=1)

    def __post_init__(self):
        self._check_fields()
        self._check_splits()
        if self.has_images:
            self._check_images()
        else:
            self._check_text()

    def _require(self, condition: object, field: str, remedy: str) -> None:
        if not condition:
            raise ValueError(f"data.{field}={getattr(self, field)!r}: {remedy}")

    def _check_fields(self) -> None:
        require = self._require
        require(self.task in TASKS, "task", f"choose one of {', '.join(TASKS)}")
        named = ("name", "file_pattern", "train_split", "validation_split")
        for field in (*named, *sum(KEYS.values(), ())):
            value = getattr(self, field)
            require(isinstance(value, str) and value, field, "give a non-empty string")
        whole = isinstance(self.batch_size, int) and not isinstance(self.batch_size, bool)
        require(whole and self.batch_size >= 1, "batch_size", "give an integer of at least 1")
        language = self.task == "language_modelling"
        if self.template is not None:
            one_of("data.template", self.template, chat.TEMPLATES)
            remedy = f"{self.task} has no prompts; leave it None"
            require(self.task == "instruction", "template", remedy)
        if self.packing is not None:
            require(self.packing in MODES, "packing", f"choose one of {', '.join(MODES)}")
            require(language, "packing", f"{self.task} has a document per row; leave it None")

    def _check_splits(self) -> None:
        require = self._require
        differ = self.train_split != self.validation_split
        require(differ, "validation_split", "is the training split: choose another")
        remedy = "goes with a .jsonl file as data.name; leave it ''"
        require(not self.validation or self.is_jsonl, "validation", remedy)
        for field in ("train_split", "validation_split") if self.is_jsonl else ():
            default = field.removesuffix("_split")
            remedy = f"slices are of TFDS datasets; leave it {default!r}"
            require(getattr(self, field) == default, field, remedy)

    def _check_images(self) -> None:
        require = self._require
        remedy = f"{self.name} has classes; set data.task='classification'"
        require(self.task == "classification", "task", remedy)
        require(self.sequence_length is None, "sequence_length", "images have none; leave it None")
        require(not self.tokenizer, "tokenizer", "images have none; leave it ''")
        require(not self.bos, "bos", "images have no tokens; leave it False")

    def _check_text(self) -> None:
        require = self._require
        length = self.length
        whole = isinstance(length, int) and not isinstance(length, bool)
        require(whole and length >= 2, "sequence_length", "give an integer of at least 2")
        language = self.task == "language_modelling"
        is_plain = self.name in ("documentation", "stdlib")
        remedy = f"{self.name} is plain text; set data.task='language_modelling'"
        require(language or not is_plain, "task", remedy)

    @property
    def is_jsonl(self) -> bool:
        """The documents are lines of a file."""
        return self.name.endswith(".jsonl")

    @property
    def has_images(self) -> bool:
        """The examples are images."""
        return self.name in NAMES

    @property
    def length(self) -> int:
        """Tokens per row; 1 for images."""
        if self.has_images:
            return 1
        return 256 if self.sequence_length is None else self.sequence_length


def load_tuning(
    config: TuningDataConfig, tokenizer: str, seed: int = 0, *, trains: bool = True
) -> Dataset:
    """Opens, and where needed prepares, a dataset; tokenises both splits once.

    Args:
      config: what is read.
      tokenizer: used when `config.tokenizer` is "".
      seed: of the order of the batches.
      trains: otherwise it is only evaluated: the training split, which may be much larger, is
        neither read nor tokenised.

    Raises FileNotFoundError, ImportError or ValueError, each naming field, value and remedy, or
    file and line.
    """
    if config.has_images:
        splits = digits(config.name)
        train, validation = (
            Images(*splits[split], config.batch_size, seed) for split in ("train", "validation")
        )
        size = f"{train.examples} + {validation.examples} images (train + validation)"
        return Dataset(
            train=train,
            validation=validation,
            tokenizer=None,
            vocabulary_size=0,
            description=f"{config.name}: {size}, {len(CLASSES)} classes",
            fingerprint=fingerprint(splits),
            classes=CLASSES,
        )
    pieces = make_tokenizer(config.tokenizer or tokenizer)
    if config.bos and pieces.bos < 0:
        raise ValueError(
            f"data.bos=True: the tokenizer {pieces.identity} has no bos piece; set it False"
        )
    directory = data_directory(config.directory)
    source = open_tuning_source(config, directory)
    names = {"train": config.train_split, "validation": config.validation_split}
    used = names if trains else {"validation": config.validation_split}
    template = (
        chat.chosen(config.template, pieces) if source.has_chats else config.template or "plain"
    )
    options: dict[str, Any] = {"bos": config.bos, "template": template}
    halves = {
        use: tokenized(source, name, pieces, directory, **options) for use, name in used.items()
    }
    parts = {use: _batches(config, split, seed) for use, split in halves.items()}
    first = parts["train" if trains else "validation"]
    if trains and first.examples == 0:
        first.batch(0)  # raises
    sizes = " + ".join(f"{len(split.tokens):,}" for split in halves.values())
    rows = f"{first.examples} rows" if isinstance(first, Rows) else config.packing or "pack"
    if isinstance(first, Rows) and first.cut:
        rows += f" ({first.cut} cut to data.sequence_length={config.length})"
    if template != "plain":
        out = chat.spelled(template, pieces)
        rows += f", template {template}" + (f" ({', '.join(out)} spelled out)" if out else "")
    return Dataset(
        train=parts.get("train"),
        validation=parts["validation"],
        tokenizer=pieces,
        vocabulary_size=pieces.vocabulary_size,
        description=f"{source.name}: {sizes} tokens ({' + '.join(halves)}), {pieces.identity}, "
        f"{rows}",
        fingerprint="/".join(split.fingerprint for split in halves.values()),
        classes=source.classes,
    )


def _batches(config: TuningDataConfig, half, seed: int):
    arguments = (half, config.batch_size, config.length, seed)
    if config.task == "language_modelling":
        return Batches(*arguments, config.packing or "pack")
    return (Instructions if config.task == "instruction" else Labelled)(*arguments)


def open_tuning_source(config: TuningDataConfig, directory: str) -> Source:
    """The documents that `config.name` stands for."""
    keys = {field: getattr(config, field) for field in KEYS[config.task]}
    if config.is_jsonl:
        return jsonl_source(config.name, keys, config.validation)
    if config.name == "documentation":
        return documentation_source(directory)
    if config.name == "stdlib":
        from experiments.data.stdlib import stdlib_source

        return stdlib_source(directory)
    if config.name.startswith(("/", ".", "~")) or "://" in config.name:
        prepared = os.path.isfile(
            os.path.join(os.path.expanduser(config.name), "dataset_info.json")
        )
        if prepared or "://" in config.name:
            return builder_source(directory_builder(config.name), keys)
        if config.task != "language_modelling":
            raise ValueError(
                f"data.name={config.name!r}: a folder holds plain text; give a .jsonl file or a "
                f"prepared TFDS dataset for data.task={config.task!r}"
            )
        return folder_source(config.name, config.file_pattern)
    return builder_source(named_builder(config.name, directory), keys)
