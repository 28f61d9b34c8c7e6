"""Products as a node is told of them: one description of each equation that multiplies by a kernel.

A host says three things of its equation, for a delta `A B` of the kernel (n, m):

    contract(x, A) -> z      its input times a thin factor: x A, A[ids], a convolution
    expand(z, B)   -> y      a thin result brought to where its own lies
    own(x)         -> y      the equation itself, as the program has it

Adapters multiply by their factors so, and a tap is a factored adapter whose low factor is zero. Where
the kernel's matrices can be told apart (`separable`), input and output are also seen as `(batch...,
free..., n)` and `(batch..., free..., m)`, for whoever turns or scales them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_jax import sharding
from lowrank_jax.functions.axes import Axes, Digit, Digits, arrange, names, size_of
from lowrank_jax.functions.equations import bind
from lowrank_jax.functions.errors import ReadError
from lowrank_jax.kernel_node import Op, Stack, over_matrices, parts_of, product, with_parts_of
from lowrank_jax.quantized import as_node
from lowrank_jax.rows import platform
from lowrank_jax.typing import Kernel, Pytree

WIDE = jnp.float32


@dataclasses.dataclass(frozen=True)
class Host:
    """One equation that multiplies by a kernel.

    Attributes:
      eqn: of the program.
      place: which of its operands is the kernel.
      axes: of the kernel as the equation sees it.
      dtype: of the kernel there.
      line: where it stands.
      x_place: which of its operands is x.
      side: what x is, `Op.input`.
      separable: whether the matrices of the batch can be told apart.
      rows: of an x whose first axis was folded, how many the first of its axes had.
    """

    eqn: Any
    place: int
    axes: Axes
    dtype: Any
    line: str

    x_place: int = 0
    side: str = "features"
    separable: bool = True
    rows: int | None = None

    @property
    def y(self) -> jax.ShapeDtypeStruct:
        """The result's shape and type."""
        aval = self.eqn.outvars[0].aval
        place = aval.sharding if sharding.is_explicit(aval.sharding) else None
        return jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=place)

    @property
    def first(self) -> Digits:
        """What is contracted: the rows, or of a transposed product the columns."""
        return self.axes.cols if self.side == "transposed" else self.axes.rows

    @property
    def second(self) -> Digits:
        return self.axes.rows if self.side == "transposed" else self.axes.cols

    @property
    def precision(self) -> Any:
        return self.eqn.params.get("precision")

    @property
    def plain(self) -> bool:
        """Whether this is `x K` of the kernel as it lies, and no more."""
        as_it_lies = self.axes.leaf == (self.axes.rows, self.axes.cols)
        return self.side == "features" and self.precision is None and as_it_lies

    @property
    def mapped(self) -> tuple[bool, ...]:
        """Of each batch digit, whether x has an axis of it."""
        return ()

    def run(self, x: Any, array: jax.Array, rest: Pytree, wide: bool = False) -> jax.Array:
        """The equation with an array in the kernel's place; `wide` in float32 where it is
        narrower."""
        params = {}
        narrow = self.y.dtype in (jnp.bfloat16, jnp.float16)
        if wide and narrow and "preferred_element_type" in self.eqn.params:
            params["preferred_element_type"] = jnp.dtype(WIDE)
            if platform() == "cpu" and max(x.ndim, array.ndim) > 2:
                # XLA on CPUs sums narrow products in float32 in two dimensions alone
                x, array = x.astype(WIDE), array.astype(WIDE)
        operands = list(rest)
        for place, value in sorted(((self.place, array), (self.x_place, x))):
            operands.insert(place, value)
        (y,) = bind(self.eqn, operands, **params)
        return y

    # --- of one matrix: x (free..., n) or what the host has, z (free..., q), y (free..., m)

    features = False  # whether `inputs` has n features in its last axis
    opaque = False  # whether the equation is a call, whose derivative is its own

    def inputs(self, x: Any) -> Any:
        return x

    def outputs(self, y: jax.Array) -> jax.Array:
        return y

    def result(self, y: jax.Array) -> jax.Array:
        return y

    def contract_one(self, x: Any, factor: jax.Array) -> jax.Array:
        return product(x, self.cut(factor, -2, "first"), self.precision)

    def expand_one(self, low: jax.Array, factor: jax.Array) -> jax.Array:
        return product(low, self.cut(factor, -1, "second"), self.precision)

    def cut(self, array: jax.Array, axis: int, which: str) -> jax.Array:
        """A factor of all rows (or columns) as the kernel is here; one that is so already stays."""
        digits = getattr(self, which)
        if array.shape[axis] == size_of(digits):
            return array
        side = {True: ("cols", "rows"), False: ("rows", "cols")}[self.side == "transposed"]
        return self.axes.taken(array, axis, side[which == "second"])

    # --- of the stack

    def contract(self, x: Any, factor: jax.Array, rest: Pytree) -> jax.Array:
        del rest
        return over_matrices(self.contract_one, self.mapped)(self.inputs(x), factor)

    def expand(self, low: jax.Array, factor: jax.Array, rest: Pytree) -> jax.Array:
        del rest
        run = self.expand_one
        for _ in self.axes.batch:
            run = jax.vmap(run)
        return self.result(run(low, factor)).astype(self.y.dtype)

    # --- what a node sees

    def op(self, base: Kernel, array: jax.Array | None, rest: Pytree) -> Op:
        """The equation with `base` in the kernel's place, as a node that lies on it is told."""
        make = functools.partial(_op, self, tuple(rest))
        return make((base, array))


