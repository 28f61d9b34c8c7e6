"""Quantised kernels as nodes.

Parameters hold codes (`lowrank_jax.codes.Codes`), which are plain pytrees: their paths, bytes and
shardings are those of a checkpoint. A product sees a `QuantizedKernel` of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec

from lowrank_jax import kernels, linalg, sharding
from lowrank_jax.codes import Codes
from lowrank_jax.kernel_node import KernelNode, Op, formed
from lowrank_jax.trees import is_quantized
from lowrank_jax.typing import DTypeLike, Kernel, Shape


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedKernel(KernelNode):
    """A quantised array in a kernel's place: decoded where it is multiplied, and again in the
    backward pass, which keeps the codes alone.

    >>> import jax.numpy as jnp
    >>> import lowrank_jax as lrx
    >>> node = QuantizedKernel(lrx.linalg.quantize_blocks(jnp.ones((4, 6)), "linear"))
    >>> lrx.matmul(jnp.ones((3, 4)), node).shape
    (3, 6)

    Attributes:
      codes: the array.
      path: of its parameter, by which `lrx.meshes.use(parameters=)` says how it lies; "" where nobody
        knows.
    """

    codes: Codes
    path: str = dataclasses.field(default="", metadata={"static": True})

    @property
    def shape(self) -> Shape:
        return self.codes.shape

    @property
    def dtype(self) -> Any:
        return self.codes.dtype

    def multiply(self, op: Op, x: jax.Array, key: Any = None) -> tuple[jax.Array, Any]:
        # x K by a kernel that never forms K, where x is (..., n) as it comes
        direct = undecoded(self.codes, self._spec) if op.plain else None
        if direct is not None and op.stack is not None and not op.stack.cut:
            return op.stack.result(direct(op.stack.inputs(x))), None
        return super().multiply(op, x, key)

    def dense(self, dtype: DTypeLike | None = None) -> jax.Array:
        return dense(self.codes, self.dtype if dtype is None else dtype, self.path or None)

    @property
    def _spec(self) -> Any:
        return sharding.matrix_spec(self.path, self.view)


def as_node(kernel: Kernel) -> KernelNode | None:
    """The node of what stands in a kernel's place; None of an array."""
    if is_quantized(kernel):
        return QuantizedKernel(kernel)
    return kernel if isinstance(kernel, KernelNode) else None


def with_path(kernel: Kernel, path: str) -> Kernel:
    """A kernel whose codes, if it has any, know their parameter."""
    if is_quantized(kernel):
        return QuantizedKernel(kernel, path)
    if not isinstance(kernel, KernelNode) or type(kernel).with_base is KernelNode.with_base:
        return kernel
    base = kernel.base()
    is_coded = is_quantized(base) or isinstance(base, KernelNode)
    return kernel.with_base(with_path(base, path)) if is_coded else kernel


def dense(kernel: Kernel, dtype: DTypeLike, path: str | None = None) -> jax.Array:
    """The kernel as an array; only a quantised one is cast.

    One whose parameter's `path` is given is gathered for a product as codes, where
    `lrx.meshes.use(parameters=)` says how it lies: left to the compiler, its value is gathered, of
    2 or 4 bytes an entry.
    """
    if isinstance(kernel, KernelNode):
        return formed(kernel, dtype)
    if not is_quantized(kernel):
        return kernel
    spec = None if path is None else sharding.for_product(path, kernel.ndim)
    places = None if spec is None else kernel.partition_specs(spec)
    if spec is None or places is None:
        return kernel.dequantize(dtype)
    # what is gathered are codes, which are decoded where they then lie
    codes = sharding.constrained(kernel, places)
    return sharding.constrained(codes.dequantize(dtype), PartitionSpec(*spec))


def decoding(function: Callable, kernel: Kernel) -> Callable:
    """`function`, which decodes `kernel`: a quantised one again in the backward pass, which keeps
    its codes alone."""
    coded = is_quantized(kernel) or isinstance(kernel, QuantizedKernel)
    return jax.checkpoint(function) if coded else function


def undecoded(
    kernel: Kernel, spec: tuple[Any, Any] | None = None
) -> Callable[[jax.Array], jax.Array] | None:
    """`x -> x K` by `lrx.kernels.nf4_linear`, of one matrix in NF4 that asks for it; None of every
    other kernel.

    `spec` says how K lies on the mesh of `lrx.meshes.use`.
    """
    if (
        not isinstance(kernel, linalg.NormalFloat4)
        or kernel.implementation != "pallas"
        or kernel.ndim != 2
        or sharding.explicit_trace()
    ):
        return None
    return lambda x: kernels.nf4_linear(x, kernel, spec=spec)
