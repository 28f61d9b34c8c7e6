"""The run folder: who writes to it, whose run it is, and what is known before any work."""

import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
import secrets
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import flax
import jax
import numpy as np
import optax
import orbax.checkpoint as ocp

import lowrank_jax.version
from experiments.data import Dataset, load
from experiments.harness import checkpoint, distributed, history, metrics, runs
from experiments.harness.versions import present_keys
from experiments.settings import configuration
from experiments.settings.configuration import RunConfig
from experiments.settings.sections import ConfigurationError
from lowrank_jax.interop import documents
from lowrank_jax.interop.documents import DocumentError

# A resumed run may change these: they alter no update and no figure, but "forgetting" whether some
# are measured.
WATCHING: dict[str, tuple[str, ...]] = {
    "name": (),
    # other devices add up the same numbers
    "mesh": ("data", "fsdp", "sequence", "tensor", "spread", "explicit"),
    "checkpoint": ("every", "keep", "verify"),
    "run": (
        "log_every",
        "tensorboard",
        "profile_steps",
        "compile_cache",
        "forgetting",
        "sample_tokens",
        "sample_prompt",
        "temperature",
    ),
}

# Sections of config.json, which a run writes whole; runs of before meshes have no mesh.
_SECTIONS = ("data", "optimizer", "schedule", "checkpoint", "run")
_TRAINED = {"name": str, "model": dict, "mesh?": dict} | dict.fromkeys(_SECTIONS, dict)
_TUNED = {"name": str, "base": dict, "adapter": dict, "mesh?": dict} | dict.fromkeys(
    _SECTIONS, dict
)

# Seconds that a shared file system has to show a host what another one wrote.
_SHARED = 10


def as_json(config) -> dict:
    """The configuration as JSON gives it back (tuples are lists)."""
    values = (
        configuration.to_dict(config)
        if isinstance(config, RunConfig)
        else dataclasses.asdict(config)
    )
    return json.loads(json.dumps(values))


def decisive(values: dict) -> dict:
    """{"section.key": value} of what decides a run's numbers: all but WATCHING."""
    flat: dict[str, Any] = {}
    for section, table in values.items():
        if isinstance(table, dict):
            flat |= {
                f"{section}.{key}": value
                for key, value in table.items()
                if key not in WATCHING.get(section, ())
            }
        elif section not in WATCHING:
            flat[section] = table
    return flat


def check_processes(config, workdir: pathlib.Path) -> None:
    """ConfigurationError unless all processes have the same configuration and see one folder.

    The lead, which holds the lock, writes a word into its file, and the others look for it.
    """
    now = as_json(config)
    word = secrets.token_hex(8)  # new in every run, so that an older one is not taken for it
    there, word = distributed.by_lead(lambda: [now, word], ConfigurationError)
    with distributed.together(ConfigurationError):
        for section in sorted(there.keys() | now.keys()):
            if there.get(section) != now.get(section):
                raise ConfigurationError(
                    f"{section}={now.get(section)!r}: process 0 was given {there.get(section)!r}; "
                    "start all processes with the same flags"
                )
        if distributed.leads():
            (workdir / ".lock").write_text(word)
    # the others wait for the word, as long as a shared file system may take
    with distributed.together(ConfigurationError):
        end = time.monotonic() + _SHARED
        while not (workdir / ".lock").is_file() or (workdir / ".lock").read_text() != word:
            if time.monotonic() > end:
                raise ConfigurationError(
                    f"workdir={str(workdir)!r}: what process 0 writes there is not seen by the "
                    "others; give a folder that all hosts share"
                )
            time.sleep(0.1)


@contextlib.contextmanager
def locked(workdir: pathlib.Path) -> Iterator[None]:
    """Hold the folder until the process ends, however it ends.

    ConfigurationError when another process holds it. Of several processes of one run the lead does.
    """
    if not distributed.leads():
        yield
        return
    with open(workdir / ".lock", "a") as file:
        try:  # the system frees the lock when the process ends
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigurationError(
                f"workdir={str(workdir)!r}: another process trains here; give another folder"
            ) from error
        yield


def over(config, workdir: pathlib.Path, extend: bool = False) -> dict | None:
    """The summary of a run that is over and not extended, or None.

    Reads only. Raises as `claim`.
    """
    if not os.path.exists(workdir / "summary.json"):  # False of a name that is none
        return None
    summary, changed = claim(config, workdir, extend)
    return None if changed else summary


def claim(
    config, workdir: pathlib.Path, extend: bool = False
) -> tuple[dict | None, dict[str, list]]:
    """Compare with the config.json that is there: the summary of a finished run, and changes.

    Args:
      config: of the run that is asked for.
      workdir: its folder.
      extend: accept other values of what an extension may change: {key: [there, here]} of them is
        returned.

    Raises ConfigurationError for another configuration's folder, naming the first difference.
    """
    changed: dict[str, list] = {}
    if (workdir / "config.json").exists():
        there, here = decisive(read_config(workdir)), decisive(as_json(config))
        for key in sorted(there.keys() | here.keys()):
            old, new = there.get(key), here.get(key)
            if old == new:  # a key that the older run did not have is None
                continue
            extends = history.may_change(key)
            if extend and extends:
                changed[key] = [old, new]
                continue
            extension = f"--extend to go on with that run under {new!r}, " if extends else ""
            raise ConfigurationError(
                f"{key}={new!r}: {workdir} holds a run with {old!r}; give another --workdir, "
                f"{extension}or --config.{key}={old!r} to resume that run"
            )
    elif any(workdir.glob("checkpoints/*/" + checkpoint.MANIFEST)):
        raise ConfigurationError(
            f"workdir={str(workdir)!r}: holds checkpoints but no config.json; give another folder"
        )
    # damage is found before any work, not when the run is over
    try:
        if (workdir / "metrics.jsonl").exists():
            metrics.read(workdir / "metrics.jsonl")
        runs.read_history(workdir)  # which an extension adds to, and a report tells
        summary = workdir / "summary.json"
        return runs.read_summary(summary) if summary.exists() else None, changed
    except DocumentError as error:
        raise ConfigurationError(f"workdir={str(workdir)!r}: {error}") from error