def times(host: Host, kernel: Kernel, array: jax.Array | None, rest: Pytree, x: Any) -> Any:
    """`(y, aux)` of the equation with a node, codes or `()`, the array itself, in its place."""
    node = as_node(kernel)
    if node is None:
        assert array is not None
        return host.run(x, array, rest, wide=True), None
    base = node.base()
    if base is None:
        return node.multiply(host.op(node, array, rest), x)
    if as_node(base) is None and array is None:
        # the array of a node that cannot be told another base
        own: Any = base
        base, array = (), host.axes.from_leaf(own).astype(host.dtype)
    return node.multiply(host.op(base, array, rest), x)


def _op(host: Host, rest: Pytree, data: tuple[Kernel, jax.Array | None]) -> Op:
    base, array = data
    n, m = size_of(host.axes.rows), size_of(host.axes.cols)

    def by_leaf(x, leaf):
        return host.run(x, host.axes.from_leaf(leaf).astype(host.dtype), rest)

    def by_matrices(x, matrices):
        return host.run(x, host.axes.from_matrices(matrices).astype(host.dtype), rest)

    def leaf():
        node = as_node(base)
        assert node is not None
        value: Any = node.dense(host.dtype)
        return host.axes.from_leaf(value).astype(host.dtype)

    # what one matrix of the stack is formed of, and how
    own_parts, shared = parts_of(base)
    parts = (own_parts, None if array is None else host.axes.to_matrices(array))

    def formed(parts):
        own_parts, matrices = parts
        return matrices_of(host, with_parts_of(base, own_parts, shared), matrices)

    stack = Stack(
        inputs=host.inputs,
        outputs=host.outputs,
        result=lambda y: host.result(y).astype(host.y.dtype),
        batch=len(host.axes.batch),
        mapped=host.mapped,
        features=host.features,
        opaque=host.opaque,
        separable=host.separable,
        cut=host.axes.cut,
        pad=host.axes.padded,
        matrix=functools.partial(_matrix_op, host, as_node(base) is None),
        by_matrices=by_matrices,
        base=base,
        array=array,
        parts=parts,
        formed=formed,
        leaf=leaf,
        make=functools.partial(_op, host),
        rest=rest,
        dtype=host.dtype,
        y=host.y,
    )
    return Op(
        shape=(n, m),
        contract=lambda x, factor: host.contract(x, factor, rest),
        expand=lambda low, factor: host.expand(low, factor, rest),
        kernel=lambda: formed(parts),
        own=lambda x: times(host, base, array, rest, x)[0],
        input=host.side,
        line=host.line,
        plain=host.plain,
        multiply=by_leaf,
        stack=stack,
        rows=host.rows,
    )


