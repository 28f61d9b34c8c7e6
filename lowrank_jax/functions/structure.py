"""Steps that move a kernel without computing: what a node flows through."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax.functions.axes import Axes
from lowrank_jax.functions.equations import bind
from lowrank_jax.functions.errors import ReadError
from lowrank_jax.functions.flow import Flow, is_flow
from lowrank_jax.functions.hosts import look_up_axis

Outputs = list[Any]


def transpose(eqn: Any, flow: Flow) -> Outputs:
    """Axes in another order."""
    return [_moved(eqn, flow, flow.axes.transpose(eqn.params["permutation"]))]


def reshape(eqn: Any, flow: Flow) -> Outputs:
    """Axes split and merged, those of the node's own arrays with them."""
    if eqn.params.get("dimensions") is not None:
        raise ReadError("is reshaped in another order")
    before = flow.axes.batch
    made = _moved(eqn, flow, flow.axes.reshape(eqn.params["new_sizes"]))
    after = made.axes.batch
    if len(before) == len(after):
        return [made]
    # the node's own arrays have the digits of the batch as axes
    sizes = tuple(digit.size for digit in after)
    return [made.with_own(lambda x: x.reshape(*sizes, *x.shape[len(before) :]))]


def squeeze(eqn: Any, flow: Flow) -> Outputs:
    """Axes of one index dropped; a batch axis is taken apart."""
    dropped = eqn.params["dimensions"]
    taken = [digit for axis in dropped for digit in flow.axes.value[axis]]
    made = _moved(eqn, flow, flow.axes.squeeze(dropped))
    for digit in taken:
        if made.place(digit) >= 0:
            made = made.indexed(digit, 0)
    return [made]


def broadcast_in_dim(eqn: Any, flow: Flow) -> Outputs:
    """New axes, which are none of the leaf."""
    params = eqn.params
    axes = flow.axes.broadcast(params["shape"], params["broadcast_dimensions"])
    return [_moved(eqn, flow, axes)]


def slice_(eqn: Any, flow: Flow) -> Outputs:
    """A static piece."""
    params = eqn.params
    strides = params["strides"] or (1,) * len(flow.shape)
    if any(stride != 1 for stride in strides) and not flow.probing:
        raise ReadError("is sliced with a stride")
    made = _moved(eqn, flow, flow.axes)
    pieces = zip(params["start_indices"], eqn.outvars[0].aval.shape, strict=True)
    for axis, (start, size) in enumerate(pieces):
        made = cut(made, axis, start, size)
    return [made]


def dynamic_slice(eqn: Any, flow: Flow, *starts: Any) -> Outputs:
    """A piece at a place that may be computed, along the batch."""
    made = _moved(eqn, flow, flow.axes, *starts)
    for axis, (start, size) in enumerate(zip(starts, eqn.params["slice_sizes"], strict=True)):
        if size != flow.shape[axis]:
            made = cut(made, axis, start, size)
    return [made]


def split(eqn: Any, flow: Flow) -> Outputs:
    """Pieces side by side."""
    sizes, axis = eqn.params["sizes"], eqn.params["axis"]
    arrays = [None] * len(sizes) if flow.array is None else bind(eqn, [flow.array])
    starts = np.cumsum([0, *sizes])[:-1]
    pieces = zip(starts, sizes, arrays, strict=True)
    return [
        cut(dataclasses.replace(flow, array=array), axis, int(start), int(size))
        for start, size, array in pieces
    ]


def unstack(eqn: Any, flow: Flow) -> Outputs:
    """Single indices of an axis, which is dropped: how jax 0.12 iterates over an array."""
    axis = eqn.params["axis"]
    count = flow.shape[axis]
    arrays = [None] * count if flow.array is None else bind(eqn, [flow.array])
    made = []
    for place, array in enumerate(arrays):
        piece = cut(flow, axis, place, 1)
        taken = piece.axes.value[axis]
        piece = dataclasses.replace(piece, array=array, axes=piece.axes.squeeze((axis,)))
        for digit in taken:
            piece = piece.indexed(digit, 0) if piece.place(digit) >= 0 else piece
        made.append(piece)
    return made


def cut(flow: Flow, axis: int, start: Any, size: int) -> Flow:
    """A flow whose array has been cut along an axis already."""
    if size == flow.shape[axis]:
        return flow
    if flow.probing:  # which axis it is does not depend on the place
        return dataclasses.replace(flow, axes=flow.axes.slice(axis, 0, size))
    digits = flow.axes.value[axis]
    place = flow.place(digits[0]) if digits else -1
    if place >= 0:
        if len(digits) != 1:
            raise ReadError("is sliced along an axis that was merged from several")
        # the node has as many matrices as the value
        take = lambda x: jax.lax.dynamic_slice_in_dim(x, start, size, axis=place)  # noqa: E731
        axes = flow.axes.resized(digits[0].name, size)
        return dataclasses.replace(flow.with_own(take), axes=axes)
    known = _known(start)
    if known is None:
        raise ReadError("is sliced along its rows or columns at a place that the program computes")
    return dataclasses.replace(flow, axes=flow.axes.slice(axis, known, size))


def cuts_a_matrix(eqn: Any, flow: Flow) -> bool:
    """Whether a step leaves rows or columns out."""
    if eqn.primitive.name in ("split", "unstack"):
        return any(flow.place(digit) < 0 for digit in flow.axes.value[eqn.params["axis"]])
    shape = eqn.outvars[0].aval.shape
    changed = (axis for axis, size in enumerate(flow.shape) if size != shape[axis])
    return any(flow.place(digit) < 0 for axis in changed for digit in flow.axes.value[axis][:1])


