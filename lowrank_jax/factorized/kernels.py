"""Kernels in factors: `W = a b`, and `W = a b + S` with a sparse S.

A model that is low-rank from the start holds factors where it would hold a matrix. Both are kernel
nodes, so that `lrx.matmul`, `lrx.einsum` and `lrx.dot_general` take them, alone, in stacks that a scan
slices, under adapters. Their arrays are ordinary leaves: an optimizer sees `kernel/a` and `kernel/b`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_jax.kernel_node import KernelNode, Op
from lowrank_jax.serialization import serializable
from lowrank_jax.typing import DTypeLike, Key, Shape


@serializable
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRankKernel(KernelNode):
    """A kernel `(batch..., n, m)` that is a product of thin factors, and is multiplied as one.

        y = (x a) b        2 N r (n + m) operations in place of 2 N n m

    The gradient is that of the factors, `∂a = xᵀ (∂y bᵀ)` and `∂b = (x a)ᵀ ∂y`; no array of the
    kernel's size is made in either direction. A transposed product, `x Wᵀ`, is `(x bᵀ) aᵀ`. Products
    are counted in the dtype of x and summed in float32.

    Attributes:
      a: `(batch..., n, r)`.
      b: `(batch..., r, m)`.

    Raises:
      ValueError: for a product that contracts neither all rows nor all columns.

    >>> import jax, jax.numpy as jnp
    >>> import lowrank_jax as lrx
    >>> from lowrank_jax.factorized import LowRankKernel
    >>> kernel = LowRankKernel(jnp.ones((4, 2)), jnp.ones((2, 6)))
    >>> lrx.matmul(jnp.ones((3, 4)), kernel)[0].tolist()
    [8.0, 8.0, 8.0, 8.0, 8.0, 8.0]
    >>> grads = jax.grad(lambda kernel: jnp.sum(lrx.matmul(jnp.ones((3, 4)), kernel)))(kernel)
    >>> grads.a.shape, grads.b.shape
    ((4, 2), (2, 6))
    """

    a: jax.Array
    b: jax.Array

    @property
    def shape(self) -> Shape:
        return (*self.a.shape[:-1], self.b.shape[-1])

    @property
    def dtype(self) -> Any:
        return jnp.result_type(self.a, self.b)

    @property
    def rank(self) -> int:
        """r."""
        return self.a.shape[-1]

    def multiply(self, op: Op, x: jax.Array, key: Key | None = None) -> tuple[jax.Array, Any]:
        del key
        return op.through(x, self.a, self.b), None

    def dense(self, dtype: DTypeLike | None = None) -> jax.Array:
        del dtype
        return jnp.matmul(self.a, self.b)


@serializable
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SparseLowRankKernel(KernelNode):
    """A kernel `(batch..., n, m)` that is low-rank plus sparse, on a support that stays.

        W = a b + S,    S[i, j] = value where i m + j is an index

    As in SLTrain (Han et al. 2024, arXiv:2406.02214) W is formed for the product and again for its
    backward pass, which keeps x, the factors and the values alone; forming it costs `2 n m r`
    operations, whatever the number of rows of x. The gradients are those of the factors, and of the
    values `∂S = (xᵀ ∂y)` at the support. The paper writes `alpha / r` before `a b`; it belongs into
    the start of the factors, or the learning rate.

    Attributes:
      a: `(batch..., n, r)`.
      b: `(batch..., r, m)`.
      indices: integers `(batch..., k)`, places in the flattened `(n, m)` matrix; int32 holds those
        below 2^31. Ascending ones lie close together. A place that is named twice adds both values.
      values: `(batch..., k)`.

    >>> import jax.numpy as jnp
    >>> import lowrank_jax as lrx
    >>> from lowrank_jax.factorized import SparseLowRankKernel
    >>> a, b, indices = jnp.ones((2, 1)), jnp.ones((1, 3)), jnp.array([0, 5])
    >>> kernel = SparseLowRankKernel(a, b, indices, jnp.array([10.0, 20.0]))
    >>> kernel.dense().tolist()
    [[11.0, 1.0, 1.0], [1.0, 1.0, 21.0]]
    >>> lrx.matmul(jnp.ones((1, 2)), kernel).tolist()
    [[12.0, 2.0, 22.0]]
    """

    a: jax.Array
    b: jax.Array
    indices: jax.Array
    values: jax.Array

    @property
    def shape(self) -> Shape:
        return (*self.a.shape[:-1], self.b.shape[-1])

    @property
    def dtype(self) -> Any:
        return jnp.result_type(self.a, self.b, self.values)

    def dense(self, dtype: DTypeLike | None = None) -> jax.Array:
        del dtype
        add = lambda flat, places, values: flat.at[places].add(values)  # noqa: E731
        for _ in self.shape[:-2]:
            add = jax.vmap(add)
        low = jnp.matmul(self.a, self.b).astype(self.dtype)  # (batch..., n, m)
        # (batch..., n m), which the indices count through
        flat = low.reshape(*self.shape[:-2], -1)
        return add(flat, self.indices, self.values.astype(self.dtype)).reshape(self.shape)