def matrices_of(host: Host, kernel: Kernel, matrices: jax.Array | None) -> jax.Array:
    """The matrices `(batch..., n, m)` of a node on these, or some of the batch, as the equation sees
    them."""
    node = as_node(kernel)
    if node is None:
        assert matrices is not None
        return matrices
    base = node.base()
    made = None if base is None else node.matrices(lambda: matrices_of(host, base, matrices))
    if made is not None:
        return made
    array = node.dense(host.dtype)
    if array is None:
        raise ReadError(f"{node.label}: its matrix may not be formed, at {host.line}")
    axes = host.axes
    for digit in axes.batch[: sum(map(len, axes.leaf)) - array.ndim]:
        axes = axes.without(digit)  # they were mapped
    return axes.to_matrices(axes.from_leaf(array))


def _matrix_op(host: Host, bare: bool, x: Any, y: jax.Array, kernel: Callable[[], jax.Array]) -> Op:
    """The operator of one matrix, whose product with the host's own input is there already."""

    def own(given):
        if given is x:
            return y
        matrix = kernel()
        if platform() == "cpu" and host.features:
            given, matrix = given.astype(_wide(given.dtype)), matrix.astype(_wide(matrix.dtype))
        return host.contract_one(given, matrix.T if host.side == "transposed" else matrix)

    return Op(
        shape=(size_of(host.axes.rows), size_of(host.axes.cols)),
        contract=host.contract_one,
        expand=host.expand_one,
        kernel=kernel,
        own=own,
        input=host.side,
        line=host.line,
        plain=host.side == "features" and host.precision is None and bare and x.dtype == host.dtype,
        rows=host.rows,
    )


# ---------------------------------------------------------------------- dot_general


@dataclasses.dataclass(frozen=True)
class Dot(Host):
    """`dot_general`, with the kernel on either side, in either direction, over any batch."""

    x_axes: tuple[Digits, ...] = ()  # digits of the axes of x; a free one is its own
    y_axes: tuple[Digits, ...] = ()
    features = True

    @property
    def mapped(self):
        have = {digit.name for digits in self.x_axes for digit in digits}
        return tuple(digit.name in have for digit in self.axes.batch)

    def _canonical(self, axes: Sequence[Digits], last: Digits) -> tuple[Digits, ...]:
        """`(batch..., free..., last)` of the axes of an operand."""
        taken = {digit.name for digit in (*self.axes.batch, *self.first, *self.second)}
        have = {digit.name for digits in axes for digit in digits}
        batch = tuple((digit,) for digit in self.axes.batch if digit.name in have)
        free = (tuple(one for one in digits if one.name not in taken) for digits in axes)
        return (*batch, *(digits for digits in free if digits), last)

    def inputs(self, x):
        x = self._floating(x)
        return arrange(x, self.x_axes, self._canonical(self.x_axes, self.first))

    def outputs(self, y):
        return arrange(y, self.y_axes, self._canonical(self.y_axes, self.second))

    def result(self, y):
        return arrange(y, self._canonical(self.y_axes, self.second), self.y_axes)

    def _floating(self, x: jax.Array) -> jax.Array:
        """x, by whose dtype factors are multiplied."""
        return x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(self.dtype)

    # where a part of a side is contracted, or a batch digit is: by einsum over digits

    def contract(self, x, factor, rest):
        if self.separable:
            return super().contract(x, factor, rest)
        return self._einsum(self._floating(x), self.x_axes, factor, self.first, -2, self._low_axes)

    def expand(self, low, factor, rest):
        if self.separable:
            return super().expand(low, factor, rest)
        y = self._einsum(low, self._low_axes, factor, self.second, -1, self.y_axes)
        return y.astype(self.y.dtype)

    @property
    def _low_axes(self) -> tuple[Digits, ...]:
        """Of `x A`: every digit of x, of a batch and of the first side that the result needs."""
        y = {digit.name for digits in self.y_axes for digit in digits}
        second = {digit.name for digit in self.second}
        x = [digit for digits in self.x_axes for digit in digits]
        kept = [d for d in x if d.name in y or d.name in second]
        have = {digit.name for digit in kept}
        # a batch digit that is summed over stays till the second factor has been seen
        summed = [d for d in self.axes.batch if d.name not in have]
        free = [d for d in self.first if d.name in y and d.name not in have]
        return tuple((digit,) for digit in (*kept, *summed, *free, _RANK))

    def _einsum(self, x, x_axes, factor, side, axis, out):
        digits = lambda axes: tuple((one,) for own in axes for one in own)  # noqa: E731
        cut = self.cut(factor, axis, "first" if axis == -2 else "second")
        rank = ((_RANK, -1),)
        batch = tuple((digit,) for digit in self.axes.batch)
        given = (*batch, side, rank[0][:1]) if axis == -2 else (*batch, rank[0][:1], side)
        sized = dataclasses.replace(_RANK, size=factor.shape[-1 if axis == -2 else -2])
        put = lambda axes: tuple(  # noqa: E731
            tuple(sized if one.name == _RANK.name else one for one in own) for own in axes
        )
        given, x_axes, out = put(given), put(x_axes), put(out)
        cut = arrange(cut, given, digits(given))
        x = arrange(x, x_axes, digits(x_axes))
        labels: dict[Any, int] = {}
        label = lambda axes: [labels.setdefault(own[0].name, len(labels)) for own in digits(axes)]  # noqa: E731
        left, right, result = label(x_axes), label(given), label(out)
        y = jnp.einsum(
            x, left, cut.astype(x.dtype), right, result, preferred_element_type=_wide(x.dtype),
            precision=self.precision,
        )  # fmt: skip
        return arrange(y, digits(out), out)