def _known(start: Any) -> int | None:
    """A start that is written in the program."""
    if isinstance(start, jax.Array) or np.ndim(start):
        return None
    return int(start)


def gather(eqn: Any, flow: Flow, indices: Any) -> Outputs | None:
    """Matrices of a batch, chosen by indices; None for a look-up of rows."""
    axis = look_up_axis(eqn, flow.axes)
    digits = flow.axes.value[axis]
    if len(digits) != 1 or flow.place(digits[0]) < 0:
        return None
    digit, place = digits[0], flow.place(digits[0])
    numbers, params = eqn.params["dimension_numbers"], eqn.params
    chosen = tuple(indices.shape[:-1])
    offset = set(numbers.offset_dims)
    ndim = len(flow.shape) - 1 + len(chosen)
    others = iter(own for i, own in enumerate(flow.axes.value) if i != axis)
    new = [type(digit)((-(10**4), *digit.name, i), size, size) for i, size in enumerate(chosen)]
    fresh = iter(new)
    value = tuple(next(others) if i in offset else (next(fresh),) for i in range(ndim))

    def take(x: jax.Array) -> jax.Array:
        # (batch before, chosen..., batch after, ...)
        return jnp.take(x, indices[..., 0], axis=place, mode=_MODES.get(str(params["mode"])))

    batch = flow.axes.batch
    axes = flow.axes.without(digit)
    axes = dataclasses.replace(axes, value=value, batch=(*batch[:place], *new, *batch[place + 1 :]))
    # the leaf, decoded, has them where the batch digit was
    leaf = tuple(
        tuple(part for one in own for part in (new if one.name == digit.name else [one]))
        for own in flow.axes.leaf
    )
    step = lambda x: bind(eqn, [x, indices])[0]  # noqa: E731
    return [flow.moved(step, dataclasses.replace(axes, leaf=leaf)).with_own(take)]


_MODES = {"1": "fill", "GatherScatterMode.FILL_OR_DROP": "fill", "GatherScatterMode.CLIP": "clip"}


def convert(eqn: Any, flow: Flow) -> Outputs:
    """Another floating type."""
    dtype = jnp.dtype(eqn.params["new_dtype"])
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ReadError(f"is cast to {dtype}")
    return [_moved(eqn, flow, flow.axes, dtype=dtype)]


def stop_gradient(eqn: Any, flow: Flow) -> Outputs:
    """Of the node's arrays as of the kernel: what is stopped is the effective kernel."""
    made = _moved(eqn, flow, flow.axes)
    node = jax.lax.stop_gradient(made.node)
    return [dataclasses.replace(made, node=node, stopped=True)]


def through(eqn: Any, *operands: Any) -> Outputs:
    """Every operand comes out as it went in, seen or placed in another way."""
    arrays = [one.array if is_flow(one) else one for one in operands]
    there = [i for i, array in enumerate(arrays) if array is not None]
    made: Any = [None] * len(operands)
    if len(there) == len(operands):
        made = bind(eqn, arrays)
    elif eqn.primitive.name == "optimization_barrier" and there:
        for i, array in zip(
            there, jax.lax.optimization_barrier([arrays[i] for i in there]), strict=True
        ):
            made[i] = array
    return [
        dataclasses.replace(one, array=made[i]) if is_flow(one) else made[i]
        for i, one in enumerate(operands)
    ]


def reshard(eqn: Any, flow: Flow) -> Outputs:
    """Where the kernel changes to a mesh of other axis types, the node's arrays do."""
    (made,) = through(eqn, flow)
    mesh = eqn.params["dst_sharding"].mesh
    if mesh.axis_types == jax.sharding.get_abstract_mesh().axis_types and mesh.axis_types == _types(
        flow
    ):
        return [made]

    def follow(x: jax.Array) -> jax.Array:
        place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*(None,) * x.ndim))
        return bind(eqn, [x], dst_sharding=place)[0]

    return [dataclasses.replace(made, node=jax.tree.map(follow, made.node))]


def _types(flow: Flow) -> Any:
    leaves = [flow.array] if flow.array is not None else jax.tree.leaves(flow.node)
    return jax.typeof(leaves[0]).sharding.mesh.axis_types


def _moved(eqn: Any, flow: Flow, axes: Axes, *rest: Any, dtype: Any = None) -> Flow:
    return flow.moved(lambda x: bind(eqn, [x, *rest])[0], axes, dtype)


Rule = Callable[..., Outputs | None]

RULES: dict[str, Rule] = {
    "transpose": transpose,
    "unstack": unstack,
    "reshape": reshape,
    "squeeze": squeeze,
    "broadcast_in_dim": broadcast_in_dim,
    "slice": slice_,
    "dynamic_slice": dynamic_slice,
    "split": split,
    "gather": gather,
    "convert_element_type": convert,
    "stop_gradient": stop_gradient,
    "reshard": reshard,
    **dict.fromkeys(
        (
            "copy", "copy_p", "optimization_barrier", "sharding_constraint", "name",
            "pvary", "pcast", "device_put", "mesh_cast",
        ),
        through,
    ),
}  # fmt: skip
CUTS = ("slice", "dynamic_slice", "split", "unstack")
