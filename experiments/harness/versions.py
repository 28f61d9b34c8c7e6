"""What older versions called things: paths of stored states, and keys of configurations.

Two tables, a line a field, and nothing else in the programs knows an older name:

- `CHANGES` says what became of the leaves of an optimizer's state from one format to the next. A
  checkpoint's manifest names the formats that it was written with; where one is older,
  `translation` maps its paths to the present ones and says what fills the fields that are new.
- `KEYS` says which keys of a configuration have another name. A file or a flag that uses an old
  one works, with a `DeprecationWarning` that names the new one; config.json of an old run is read
  in silence.
"""

import dataclasses
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax.adapters import versions as adapter_versions
from lowrank_jax.optim import pair_update
from lowrank_jax.projection import state as projection_state
from lowrank_jax.projection import versions as projection_versions
from lowrank_jax.typing import Kernel

# The formats of the states of this version: {kind: its `format_version`}.
CURRENT = {
    "projection": projection_state.FORMAT_VERSION,
    "pairs": pair_update.FORMAT_VERSION,
    "adapters": adapter_versions.FORMAT_VERSION,
}
# Those of manifests that name none: all that were written before manifests did.
UNNAMED = {"projection": 2, "pairs": 1, "adapters": 1}
# The leaf that says the format, and the one beside it that only a projection's state has.
VERSION, MARK = "format_version", "refreshes"


@dataclasses.dataclass(frozen=True)
class Copy:
    """A new field that begins with the value of another leaf.

    Attributes:
      path: of that leaf, in present names; groups of the field's pattern stand for `\\1`, ...
    """

    path: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Change:
    """What became of the leaves of one kind of state from one format to the next.

    Patterns are regular expressions on whole paths of leaves, "opt_state/0/matrices/.../basis".

    Attributes:
      kind: of state: a key of CURRENT.
      version: the older format; the newer one is its successor.
      renamed: (pattern, replacement) of what has another path, as for `re.sub`; not of a path that
        is wanted as it is, under whose new name nothing is.
      removed: patterns of leaves that are no more, which match whole paths.
      filled: (pattern, value) of leaves that are new: patterns of whole paths in present names, and
        a number, or `Copy` of another leaf.
    """

    kind: str
    version: int
    renamed: tuple[tuple[str, str], ...] = ()
    removed: tuple[str, ...] = ()
    filled: tuple[tuple[str, float | Copy], ...] = ()


# From older to newer; of one kind, in the order of its formats.
CHANGES: tuple[Change, ...] = (
    Change(
        kind="projection",
        version=2,
        renamed=projection_versions.RENAMED,
        filled=projection_versions.FILLED,
    ),
    Change(kind="adapters", version=1, renamed=adapter_versions.RENAMED),
)


@dataclasses.dataclass(frozen=True)
class Translation:
    """How the leaves of a stored tree stand in the present one.

    Attributes:
      sources: {present path: stored path}.
      filled: (pattern, value) of present paths that are not stored, see `Change`.
    """

    sources: Mapping[str, str]
    filled: tuple[tuple[str, float | Copy], ...] = ()

    def fill(self, path: str) -> float | Copy | None:
        """What a leaf begins with that was not stored; None where nothing says so."""
        for pattern, value in self.filled:
            match = re.fullmatch(pattern, path)
            if match is not None:
                return Copy(match.expand(value.path)) if isinstance(value, Copy) else value
        return None

    def table(self, stored: Mapping[str, Any], expected: Mapping[str, Any]) -> dict[str, Any]:
        """The stored entries by present paths; of a leaf that is filled, what is expected."""
        found = {path: stored[source] for path, source in self.sources.items()}
        return found | {
            path: entry
            for path, entry in expected.items()
            if path not in found and self.fill(path) is not None
        }

    def tree(self, read: Callable[[dict[str, Any]], Mapping[str, Any]], like: Mapping[str, Any]):
        """{path: array} of the present tree.

        Args:
          read: `{stored path: leaf of like}` to `{stored path: array}`.
          like: {path: shape, dtype and sharding}, of the leaves that are wanted.
        """
        wanted = {self.sources[path]: leaf for path, leaf in like.items() if path in self.sources}
        arrays = read(wanted)
        found = {path: arrays[self.sources[path]] for path in like if path in self.sources}
        for path, leaf in like.items():
            if path not in found:
                value = self.fill(path)
                value = found[value.path] if isinstance(value, Copy) else value
                found[path] = _like(leaf, value)
            if path.rpartition("/")[2] == VERSION:
                found[path] = _like(leaf, CURRENT[_kind(path, like)])
        return found