_RANK = Digit((-(10**6),), 2, 2)


def _wide(dtype: Any) -> Any:
    return jnp.promote_types(dtype, WIDE)


def dot_host(eqn: Any, place: int, axes: Axes, dtype: Any, line: str) -> Dot:
    """The host of a `dot_general` whose operand `place` is a kernel."""
    other = 1 - place
    contracted, batched = eqn.params["dimension_numbers"]
    of_x = {"contract": contracted[other], "batch": batched[other]}
    of_w = {"contract": contracted[place], "batch": batched[place]}
    x_aval = eqn.invars[other].aval
    free = lambda axis: Digit((-(10**5) - axis,), x_aval.shape[axis], x_aval.shape[axis])  # noqa: E731
    x_axes: list[Digits] = [(free(axis),) for axis in range(x_aval.ndim)]
    for kind in ("contract", "batch"):
        for x_axis, w_axis in zip(of_x[kind], of_w[kind], strict=True):
            x_axes[x_axis] = axes.value[w_axis]
    used_x, used_w = (set(own["contract"]) | set(own["batch"]) for own in (of_x, of_w))
    free_x = [x_axes[axis] for axis in range(x_aval.ndim) if axis not in used_x]
    free_w = [axes.value[axis] for axis in range(len(axes.value)) if axis not in used_w]
    batch_y = [axes.value[axis] for axis in of_w["batch"]]
    y_axes = batch_y + (free_x + free_w if place == 1 else free_w + free_x)
    host = functools.partial(
        Dot, eqn, place, axes, dtype, line, other, x_axes=tuple(x_axes), y_axes=tuple(y_axes)
    )
    summed = {name for axis in of_w["contract"] for name in names(axes.value[axis])}
    kept = {name for own in y_axes for name in names(own)}
    batch = set(names(axes.batch))
    rows, cols = set(names(axes.rows)), set(names(axes.cols))
    if not (rows | cols | batch) <= (summed | kept):
        raise ReadError("has not all the axes of the leaf")
    separable = not (batch & summed)
    # an axis that was broadcast is one of x's own
    if any(digit.name[0] < 0 and digit.name not in batch for own in free_w for digit in own):
        raise ReadError("multiplies by a kernel that was broadcast along an axis of the result")
    if summed - batch == rows and not (rows & kept):
        return host(side="features", separable=separable and not (cols & summed))
    if summed - batch == cols and not (cols & kept):
        return host(side="transposed", separable=separable)
    if not (summed & cols):
        return host(side="features", separable=False)
    if not (summed & rows):
        return host(side="transposed", separable=False)
    raise ReadError("contracts a part of the rows and a part of the columns")