def write_files(workdir: pathlib.Path, files: dict[str, Any]) -> None:
    """What a run folder holds from the start: {name: JSON, or bytes as they are}."""
    for name, value in files.items():
        if isinstance(value, bytes):
            documents.write(workdir / name, value)
        else:
            checkpoint.write_json(workdir / name, value)


def read_config(workdir: pathlib.Path) -> dict[str, Any]:
    """config.json of a run, with all its sections, by present names.

    Raises ConfigurationError, which names what is wrong in the file.
    """
    path, remedy = workdir / "config.json", "restore it, or give the folder of another run"
    try:
        values = documents.read(path, dict, remedy=remedy)
        shape = _TUNED if "adapter" in values else _TRAINED
        documents.check(values, shape, where=str(path), remedy=remedy)
    except DocumentError as error:
        raise ConfigurationError(str(error)) from error
    return present_keys(values)[0]


class Wish(threading.Event):
    """The wish that the run stops, which waits for a place where the run can save."""

    _raises = False

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside, where there is nothing to save, the wish raises `Stopped` in the main thread.

        Several processes would not stop together by that: there it waits.
        """
        if distributed.joined():
            yield
            return
        if self.is_set():
            raise distributed.Stopped
        self._raises = True
        try:
            yield
        finally:
            self._raises = False

    def express(self) -> None:
        """What a signal does."""
        self.set()
        if self._raises:
            raise distributed.Stopped


@contextlib.contextmanager
def stop_flag(handle_signals: bool) -> Iterator[Wish]:
    """A wish that the first SIGTERM or SIGINT expresses; a second signal acts as it did before."""
    stop = Wish()
    if not handle_signals:
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def handle(number, frame):
        # a second signal of this kind kills, as it would without a run
        signal.signal(number, before[number])
        stop.express()

    try:
        for number in before:
            signal.signal(number, handle)
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def use_compile_cache() -> None:
    """Keep compiled programs in the user's cache folder, unless JAX has a place for them."""
    if getattr(jax.config, "jax_compilation_cache_dir", None) is None:
        base = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(base / "lowrank_jax" / "xla"))


def check_devices(config) -> None:
    """ConfigurationError unless all devices get equally many sequences.

    Of each microbatch, and of an evaluation.
    """
    devices, accumulation = config.mesh.parts(jax.device_count()), config.schedule.accumulation
    batch = config.data.batch_size
    if batch % (devices * accumulation):
        raise ConfigurationError(
            f"data.batch_size={batch}: does not divide over {devices} devices with "
            f"schedule.accumulation={accumulation}; choose a multiple of {devices * accumulation}"
        )
    size = config.run.evaluation_batch_size or batch
    if size % devices:
        raise ConfigurationError(
            f"run.evaluation_batch_size={size}: choose a multiple of the {devices} devices"
        )


def check_disk(workdir: pathlib.Path, state, keep: int) -> None:
    """ConfigurationError when the disk cannot hold `keep` checkpoints and the one being written."""
    needed, free = (keep + 1) * tree_bytes(state), shutil.disk_usage(workdir).free
    # the steps that are there make room before newer ones are written
    present = sum(
        path.stat().st_size for path in (workdir / "checkpoints").rglob("*") if path.is_file()
    )
    if needed > free + present:
        raise ConfigurationError(
            f"workdir={str(workdir)!r}: {keep + 1} checkpoints take "
            f"{metrics.format_bytes(needed)}, the disk has {metrics.format_bytes(free)} left; free "
            "space, lower checkpoint.keep, or give another folder"
        )


def open_dataset(config: RunConfig) -> Dataset:
    """The dataset.

    Whatever is wrong with it, or between it and the model, is a ConfigurationError.
    """
    try:
        dataset = load(config.data, config.run.seed)
    except (ValueError, OSError, ImportError) as error:
        raise ConfigurationError(str(error)) from error
    size, room = dataset.vocabulary_size, config.model.vocabulary_size
    if size > room:
        raise ConfigurationError(
            f"data.tokenizer={config.data.tokenizer!r}: has {size} tokens, the model {room}; set "
            f"model.vocabulary_size={size} or give a smaller tokenizer"
        )
    return dataset


def tree_bytes(tree) -> int:
    """Bytes of the leaves of a tree of arrays or of `jax.ShapeDtypeStruct`.

    >>> tree_bytes({"a": np.zeros((2, 3), np.float32)})
    24
    """
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def versions() -> dict[str, str]:
    """What a number depends on besides the configuration."""
    modules = {"jax": jax, "flax": flax, "optax": optax, "orbax": ocp, "numpy": np}
    return {"lowrank_jax": lowrank_jax.version.__version__} | {
        name: module.__version__ for name, module in modules.items()
    }
