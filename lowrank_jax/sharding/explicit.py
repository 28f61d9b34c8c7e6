"""Arrays of explicit meshes, whose types carry their shardings: made, reshaped and resharded."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AxisType, PartitionSpec
from jax.typing import DTypeLike

from lowrank_jax.sharding.context import Spec, explicit_trace
from lowrank_jax.sharding.entries import _divides, batch_axes, divides_any, explicit_spec
from lowrank_jax.typing import Pytree, Shape


def reshard(x: Array, spec: Spec | None) -> Array:
    """`x` sharded as `spec` says on an explicit mesh; `x` itself where spec is None."""
    if spec is None or explicit_spec(x) == tuple(spec):
        return x
    return jax.sharding.reshard(x, PartitionSpec(*spec))


def with_out_sharding(function: Callable[..., Array], spec: Spec | None) -> Callable[..., Array]:
    """`function`, whose result is sharded as `spec` says on an explicit mesh.

    Inside, the compiler chooses shardings: for what array types do not follow, scatters and small
    solves of a divided axis. Where spec is None, `function`.
    """
    if spec is None:
        return function
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    axes = tuple(name for name, kind in kinds if kind == AxisType.Explicit)
    return jax.sharding.auto_axes(function, axes=axes, out_sharding=PartitionSpec(*spec))


def match_sharding(x: Array, other: Array) -> Array:
    """`x` with the sharding of `other`, an array of its shape to which it is added."""
    return reshard(x, explicit_spec(other))


def product_spec(x: Array, matrix: Array) -> Spec | None:
    """Partition entries of `x (..., n) @ matrix (n, q)` on an explicit mesh, None elsewhere.

    A sum over a divided axis is unsharded, and an axis of the mesh that x uses stays with x.
    """
    left, right = explicit_spec(x), explicit_spec(matrix)
    if left is None or right is None:
        return None
    of_rows = batch_axes(left, x.ndim - 1)
    of_columns = batch_axes(right[1:], 1)
    columns = right[1] if of_rows.isdisjoint(of_columns) else None
    return (*left[:-1], columns)


def zeros(shape: Shape, dtype: DTypeLike, spec: Spec | None) -> Array:
    """Zeros that have their sharding from the start."""
    if spec is None:
        return jnp.zeros(shape, dtype)
    return jnp.zeros(shape, dtype, out_sharding=PartitionSpec(*spec))


def zeros_like(x: Array | jax.ShapeDtypeStruct) -> Array:
    """Zeros of the shape, the dtype and, on an explicit mesh, the sharding of x."""
    return zeros(x.shape, x.dtype, explicit_spec(x))


def reshape(x: Array, shape: Shape, *, first: int) -> Array:
    """`x.reshape(shape)`, folding or splitting axes from `first` on; shardings survive if they can."""
    spec = explicit_spec(x)
    if spec is None or all(entry is None for entry in spec):
        return x.reshape(shape)
    source, target = list(spec[:first]), list(spec[:first])
    for old, new in _groups(x.shape, shape, first):
        # the first axis of a group keeps its entry where no later one is divided, and where the
        # entry divides both sizes, so that each device has whole blocks of the other shape
        entry = spec[old.start]
        alone = not divides_any(spec[old.start + 1 : old.stop])
        divided = len(old) == 1 or _divides(entry, x.shape[old.start])
        survives = alone and divided and _divides(entry, shape[new.start])
        kept = entry if survives else None
        source += [kept] + [None] * (len(old) - 1)
        target += [kept] + [None] * (len(new) - 1)
    return jax.lax.reshape(reshard(x, tuple(source)), shape, out_sharding=PartitionSpec(*target))


def _groups(old: Shape, new: Shape, first: int) -> Iterator[tuple[range, range]]:
    """The least groups of axes of two shapes with equal products, from axis `first` on."""
    i = j = first
    while i < len(old) and j < len(new):
        a, b = i, j
        left, right = old[i], new[j]
        while left != right:
            if left < right:
                i += 1
                left *= old[i]
            else:
                j += 1
                right *= new[j]
        i, j = i + 1, j + 1
        yield range(a, i), range(b, j)


def mesh_of(tree: Pytree) -> contextlib.AbstractContextManager:
    """A context in which PartitionSpecs mean the explicit mesh of the tree's leaves.

    As inside `jax.set_mesh`; where a mesh is set already, it stays.
    """
    if not jax.sharding.get_abstract_mesh().empty:
        return contextlib.nullcontext()
    for x in jax.tree.leaves(tree):
        if not hasattr(x, "shape") or explicit_spec(x) is None:
            continue
        # a tracer knows its mesh by its type alone
        traced = isinstance(x, jax.core.Tracer)
        mesh = jax.typeof(x).sharding.mesh if traced else x.sharding.mesh
        abstract = isinstance(mesh, jax.sharding.AbstractMesh)
        return jax.sharding.use_abstract_mesh(mesh) if abstract else jax.set_mesh(mesh)
    return contextlib.nullcontext()


def replicate_rest(tree: Pytree) -> Pytree:
    """`tree`, whose leaves that are on no explicit mesh are replicated over the current one.

    The tree itself where the current mesh is not explicit.
    """
    if not explicit_trace():
        return tree

    def replicate(x):
        return reshard(x, (None,) * x.ndim) if explicit_spec(x) is None else x

    return jax.tree.map(replicate, tree)


def over_batch(function: Callable, spec: Spec, axes: int) -> Callable:
    """`function(trees, shared)` on each device's own matrices.

    A `shard_map` over the mesh axes that divide the batch axes. Every leaf of `trees` and of the
    result has the batch axes in front; `shared` holds unsharded arrays. Explicit meshes need it for
    what cannot be batched over a sharded axis: vmap of mixed shardings, QR, Cholesky, slices.
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


def sharded_like(x: Array, old: Array) -> Array:
    """`x` in the type of `old`: its dtype, and on an explicit mesh its sharding.

    Inside `jax.shard_map` it varies where `old` varies.
    """
    x = reshard(x.astype(old.dtype), explicit_spec(old))
    if AxisType.Manual not in jax.sharding.get_abstract_mesh().axis_types:
        return x
    # the same numbers, varying over the mesh axes over which old varies
    return jnp.where(True, x, old)
