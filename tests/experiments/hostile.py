"""Random damage, by generators with fixed seeds: of checkpoints, of JSON files, and of command
lines.

JSON is damaged so that it shows: a number that became another one is no damage that a file without
a seal could tell.
"""

import contextlib
import io
import json
import random
import shutil
import sys
import warnings

from absl import flags
from absl.testing import flagsaver

from experiments.harness import checkpoint, outputs

_OTHERS = {
    dict: (None, [], "x", 3, True),
    list: (None, {}, "x", 3),
    str: (3, {}, ["x"], True),
    bool: ("x", 2.5, {}),
    int: ("3", True, 2.5, {}, None),
    float: ("3", True, [], {}),
}


def damaged_json(generator: random.Random, text: str, keys: tuple[str, ...]) -> bytes:
    """The text of an object that is no longer one, or lacks one of `keys`, or has it of another
    type."""
    value = json.loads(text)
    key = generator.choice(keys)
    own = value[key]
    kinds = {
        "cut": lambda: text[: generator.randrange(len(text.rstrip()))].encode(),
        "other": lambda: generator.choice(
            [b"", b"[]", b"{}", b"null", b"3", b'"x"', b"[[1]]", b"\0", b"not JSON"]
        ),
        "UTF-16": lambda: text.encode("utf-16"),
        "encoding": lambda: text.encode().replace(b'"', b'"\xff', 1),
        "nesting": lambda: b'{"a":' * 5000,
        "literal": lambda: (
            json.dumps(value | {"further": "@"})
            .replace('"@"', generator.choice(NO_NUMBERS))
            .encode()
        ),
        "twice": lambda: text.rstrip()[:-1].encode() + b"," + json.dumps({key: own})[1:].encode(),
        "lacks": lambda: json.dumps(
            {name: one for name, one in value.items() if name != key}
        ).encode(),
        "type": lambda: json.dumps(value | {key: generator.choice(_OTHERS[type(own)])}).encode(),
        "surrogate": lambda: json.dumps(value | {"further": "\ud800"}).encode(),
    }
    return kinds[generator.choice([*kinds])]()


NO_NUMBERS = ("NaN", "Infinity", "-Infinity", "1e999", "9" * 5000, "undefined", "01")


def damage_checkpoint(generator: random.Random, step) -> str:
    """Damages the folder of one step; says how."""
    kind = generator.choice([*CHECKPOINT])
    CHECKPOINT[kind](generator, step)
    return kind


def _file(generator, step):
    return generator.choice(sorted(path for path in step.rglob("*") if path.is_file()))


def _bit(generator, step):
    path = _file(generator, step)
    data = bytearray(path.read_bytes() or b"\0")
    data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
    path.write_bytes(data)


def _cut(generator, step):
    path = _file(generator, step)
    data = path.read_bytes()
    path.write_bytes(data[: generator.randrange(max(1, len(data)))])


def _longer(generator, step):
    path = _file(generator, step)
    path.write_bytes(path.read_bytes() + generator.randbytes(generator.randint(1, 9)))


def _copied(generator, step):
    path = _file(generator, step)
    path.write_bytes(_file(generator, step).read_bytes())


def _folder(generator, step):
    path = _file(generator, step)
    path.unlink()
    path.mkdir()


def _further(generator, step):
    folders = sorted(path for path in step.rglob("*") if path.is_dir())
    (generator.choice(folders) / generator.choice(["x", ".x", "²", "manifest.json"])).write_bytes(
        b"{}"
    )


def _renamed(generator, step):
    step.rename(
        step.parent
        / generator.choice(["9", "80", "²", "08", "+8", "8.0", "-8", "8e0", "8.orbax-tmp"])
    )


def _moved(generator, step):
    (step / "state").rename(step / generator.choice(["State", "state.old"]))


def _manifest(generator, step):
    path = step / checkpoint.MANIFEST
    keys = ("format", "step", "leaves", "files", "sides", "extra")
    path.write_bytes(damaged_json(generator, path.read_text(), keys))


