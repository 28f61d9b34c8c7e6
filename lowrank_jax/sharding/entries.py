"""Partition entries, one for each axis of an array: read from shardings, folded, cut, counted."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, TypeAlias

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from lowrank_jax.sharding.context import Spec
from lowrank_jax.trees import is_quantized
from lowrank_jax.typing import Kernel, Shape

MeshAxes: TypeAlias = str | tuple[str, ...] | None
"""One partition entry: the axis or the axes of the mesh that divide one axis of an array."""

AnyMesh: TypeAlias = Mesh | AbstractMesh


def _pad(spec: Iterable[MeshAxes], ndim: int) -> Spec:
    entries = tuple(spec)
    return entries + (None,) * (ndim - len(entries))


def codes_of(x: Any) -> Any:
    """x itself; of a quantised array, or of one of shardings, that of the codes.

    An array is divided as its codes are.
    """
    return next(iter(jax.tree.leaves(x)), None) if is_quantized(x) else x


def explicit_spec(x: Kernel) -> Spec | None:
    """The partition entries of an array on an explicit mesh, one for each axis; None elsewhere."""
    x = codes_of(x)
    abstract = isinstance(x, jax.ShapeDtypeStruct)
    kind = getattr(x, "sharding", None) if abstract else jax.typeof(x).sharding
    return spec_of(kind, len(x.shape)) if is_explicit(kind) else None


def is_explicit(kind: Sharding | None) -> bool:
    """Whether a sharding belongs to a mesh with explicit axes."""
    return isinstance(kind, NamedSharding) and AxisType.Explicit in kind.mesh.axis_types


def spec_of(kind: Sharding | None, ndim: int) -> Spec:
    """The partition entries of a sharding, one for each axis; all None where it has no spec."""
    if not isinstance(kind, NamedSharding):
        return (None,) * ndim
    return _pad(kind.spec, ndim)


def fold_spec(spec: Spec, *groups: tuple[int, ...]) -> Spec:
    """Partition entries after folding: batch axes one by one, then each group of axes into one.

    A folded dimension is sharded as its first axis is, and unsharded if a later axis of the group
    is sharded too.
    """
    batch, *folded = groups
    entries = [spec[axis] for axis in batch]
    for group in folded:
        first, *later = (spec[axis] for axis in group)
        # a block of the first axis is one of the folded dimension only with all of the later ones
        entries.append(first if all(entry is None for entry in later) else None)
    return tuple(entries)


def dividing(entry: MeshAxes, mesh: AnyMesh) -> tuple[str, ...]:
    """The axes of a partition entry that divide anything on this mesh."""
    return tuple(name for name in axis_names_of(entry) if mesh.shape[name] > 1)


def parts(entry: MeshAxes, mesh: AnyMesh) -> int:
    """Into how many parts a partition entry divides an axis on this mesh."""
    return math.prod(mesh.shape[name] for name in axis_names_of(entry))


def even(mesh: AnyMesh, shape: Shape, spec: Iterable[MeshAxes]) -> PartitionSpec:
    """The entries that divide an axis of `shape` evenly on this mesh; along others, None."""
    pairs = zip(shape, spec, strict=False)
    entries = [None if size % parts(entry, mesh) else entry for size, entry in pairs]
    return PartitionSpec(*entries)


def divides_any(spec: Iterable[MeshAxes]) -> bool:
    """Whether any of these partition entries divides an axis on the explicit mesh of the trace."""
    mesh = jax.sharding.get_abstract_mesh()
    return any(dividing(entry, mesh) for entry in spec)


def axis_names_of(entry: MeshAxes) -> tuple[str, ...]:
    """The mesh axes of one partition entry, in order."""
    if entry is None:
        return ()
    return entry if isinstance(entry, tuple) else (entry,)


def _divides(entry: MeshAxes, size: int) -> bool:
    """Whether an entry divides so many evenly on the explicit mesh of the trace."""
    return size % parts(entry, jax.sharding.get_abstract_mesh()) == 0


def batch_axes(spec: Spec | None, axes: int) -> frozenset[str]:
    """Names of the mesh axes over which the first `axes` axes are sharded."""
    entries = () if spec is None else spec[:axes]
    return frozenset(name for entry in entries for name in axis_names_of(entry))


def low_spec(spec: Spec | None) -> Spec | None:
    """Entries of `(batch..., r, k)` from those of its oriented matrix `(batch..., s, k)`."""
    return None if spec is None else (*spec[:-2], None, spec[-1])


def unsharded_spec(spec: Spec | None) -> Spec | None:
    """Entries of an array whose last two axes are unsharded, such as a decomposition's input."""
    return None if spec is None else (*spec[:-2], None, None)
