"""Auto meshes, which leave shardings to the compiler: constraints where it needs to be told."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from lowrank_jax.sharding.context import Spec, current_mesh, current_rows, current_specs, divides
from lowrank_jax.sharding.entries import axis_names_of, dividing, even, fold_spec, parts


def matrix_spec(path: str, view: Any) -> Spec | None:
    """Partition entries `(rows, cols)` of the parameter at `path`, as `meshes.use(parameters=)`
    knows it.

    None where it does not, and where batch axes of the view are divided.
    """
    entries = (current_specs.get() or {}).get(path)
    if entries is None or len(entries) != len(view.batch) + len(view.rows) + len(view.cols):
        return None
    *batch, rows, cols = fold_spec(entries, view.batch, view.rows, view.cols)
    return None if any(batch) else (rows, cols)


def for_product(path: str, ndim: int) -> Spec | None:
    """How the last `ndim` axes of the parameter at `path` lie in a product on the auto mesh of
    `meshes.use`.

    Gathered over the axes of the mesh that divide rows of the batch. None where
    `meshes.use(parameters=)` does not say how it lies, and where no rule says how rows do.
    """
    entries, rows = (current_specs.get() or {}).get(path), current_rows.get()
    if entries is None or rows is None or len(entries) < ndim:
        return None
    used = {name for entry in rows for name in axis_names_of(entry)}
    kept = (
        tuple(name for name in axis_names_of(entry) if name not in used)
        for entry in entries[-ndim:]
    )
    return tuple(names or None for names in kept)


def constrained(tree: Any, specs: Any) -> Any:
    """The arrays of `tree` where `specs` say, on the auto mesh of `meshes.use`; whole along what it
    does not divide."""
    mesh = current_mesh.get()
    place = lambda x, spec: NamedSharding(mesh, even(mesh, x.shape, spec))  # noqa: E731
    return jax.tree.map(
        lambda x, spec: jax.lax.with_sharding_constraint(x, place(x, spec)), tree, specs
    )


def all_axes(mesh: Any) -> tuple[str, ...]:
    """The axes of a mesh that divide anything, over all of which rows of a refresh lie; those of
    replicas first."""
    names, copies = dividing(tuple(reversed(mesh.axis_names)), mesh), _replicas(mesh)
    return (*copies, *(name for name in names if name not in copies))


def _replicas(mesh: Any) -> tuple[str, ...]:
    """The axes that divide none of the parameters of `meshes.use`; () where these are not known,
    and where all do."""
    names, specs = dividing(mesh.axis_names, mesh), current_specs.get() or {}
    used = {
        name for entries in specs.values() for entry in entries for name in axis_names_of(entry)
    }
    return tuple(name for name in names if name not in used) if used.intersection(names) else ()


def rows_whole(x: jax.Array, *, pad: bool = False, k: Any = None) -> jax.Array:
    """`x (..., s, k)` with s whole and k divided over the auto mesh of `meshes.use`; `x` itself
    elsewhere.

    What a refresh works on: one all-to-all of a device's share, after which transforms along s and
    Gram matrices of rows send nothing of a matrix's size
    (`python -m experiments.benchmarks.collectives`). Replicas take their part of the columns
    before; left to it, the partitioner may gather the whole matrix on each device.

    Args:
      x: matrices.
      pad: add columns of zeros up to the next k that the mesh divides; otherwise such an x stays as
        it lies.
      k: the partition entry of k as x lies.
    """
    mesh = current_mesh.get()
    if mesh is None or not divides():
        return x
    names, copies = all_axes(mesh), _replicas(mesh)
    missing = -x.shape[-1] % parts(names, mesh)
    if missing and not pad:
        return x
    if missing:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)])
    if copies:
        first = (*dividing(k, mesh), *copies)
        names = (*first, *(name for name in names if name not in first))
        free = (PartitionSpec.UNCONSTRAINED,) * (x.ndim - 1)
        x = jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*free, first)))
    spec = PartitionSpec(*(None,) * (x.ndim - 1), names)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))
