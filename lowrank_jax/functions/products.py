"""Products of an input and a kernel that may be more than an array.

A kernel is an array, a quantised array (`dequantize(dtype)`), or a node that knows how to multiply
(`dot_general(x, dimension_numbers, ...)`): a kernel with a tap of projected backprop, or one with
adapters. A loss that multiplies by `lrx.matmul`, `lrx.einsum` or `lrx.dot_general` takes all of
them; the Flax skins do so for Flax models.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lowrank_jax import kernels, linalg, sharding
from lowrank_jax.matrices import MatrixView
from lowrank_jax.rows import over_rows
from lowrank_jax.trees import is_quantized


def dense(kernel: Any, dtype: Any, path: str | None = None) -> jax.Array:
    """The kernel as an array; only a quantised one is cast.

    One whose parameter's `path` is given is gathered for a product as codes, where
    `lrx.meshes.use(parameters=)` says how it lies: left to the compiler, its value is gathered, of
    2 or 4 bytes an entry.
    """
    if not is_quantized(kernel):
        return kernel
    spec = None if path is None else sharding.for_product(path, kernel.ndim)
    places = None if spec is None else kernel.specs(spec)
    if spec is None or places is None:
        return kernel.dequantize(dtype)
    codes = sharding.constrained(kernel, places)
    return sharding.constrained(codes.dequantize(dtype), jax.sharding.PartitionSpec(*spec))


def decoding(function: Callable, kernel: Any) -> Callable:
    """`function`, which decodes `kernel`: a quantised one again in the backward pass, which keeps
    its codes alone."""
    return jax.checkpoint(function) if is_quantized(kernel) else function


def undecoded(
    kernel: Any, spec: tuple[Any, Any] | None = None
) -> Callable[[jax.Array], jax.Array] | None:
    """`x -> x K` by `lrx.kernels.nf4_linear`, of one matrix in NF4 that asks for it; None of every
    other kernel.

    `spec` says how K lies on the mesh of `lrx.meshes.use`.
    """
    if (
        not isinstance(kernel, linalg.NormalFloat4)
        or kernel.products != "kernel"
        or kernel.ndim != 2
    ):
        return None
    if sharding.explicit_trace():
        return None
    return lambda x: kernels.nf4_linear(x, kernel, spec=spec)


def dot_general(
    x: jax.Array,
    kernel: Any,
    dimension_numbers: Any,
    precision: Any = None,
    preferred_element_type: Any = None,
    **options: Any,
) -> jax.Array:
    """`jax.lax.dot_general(x, kernel, ...)` for a kernel that may have a tap or adapters.

    Of such a kernel the contracted axes must be its rows, batched axes its remaining batch axes.
    The last axis of an array x is contracted on one axis of rows, `(N, n)`, wherever a mesh allows
    it (`rows.fold_rows`), so that the gradient of the kernel contracts one axis too.

    >>> import jax.numpy as jnp
    >>> dot_general(jnp.ones((2, 3)), jnp.ones((3, 4)), (((1,), (0,)), ((), ()))).shape
    (2, 4)
    """
    options |= {"precision": precision, "preferred_element_type": preferred_element_type}
    direct = undecoded(kernel)
    plain = (((x.ndim - 1,), (0,)), ((), ()))
    if direct is not None and not any(options.values()) and _tuples(dimension_numbers) == plain:
        return direct(x)
    if hasattr(kernel, "dot_general"):
        return kernel.dot_general(x, dimension_numbers, **options)
    own = lambda x, kernel: _by_rows(x, dense(kernel, x.dtype), dimension_numbers, **options)  # noqa: E731
    return decoding(own, kernel)(x, kernel)


def _by_rows(x: jax.Array, kernel: jax.Array, dimension_numbers: Any, **options: Any) -> jax.Array:
    """`jax.lax.dot_general` of two arrays; where the last axis of x is contracted, on one axis of
    rows."""
    (contracted, of_kernel), batched = _tuples(dimension_numbers)
    place, last = options.get("out_sharding"), x.ndim - 1
    apart = place is not None and (
        not isinstance(place, PartitionSpec) or sharding.divides_any(place[1:last])
    )
    if contracted != (last,) or any(batched) or apart:
        return jax.lax.dot_general(x, kernel, dimension_numbers, **options)

    def product(rows: jax.Array) -> jax.Array:
        own = options
        if rows.ndim < x.ndim and place is not None:
            own = options | {"out_sharding": PartitionSpec(*place[:1], *place[last:])}
        return jax.lax.dot_general(rows, kernel, (((rows.ndim - 1,), of_kernel), ((), ())), **own)

    y = over_rows(product, x)
    return y if place is None else sharding.reshard(y, tuple(place))


def _tuples(numbers: Any) -> Any:
    return tuple(map(_tuples, numbers)) if isinstance(numbers, list | tuple) else numbers


def matmul(x: jax.Array, kernel: Any) -> jax.Array:
    """`x (..., d_in) @ kernel (d_in, d_out)` for a kernel that may have a tap or adapters.

    >>> import jax.numpy as jnp
    >>> matmul(jnp.ones((2, 5, 3)), jnp.ones((3, 4))).shape
    (2, 5, 4)
    """
    return dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))


def einsum(subscripts: str, x: jax.Array, kernel: Any, **options: Any) -> jax.Array:
    """`jnp.einsum(subscripts, x, kernel)` of two operands, for a kernel that may have a tap or
    adapters.

    An index that only one operand has and the result lacks is not supported for a kernel with a tap
    or adapters.

    >>> import jax.numpy as jnp
    >>> einsum("bsd,dhk->bshk", jnp.ones((2, 5, 8)), jnp.ones((8, 2, 4))).shape
    (2, 5, 2, 4)
    """
    if not hasattr(kernel, "dot_general"):
        own = lambda x, kernel: jnp.einsum(subscripts, x, dense(kernel, x.dtype), **options)  # noqa: E731
        return decoding(own, kernel)(x, kernel)
    left, right, out = _indices(subscripts, x.ndim, kernel.ndim)
    batch = [name for name in left if name in right and name in out]
    contract = [name for name in left if name in right and name not in out]
    free = [[name for name in names if name not in batch + contract] for names in (left, right)]
    result = batch + free[0] + free[1]
    if (
        sorted(result) != sorted(out)
        or len(set(left)) != len(left)
        or len(set(right)) != len(right)
    ):
        raise ValueError(
            f"einsum {subscripts!r}: with a tap or adapters every index of the product must be "
            "contracted or kept, once"
        )
    axes = lambda names, among: tuple(among.index(name) for name in names)  # noqa: E731
    numbers = (
        (axes(contract, left), axes(contract, right)),
        (axes(batch, left), axes(batch, right)),
    )
    return jnp.transpose(dot_general(x, kernel, numbers, **options), axes(out, result))


def _indices(subscripts: str, *ndims: int) -> list[list[str]]:
    """The names of the axes of both operands and the result; an ellipsis stands for axes "0", "1",
    ... of x."""
    operands, arrow, out = subscripts.replace(" ", "").partition("->")
    names = operands.split(",")
    if not arrow or len(names) != 2 or "..." in names[1]:
        raise ValueError(
            f"einsum {subscripts!r}: write both operands and the result, and no ellipsis in the "
            "kernel"
        )
    extra = [str(i) for i in range(ndims[0] - len(names[0].replace("...", "")))]

    def expand(term: str) -> list[str]:
        before, dots, after = term.partition("...")
        return [*before, *(extra if dots else []), *after]

    return [expand(names[0]), expand(names[1]), expand(out)]


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the operands of a product lie: axes of x as (batch, free, rows), of the result as (batch,
    free, cols).

    Attributes:
      x: the axes of x in that order.
      y: the axes of the result in that order.
      batch, free: how many axes are batch axes of the kernel, and how many are x's own.

    >>> import jax.numpy as jnp
    >>> heads = MatrixView(rows=(0, 1), cols=(2,))  # an output projection (heads, head_dim, d)
    >>> layout = Layout.of(4, 3, heads, (((2, 3), (0, 1)), ((), ())))
    >>> layout.inputs(jnp.ones((2, 5, 4, 8))).shape
    (2, 5, 32)
    """

    x: tuple[int, ...]
    y: tuple[int, ...]
    batch: int
    free: int

    @classmethod
    def of(cls, x_ndim: int, kernel_ndim: int, view: MatrixView, dimension_numbers: Any) -> Layout:
        """Of `dot_general(x, kernel, dimension_numbers)`, which contracts the view's rows, and
        batches its batch."""
        (contract_x, contract_w), (batch_x, batch_w) = (
            tuple(map(tuple, axes)) for axes in dimension_numbers
        )
        # the axes of the product: batch, free axes of x, free axes of the kernel in their own order
        order = [contract_x[contract_w.index(axis)] for axis in view.rows]
        free = [axis for axis in range(x_ndim) if axis not in contract_x and axis not in batch_x]
        cols = [
            axis for axis in range(kernel_ndim) if axis not in view.rows and axis not in batch_w
        ]
        first = len(batch_x) + len(free)
        aligned = [batch_x[batch_w.index(axis)] for axis in view.batch]
        batch_y = [batch_w.index(axis) for axis in view.batch]
        return cls(
            x=(*aligned, *free, *order),
            y=(
                *batch_y,
                *range(len(batch_x), first),
                *(first + cols.index(axis) for axis in view.cols),
            ),
            batch=len(batch_x),
            free=len(free),
        )

    def inputs(self, x: jax.Array) -> jax.Array:
        """x as `(batch..., free..., rows)`."""
        return self._matrices(x, self.x)

    def outputs(self, y: jax.Array) -> jax.Array:
        """The result, or its cotangent, as `(batch..., free..., cols)`."""
        return self._matrices(y, self.y)

    def result(self, y: jax.Array, cols: Sequence[int]) -> jax.Array:
        """The inverse of `outputs`, for columns folded from axes of these sizes."""
        kept = self.batch + self.free
        if len(cols) > 1:
            y = sharding.reshape(y, (*y.shape[:kept], *cols), first=kept)
        if self.y == tuple(range(y.ndim)):
            return y
        return jnp.transpose(y, tuple(self.y.index(axis) for axis in range(y.ndim)))

    def _matrices(self, x: jax.Array, axes: Sequence[int]) -> jax.Array:
        if tuple(axes) != tuple(range(x.ndim)):
            x = jnp.transpose(x, axes)
        kept = self.batch + self.free
        if x.ndim == kept + 1:
            return x
        return sharding.reshape(x, (*x.shape[:kept], math.prod(x.shape[kept:])), first=kept)
