"""Meshes of four named axes, and the rules that divide parameters and activations over them.

    mesh = meshes.make_mesh(fsdp=4, tensor=2)
    placed = meshes.shardings(params, table, mesh)           NamedShardings, a tree like params
    state = lrx.state_shardings(tx, params, placed)           those of the optimizer follow
    step = jax.jit(step, in_shardings=(placed, state, rows), out_shardings=(placed, state),
    donate_argnums=(0, 1))

`jax.jit` with shardings and donation is what pjit is today; there is no other function to call.

A table names the axes of a model's leaves (`(r".*/q_proj/kernel", ("embed", "heads"))`), RULES say
over which axes of the mesh a named axis is divided:

    data      replicas: each has the whole model and its own rows of the batch
    fsdp      rows of the batch as well, and parameters along "embed"; they are gathered layer by
              layer as they are used
    sequence  positions, outside attention
    tensor    heads, the inner width of the MLP, and the vocabulary

An axis that the mesh does not divide evenly is unsharded, and `describe` says so.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lowrank_jax import deprecations, sharding
from lowrank_jax.trees import is_quantized, leaves_with_metadata
from lowrank_jax.typing import Kernel, Pytree, Spec

__getattr__ = deprecations.names("lowrank_jax.meshes")  # the address that users know

AXES = ("data", "fsdp", "sequence", "tensor")

Rules = tuple[tuple[str, str | tuple[str, ...] | None], ...]
Table = Sequence[tuple[str, tuple[str | None, ...]]]

RULES: Rules = (
    ("batch", ("data", "fsdp")),
    ("length", "sequence"),
    ("embed", "fsdp"),
    ("heads", "tensor"),
    ("kv", "tensor"),
    ("mlp", "tensor"),
    ("vocabulary", "tensor"),
    ("layers", None),
    ("norm", None),
)


def make_mesh(
    *,
    data: int = 1,
    fsdp: int = 1,
    sequence: int = 1,
    tensor: int = 1,
    devices: Sequence[jax.Device] | None = None,
    explicit: bool = False,
) -> Mesh:
    """A mesh with the axes `AXES`, whatever their sizes.

    Args:
      data, fsdp, sequence, tensor: sizes; one of them may be -1, which is what the others leave.
      devices: all by default; also those of a topology that is not there
        (`jax.experimental.topologies`).
      explicit: axes that array types carry (`AxisType.Explicit`); otherwise the compiler completes
        the shardings.

    Raises:
      ValueError: where the sizes do not make up the number of devices.

    >>> import jax
    >>> dict(make_mesh(data=-1).shape) == {
    ...     "data": jax.device_count(),
    ...     "fsdp": 1,
    ...     "sequence": 1,
    ...     "tensor": 1,
    ... }
    True
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = dict(zip(AXES, (data, fsdp, sequence, tensor), strict=True))
    for name, size in sizes.items():
        if size != -1 and size < 1:
            raise ValueError(
                f"mesh: {name}={size} must be positive, or -1 for what the other axes leave"
            )
    open_axes = [name for name, size in sizes.items() if size == -1]
    if len(open_axes) > 1:
        raise ValueError(
            f"mesh: {' and '.join(open_axes)} are -1; only one axis can take what the others leave"
        )
    given = math.prod(size for size in sizes.values() if size != -1)
    if open_axes:
        sizes[open_axes[0]] = max(1, len(devices) // given)
    if math.prod(sizes.values()) != len(devices):
        text = " x ".join(f"{name}={size}" for name, size in sizes.items())
        raise ValueError(
            f"mesh: {text} is not {len(devices)} devices; choose sizes whose product is "
            f"{len(devices)}"
        )
    kind = AxisType.Explicit if explicit else AxisType.Auto
    return jax.make_mesh(
        tuple(sizes.values()), AXES, axis_types=(kind,) * len(AXES), devices=devices
    )


def logical_axes(params: Pytree, table: Table) -> Pytree:
    """A tree like `params` of tuples of axis names, one for a quantised array.

    Args:
      params: arrays or ShapeDtypeStructs, also quantised ones.
      table: ordered `(pattern, names)`; a pattern matches the whole "/"-joined path of a leaf, the
        first one counts. A leaf with one axis more than its names has the axis "layers" in front.

    Raises:
      ValueError: for a leaf that nothing matches, or with another number of axes.

    >>> import jax.numpy as jnp
    >>> logical_axes({"up": {"kernel": jnp.ones((3, 8, 16))}}, [(".*/kernel", ("embed", "mlp"))])
    {'up': {'kernel': ('layers', 'embed', 'mlp')}}
    """
    found = []
    for path, leaf, _ in leaves_with_metadata(params):
        names = next((names for pattern, names in table if re.fullmatch(pattern, path)), None)
        if names is None:
            raise ValueError(
                f"table: nothing matches the leaf {path!r}; add a row (pattern, axis names) for it"
            )
        ndim = len(leaf.shape)
        if ndim - len(names) not in (0, 1):
            raise ValueError(
                f"table: {path!r} of shape {leaf.shape} has {ndim} axes, and its row names {names}"
            )
        found.append(("layers",) * (ndim - len(names)) + tuple(names))
    return jax.tree.unflatten(jax.tree.structure(params, is_leaf=is_quantized), found)


def _mesh_axes(rules: Rules, name: str | None, mesh: Mesh) -> tuple[str, ...]:
    if name is None:
        return ()
    for logical, axes in rules:
        if logical == name:
            axes = () if axes is None else (axes if isinstance(axes, tuple) else (axes,))
            unknown = [axis for axis in axes if axis not in mesh.shape]
            if unknown:
                raise ValueError(
                    f"rules: {name!r} goes to {unknown[0]!r}, and the mesh has {tuple(mesh.shape)}"
                )
            return axes
    raise ValueError(
        f"rules: no rule for the axis {name!r}; add ({name!r}, None) if it is unsharded"
    )


def spec(
    names: Sequence[str | None],
    mesh: Mesh,
    rules: Rules = RULES,
    shape: Sequence[int] | None = None,
) -> PartitionSpec:
    """The PartitionSpec of axes with these names.

    An axis of the mesh is used once, and where it divides `shape`. An axis of one entry is
    unsharded, also where the mesh would not divide it.

    >>> mesh = make_mesh(data=-1)
    >>> spec(("batch", None, "embed"), mesh)
    P(('data', 'fsdp'), None, None)
    """
    entries: list[Any] = []
    used: set[str] = set()
    for i, name in enumerate(names):
        axes = tuple(axis for axis in _mesh_axes(rules, name, mesh) if axis not in used)
        # one entry, such as a head that all queries share, is on every device
        if shape is not None and (shape[i] == 1 or shape[i] % sharding.parts(axes, mesh)):
            axes = ()
        used |= set(axes)
        entries.append(axes if len(axes) > 1 else axes[0] if axes else None)
    return PartitionSpec(*entries)


def partition_specs(params: Pytree, table: Table, mesh: Mesh, rules: Rules = RULES) -> Pytree:
    """A tree like `params` of PartitionSpecs; see `logical_axes` and `spec`.

    A quantised array is one of PartitionSpecs: its codes are divided as its matrix would be, as far
    as a device has blocks without a rest.

    >>> import jax.numpy as jnp
    >>> partition_specs(
    ...     {"up": {"kernel": jnp.ones((8, 16))}},
    ...     [(".*/kernel", ("embed", "mlp"))],
    ...     make_mesh(data=-1),
    ... )
    {'up': {'kernel': P('fsdp', 'tensor')}}
    """
    names = logical_axes(params, table)

    def place(leaf, own):
        if not is_quantized(leaf):
            return spec(own, mesh, rules, leaf.shape)
        placed = leaf.partition_specs(tuple(spec(own, mesh, rules, leaf.blocks)))
        if placed is None:  # codes that do not say how they can be divided
            return jax.tree.map(lambda _: PartitionSpec(), leaf)
        # an nnx variable is quantised as its value is, and is another tree than the value's specs
        pairs = zip(jax.tree.leaves(leaf), jax.tree.leaves(placed), strict=True)
        fit = [sharding.even(mesh, x.shape, own) for x, own in pairs]
        return jax.tree.unflatten(jax.tree.structure(leaf), fit)

    return jax.tree.map(place, params, names, is_leaf=is_quantized)


def shardings(params: Pytree, table: Table, mesh: Mesh, rules: Rules = RULES) -> Pytree:
    """A tree like `params` of NamedShardings; see `partition_specs`."""
    found = partition_specs(params, table, mesh, rules)
    return jax.tree.map(
        lambda own: NamedSharding(mesh, own), found, is_leaf=lambda x: isinstance(x, PartitionSpec)
    )


def describe(params: Pytree, table: Table, mesh: Mesh, rules: Rules = RULES) -> str:
    """A line for each leaf, and what is unsharded because the mesh does not divide it.

    >>> import jax.numpy as jnp
    >>> print(
    ...     describe(
    ...         {"kernel": jnp.ones((8, 16))}, [("kernel", ("embed", "mlp"))], make_mesh(data=-1)
    ...     )
    ... )
    kernel  (8, 16)  P('fsdp', 'tensor')
    """
    lines = []
    names = jax.tree.leaves(logical_axes(params, table), is_leaf=lambda x: isinstance(x, tuple))
    for (path, leaf, _), own in zip(leaves_with_metadata(params), names, strict=True):
        units = leaf.blocks if is_quantized(leaf) else leaf.shape
        placed, wanted = spec(own, mesh, rules, units), spec(own, mesh, rules)
        line = f"{path}  {tuple(leaf.shape)}  {placed}"
        for size, unit, name, have, want in zip(
            leaf.shape, units, own, placed, wanted, strict=True
        ):
            if have != want:
                blocks = "" if unit == size else f", {unit} blocks,"
                line += f"  ({name} = {size}{blocks} stays whole: {want!r} does not divide it)"
        lines.append(line)
    return "\n".join(lines)


def _specs(mesh: Mesh, parameters: Pytree) -> dict[str, Spec]:
    """`{path: partition entries, one for each axis}`; of a quantised leaf those of its codes."""
    found = {}
    for path, leaf, _ in leaves_with_metadata(parameters):
        own = sharding.codes_of(leaf)
        if not hasattr(own, "shape"):  # a masked leaf
            continue
        place = getattr(own, "sharding", None)
        if not isinstance(place, NamedSharding) or place.mesh.shape != mesh.shape:
            raise ValueError(
                f"use: parameters has {place} at {path!r}, not a NamedSharding on this mesh; give "
                "abstract or placed parameters, for instance with the shardings of "
                "lrx.meshes.shardings"
            )
        found[path] = sharding.spec_of(place, len(own.shape))
    return found


def _rows(mesh: Mesh, rules: Rules) -> Spec | None:
    """Partition entries of the first axes of activations, "batch" and "length".

    None where no rule names a batch.
    """
    named = [name for name in ("batch", "length") if name in dict(rules)]
    return tuple(spec(named, mesh, rules)) if "batch" in named else None


_CURRENT: contextvars.ContextVar[tuple[Mesh, Rules] | None] = contextvars.ContextVar(
    "mesh", default=None
)


@contextlib.contextmanager
def use(mesh: Mesh, rules: Rules = RULES, *, parameters: Pytree = None) -> Iterator[None]:
    """The mesh of what is traced inside: activations, refreshes and kernels are divided over it.

    `constrain` places activations, and a refresh its matrices. Inside an optimizer's update on an
    auto mesh, refreshes need it: without it the compiler adds up unsharded matrices for a DCT along
    a divided dimension. Kernels (`lrx.kernels`) need it to be divided over an auto mesh.

    Args:
      mesh, rules: of the program.
      parameters: a tree of arrays or `jax.ShapeDtypeStruct`s with NamedShardings on an auto mesh.
        The update of an optimizer of this library then keeps its state divided as
        `lrx.state_shardings(..., spread=True)` says, and gathers what is low-rank layer by layer,
        where a layer is written. `implementation="pallas"` of adapters and of
        the fused form take a kernel where this tree, by the paths that `lrx.adapt` or the optimizer
        sees, says that a matrix is divided so that each device can run it on its own block. A
        quantised matrix with adapters is gathered as codes, before it is decoded (HiRA, which
        multiplies by it entry by entry, has values sent as well).

    Raises:
      ValueError: where a leaf of `parameters` is on no mesh, or on another one.
    """
    own, explicit = None, AxisType.Explicit in mesh.axis_types
    # array types say it on an explicit mesh
    if parameters is not None and not explicit and mesh.size > 1:
        own = _specs(mesh, parameters)
    known: list[tuple[contextvars.ContextVar, Any]] = [
        (_CURRENT, (mesh, rules)),
        (sharding.current_mesh, mesh),
        (sharding.current_partition_specs, own),
        (sharding.current_rows, _rows(mesh, rules)),
    ]
    tokens = [(variable, variable.set(value)) for variable, value in known]
    try:
        with _types_of(mesh) if explicit else contextlib.nullcontext():
            yield
    finally:
        for variable, token in reversed(tokens):
            variable.reset(token)


def _types_of(mesh: Mesh) -> contextlib.AbstractContextManager:
    """A context for a trace, in which array types are those of this explicit mesh."""
    known = jax.sharding.get_abstract_mesh() == mesh.abstract_mesh
    return contextlib.nullcontext() if known else jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def _placed(names: Sequence[str | None], shape: Sequence[int]) -> tuple[Mesh, PartitionSpec] | None:
    """The mesh of `use` and the PartitionSpec of an array of this shape on it.

    None outside `use`, or on one auto device.
    """
    current = _CURRENT.get()
    if current is None or (current[0].size == 1 and AxisType.Explicit not in current[0].axis_types):
        return None
    if len(names) != len(shape):
        raise ValueError(
            f"{len(names)} names {names} for an array of shape {tuple(shape)}; name every axis"
        )
    mesh, rules = current
    return mesh, spec(names, mesh, rules, shape)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """`x` with its axes, one name each, divided as the rules say.

    `x` itself outside `use`, or on one device.

    >>> import jax.numpy as jnp
    >>> constrain(jnp.ones((2, 4)), "batch", None).shape
    (2, 4)
    """
    found = _placed(names, x.shape)
    if found is None:
        return x
    mesh, placed = found
    if AxisType.Explicit in mesh.axis_types:
        return sharding.reshard(x, tuple(placed))
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, placed))


