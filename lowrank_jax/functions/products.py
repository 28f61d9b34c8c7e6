"""Products of an input and a kernel that may be more than an array.

An array is multiplied as JAX does it. Of anything else (`lowrank_jax.kernel_node.KernelNode`) a
product knows one verb: it describes itself by an `Op`, and asks the node to `multiply`. A loss that
multiplies by `lrx.matmul`, `lrx.einsum` or `lrx.dot_general` takes all of them; the Flax skins do so
for Flax models.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lowrank_jax import sharding
from lowrank_jax.kernel_node import KernelNode, Layout, Op, product
from lowrank_jax.matrices import MatrixView
from lowrank_jax.quantized import as_node, dense
from lowrank_jax.rows import over_rows
from lowrank_jax.typing import Kernel, Shape


def dot_general(
    x: jax.Array,
    kernel: Kernel,
    dimension_numbers: Any,
    precision: Any = None,
    preferred_element_type: Any = None,
    **options: Any,
) -> jax.Array:
    """`jax.lax.dot_general(x, kernel, ...)` for a kernel that may be a node.

    Of a node that does not form its matrix the contracted axes must be its rows, batched axes its
    remaining batch axes. The last axis of an array x is contracted on one axis of rows, `(N, n)`,
    wherever a mesh allows it (`rows.fold_rows`), so that the gradient of the kernel contracts one
    axis too.

    >>> import jax.numpy as jnp
    >>> dot_general(jnp.ones((2, 3)), jnp.ones((3, 4)), (((1,), (0,)), ((), ()))).shape
    (2, 4)
    """
    options |= {"precision": precision, "preferred_element_type": preferred_element_type}
    return multiplied(x, kernel, dimension_numbers, **options)


def multiplied(
    x: jax.Array,
    kernel: Kernel,
    dimension_numbers: Any,
    own: Callable[..., jax.Array] | None = None,
    **options: Any,
) -> jax.Array:
    """`dot_general(x, kernel, dimension_numbers, **options)`; products with arrays are `own`, or
    those of this file where it is None."""
    own = _by_rows if own is None or own is dot_general else own
    # a product of one's own need not know a type of the result that nobody asked for
    if options.get("preferred_element_type") is None:
        options = {k: v for k, v in options.items() if k != "preferred_element_type"}
    options = {"precision": None} | options
    seen = _seen(kernel)
    if not isinstance(seen, KernelNode):
        return own(x, seen, dimension_numbers, **options)
    op = _op(x, seen, _tuples(dimension_numbers), own, options)
    return _alone(seen, *seen.multiply(op, x))


def _seen(kernel: Kernel) -> Kernel:
    """What a dense product multiplies by: a node, or an array."""
    node = as_node(kernel)
    if node is None:
        return kernel
    seen = node.at("dot_general")
    return node if seen is node else _seen(seen)


def _alone(node: KernelNode, y: jax.Array, aux: Any) -> jax.Array:
    """The product, which nothing stands beside."""
    if aux is not None:
        raise ValueError(
            f"{node.label}: it gives a value beside the product, such as a router's loss, and nobody "
            "takes it; multiply by lrx.matmul(x, kernel, aux=True), which gives both"
        )
    return y


def _op(
    x: jax.Array,
    node: KernelNode,
    numbers: Any,
    own: Callable[..., jax.Array],
    options: dict[str, Any],
) -> Op:
    """What `own(x, node, numbers, **options)` does, as a node is told."""
    (_, contracted), (_, batch) = numbers

    def layout(view: MatrixView) -> Layout:
        if set(contracted) != set(view.rows) or set(batch) != set(view.batch):
            raise ValueError(
                f"{node.label}: the product contracts axes {contracted} and batches axes {batch} "
                f"of the kernel, but its view has rows {view.rows} and batch {view.batch}; give it "
                "another MatrixView, or leave it out"
            )
        return Layout.of(x.ndim, node.ndim, view, numbers)

    # which side of the kernel the product sums over: x K, or x Kᵀ
    side = _side(node, contracted, batch)
    contract, expand = _thin_products(x, node, side, layout, options)
    multiply = lambda x, kernel: multiplied(x, kernel, numbers, own, **options)  # noqa: E731
    # what the operator itself multiplies by: the kernel without the node, where there is one
    base = node if node.base() is None else node.base()
    shape = tuple(node.shape)
    if side != "other":
        shape = tuple(node.view.matrix_shape(shape)[-2:])  # (n, m)
    return Op(
        shape=shape,
        contract=contract,
        expand=expand,
        kernel=lambda: dense(base, x.dtype),
        own=lambda x: multiply(x, dense(base, x.dtype)),
        input=side,
        plain=own in (_by_rows, jax.lax.dot_general) and not any(options.values()),
        multiply=multiply,
        layout=layout,
        matrix=lambda kernel: _matrix_op(kernel, own, options),
    )


def _side(node: KernelNode, contracted: Shape, batch: Shape) -> str:
    """Whether a product contracts a node's rows, its columns, or something else."""
    if node.ndim < 2 or set(batch) != set(node.view.batch):
        return "other"
    sides = {"features": node.view.rows, "transposed": node.view.cols}
    return next((name for name, axes in sides.items() if set(axes) == set(contracted)), "other")


