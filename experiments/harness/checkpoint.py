"""Checkpoints that are verified before they are believed.

Orbax writes the arrays; this file adds what orbax leaves open: a flipped bit, an empty step folder
or a changed dtype would be restored in silence. One step is one folder:

    checkpoints/120/state/          orbax: a flat dictionary {"params/embed/embedding": array, ...}
    checkpoints/120/manifest.json   written last: format, leaves (path, shape, dtype), sha256 of the
                                    files

A folder without a manifest was never finished and counts for nothing. Whatever disagrees within a
step is damage: its folder's name, the manifest's step and the state's own counter, the files and
their contents, the shapes and dtypes of the leaves and of what orbax stored. The newest step that
verifies is restored and the newer ones are reported. Leaves that disagree with the model or the
optimizer at hand are an error, because falling back would not help. Where the manifest names older
formats of the optimizer's state, its leaves are read by their old paths (`versions.py`).

A full disk does not stop a run: the unfinished step is removed, the last good ones stay, and the
next save tries again. Only the final save of a run raises.

Several processes write one step together, into a folder that they share. Process 0 makes the
folder, writes the manifest when all have finished, chooses what is restored, and removes; an error
of one is an error of all.
"""

import contextlib
import json
import pathlib
import re
import shutil
import threading
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from experiments.harness import distributed, manifest, outputs, versions
from experiments.harness.manifest import NAME as MANIFEST
from experiments.harness.manifest import digest as digest
from experiments.harness.manifest import stored_sides as stored_sides
from experiments.harness.outputs import write_json as write_json
from lowrank_jax.interop.documents import DocumentError
from lowrank_jax.typing import Pytree


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or none could be restored."""


class MismatchError(CheckpointError):
    """A sound checkpoint of another model or optimizer."""


class DiskFullError(CheckpointError):
    """No space was left for a checkpoint."""


class Restored(NamedTuple):
    """step: updates done. tree: arrays as in `like`. extra: what `save` was given."""

    step: int
    tree: Pytree
    extra: dict


def leaf_table(tree) -> dict[str, tuple[tuple[int, ...], str]]:
    """{path: (shape, dtype)} of the leaves of a tree of arrays or of `jax.ShapeDtypeStruct`.

    >>> leaf_table({"layer": {"kernel": np.zeros((2, 3), np.float32)}})
    {'layer/kernel': ((2, 3), 'float32')}
    """
    return {path: (tuple(leaf.shape), str(leaf.dtype)) for path, leaf in _flatten(tree).items()}


def _flatten(tree) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    table = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    if len(table) != len(leaves):
        raise CheckpointError("two leaves have the same path: rename a key that contains '/'")
    return table


def _is_disk_full(error: BaseException) -> bool:
    """Orbax reports a full disk as OSError, or as ValueError with tensorstore's text."""
    if outputs.is_full(error):
        return True
    return (
        re.search(
            r"No space left on device|Disk quota exceeded|os_error_code='(28|122)'", str(error)
        )
        is not None
    )


def _show(leaf: tuple[tuple[int, ...], str] | None) -> str:
    return "absent" if leaf is None else f"{leaf[1]}{list(leaf[0])}"


def _empty(leaf) -> jax.Array:
    """An array of size zero, on the devices of `leaf`."""
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        return jnp.zeros(leaf.shape, leaf.dtype)
    return jax.make_array_from_callback(
        leaf.shape, sharding, np.zeros(leaf.shape, leaf.dtype).__getitem__
    )


def _remove(folder: pathlib.Path) -> None:
    """The manifest goes first, so that a folder half removed counts as never finished."""
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