def on_auto_axes(tree: Pytree) -> Pytree:
    """Arrays of an explicit mesh as those of an auto one, on the same devices.

    For programs that do not say what goes where.

    >>> x = jax.device_put(1.0, NamedSharding(make_mesh(data=-1, explicit=True), PartitionSpec()))
    >>> set(on_auto_axes(x).sharding.mesh.axis_types)
    {Auto}
    """

    def place(x):
        mesh = x.sharding.mesh
        auto = mesh.update(axis_types=(AxisType.Auto,) * len(mesh.axis_names))
        own = [shard.data for shard in x.addressable_shards]
        return jax.make_array_from_single_device_arrays(
            x.shape, NamedSharding(auto, x.sharding.spec), own
        )

    return jax.tree.map(lambda x: place(x) if sharding.is_explicit(x.sharding) else x, tree)


def divided(shape: Sequence[int], *names: str | None) -> tuple[bool, ...]:
    """Which axes of an array of this shape, one name each, the mesh of `use` divides.

    None outside `use`.

    >>> divided((2, 4), "batch", None)
    (False, False)
    """
    found = _placed(names, shape)
    if found is None:
        return (False,) * len(shape)
    mesh, placed = found
    return tuple(bool(sharding.dividing(entry, mesh)) for entry in placed)


