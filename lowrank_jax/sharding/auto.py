"""Auto meshes, which leave shardings to the compiler: constraints where it needs them."""

from __future__ import annotations

from typing import Protocol

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lowrank_jax.sharding.context import (
    Spec,
    current_mesh,
    current_partition_specs,
    current_rows,
    divides,
)
from lowrank_jax.sharding.entries import (
    MeshAxes,
    axis_names_of,
    dividing,
    even,
    fold_spec,
    parts,
)
from lowrank_jax.typing import Pytree, Shape


class AxesOfMatrix(Protocol):
    """The axes of a parameter that a view takes as batch, rows and columns."""

    @property
    def batch(self) -> Shape: ...

    @property
    def rows(self) -> Shape: ...

    @property
    def cols(self) -> Shape: ...


def matrix_spec(path: str, view: AxesOfMatrix) -> Spec | None:
    """Partition entries `(rows, cols)` of the parameter at `path`, as a matrix of its view.

    They are what `meshes.use(parameters=)` says. None where it does not, and where batch axes of
    the view are divided, or axes in front that a view of a slice lacks.
    """
    entries = (current_partition_specs.get() or {}).get(path)
    ndim = len(view.batch) + len(view.rows) + len(view.cols)
    if entries is None or len(entries) < ndim:
        return None
    taken = len(entries) - ndim
    *batch, rows, cols = fold_spec(entries[taken:], view.batch, view.rows, view.cols)
    return None if any(batch) or any(entries[:taken]) else (rows, cols)


def for_product(path: str, ndim: int) -> Spec | None:
    """Partition entries of the last `ndim` axes of the parameter at `path` in a product.

    On the auto mesh of `meshes.use` it is gathered over the axes of the mesh that divide rows of
    the batch. None where `meshes.use(parameters=)` does not name the parameter, and where no rule
    divides rows.
    """
    entries = (current_partition_specs.get() or {}).get(path)
    rows = current_rows.get()
    if entries is None or rows is None or len(entries) < ndim:
        return None
    # an axis of the mesh that divides the batch gathers the parameter: that is what FSDP does
    used = {name for entry in rows for name in axis_names_of(entry)}
    names = [axis_names_of(entry) for entry in entries[-ndim:]]
    kept = [tuple(name for name in own if name not in used) for own in names]
    return tuple(own or None for own in kept)


def constrained(tree: Pytree, partition_specs: Pytree) -> Pytree:
    """The arrays of `tree` divided as `partition_specs` say, on the auto mesh of `meshes.use`.

    An axis that the mesh does not divide evenly is unsharded.
    """
    mesh = current_mesh.get()

    def constrain(x, spec):
        sharding = NamedSharding(mesh, even(mesh, x.shape, spec))
        return jax.lax.with_sharding_constraint(x, sharding)

    return jax.tree.map(constrain, tree, partition_specs)


def all_axes(mesh: Mesh) -> tuple[str, ...]:
    """The axes of a mesh that divide anything; columns of a refresh are divided over all of them.

    Those of replicas come first.
    """
    names = dividing(tuple(reversed(mesh.axis_names)), mesh)
    copies = _replicas(mesh)
    return (*copies, *(name for name in names if name not in copies))


def _replicas(mesh: Mesh) -> tuple[str, ...]:
    """The axes that divide none of the parameters of `meshes.use`.

    () where these are not known, and where all axes divide some.
    """
    names = dividing(mesh.axis_names, mesh)
    entries = [entry for spec in (current_partition_specs.get() or {}).values() for entry in spec]
    used = {name for entry in entries for name in axis_names_of(entry)}
    if used.isdisjoint(names):
        return ()
    return tuple(name for name in names if name not in used)


def unshard_rows(x: Array, *, pad: bool = False, k: MeshAxes = None) -> Array:
    """`x (..., s, k)` with s unsharded and k divided over the auto mesh of `meshes.use`.

    Elsewhere `x` itself. What a refresh works on: one all-to-all of a device's share, after which
    transforms along s and Gram matrices of rows send nothing of a matrix's size
    (`python -m experiments.benchmarks.collectives`). Replicas take their part of the columns
    before; left to it, the partitioner may gather the matrix on each device.

    Args:
      x: matrices.
      pad: add columns of zeros up to the next k that the mesh divides; otherwise such an x is
        returned as it is.
      k: the partition entry of k that x has.
    """
    mesh = current_mesh.get()
    if mesh is None or not divides():
        return x
    names, copies = all_axes(mesh), _replicas(mesh)
    missing = -x.shape[-1] % parts(names, mesh)
    if missing and not pad:
        return x
    leading = x.ndim - 1
    if missing:
        x = jnp.pad(x, [(0, 0)] * leading + [(0, missing)])
    if copies:
        # first a slice of what each replica holds, which sends nothing: k stays divided as it is
        first = (*dividing(k, mesh), *copies)
        names = (*first, *(name for name in names if name not in first))
        free = (PartitionSpec.UNCONSTRAINED,) * leading
        sliced = NamedSharding(mesh, PartitionSpec(*free, first))
        x = jax.lax.with_sharding_constraint(x, sliced)
    # then the all-to-all: every device has all rows of its columns
    spec = PartitionSpec(*(None,) * leading, names)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))
