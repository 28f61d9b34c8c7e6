"""Shardings of optimizer state that follow from the parameters' shardings, on explicit and on auto
meshes.

An explicit mesh carries shardings in array types: state is born with the right one, and
decompositions see whole matrices because their input is resharded first. An auto mesh leaves them
to the compiler, and `state_shardings` gives `jax.jit` the same answer from outside. Where other
libraries say pjit, this is `jax.jit` with shardings.

One rule places everything: batch axes keep their sharding, the kept dimension `k` keeps its own,
the rank `r` and the shrunk dimension of a basis are whole.
"""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

Spec = tuple

# The mesh of `meshes.use`: what an auto mesh's arrays do not say while they are traced.
current_mesh: contextvars.ContextVar[Any] = contextvars.ContextVar("current_mesh", default=None)
# Of `meshes.use(mesh, parameters=...)`: path -> partition entries of the parameter, one for each
# axis.
current_specs: contextvars.ContextVar[dict[str, Spec] | None] = contextvars.ContextVar(
    "current_specs", default=None
)
# Of the rules of `meshes.use`: partition entries of the first axes of activations.
current_rows: contextvars.ContextVar[Spec | None] = contextvars.ContextVar(
    "current_rows", default=None
)


def _pad(spec: Any, ndim: int) -> Spec:
    entries = tuple(spec)
    return entries + (None,) * (ndim - len(entries))


def codes_of(x: Any) -> Any:
    """x; of a quantised array, or of one of shardings or specs, that of the codes: as they lie it
    lies."""
    return next(iter(jax.tree.leaves(x)), None) if hasattr(x, "dequantize") else x


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


def even(mesh: Any, shape: tuple[int, ...], spec: Any) -> PartitionSpec:
    """The entries that divide an axis of `shape` evenly on this mesh; along others, None."""
    return PartitionSpec(
        *(None if n % parts(entry, mesh) else entry for n, entry in zip(shape, spec, strict=False))
    )


def reshard(x: jax.Array, spec: Spec | None) -> jax.Array:
    """`x` laid out as `spec` on an explicit mesh; `x` itself where spec is None."""
    if spec is None or explicit_spec(x) == tuple(spec):
        return x
    return jax.sharding.reshard(x, PartitionSpec(*spec))


def divides() -> bool:
    """Whether the program is traced for several devices of an auto mesh, inside `meshes.use`."""
    mesh = current_mesh.get()
    return mesh is not None and mesh.size > 1 and AxisType.Explicit not in mesh.axis_types


def explicit_trace() -> bool:
    """Whether a program is traced for a mesh of explicit axes, which no kernel is divided over."""
    return AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types


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


def batch_axes(spec: Spec | None, axes: int) -> frozenset[str]:
    """Names of the mesh axes over which the first `axes` axes are sharded."""
    entries = () if spec is None else spec[:axes]
    return frozenset(name for entry in entries for name in axis_names_of(entry))


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


def varying(*trees: Any) -> frozenset[str]:
    """The mesh axes of `jax.shard_map` over which any array of the trees, or its shape, varies;
    none outside of it."""
    types = (
        x if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x) for x in jax.tree.leaves(trees)
    )
    kinds = (getattr(kind, "manual_axis_type", None) for kind in types)
    return frozenset(name for kind in kinds if kind is not None for name in kind.varying)


def vary(tree: Any, names: frozenset[str]) -> Any:
    """The same numbers, varying over these mesh axes too, over which the transpose sums
    cotangents."""

    def one(x):
        missing = tuple(sorted(names - varying(x)))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(one, tree)


def varying_alike(*trees: Any) -> Any:
    """The trees, each array varying over the mesh axes over which any of them does.

    For the arguments of a custom VJP inside `jax.shard_map`: cotangents that its backward pass
    makes of all of them then have its arguments' types, and what did not vary gets their sum over
    the devices, as from a product of JAX.
    """
    return vary(trees, varying(trees))


def alike(*functions: Callable[[], Any]) -> tuple[Callable[[], Any], ...]:
    """The functions, each array of a result varying over the mesh axes over which that array of any
    of them does.

    For the branches of a cond inside `jax.shard_map`, one of which returns what it has read and
    another a constant.
    """
    if AxisType.Manual not in jax.sharding.get_abstract_mesh().axis_types:
        return functions
    results = [jax.eval_shape(function) for function in functions]
    names = jax.tree.map(varying, *results)
    return tuple(
        lambda function=function: jax.tree.map(vary, function(), names) for function in functions
    )


def everywhere(ok: jax.Array, *own: Any) -> jax.Array:
    """Whether `ok` on every device along the mesh axes over which it varies and the trees `own` do
    not."""
    names = tuple(sorted(varying(ok) - varying(own)))
    return jax.lax.pmin(ok.astype(jnp.int32), names) > 0 if names else ok


def scan(body: Callable, start: Any, parts: Any) -> Any:
    """`jax.lax.scan`, whose carry varies over mesh axes from the start where it does after a
    step."""
    if AxisType.Manual in jax.sharding.get_abstract_mesh().axis_types:
        first = jax.tree.map(lambda x: x[0], parts)
        after = jax.eval_shape(body, start, first)[0]
        start = jax.tree.map(lambda x, made: vary(x, varying(made)), start, after)
    return jax.lax.scan(body, start, parts)


def low_spec(spec: Spec | None) -> Spec | None:
    """Entries of a low-rank object `(batch..., r, k)` from those of its oriented matrix
    `(batch..., s, k)`."""
    return None if spec is None else (*spec[:-2], None, spec[-1])


def whole_spec(spec: Spec | None) -> Spec | None:
    """Entries of an object whose last two axes are whole, such as a basis or the input of a
    decomposition."""
    return None if spec is None else (*spec[:-2], None, None)