# -------------------------------------------------------------------------- gather


@dataclasses.dataclass(frozen=True)
class LookUp(Host):
    """`gather` of whole rows (or columns) by one index: an embedding."""

    def outputs(self, y):
        offset = self.eqn.params["dimension_numbers"].offset_dims
        last = tuple(range(y.ndim - len(offset), y.ndim))
        y = jnp.moveaxis(y, offset, last)
        digits = tuple(own for i, own in enumerate(self.axes.value) if i != self._axis)
        lead = tuple((_free(axis, size),) for axis, size in enumerate(y.shape[: last[0]]))
        return arrange(y, (*lead, *digits), (*lead, self.second))

    def result(self, y):
        digits = tuple(own for i, own in enumerate(self.axes.value) if i != self._axis)
        lead = tuple((_free(axis, size),) for axis, size in enumerate(y.shape[:-1]))
        y = arrange(y, (*lead, self.second), (*lead, *digits))
        offset = self.eqn.params["dimension_numbers"].offset_dims
        return jnp.moveaxis(y, tuple(range(y.ndim - len(offset), y.ndim)), offset)

    @property
    def _axis(self) -> int:
        return self.eqn.params["dimension_numbers"].start_index_map[0]

    def contract_one(self, x, factor):
        factor = self.cut(factor, -2, "first")
        if (right := sharding.explicit_spec(factor)) is not None and any(right):
            left = sharding.explicit_spec(x) or (None,) * x.ndim
            place = jax.sharding.PartitionSpec(*left[:-1], *(None for _ in right[1:]))
            return factor.at[x[..., 0]].get(out_sharding=place)
        numbers = jax.lax.GatherDimensionNumbers((x.ndim - 1,), (0,), (0,))
        options = {
            key: self.eqn.params[key]
            for key in ("mode", "fill_value", "unique_indices", "indices_are_sorted")
        }
        return jax.lax.gather(factor, x, numbers, (1, factor.shape[-1]), **options)


def _free(axis: int, size: int) -> Digit:
    return Digit((-(10**5) - axis,), size, size)


def look_up_host(eqn: Any, axes: Axes, dtype: Any, line: str) -> LookUp:
    """The host of a `gather` along an axis that is all rows, or all columns."""
    axis = look_up_axis(eqn, axes)
    own = set(names(axes.value[axis]))
    if any(digit.size != 1 for digit in axes.batch):
        raise ReadError("looks up in several matrices at once")
    for side, digits in (("indices", axes.rows), ("transposed", axes.cols)):
        if own == set(names(digits)):
            return LookUp(eqn, 0, axes, dtype, line, 1, side, side == "indices")
    raise ReadError("looks up along an axis that is neither all rows nor all columns")


def look_up_axis(eqn: Any, axes: Axes) -> int:
    """The axis of the operand along which a gather takes single indices, all of the others."""
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    (axis, *more) = numbers.start_index_map
    whole = all(size == axes.shape[i] for i, size in enumerate(sizes) if i != axis)
    if (
        more
        or not whole
        or sizes[axis] != 1
        or numbers.collapsed_slice_dims != (axis,)
        or numbers.operand_batching_dims
    ):
        raise ReadError("gathers something else than single indices along one axis")
    return axis


# --------------------------------------------------------------------- convolution