def _forged(generator, step):
    """A manifest that matches its own digest, but not its folder."""
    path = step / checkpoint.MANIFEST
    values = json.loads(path.read_text())
    del values["digest"]
    leaf = generator.choice(sorted(values["leaves"]))
    shape, dtype = values["leaves"][leaf]
    file = generator.choice(sorted(values["files"]))
    other = {"float32": "float16", "int32": "int64"}.get(dtype, "float32")
    changes = {
        "step": lambda: {"step": generator.choice([9, 0, -1, 2**70])},
        "format": lambda: {"format": generator.choice([0, 2])},
        "files": lambda: {"files": generator.choice([{}, {"../../x": values["files"][file]}])},
        "file": lambda: {
            "files": {name: own for name, own in values["files"].items() if name != file}
        },
        "size": lambda: {"files": values["files"] | {file: {"bytes": -1, "sha256": "0"}}},
        "leaves": lambda: {
            "leaves": generator.choice([{}, {"x": [[1], "float32"]}, {leaf: [shape, "nonsense"]}])
        },
        "dtype": lambda: {"leaves": values["leaves"] | {leaf: [shape, other]}},
        "shape": lambda: {"leaves": values["leaves"] | {leaf: [[*shape, 7], dtype]}},
    }
    values |= changes[generator.choice([*changes])]()
    outputs.write_json(path, {**values, "digest": checkpoint.digest(values)})


CHECKPOINT = {
    "bit": _bit,
    "cut": _cut,
    "longer": _longer,
    "copied": _copied,
    "removed": lambda generator, step: _file(generator, step).unlink(),
    "a folder for a file": _folder,
    "further file": _further,
    "renamed": _renamed,
    "state moved": _moved,
    "manifest": _manifest,
    "forged manifest": _forged,
    "nothing left": lambda generator, step: (shutil.rmtree(step), step.mkdir()),
    "a file for the step": lambda generator, step: (shutil.rmtree(step), step.write_bytes(b"")),
}


def ended(main, arguments, monkeypatch=None) -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of a program in this process.

    Args:
      main: takes the arguments, or, with a monkeypatch, reads `sys.argv` and absl's flags.
      arguments: the command line without the program.
      monkeypatch: of the test.
    """
    out, err = io.StringIO(), io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        if monkeypatch is not None:
            stack.enter_context(flagsaver.flagsaver())
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings(
                "ignore", "the load_module", DeprecationWarning
            )  # of ml_collections
            stack.callback(_forget_flags)
            context = stack.enter_context(monkeypatch.context())
            context.setattr(sys, "argv", ["program", *arguments])
        try:
            code = main() if monkeypatch is not None else main(arguments)
        except SystemExit as error:
            code = error.code
    return code, out.getvalue(), err.getvalue()


def _forget_flags():
    """Those of a configuration file, which the next command line defines anew."""
    for name in [name for name in flags.FLAGS if name == "config" or name.startswith("config.")]:
        delattr(flags.FLAGS, name)


def damaged_run(generator: random.Random, folder) -> None:
    """Damages one of the files of a run folder that say what it is, or its parameters."""
    kinds = {
        "config.json": lambda path: damaged_json(
            generator, path.read_text(), ("name", "optimizer")
        ),
        "metrics.jsonl": lambda path: _damaged_lines(generator, path),
        "summary.json": lambda path: damaged_json(
            generator, path.read_text(), ("status", "steps", "tokens")
        ),
        "ledger.json": lambda path: _damaged_rows(generator, path, ("component",)),
        "history.json": lambda path: _damaged_rows(
            generator, path, ("started_from", "step", "with")
        ),
    }
    name = generator.choice([name for name in kinds if (folder / name).exists()])
    (folder / name).write_bytes(kinds[name](folder / name))


def _damaged_rows(generator, path, keys) -> bytes:
    """An array of two rows, the second damaged."""
    sound = json.dumps(json.loads(path.read_bytes())[0])
    return b"[" + sound.encode() + b"," + damaged_json(generator, sound, keys) + b"]"


def _damaged_lines(generator, path) -> bytes:
    """One line of many damaged."""
    lines = path.read_bytes().splitlines()
    place = generator.randrange(len(lines))
    lines[place] = damaged_json(generator, lines[place].decode(), ("kind", "step"))
    return b"\n".join(lines) + b"\n"


def place(generator: random.Random, folder, *, is_folder: bool) -> str:
    """A path at which no folder, or no file, can be written."""
    (folder / "file").write_text("mine")
    (folder / "nothing").mkdir(exist_ok=True)
    kinds = {
        "another kind": str(folder / ("file" if is_folder else "nothing")),
        "below a file": str(folder / "file" / "below"),
        "a device": "/dev/null",
        "below a device": "/dev/null/x",
        "a long name": str(folder / ("x" * 300)),
        "no disk": "/proc/nothing/here",
    }
    return generator.choice([*kinds.values()])


def misspelt(generator: random.Random, word: str) -> str:
    """The word with one letter less or doubled."""
    place = generator.randrange(len(word))
    return word[:place] + word[place] * generator.choice([0, 2]) + word[place + 1 :]