def translation(
    stored: Iterable[str],
    formats: Mapping[str, int] | None,
    changes: tuple[Change, ...] | None = None,
    *,
    wanted: Collection[str] = (),
) -> Translation | None:
    """How a tree stored in older formats stands in the present one; None for the present ones.

    Args:
      stored: its paths.
      formats: {kind: format} of its manifest; None is UNNAMED.
      changes: by default CHANGES.
      wanted: the paths of the present tree.
    """
    formats = UNNAMED if formats is None else formats
    older = [
        change
        for change in (CHANGES if changes is None else changes)
        if change.version >= formats.get(change.kind, CURRENT[change.kind])
    ]
    if not older:
        return None
    sources = {path: path for path in stored}
    for change in older:
        sources = {
            _renamed(path, change, wanted): source
            for path, source in sources.items()
            if not any(re.fullmatch(pattern, path) for pattern in change.removed)
        }
    # what a later change fills is looked at first: an earlier name may have moved on
    filled = tuple(entry for change in reversed(older) for entry in change.filled)
    return Translation(sources, filled)


def _renamed(path: str, change: Change, wanted: Collection[str]) -> str:
    for pattern, replacement in change.renamed:
        new = re.sub(pattern, replacement, path)
        path = path if path in wanted and new not in wanted else new
    return path


def _kind(path: str, tree: Mapping[str, Any]) -> str:
    """Which kind of state a leaf VERSION belongs to, by what stands beside it."""
    return "projection" if path.removesuffix(VERSION) + MARK in tree else "pairs"


def _like(leaf: Kernel, value: Any) -> jax.Array:
    """A number, or an array, as `leaf` says: its shape, dtype and sharding."""
    array = jnp.broadcast_to(jnp.asarray(value, leaf.dtype), leaf.shape)
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        return array
    whole = np.asarray(array)
    return jax.make_array_from_callback(leaf.shape, sharding, whole.__getitem__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Key:
    """A key of a configuration that has another name.

    Attributes:
      section: that holds it.
      old, new: its names.
      values: (old value, new value) of those that changed too.
    """

    section: str
    old: str
    new: str
    values: tuple[tuple[Any, Any], ...] = ()


KEYS: tuple[Key, ...] = ()


def present_keys(
    values: Mapping[str, Any], explicit: Collection[str] = ()
) -> tuple[dict[str, Any], list[str]]:
    """A configuration with the present names of its keys, and a note on each that was another.

    Args:
      values: sections, which may use old names. An old name is in no template: who uses it says so,
        and its value is taken.
      explicit: "section.key" of what flags set, which no old name of a file changes.
    """
    found, notes = dict(values), []
    for key in KEYS:
        section = found.get(key.section)
        if not isinstance(section, Mapping) or key.old not in section:
            continue
        old, new = f"{key.section}.{key.old}", f"{key.section}.{key.new}"
        table = {name: value for name, value in section.items() if name != key.old}
        if new not in explicit:
            value = section[key.old]
            table[key.new] = next((now for was, now in key.values if was == value), value)
        found[key.section] = table
        notes.append(f"{old} is {new} now; the old name goes with the next minor version")
    return found, notes


def present_flag(word: str) -> str:
    """A flag `--config.section.key=value` with the present name of its key.

    >>> present_flag("--config.optimizer.rank=4")
    '--config.optimizer.rank=4'
    """
    for key in KEYS:
        pattern = rf"(--?(?:no)?config\.{key.section}\.){key.old}(?==|$)"
        word = re.sub(rf"^{pattern}", rf"\g<1>{key.new}", word)
    return word
