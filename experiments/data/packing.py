"""A split as one flat array of tokens on disk, tokenised once.

Layout of a cached split, a folder made under a temporary name and renamed when whole:

    tokens.bin    all documents, each followed by eos; uint16, or int32 when the vocabulary is
                  larger than 65536
    starts.npy    (documents + 1,) int64: document i is tokens[starts[i]:starts[i + 1]], eos
                  included
    marks.npy     (documents,) int64: of a pair, the number of tokens of its prompt, or of its
                  class; absent for text. Of a conversation, the number of tokens before its first
                  reply
    counted.bin   uint8, 1 for each token that has a loss; absent where they are all those behind
                  the marks
    info.json     number of tokens, CRC-32 of tokens.bin (and marks), and what they were made from
"""

import dataclasses
import glob
import hashlib
import json
import os
import re
import shutil
import zlib

import numpy as np
from tqdm import tqdm

from experiments.data import chat
from experiments.data.sources import Source, exclusive
from lowrank_jax.interop import documents

_INFO = {"tokens": int, "crc32": str, "dtype": str}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizedSplit:
    """A split as tokens in a file.

    tokens: (N,) memory map; starts: (documents + 1,) int64; eos, pad: ids; fingerprint: equal
    for equal tokens.

    marks: (documents,) int64 of documents that are pairs or conversations, see above, else None.
    counted: (N,) memory map of uint8, see above, else None.
    """

    tokens: np.ndarray
    starts: np.ndarray
    eos: int
    pad: int
    fingerprint: str
    marks: np.ndarray | None = None
    counted: np.ndarray | None = None


def tokenized(
    source: Source,
    split: str,
    tokenizer,
    directory: str,
    *,
    bos: bool = False,
    template: str = "plain",
) -> TokenizedSplit:
    """The tokens of `split`, from `directory/tokens/` or made there now.

    Safe in several processes, and to interrupt. With `bos`, every document begins with the
    tokenizer's bos. Pairs and conversations are put into a template of `experiments.data.chat`.

    Raises ValueError when the source has no such split, or the split has fewer than two tokens.
    """
    if split.split("[")[0] not in source.splits:
        have = ", ".join(f"{name!r}" for name in source.splits)
        raise ValueError(
            f"split {split!r}: {source.name} has the splits {have}; set data.train_split and "
            "data.validation_split among them, or to a slice such as 'train[:99%]'"
        )
    # the folder's name holds a digest of all that decides the tokens
    content = [source.identity, tokenizer.identity, split, *["bos"] * bos]
    content += [] if template == "plain" else [f"template {template}"]
    key = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
    readable = re.sub(r"[^\w.-]+", "_", f"{source.name}-{split}-{tokenizer.identity}")
    folder = os.path.join(directory, "tokens", f"{readable}-{key}")
    if not os.path.isdir(folder):
        with exclusive(folder + ".lock") as held:
            if held:  # then whoever wrote these was killed
                for leftover in glob.glob(glob.escape(folder) + ".*.incomplete"):
                    shutil.rmtree(leftover)
            if not os.path.isdir(folder):  # while this one waited, another may have made it
                encode = lambda document: _encode(document, tokenizer, bos, template)  # noqa: E731
                _write(source, split, folder, encode, tokenizer)
    info = documents.read(
        os.path.join(folder, "info.json"), _INFO, remedy=f"delete the folder {folder}"
    )
    if info["dtype"] not in ("uint16", "int32"):
        raise ValueError(f"{folder} holds tokens of type {info['dtype']!r}: delete the folder")
    # what is there must be what info.json says, before anything is trained on it
    tokens = np.memmap(os.path.join(folder, "tokens.bin"), dtype=info["dtype"], mode="r")
    if tokens.size != info["tokens"]:
        raise ValueError(
            f"{folder} holds {tokens.size} tokens in place of {info['tokens']}: delete the folder"
        )
    starts = np.load(os.path.join(folder, "starts.npy"))
    marks, counted = (os.path.join(folder, name) for name in ("marks.npy", "counted.bin"))
    if os.path.exists(counted) and os.path.getsize(counted) != tokens.size:
        raise ValueError(
            f"{counted} says which of {os.path.getsize(counted)} tokens have a loss: delete the "
            "folder"
        )
    return TokenizedSplit(
        tokens=tokens,
        starts=starts,
        marks=np.load(marks) if os.path.exists(marks) else None,
        counted=np.memmap(counted, np.uint8, mode="r") if os.path.exists(counted) else None,
        eos=tokenizer.eos,
        pad=tokenizer.pad,
        fingerprint=f"{info['tokens']}-{info['crc32']}",
    )