def _thin_products(
    x: jax.Array,
    node: KernelNode,
    side: str,
    layout: Callable[[MatrixView], Layout],
    options: dict[str, Any],
) -> tuple[Callable[[Any, jax.Array], jax.Array], Callable[[jax.Array, jax.Array], jax.Array]]:
    """`(contract, expand)` of a product, by factors with the kernel's batch axes in front."""

    def laid() -> tuple[Layout, tuple[int, ...]]:
        view = node.view
        if side == "transposed":  # the columns are the inputs
            view = MatrixView(batch=view.batch, rows=view.cols, cols=view.rows)
        return layout(view), tuple(node.shape[axis] for axis in view.cols)

    def thin(x, factor, axes):
        # (batch..., free..., n) times (batch..., n, q), in two dimensions but for the batch
        run = lambda x, factor: product(x, factor, options["precision"])  # noqa: E731
        for _ in range(axes):
            run = jax.vmap(run)
        return run(x, factor)

    def contract(x, factor):
        own, _ = laid()
        return thin(own.inputs(x), factor, own.batch)

    def expand(low, factor):
        own, cols = laid()
        y = own.result(thin(low, factor, own.batch), cols)
        # summed in float32, given in the type that the product with an array has
        return y.astype(options.get("preferred_element_type") or jnp.result_type(x, node.dtype))

    return contract, expand


def _matrix_op(kernel: Kernel, own: Callable[..., jax.Array], options: dict[str, Any]) -> Op:
    """The operator `x (..., n) -> x K` of one matrix, an array or a node."""

    # the last axis of x with the first of K
    numbers = lambda x: (((x.ndim - 1,), (0,)), ((), ()))  # noqa: E731
    return Op(
        shape=tuple(kernel.shape),
        contract=lambda x, factor: product(x, factor, options["precision"]),
        kernel=lambda: dense(kernel, kernel.dtype),
        own=lambda x: multiplied(x, kernel, numbers(x), own, **options),
    )


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


@overload
def matmul(x: jax.Array, kernel: Kernel, *, aux: Literal[False] = False) -> jax.Array: ...


@overload
def matmul(x: jax.Array, kernel: Kernel, *, aux: Literal[True]) -> tuple[jax.Array, Any]: ...


def matmul(x, kernel, *, aux=False):
    """`x (..., d_in) @ kernel (d_in, d_out)` for a kernel that may be a node.

    Args:
      x, kernel: the operands.
      aux: return `(y, aux)`, with what the node gives beside the product: of a kernel with adapters
        a tuple, an entry for each that gives anything; None where there is nothing.

    >>> import jax.numpy as jnp
    >>> matmul(jnp.ones((2, 5, 3)), jnp.ones((3, 4))).shape
    (2, 5, 4)
    >>> matmul(jnp.ones((2, 3)), jnp.ones((3, 4)), aux=True)[1] is None
    True
    """
    numbers = (((x.ndim - 1,), (0,)), ((), ()))
    if not aux:
        return dot_general(x, kernel, numbers)
    seen = _seen(kernel)
    if not isinstance(seen, KernelNode):
        return dot_general(x, seen, numbers), None
    return seen.multiply(_op(x, seen, numbers, _by_rows, {"precision": None}), x)


def einsum(subscripts: str, x: jax.Array, kernel: Kernel, **options: Any) -> jax.Array:
    """`jnp.einsum(subscripts, x, kernel)` of two operands, for a kernel that may be a node.

    An index that only one operand has and the result lacks is not supported for a node that does
    not form its matrix: one with a tap or adapters, or in factors.

    >>> import jax.numpy as jnp
    >>> einsum("bsd,dhk->bshk", jnp.ones((2, 5, 8)), jnp.ones((8, 2, 4))).shape
    (2, 5, 2, 4)
    """
    seen = _seen(kernel)
    if not isinstance(seen, KernelNode):
        return jnp.einsum(subscripts, x, seen, **options)
    if not seen.factored:  # any einsum of its matrix will do
        return _alone(seen, *seen.multiply(_einsum_op(subscripts, seen, options), x))
    numbers, order = _numbers(subscripts, x, seen)
    return jnp.transpose(dot_general(x, seen, numbers, **options), order)


def _einsum_op(subscripts: str, node: KernelNode, options: dict[str, Any]) -> Op:
    """An einsum as a node is told that multiplies by its matrix alone."""

    def refused(*_: Any) -> Any:
        raise ValueError(
            f"einsum {subscripts!r}: {node.label} multiplies by Op.multiply alone here"
        )

    own = lambda x, kernel: jnp.einsum(subscripts, x, dense(kernel, x.dtype), **options)  # noqa: E731
    return Op(
        shape=node.shape,
        contract=refused,
        expand=refused,
        kernel=lambda: dense(node, node.dtype),
        own=lambda x: own(x, node),
        input="other",
        multiply=own,
        layout=refused,
        matrix=refused,
    )


def _numbers(subscripts: str, x: jax.Array, node: KernelNode) -> tuple[Any, tuple[int, ...]]:
    """`(dimension_numbers, order)` of an einsum: a dot_general, and how its axes are transposed."""
    left, right, out = _indices(subscripts, x.ndim, node.ndim)
    # an index of both operands is a batch axis where the result keeps it, else it is summed over
    batch = [name for name in left if name in right and name in out]
    contract = [name for name in left if name in right and name not in out]
    free = [[name for name in names if name not in batch + contract] for names in (left, right)]
    # the axes of a dot_general: batch, free ones of x, free ones of the kernel
    result = batch + free[0] + free[1]
    if (
        sorted(result) != sorted(out)
        or len(set(left)) != len(left)
        or len(set(right)) != len(right)
    ):
        raise ValueError(
            f"einsum {subscripts!r}: with {node.label} every index of the product must be "
            "contracted or kept, once"
        )
    axes = lambda names, among: tuple(among.index(name) for name in names)  # noqa: E731
    numbers = (
        (axes(contract, left), axes(contract, right)),
        (axes(batch, left), axes(batch, right)),
    )
    return numbers, axes(out, result)


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