def out_sharding(shape: Sequence[int], *names: str | None) -> PartitionSpec | None:
    """The `out_sharding=` of an operation whose result has this shape and these axes.

    On an explicit mesh a sum over a divided axis, and a look-up along one, needs it. None
    elsewhere.

    >>> out_sharding((2, 4), "batch", None)
    """
    found = _placed(names, shape)
    return found[1] if found is not None and AxisType.Explicit in found[0].axis_types else None


def at_input(kernel: Kernel, x: jax.Array, *, rows: int = -2) -> Kernel:
    """The kernel `(..., rows, cols)` of a product, gathered for its input `x (..., rows)`.

    Itself off explicit meshes. Its rows are divided as the last axis of x is, and its columns over
    no axis of the mesh that divides x: parameters divided along "embed" over fsdp are gathered over
    it, because rows of the batch are. The gradient gets the sharding of the kernel.

    Args:
      kernel, x: of a product that contracts the last axis of x; a quantised kernel is gathered as
        codes.
      rows: the axis of the kernel that is contracted, -2, or -1 of an embedding that serves as the
        output layer.

    >>> import jax.numpy as jnp
    >>> at_input(jnp.ones((4, 6)), jnp.ones((2, 4))).shape
    (4, 6)
    """
    inner, own = sharding.explicit_spec(x), sharding.explicit_spec(kernel)
    if inner is None or own is None:
        return kernel
    # contracted as x is divided along its last axis; columns stay divided over axes x does not use
    used = {name for entry in inner for name in sharding.axis_names_of(entry)}
    cols = -3 - rows
    entries = [None] * kernel.ndim
    entries[rows] = inner[-1]
    if used.isdisjoint(sharding.axis_names_of(own[cols])):
        entries[cols] = own[cols]
    spec = tuple(entries)
    if not is_quantized(kernel):
        return sharding.reshard(kernel, spec)
    mesh = jax.sharding.get_abstract_mesh()

    def place(x, own):
        return sharding.reshard(x, tuple(sharding.even(mesh, x.shape, own)))

    return jax.tree.map(place, kernel, kernel.partition_specs(spec))


__all__ = [
    "RULES",
    "at_input",
    "constrain",
    "describe",
    "divided",
    "logical_axes",
    "make_mesh",
    "on_auto_axes",
    "out_sharding",
    "partition_specs",
    "shardings",
    "spec",
    "use",
]
__dir__ = functools.partial(sorted, __all__)
