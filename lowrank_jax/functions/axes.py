"""Which axes of a value are which axes of a leaf.

A program transposes, reshapes, slices and splits a kernel before it multiplies by it. What it
multiplies by is then described by digits: an axis of the value is a list of digits, each a part of
an axis of the leaf in row-major order,

    leaf (D, H K)  --reshape-->  value (D, H, K):    axis 1 of the leaf = 8 h + k
    digits          0 | 1                            0 | 1.0 | 1.1

A reshape that splits an axis splits its digit everywhere; one that merges axes lists them behind
each other. All of this is known without any array.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp

from lowrank_jax import sharding
from lowrank_jax.matrices import MatrixView
from lowrank_jax.typing import Shape


class AxesError(ValueError):
    """A step that the digits of a value cannot follow."""


@dataclasses.dataclass(frozen=True)
class Digit:
    """A part of an axis of a leaf: index `i` of the value is index `start + i` out of `full`.

    Attributes:
      name: which: the axis of the leaf, then the halves of its splits. A negative first number is
        no axis of the leaf: one that was broadcast, or gathered.
      size: how many indices the value has of it.
      full, start: how many the leaf has, and which is the first.
    """

    name: tuple[int, ...]
    size: int
    full: int
    start: int = 0

    @property
    def cut(self) -> bool:
        """Whether the value has only some of its indices."""
        return self.size != self.full

    def halves(self, inner: int) -> tuple[Digit, Digit]:
        """`(major, minor)` of an index `major * inner + minor`."""
        if self.size % inner or self.full % inner or self.start % inner:
            raise AxesError(
                f"splits an axis, of which it has [{self.start}:{self.start + self.size}] out of "
                f"{self.full}, into parts of {inner}"
            )
        sizes = (self.size // inner, self.full // inner, self.start // inner)
        return Digit((*self.name, 0), *sizes), Digit((*self.name, 1), inner, inner)


Digits = tuple[Digit, ...]


def size_of(digits: Iterable[Digit]) -> int:
    """Of the axis that they make."""
    return math.prod(digit.size for digit in digits)


@dataclasses.dataclass(frozen=True)
class Axes:
    """The digits of a value, and what they are of a matrix.

    Attributes:
      value: of each axis of the value.
      leaf: of each axis of the leaf, without those that were taken apart.
      batch: the leading axes of the node's own arrays, in their order.
      rows, cols: of the matrices, in the order in which the view folds them.

    >>> view = MatrixView(rows=(0,), cols=(1, 2))  # a query's kernel (d, heads, head_dim)
    >>> axes = Axes.of((16, 4, 8), view).transpose((1, 2, 0)).reshape((32, 16))
    >>> axes.shape, [digit.size for digit in axes.cols]
    ((32, 16), [4, 8])
    """

    value: tuple[Digits, ...]
    leaf: tuple[Digits, ...]
    batch: Digits = ()
    rows: Digits = ()
    cols: Digits = ()

    @classmethod
    def of(cls, shape: Shape, view: MatrixView | None) -> Axes:
        """Of a leaf as it is; without a view nothing is said of matrices."""
        digits = tuple(Digit((axis,), size, size) for axis, size in enumerate(shape))
        alone = tuple((digit,) for digit in digits)
        if view is None:
            return cls(alone, alone)
        view.matrix_shape(tuple(shape))  # or an error
        named = (tuple(digits[i] for i in axes) for axes in (view.batch, view.rows, view.cols))
        return cls(alone, alone, *named)

    @property
    def shape(self) -> Shape:
        """Of the value."""
        return tuple(map(size_of, self.value))

    @property
    def untouched(self) -> bool:
        """Whether the value is the leaf, but for axes that were taken apart."""
        return self.value == self.leaf

    @property
    def cut(self) -> bool:
        """Whether the value has only some rows or columns."""
        return any(digit.cut for digit in (*self.rows, *self.cols))

    def transpose(self, permutation: Sequence[int]) -> Axes:
        return dataclasses.replace(self, value=tuple(self.value[axis] for axis in permutation))

    def reshape(self, shape: Sequence[int]) -> Axes:
        """The same digits in row-major order, split where an axis of the new shape ends within
        one."""
        queue = [digit for digits in self.value for digit in digits]
        axes: Axes = self
        made: list[list[Digit]] = []
        for size in shape:
            own: list[Digit] = []
            if size == 1 and queue and queue[0].size == 1:
                own.append(queue.pop(0))
            while (have := size_of(own)) < size:
                digit = queue.pop(0)
                need = size // have  # of this axis is left
                if digit.size > need:
                    if digit.size % need:
                        raise AxesError(f"reshapes an axis of {digit.size} into {tuple(shape)}")
                    inner = digit.size // need
                    axes = axes.split(digit.name, inner)
                    digit, rest = digit.halves(inner)
                    queue.insert(0, rest)
                own.append(digit)
            if size_of(own) != size:
                raise AxesError(f"reshapes {self.shape} into {tuple(shape)}")
            made.append(own)
        return dataclasses.replace(axes, value=tuple(map(tuple, made)))

    def split(self, name: tuple[int, ...], inner: int) -> Axes:
        """With the halves of a digit in its place, everywhere."""

        def put(digits: Digits) -> Digits:
            parts = (one.halves(inner) if one.name == name else (one,) for one in digits)
            return tuple(part for own in parts for part in own)

        return self._each(put)

    def _each(self, put: Callable[[Digits], Digits]) -> Axes:
        return Axes(
            tuple(map(put, self.value)),
            tuple(map(put, self.leaf)),
            *map(put, (self.batch, self.rows, self.cols)),
        )

    def slice(self, axis: int, start: int, size: int) -> Axes:
        """Some indices of an axis of the value that is one digit."""
        if size == self.shape[axis]:
            return self
        digits = self.value[axis]
        if len(digits) != 1:
            # of several digits the minor ones must be there in full
            inner = size_of(digits[1:])
            if not digits or start % inner or size % inner:
                raise AxesError("slices an axis that was merged from several")
            start, size = start // inner, size // inner
        digit = digits[0]
        new = dataclasses.replace(digit, start=digit.start + start, size=size)
        value = list(self.value)
        value[axis] = (new, *digits[1:])
        put = lambda own: tuple(new if one.name == digit.name else one for one in own)  # noqa: E731
        # the leaf keeps all its indices
        rows, cols = put(self.rows), put(self.cols)
        return dataclasses.replace(self, value=tuple(value), rows=rows, cols=cols)

    def resized(self, name: tuple[int, ...], size: int) -> Axes:
        """With another number of matrices along a batch digit, of which the node then has as many."""
        new = Digit(name, size, size)
        return self._each(lambda digits: tuple(new if d.name == name else d for d in digits))

    def squeeze(self, dropped: Sequence[int]) -> Axes:
        kept = (digits for axis, digits in enumerate(self.value) if axis not in dropped)
        return dataclasses.replace(self, value=tuple(kept))

    def broadcast(self, shape: Shape, places: Sequence[int]) -> Axes:
        """`lax.broadcast_in_dim`: new axes are no axes of the leaf."""
        value: list[Digits] = []
        for axis, size in enumerate(shape):
            own = self.value[places.index(axis)] if axis in places else ()
            if size_of(own) != size:
                own = (Digit((-1 - axis, size, len(self.value)), size, size),)
            value.append(own)
        return dataclasses.replace(self, value=tuple(value))

    def without(self, digit: Digit) -> Axes:
        """With a batch digit taken apart."""
        drop = lambda digits: tuple(one for one in digits if one.name != digit.name)  # noqa: E731
        # an axis of the leaf that had no other digit is gone
        leaf = tuple(
            drop(digits)
            for digits in self.leaf
            if drop(digits) or all(one.name != digit.name for one in digits)
        )
        return Axes(
            tuple(map(drop, self.value)), leaf, *map(drop, (self.batch, self.rows, self.cols))
        )

    # ------------------------------------------------------------------ arrays

    def to_matrices(self, array: jax.Array) -> jax.Array:
        """A value as `(batch..., rows, cols)`, with the rows and columns that it has."""
        return arrange(array, self.value, self.matrix_axes)

    def from_matrices(self, matrices: jax.Array) -> jax.Array:
        """The value of matrices `(batch..., rows, cols)`."""
        return arrange(matrices, self.matrix_axes, self.value)

    def from_leaf(self, array: jax.Array) -> jax.Array:
        """The value of the leaf."""
        here = {digit.name: digit for digits in self.value for digit in digits}
        cut = lambda digits: tuple(here.get(digit.name, digit) for digit in digits)  # noqa: E731
        for axis, digits in enumerate(self.leaf):
            array = take_digits(array, axis, cut(digits))
        return arrange(array, tuple(map(cut, self.leaf)), self.value)

    @property
    def matrix_axes(self) -> tuple[Digits, ...]:
        """The axes of a stack of matrices."""
        return (*((digit,) for digit in self.batch), self.rows, self.cols)

    def taken(self, array: jax.Array, axis: int, side: str) -> jax.Array:
        """Of an array with all rows (or columns) along an axis those that the value has."""
        return take_digits(array, axis, getattr(self, side))

    def padded(self, array: jax.Array, axis: int, side: str) -> jax.Array:
        """The inverse of `taken`, with zeros elsewhere."""
        digits: Digits = getattr(self, side)
        if not any(digit.cut for digit in digits):
            return array
        axis %= array.ndim
        sizes = tuple(digit.size for digit in digits)
        array = array.reshape(*array.shape[:axis], *sizes, *array.shape[axis + 1 :])
        widths = [(0, 0)] * array.ndim
        for place, digit in enumerate(digits, axis):
            widths[place] = (digit.start, digit.full - digit.size - digit.start)
        array = jnp.pad(array, widths)
        full = math.prod(digit.full for digit in digits)
        return array.reshape(*array.shape[:axis], full, *array.shape[axis + len(digits) :])


def take_digits(array: jax.Array, axis: int, digits: Digits) -> jax.Array:
    """Of an axis made of the full digits the indices that are there."""
    if not any(digit.cut for digit in digits):
        return array
    axis %= array.ndim
    full = tuple(digit.full for digit in digits)
    array = array.reshape(*array.shape[:axis], *full, *array.shape[axis + 1 :])
    for place, digit in enumerate(digits, axis):
        array = jax.lax.slice_in_dim(array, digit.start, digit.start + digit.size, axis=place)
    sizes = size_of(digits)
    return array.reshape(*array.shape[:axis], sizes, *array.shape[axis + len(digits) :])


def names(digits: Iterable[Digit]) -> list[tuple[int, ...]]:
    """Of the digits that take part in a layout: an axis of one index may stand anywhere."""
    return [digit.name for digit in digits if digit.size != 1]


def arrange(array: jax.Array, given: Sequence[Digits], wanted: Sequence[Digits]) -> jax.Array:
    """An array whose axes are made of digits, with the same digits in other axes."""
    order = names(digit for digits in given for digit in digits)
    target = names(digit for digits in wanted for digit in digits)
    if sorted(order) != sorted(target):
        raise AxesError("has not all the axes of the leaf, or others too")
    shape = tuple(map(size_of, wanted))
    if order == target:
        return _reshape(array, shape)
    sizes = {digit.name: digit.size for digits in given for digit in digits}
    array = _reshape(array, tuple(sizes[name] for name in order))
    return _reshape(jnp.transpose(array, tuple(map(order.index, target))), shape)


def _reshape(array: jax.Array, shape: Shape) -> jax.Array:
    if array.shape == shape:
        return array
    # the first axis that changes
    same = [a == b for a, b in zip(array.shape, shape, strict=False)]
    return sharding.reshape(array, shape, first=same.index(False) if False in same else len(same))
