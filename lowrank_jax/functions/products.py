"""Products of an input and a kernel that may be more than an array.

An array is multiplied as JAX does it. Anything else (`lowrank_jax.kernel_node.KernelNode`) is read by
`lrx.adapted`: `lrx.matmul(x, node)` is `lrx.adapted(jnp.matmul)(x, node)`, on one axis of rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lowrank_jax import sharding
from lowrank_jax.functions.adapted import adapted
from lowrank_jax.kernel_node import KernelNode
from lowrank_jax.quantized import as_node
from lowrank_jax.rows import over_rows
from lowrank_jax.trees import is_quantized
from lowrank_jax.typing import Kernel


def dot_general(
    x: jax.Array,
    kernel: Kernel,
    dimension_numbers: Any,
    precision: Any = None,
    preferred_element_type: Any = None,
    **options: Any,
) -> jax.Array:
    """`jax.lax.dot_general(x, kernel, ...)` for a kernel that may be a node.

    The last axis of an array x is contracted on one axis of rows, `(N, n)`, wherever a mesh allows it
    (`rows.fold_rows`), so that the gradient of the kernel contracts one axis too.

    >>> import jax.numpy as jnp
    >>> dot_general(jnp.ones((2, 3)), jnp.ones((3, 4)), (((1,), (0,)), ((), ()))).shape
    (2, 4)
    """
    options |= {"precision": precision, "preferred_element_type": preferred_element_type}
    run = lambda x, kernel: _by_rows(x, kernel, dimension_numbers, **options)  # noqa: E731
    return _of(run, x, kernel)


def _of(function: Callable[..., jax.Array], x: jax.Array, kernel: Kernel, **options: Any) -> Any:
    """`function(x, kernel)`, read where the kernel is a node; codes are decoded to the dtype of x."""
    if as_node(kernel) is None:
        return (function(x, kernel), {}) if options else function(x, kernel)
    bottom = kernel
    while isinstance(bottom, KernelNode) and bottom.base() is not None:
        bottom = bottom.base()
    if is_quantized(bottom) and jnp.issubdtype(x.dtype, jnp.floating):
        own = function
        function = lambda x, kernel: own(x, kernel.astype(x.dtype))  # noqa: E731
    return adapted(function, **options)(x, kernel)


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
    run = lambda x, kernel: _by_rows(x, kernel, numbers, precision=None)  # noqa: E731
    y, beside = _of(run, x, kernel, aux=True)
    return y, next(iter(beside.values()), None)


def einsum(subscripts: str, x: jax.Array, kernel: Kernel, **options: Any) -> jax.Array:
    """`jnp.einsum(subscripts, x, kernel)` of two operands, for a kernel that may be a node.

    >>> import jax.numpy as jnp
    >>> einsum("bsd,dhk->bshk", jnp.ones((2, 5, 8)), jnp.ones((8, 2, 4))).shape
    (2, 5, 2, 4)
    """
    return _of(lambda x, kernel: jnp.einsum(subscripts, x, kernel, **options), x, kernel)