@dataclasses.dataclass(frozen=True)
class Convolution(Host):
    """`conv_general_dilated`: a factor is a convolution with as many channels as it has columns."""

    def outputs(self, y):
        y = jnp.moveaxis(y, self._channel, -1)
        return arrange(y, (*self._lead(y), self._out), (*self._lead(y), self.second))

    def result(self, y):
        y = arrange(y, (*self._lead(y), self.second), (*self._lead(y), self._out))
        return jnp.moveaxis(y, -1, self._channel)

    def _lead(self, y: jax.Array) -> tuple[Digits, ...]:
        return tuple((_free(axis, size),) for axis, size in enumerate(y.shape[:-1]))

    @property
    def _channel(self) -> int:
        return self.eqn.params["dimension_numbers"].out_spec[1]

    @property
    def _out(self) -> Digits:
        return self.axes.value[self.eqn.params["dimension_numbers"].rhs_spec[0]]

    def contract_one(self, x, factor):
        factor = self.cut(factor, -2, "first")
        out = self.eqn.params["dimension_numbers"].rhs_spec[0]
        channels = Digit(_RANK.name, factor.shape[-1], factor.shape[-1])
        kernel_axes = tuple(
            (channels,) if axis == out else digits for axis, digits in enumerate(self.axes.value)
        )
        kernel = arrange(factor.astype(x.dtype), (self.first, (channels,)), kernel_axes)
        (y,) = bind(self.eqn, [x, kernel], preferred_element_type=None)
        return jnp.moveaxis(y, self._channel, -1).astype(_wide(x.dtype))


def convolution_host(eqn: Any, place: int, axes: Axes, dtype: Any, line: str) -> Convolution:
    """The host of a convolution whose kernel is one matrix from a window to channels."""
    params = eqn.params
    if place != 1:
        raise ReadError("is convolved as an image")
    for field in ("feature_group_count", "batch_group_count"):
        if params[field] != 1:
            raise ReadError(
                f"is a convolution in groups ({field}={params[field]}), which is no product of the "
                "whole input with thin factors"
            )
    if any(digit.size != 1 for digit in axes.batch):
        raise ReadError("is a convolution by several matrices at once")
    out = set(names(axes.value[params["dimension_numbers"].rhs_spec[0]]))
    for side, digits in (("windows", axes.cols), ("transposed", axes.rows)):
        if out == set(names(digits)):
            return Convolution(eqn, 1, axes, dtype, line, 0, side, side == "windows")
    raise ReadError(
        "is a convolution whose output channels are not the view's columns: give it "
        "MatrixView(rows=(window and input axes), cols=(output axis,))"
    )


# ---------------------------------------------------------------------- ragged_dot


@dataclasses.dataclass(frozen=True)
class Ragged(Host):
    """`ragged_dot`: every row times the matrix of its group, an expert."""

    def contract(self, x, factor, rest):
        return self._dot(x, self.cut(factor, -2, "first"), rest)

    def expand(self, low, factor, rest):
        y = self._dot(low, self.cut(factor, -1, "second"), rest)
        return y.astype(self.y.dtype)

    def _dot(self, x, factor, rest):
        return jax.lax.ragged_dot(
            x, factor.astype(x.dtype), rest[0], precision=self.precision,
            preferred_element_type=_wide(x.dtype),
        )  # fmt: skip


def ragged_host(eqn: Any, place: int, axes: Axes, dtype: Any, line: str) -> Ragged:
    """The host of a `ragged_dot` over groups that are the view's batch."""
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (contracted, batched) = numbers.dot_dimension_numbers
    group = numbers.rhs_group_dimensions
    simple = len(group) == 1 and not any(batched) and numbers.lhs_ragged_dimensions == (0,)
    if place != 1 or not simple or eqn.params.get("group_offset") is not None:
        raise ReadError("is a ragged product of another kind than jax.lax.ragged_dot's")
    if names(axes.value[group[0]]) != names(axes.batch):
        raise ReadError("has groups that are not the view's batch: give it MatrixView(batch=(0,))")
    summed = {name for axis in contracted[1] for name in names(axes.value[axis])}
    for side, digits in (("features", axes.rows), ("transposed", axes.cols)):
        if summed == set(names(digits)):
            return Ragged(eqn, 1, axes, dtype, line, 0, side, separable=False)
    raise ReadError("contracts a part of the rows or of the columns")


PRODUCTS: dict[str, Callable[..., Host]] = {
    "dot_general": dot_host,
    "conv_general_dilated": convolution_host,
    "ragged_dot_general": ragged_host,
    "gather": lambda eqn, place, *rest: look_up_host(eqn, *rest),
}