def _write(source, split, folder, encode, tokenizer):
    """Writes the folder of a split; `encode(document)` gives ids, a mark and which have a loss."""
    # in place whole: a folder under its own name is never half written
    temporary = f"{folder}.{os.getpid()}.incomplete"
    os.makedirs(temporary)
    try:
        info = _write_tokens(source, split, temporary, encode, tokenizer.vocabulary_size)
        info |= {"source": source.identity, "split": split, "tokenizer": tokenizer.identity}
        with open(os.path.join(temporary, "info.json"), "w") as file:
            json.dump(info, file)
        try:
            os.rename(temporary, folder)
        except OSError:
            if not os.path.isdir(folder):  # else another process, unseen by the lock, was first
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_tokens(source, split, folder, encode, vocabulary_size: int) -> dict:
    """Writes tokens.bin, starts.npy and, where they say anything, marks.npy and counted.bin.

    Returns what info.json says of them.
    """
    # two bytes a token where all ids fit
    dtype = np.dtype(np.uint16 if vocabulary_size <= 1 << 16 else np.int32)
    starts, marks, checksum, has_gaps = [0], [], 0, False
    names = [os.path.join(folder, name) for name in ("tokens.bin", "counted.bin")]
    with open(names[0], "wb") as file, open(names[1], "wb") as losses:
        documents = tqdm(
            source.documents(split),
            total=source.splits.get(split),
            desc=f"tokens of {split}",
            unit="doc",
        )
        for number, document in enumerate(documents, 1):
            try:
                ids, mark, counted = encode(document)
            except ValueError as error:
                raise ValueError(
                    f"document {number} of the split {split!r} of {source.name}: {error}"
                ) from error
            block = ids.astype(dtype).tobytes()
            checksum = zlib.crc32(block, checksum)
            file.write(block)
            if counted is not None:
                losses.write(counted.astype(np.uint8).tobytes())
                has_gaps |= not counted[mark:].all()
            starts.append(starts[-1] + len(block) // dtype.itemsize)
            marks.append(mark)
    if starts[-1] < 2:
        raise ValueError(
            f"split {split!r} of {source.name} has {starts[-1]} tokens: too few to predict one "
            "from another"
        )
    np.save(os.path.join(folder, "starts.npy"), np.asarray(starts, np.int64))
    if None not in marks:
        each = np.asarray(marks, np.int64)
        np.save(os.path.join(folder, "marks.npy"), each)
        checksum = zlib.crc32(each.tobytes(), checksum)
    if has_gaps:
        with open(names[1], "rb") as losses:
            checksum = zlib.crc32(losses.read(), checksum)
    else:  # the marks say it all
        os.remove(names[1])
    return {"tokens": starts[-1], "crc32": f"{checksum:08x}", "dtype": dtype.name}


def _encode(document, tokenizer, bos, template) -> tuple[np.ndarray, int | None, np.ndarray | None]:
    """The ids of a document, its mark, and which ids have a loss; eos ends texts and classes."""
    first, second = document if isinstance(document, tuple) else (document, None)
    if isinstance(second, bytes):
        document = chat.Conversation((("user", first), ("assistant", second)))
    if not isinstance(document, chat.Conversation):
        ids = np.append(tokenizer.encode(first), tokenizer.eos)
        return np.append(tokenizer.bos, ids) if bos else ids, second, None
    ids, counted = chat.encoded(document, template, tokenizer)
    if bos and ids[0] != tokenizer.bos:  # which some templates begin with
        ids, counted = np.append(tokenizer.bos, ids), np.append(False, counted)
    return ids, int(np.argmax(counted)), counted