class Checkpoints:
    """The checkpoints of one run: one writer, `keep` finished steps.

    Args:
      directory: the `checkpoints` folder; made when missing.
      keep: how many verified steps stay; older ones are removed after a newer one is finished.
      verify: compare checksums when restoring.
      config_digest: stored in the manifest.
      sides: {path: [side, rank]} of the projected matrices, stored in the manifest; a checkpoint
        with others is refused, because a square matrix projected from its other side has the same
        shapes.
      meaning: {section: {key: value}} of the configuration without which the arrays mean nothing,
        such as how many heads share a kernel; stored in the manifest, and a checkpoint with another
        value is refused.
      say: receives one line per event (a step passed over, a save that failed).
    """

    def __init__(
        self,
        directory,
        *,
        keep: int = 2,
        verify: bool = True,
        config_digest: str = "",
        sides: Mapping | None = None,
        meaning: Mapping[str, Mapping] | None = None,
        say: Callable[[str], None] = print,
    ):
        if keep < 1:
            raise ValueError(
                f"checkpoint.keep={keep}: keep at least 1, or there is nothing to resume from"
            )
        self.directory = pathlib.Path(directory).absolute()
        self.keep, self.verify, self.config_digest, self.say = keep, verify, config_digest, say
        self.sides = {path: list(side) for path, side in (sides or {}).items()}
        self.meaning = json.loads(json.dumps(meaning or {}))
        self._writer = ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler())
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._finished: int | None = None  # the last step that all processes have written
        self._written: int | None = None  # and the last one that this process has
        self._is_lead = distributed.leads()
        self.directory.mkdir(parents=True, exist_ok=True)

    def steps(self) -> list[int]:
        """Steps with a folder, newest first, finished or not."""
        return manifest.steps(self.directory)

    def save(self, step: int, tree, extra: Mapping | None = None) -> None:
        """Begin to write `tree`; its buffers may be donated once this returns.

        Leaves of size zero, which orbax refuses, are in the manifest alone. Raises what went wrong
        with the save before.
        """
        self.wait()
        if step == self._finished:
            return
        leaves = {path: leaf for path, leaf in _flatten(tree).items() if leaf.size}
        table = leaf_table(tree)  # all leaves, those of size zero too
        folder = self.directory / str(step)
        try:
            with distributed.together(CheckpointError):
                if self._is_lead:
                    _remove(folder)
                    folder.mkdir()
            with distributed.together(CheckpointError):
                self._writer.save(folder / manifest.STATE, args=ocp.args.StandardSave(leaves))
        except Exception as error:
            self._fail(step, error)
            self._raise()
        # the values are on the host: the rest happens beside the training
        self._thread = threading.Thread(
            target=self._finish, args=(step, table, dict(extra or {})), name=f"checkpoint {step}"
        )
        self._thread.start()

    def wait(self) -> None:
        """Block until the save in progress is finished or has failed; raises in the latter case."""
        if self._thread is not None:
            thread, self._thread = self._thread, None
            thread.join()
            try:
                with distributed.together(CheckpointError):
                    self._raise()
            except CheckpointError:
                if self._is_lead and self._written is not None:  # another process failed
                    _remove(self.directory / str(self._written))
                self._written = None
                raise
            self._finished, self._written = self._written, None
        self._raise()

    def close(self) -> None:
        """Wait, and let go of orbax's threads."""
        try:
            self.wait()
        finally:
            with contextlib.suppress(Exception):  # orbax raises again what `wait` has told
                self._writer.close()

    def restore(
        self,
        like,
        *,
        partial: bool = False,
        check: Callable[[Restored], str | None] = lambda restored: None,
    ) -> Restored | None:
        """The newest good step in the structure of `like`, or None when nothing was ever finished.

        Args:
          like: tree of `jax.ShapeDtypeStruct`, with shardings, or of arrays.
          partial: `like` holds some of the leaves, such as {"params": ...}; the others and the
            sides are not compared, and not read but for their checksums.
          check: says what is wrong with a step that was read, None when nothing is; also damage.

        Raises:
          MismatchError: a leaf is missing, superfluous, or of another shape or dtype; names the
            first one.
          CheckpointError: checkpoints exist and none of them verifies.
        """
        damaged: list[int] = []
        while True:
            choose = lambda: self._choose(leaf_table(like), partial, damaged)  # noqa: E731
            chosen = distributed.by_lead(choose, CheckpointError)
            if chosen is None:
                return None
            # all processes read the same step, and all pass it over when one cannot
            step, extra, older = chosen
            folder = self.directory / str(step)
            restored, problem = self._read_arrays(folder, like, partial, extra, older)
            problem = check(restored) if restored is not None else problem
            problem = next((text for text in distributed.exchange(problem or "") if text), None)
            if restored is not None and problem is None:
                return restored
            self.say(f"checkpoint {folder}: damaged, {problem}; passed over")
            damaged.append(step)

    def _read_arrays(
        self, folder, like, partial, extra, older
    ) -> tuple[Restored | None, str | None]:
        """(What the step holds, None), or (None, why it cannot be read)."""
        try:
            tree = self._load(folder, like, partial, older)
            return Restored(int(folder.name), tree, extra), None
        except (MemoryError, jax.errors.JaxRuntimeError):  # of this machine, not of the files
            raise
        except Exception as error:
            return None, f"orbax cannot read it: {error}"

    def _choose(
        self, expected: Mapping, partial: bool, damaged: list[int]
    ) -> tuple[int, dict, list | None] | None:
        """The newest good step older than the `damaged` ones, with what was saved beside it.

        Of a step in older formats also its (paths, formats). Adds to `damaged`.
        """
        for folder in [] if damaged else manifest.strays(self.directory):
            self.say(f"checkpoint {folder}: its name is no step's; passed over")
        for step in [step for step in self.steps() if not damaged or step < min(damaged)]:
            folder = self.directory / str(step)
            if not (folder / MANIFEST).exists():
                self.say(f"checkpoint {folder}: never finished (no {MANIFEST}); passed over")
                continue
            try:
                values = manifest.read(folder)
                problem = manifest.problem(folder, values, self._stored, self.verify)
            except DocumentError as error:
                problem = str(error)
            if problem is None:
                self._compare(folder, values, expected, partial)
                paths, formats = [*values["leaves"]], values.get("states")
                is_older = versions.translation(paths, formats) is not None
                return step, values["extra"], [paths, formats] if is_older else None
            self.say(f"checkpoint {folder}: damaged, {problem}; passed over")
            damaged.append(step)
        if damaged:
            raise CheckpointError(
                f"no checkpoint in {self.directory} verifies (damaged: {damaged}): restore a "
                "backup, or remove the folder to start over"
            )
        return None

    def _stored(self, folder: pathlib.Path) -> Mapping[str, Any]:
        """Metadata of the arrays that orbax stored, by path."""
        return self._writer.metadata(folder / manifest.STATE).item_metadata.tree

    def _load(self, folder, like, partial, older=None):
        flat = _flatten(like)
        translated = None if older is None else versions.translation(*older, wanted=flat)
        if translated is not None:
            leaves = translated.tree(lambda wanted: self._arrays(folder, wanted, True), flat)
        else:
            leaves = self._arrays(folder, flat, partial)
        return jax.tree.unflatten(jax.tree.structure(like), [leaves[path] for path in flat])

    def _arrays(self, folder, flat: Mapping[str, Any], partial: bool) -> dict[str, Any]:
        """{path: array} of the leaves that a step stores under these paths."""
        sharding_of = lambda leaf: getattr(leaf, "sharding", None)  # noqa: E731
        target = {
            path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding_of(leaf))
            for path, leaf in flat.items()
            if leaf.size
        }
        if partial:  # the other leaves are not read
            reader = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
            each = ocp.checkpoint_utils.construct_restore_args(target)
            options = ocp.args.PyTreeRestore(target, restore_args=each, partial_restore=True)
            found = reader.restore(folder / manifest.STATE, args=options)
        else:
            found = self._writer.restore(
                folder / manifest.STATE, args=ocp.args.StandardRestore(target)
            )
        return {path: found[path] if leaf.size else _empty(leaf) for path, leaf in flat.items()}

    def _compare(self, folder, values: Mapping, expected: Mapping, partial: bool) -> None:
        for kind, number in values.get("states", {}).items():
            if not partial and number > versions.CURRENT.get(kind, 0):
                raise MismatchError(
                    f"checkpoint {folder} holds {kind} states of format {number}, this version "
                    f"reads {versions.CURRENT.get(kind, 0)}: go on with the version that wrote it"
                )
        stored = manifest.table(values)
        translated = versions.translation(stored, values.get("states"), wanted=expected)
        if translated is not None:
            stored = translated.table(stored, expected)
        stored = {path: leaf for path, leaf in stored.items() if path in expected or not partial}
        for path in [*expected, *stored]:
            if stored.get(path) != expected.get(path):
                raise MismatchError(
                    f"checkpoint {folder} belongs to another model or optimizer: leaf {path} is "
                    f"{_show(stored.get(path))} there and {_show(expected.get(path))} here. Give "
                    "the configuration it was written with, or another workdir"
                )
        for path in [] if partial else [*self.sides, *values["sides"]]:
            there, here = values["sides"].get(path), self.sides.get(path)
            if there != here:
                raise MismatchError(
                    f"checkpoint {folder} projects {path} by (side, rank) = {there}, this program "
                    f"by {here}. Set the side of that view, or give another workdir"
                )
        meaning, _ = versions.present_keys(values.get("meaning", {}))  # older manifests have none
        for section, entries in meaning.items():
            own = self.meaning.get(section, {})
            for key in entries.keys() & own.keys():
                if entries[key] != own[key]:
                    raise MismatchError(
                        f"checkpoint {folder} was written with {section}.{key}={entries[key]!r}, "
                        f"the configuration now says {own[key]!r}: restore config.json, or give "
                        "another workdir"
                    )

    def _finish(self, step, table, extra) -> None:
        folder = self.directory / str(step)
        try:
            self._writer.wait_until_finished()
            if self._is_lead:
                own = {
                    "config_digest": self.config_digest,
                    "sides": self.sides,
                    "meaning": self.meaning,
                    "states": versions.CURRENT,
                }
                manifest.write(folder, step, table, own | {"extra": extra})
                self._prune(step)
            self._written = step
        except BaseException as error:  # kept for the next wait(): a thread has nobody to raise to
            self._fail(step, error)

    def _prune(self, newest: int) -> None:
        """Keep `keep` finished steps up to `newest`; unfinished older ones go too."""
        # a newer step than this one is damaged, and kept for whoever wants to look at it
        older = [step for step in self.steps() if step <= newest]
        finished = [step for step in older if (self.directory / str(step) / MANIFEST).exists()]
        for step in older:
            if step not in finished[: self.keep]:
                _remove(self.directory / str(step))

    def _fail(self, step, error) -> None:
        if self._is_lead:
            _remove(self.directory / str(step))
        where = f"checkpoint of step {step} in {self.directory}"
        kept = [kept for kept in self.steps() if (self.directory / str(kept) / MANIFEST).exists()]
        last = f"the last good step is {kept[0]}" if kept else "there is no earlier one"
        if _is_disk_full(error):
            message = (
                f"{where} was not written, the disk is full ({last}): free space there, or lower "
                "checkpoint.keep"
            )
            self._error = DiskFullError(message)
        else:
            self._error = CheckpointError(
                f"{where} was not written ({last}): {type(error).__name__}: {error}"
            )
        self._error.__cause__ = error

    def _raise(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            raise error
