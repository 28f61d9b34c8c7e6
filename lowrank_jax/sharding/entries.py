"""Partition entries, one for each axis of an array: read from shardings, folded, cut, counted."""

from __future__ import annotations

import math
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lowrank_jax.sharding.context import Spec
from lowrank_jax.trees import is_quantized


def _pad(spec: Any, ndim: int) -> Spec:
    entries = tuple(spec)
    return entries + (None,) * (ndim - len(entries))


def codes_of(x: Any) -> Any:
    """x; of a quantised array, or of one of shardings or specs, that of the codes: as they lie it
    lies."""
    return next(iter(jax.tree.leaves(x)), None) if is_quantized(x) else x


def explicit_spec(x: Any) -> Spec | None:
    """The partition entries of an array on an explicit mesh, one for each axis; None elsewhere."""
    x = codes_of(x)
    kind = (
        getattr(x, "sharding", None)
        if isinstance(x, jax.ShapeDtypeStruct)
        else jax.typeof(x).sharding
    )
    return spec_of(kind, len(x.shape)) if is_explicit(kind) else None


def is_explicit(kind: Any) -> bool:
    """Whether a sharding belongs to a mesh with explicit axes."""
    return isinstance(kind, NamedSharding) and AxisType.Explicit in kind.mesh.axis_types


def spec_of(kind: Any, ndim: int) -> Spec:
    """The partition entries of a sharding, one for each axis; a sharding without a spec is
    whole."""
    return _pad(kind.spec, ndim) if isinstance(kind, NamedSharding) else (None,) * ndim


def fold_spec(spec: Spec, *groups: tuple[int, ...]) -> Spec:
    """Partition entries after folding: batch axes one by one, then each other group of axes into
    one.

    A folded dimension is sharded as its first axis is, and whole if a later axis of the group is
    sharded too.
    """
    batch, *folded = groups
    entries = [spec[axis] for axis in batch]
    for group in folded:
        entries.append(spec[group[0]] if all(spec[axis] is None for axis in group[1:]) else None)
    return tuple(entries)


def dividing(entry: Any, mesh: Any) -> tuple[str, ...]:
    """The axes of a partition entry that divide anything on this mesh."""
    return tuple(name for name in axis_names_of(entry) if mesh.shape[name] > 1)


def parts(entry: Any, mesh: Any) -> int:
    """Into how many parts a partition entry divides an axis on this mesh."""
    return math.prod(mesh.shape[name] for name in axis_names_of(entry))


def even(mesh: Any, shape: tuple[int, ...], spec: Any) -> PartitionSpec:
    """The entries that divide an axis of `shape` evenly on this mesh; along others, None."""
    return PartitionSpec(
        *(None if n % parts(entry, mesh) else entry for n, entry in zip(shape, spec, strict=False))
    )


def divides_any(spec: Any) -> bool:
    """Whether any of these partition entries divides an axis on the explicit mesh of the trace."""
    mesh = jax.sharding.get_abstract_mesh()
    return any(dividing(entry, mesh) for entry in spec)


def axis_names_of(entry: Any) -> tuple[str, ...]:
    """The mesh axes of one partition entry, in order."""
    return () if entry is None else (entry if isinstance(entry, tuple) else (entry,))


def _divides(entry, size: int) -> bool:
    mesh = jax.sharding.get_abstract_mesh()
    count = 1
    for name in axis_names_of(entry):
        count *= mesh.shape[name]
    return size % count == 0


def batch_axes(spec: Spec | None, axes: int) -> frozenset[str]:
    """Names of the mesh axes over which the first `axes` axes are sharded."""
    entries = () if spec is None else spec[:axes]
    return frozenset(name for entry in entries for name in axis_names_of(entry))


def low_spec(spec: Spec | None) -> Spec | None:
    """Entries of a low-rank object `(batch..., r, k)` from those of its oriented matrix
    `(batch..., s, k)`."""
    return None if spec is None else (*spec[:-2], None, spec[-1])


def whole_spec(spec: Spec | None) -> Spec | None:
    """Entries of an object whose last two axes are whole, such as a basis or the input of a
    decomposition."""
    return None if spec is None else (*spec[:-2], None, None)
