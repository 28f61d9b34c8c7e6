"""A split as one flat array of tokens on disk, tokenised once.

Layout of a cached split, a folder made under a temporary name and renamed when whole:

    tokens.bin    all documents, each followed by eos; uint16, or int32 when the vocabulary is larger than 65536
    starts.npy    (documents + 1,) int64: document i is tokens[starts[i]:starts[i + 1]], eos included
    marks.npy     (documents,) int64: of a pair, the number of tokens of its prompt, or of its class; absent for text
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

from experiments.data.sources import Source, exclusive
from lowrank_jax.interop import documents

_INFO = {"tokens": int, "crc32": str, "dtype": str}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizedSplit:
    """tokens: (N,) memory map; starts: (documents + 1,) int64; eos, pad: ids; fingerprint: equal for equal tokens.

    marks: (documents,) int64 of documents that are pairs, see above, else None.
    """

    tokens: np.ndarray
    starts: np.ndarray
    eos: int
    pad: int
    fingerprint: str
    marks: np.ndarray | None = None


def tokenized(source: Source, split: str, tokenizer, directory: str, *, bos: bool = False) -> TokenizedSplit:
    """The tokens of `split`, from `directory/tokens/` or made there now; safe in several processes and to interrupt.

    With `bos`, every document begins with the tokenizer's bos.

    Raises ValueError when the source has no such split, or the split has fewer than two tokens.
    """
    if split.split("[")[0] not in source.splits:
        have = ", ".join(f"{name!r}" for name in source.splits)
        raise ValueError(
            f"split {split!r}: {source.name} has the splits {have}; set data.train_split and data.validation_split "
            "among them, or to a slice such as 'train[:99%]'"
        )
    content = [source.identity, tokenizer.identity, split, *["bos"] * bos]
    key = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
    readable = re.sub(r"[^\w.-]+", "_", f"{source.name}-{split}-{tokenizer.identity}")
    folder = os.path.join(directory, "tokens", f"{readable}-{key}")
    if not os.path.isdir(folder):
        with exclusive(folder + ".lock") as held:
            if held:  # then whoever wrote these was killed
                for leftover in glob.glob(glob.escape(folder) + ".*.incomplete"):
                    shutil.rmtree(leftover)
            if not os.path.isdir(folder):
                _write(source, split, tokenizer, folder, bos)
    info = documents.read(os.path.join(folder, "info.json"), _INFO, remedy=f"delete the folder {folder}")
    if info["dtype"] not in ("uint16", "int32"):
        raise ValueError(f"{folder} holds tokens of type {info['dtype']!r}: delete the folder")
    tokens = np.memmap(os.path.join(folder, "tokens.bin"), dtype=info["dtype"], mode="r")
    if tokens.size != info["tokens"]:
        raise ValueError(f"{folder} holds {tokens.size} tokens in place of {info['tokens']}: delete the folder")
    starts = np.load(os.path.join(folder, "starts.npy"))
    marks = os.path.join(folder, "marks.npy")
    return TokenizedSplit(
        tokens=tokens,
        starts=starts,
        marks=np.load(marks) if os.path.exists(marks) else None,
        eos=tokenizer.eos,
        pad=tokenizer.pad,
        fingerprint=f"{info['tokens']}-{info['crc32']}",
    )


def _write(source, split, tokenizer, folder, bos):
    dtype = np.dtype(np.uint16 if tokenizer.vocabulary_size <= 1 << 16 else np.int32)
    temporary = f"{folder}.{os.getpid()}.incomplete"
    os.makedirs(temporary)
    try:
        starts, marks, checksum = [0], [], 0
        with open(os.path.join(temporary, "tokens.bin"), "wb") as file:
            documents = tqdm(
                source.documents(split), total=source.splits.get(split), desc=f"tokens of {split}", unit="doc"
            )
            for document in documents:
                ids, mark = _encode(document, tokenizer, bos)
                block = ids.astype(dtype).tobytes()
                checksum = zlib.crc32(block, checksum)
                file.write(block)
                starts.append(starts[-1] + len(block) // dtype.itemsize)
                marks.append(mark)
        if starts[-1] < 2:
            raise ValueError(
                f"split {split!r} of {source.name} has {starts[-1]} tokens: too few to predict one from another"
            )
        np.save(os.path.join(temporary, "starts.npy"), np.asarray(starts, np.int64))
        if None not in marks:
            each = np.asarray(marks, np.int64)
            np.save(os.path.join(temporary, "marks.npy"), each)
            checksum = zlib.crc32(each.tobytes(), checksum)
        info = {"tokens": starts[-1], "crc32": f"{checksum:08x}", "dtype": dtype.name}
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


def _encode(document, tokenizer, bos) -> tuple[np.ndarray, int | None]:
    """The ids of a document, eos included, and its mark."""
    first, second = document if isinstance(document, tuple) else (document, None)
    ids = tokenizer.encode(first)
    if bos:
        ids = np.append(tokenizer.bos, ids)
    if isinstance(second, bytes):
        return np.concatenate([ids, tokenizer.encode(second), [tokenizer.eos]]), len(ids)
    return np.append(ids, tokenizer.eos), second
