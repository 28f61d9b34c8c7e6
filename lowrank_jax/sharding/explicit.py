"""Arrays of explicit meshes, whose types carry their shardings: placed, made and reshaped so that they keep them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from lowrank_jax.sharding.context import Spec, explicit_trace
from lowrank_jax.sharding.entries import _divides, batch_axes, divides_any, explicit_spec


def reshard(x: jax.Array, spec: Spec | None) -> jax.Array:
    """`x` laid out as `spec` on an explicit mesh; `x` itself where spec is None."""
    if spec is None or explicit_spec(x) == tuple(spec):
        return x
    return jax.sharding.reshard(x, PartitionSpec(*spec))


def placing(function: Callable, spec: Spec | None) -> Callable:
    """`function`, whose result lies as `spec` says: on an explicit mesh the compiler says what lies
    where inside.

    For what array types do not follow, scatters and small solves of a divided axis. Where spec is
    None, `function`.
    """
    if spec is None:
        return function
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(
        name
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == AxisType.Explicit
    )
    return jax.sharding.auto_axes(function, axes=axes, out_sharding=PartitionSpec(*spec))


def beside(x: jax.Array, other: jax.Array) -> jax.Array:
    """`x`, of the shape of `other`, on an explicit mesh laid out as that, to which it is added."""
    return reshard(x, explicit_spec(other))


def product_spec(x: Any, matrix: Any) -> Spec | None:
    """Where `x (..., n) @ matrix (n, q)` lies on an explicit mesh, None elsewhere.

    A sum over a divided axis is whole, and an axis of the mesh that x uses stays with x.
    """
    left, right = explicit_spec(x), explicit_spec(matrix)
    if left is None or right is None:
        return None
    free = batch_axes(left, x.ndim - 1).isdisjoint(batch_axes(right[1:], 1))
    return (*left[:-1], right[1] if free else None)


def zeros(shape: tuple[int, ...], dtype, spec: Spec | None) -> jax.Array:
    """Zeros born with their sharding."""
    return (
        jnp.zeros(shape, dtype)
        if spec is None
        else jnp.zeros(shape, dtype, out_sharding=PartitionSpec(*spec))
    )


def zeros_like(x: Any) -> jax.Array:
    """Zeros of the shape, the dtype and on an explicit mesh the sharding of an array or a
    `jax.ShapeDtypeStruct`."""
    return zeros(x.shape, x.dtype, explicit_spec(x))


def reshape(x: jax.Array, shape: tuple[int, ...], *, first: int) -> jax.Array:
    """`x.reshape(shape)` that folds or splits axes from `first` on and keeps a sharding wherever it
    survives."""
    spec = explicit_spec(x)
    if spec is None or all(entry is None for entry in spec):
        return x.reshape(shape)
    target = list(spec[:first])
    source = list(spec[:first])
    i = j = first
    while i < x.ndim and j < len(shape):
        left, right, a, b = x.shape[i], shape[j], i, j
        while left != right:
            if left < right:
                i += 1
                left *= x.shape[i]
            else:
                j += 1
                right *= shape[j]
        survives = not divides_any(spec[a + 1 : i + 1]) and (
            a == i or _divides(spec[a], x.shape[a])
        )
        entry = spec[a] if survives and _divides(spec[a], shape[b]) else None
        source += [entry] + [None] * (i - a)
        target += [entry] + [None] * (j - b)
        i, j = i + 1, j + 1
    return jax.lax.reshape(reshard(x, tuple(source)), shape, out_sharding=PartitionSpec(*target))


def mesh_of(tree: Any) -> contextlib.AbstractContextManager:
    """A context in which PartitionSpecs mean the explicit mesh of the tree's leaves, as inside
    `jax.set_mesh`."""
    if jax.sharding.get_abstract_mesh().empty:
        for x in jax.tree.leaves(tree):
            if hasattr(x, "shape") and explicit_spec(x) is not None:
                mesh = (
                    jax.typeof(x).sharding.mesh
                    if isinstance(x, jax.core.Tracer)
                    else x.sharding.mesh
                )
                abstract = isinstance(mesh, jax.sharding.AbstractMesh)
                return jax.sharding.use_abstract_mesh(mesh) if abstract else jax.set_mesh(mesh)
    return contextlib.nullcontext()


def settled(tree: Any) -> Any:
    """`tree` with the leaves that are on no explicit mesh replicated over the current one, if that
    is explicit."""
    if not explicit_trace():
        return tree
    return jax.tree.map(
        lambda x: reshard(x, (None,) * x.ndim) if explicit_spec(x) is None else x, tree
    )


def over_batch(function: Callable, spec: Spec, axes: int) -> Callable:
    """`function(trees, shared)` on each device's own matrices: a `shard_map` over the mesh axes of
    the batch axes.

    Every leaf of `trees` and of the result has the batch axes in front; `shared` holds unsharded
    arrays. Explicit meshes need it for what cannot be batched over a sharded axis: vmap of mixed
    shardings, QR, Cholesky, slices.
    """
    batch = PartitionSpec(*spec[:axes])

    def place(x):
        own = explicit_spec(x) or (None,) * x.ndim
        return reshard(x, (*spec[:axes], *own[axes:]))

    def run(trees, shared):
        names = set(batch_axes(spec, axes))
        mapped = jax.shard_map(
            function, in_specs=(batch, PartitionSpec()), out_specs=batch, axis_names=names
        )
        return mapped(jax.tree.map(place, trees), shared)

    return run


def like(x: jax.Array, old: jax.Array) -> jax.Array:
    """`x` in the dtype of `old`, and on an explicit mesh in its type: its sharding, and varying
    where `old` varies."""
    x = reshard(x.astype(old.dtype), explicit_spec(old))
    manual = AxisType.Manual in jax.sharding.get_abstract_mesh().axis_types
    return (
        jnp.where(True, x, old) if manual else x
    )  # the same numbers, varying over the mesh axes that old varies over
