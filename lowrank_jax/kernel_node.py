"""What may stand in a kernel's place, and what a product does with it.

A kernel is an array, or a `KernelNode`: a pytree with the shape of the kernel that knows how to be
multiplied. A tap of projected backprop, a kernel with adapters, a quantised one and one that is kept
in factors are nodes, and so is whatever else derives from `KernelNode`. A product (`lrx.matmul`,
`lrx.einsum`, `lrx.dot_general`, a layer of Flax) asks a node one thing only:

    y, aux = node.multiply(op, x)

The `Op` says what the product does, in words that do not depend on which product it is: multiply by
an array in the node's place, by a thin factor, and bring a thin result to where the product's own
would lie.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lowrank_jax import sharding
from lowrank_jax.matrices import MatrixView
from lowrank_jax.reprs import Short
from lowrank_jax.rows import over_rows
from lowrank_jax.typing import DTypeLike, Kernel, Key, Pytree, Shape

INPUTS = ("features", "indices", "windows", "transposed")
# What multiplies by a kernel, in the words of jaxprs.
USES = ("gather", "dot_general", "conv_general_dilated")


def product(x: jax.Array, matrix: jax.Array, precision: Any = None) -> jax.Array:
    """`x (..., n) @ matrix (n, q)`, counted in the dtype of x and summed in float32 (float64 where
    x is)."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    matrix = matrix.astype(x.dtype)

    def rows(x):
        axes, spec = (((x.ndim - 1,), (0,)), ((), ())), sharding.product_spec(x, matrix)
        options = {} if spec is None else {"out_sharding": jax.sharding.PartitionSpec(*spec)}
        return jax.lax.dot_general(
            x, matrix, axes, precision=precision, preferred_element_type=wide, **options
        )

    return over_rows(rows, x)


def _one_matrix(*_: Any) -> Any:
    raise ValueError("the operator of one matrix has nothing to lay out, and no other kernel")


@dataclasses.dataclass(frozen=True)
class Op:
    """A linear operator without bias: what a host does to its input x, as one matrix `K (n, m)`.

    A host is what multiplies by a kernel: a dense product, a look-up, an output layer tied to one,
    a convolution. The operator of a node in a product has the kernel's batch axes in front of its
    factors, and `multiply`, `layout` and `matrix` besides; that of one matrix, which adapters wrap, has none.

    Attributes:
      shape: (n, m).
      contract: `(x, A (batch..., n, q)) -> z (batch..., free..., q)`, the host's input times another
        matrix, the host's way: `x @ A`, `A[ids]`, a convolution. Products are counted in the dtype
        of x and summed in float32. Where `input` is "transposed" the host computes `x Kᵀ`, and A
        has m rows.
      kernel: `() -> K (n, m)`; asked for only where it is needed.
      own: `x -> y`, the operator itself.
      input: what x is: "features" (contract is `x @ A`), "indices", "windows" of a convolution, or
        "transposed".
      expand: `(z (batch..., free..., q), B (batch..., q, m)) -> y`, a thin result brought to the
        host's output.
      line: where the user's program makes this product, for errors; "" where nobody knows.
      plain: `own` is `x @ K` with nothing of the host's own about it (precision, dtype, another
        product, adapters), so that a kernel may make it.
      aux: `x -> values`, what adapters give beside the product, such as the loss of a router: one
        entry for each adapter that gives anything; None where none does.
      multiply: `(x, kernel) -> y`, the host's own product with an array, or with another node, in the
        node's place.
      layout: `view -> Layout` of the operands, for a node of this view; ValueError where the product
        does not contract the view's rows.
      matrix: `K -> Op` of one matrix of the kernel, an array or a node, whose input is
        `(free..., n)`.

    >>> import jax.numpy as jnp
    >>> matrix = jnp.ones((3, 4))
    >>> op = Op((3, 4), product, lambda: matrix, lambda x: x @ matrix)
    >>> op(jnp.ones((2, 3))).shape, op.through(jnp.ones((2, 3)), matrix[:, :1], matrix[:1]).shape
    ((2, 4), (2, 4))
    """

    shape: Shape
    contract: Callable[[Any, jax.Array], jax.Array]
    kernel: Callable[[], jax.Array]
    own: Callable[[Any], jax.Array]
    input: str = "features"
    expand: Callable[[jax.Array, jax.Array], jax.Array] = product
    line: str = ""
    plain: bool = False
    aux: Callable[[Any], tuple] | None = None
    multiply: Callable[[Any, Kernel], jax.Array] = _one_matrix
    layout: Callable[[MatrixView], Layout] = _one_matrix
    matrix: Callable[[Kernel], Op] = _one_matrix

    def __call__(self, x: Any) -> jax.Array:
        return self.own(x)

    def through(self, x: Any, a: jax.Array, b: jax.Array, scale: Any = None) -> jax.Array:
        """`x a diag(scale) b`, or `x bᵀ diag(scale) aᵀ` for a transposed host; `a b` is never
        formed."""
        if self.input == "transposed":
            # (a b)ᵀ = bᵀ aᵀ
            a, b = jnp.swapaxes(b, -1, -2), jnp.swapaxes(a, -1, -2)
        low = self.contract(x, a)  # (..., r)
        low = low if scale is None else low * scale
        # the second product is counted in the dtype of the input, where that has one
        compute = x.dtype if jnp.issubdtype(x.dtype, jnp.floating) else low.dtype
        return self.expand(low.astype(compute), b)

    def thin(self, x: Any, factors: Any) -> jax.Array:
        """`x a diag(scale) b` of an adapter's factors `(a, scale, b, rank_of)`."""
        a, scale, b, _ = factors
        return self.through(x, a, b, scale)

    def plus(self, forward: Callable[[Any], jax.Array], delta: Callable[[], jax.Array]) -> Op:
        """This operator plus another: `forward(x)` in the product, `delta()` in the kernel."""

        def own(x):
            y = self(x)
            return y + sharding.match_sharding(forward(x), y)

        return dataclasses.replace(
            self, own=own, kernel=lambda: self.kernel() + delta(), plain=False
        )

    def giving(self, value: Callable[[Any], Pytree]) -> Op:
        """This operator, and `value(x)` beside its result: a loss of a router or a gate.

        What value and product both need is computed once under jit.
        """
        before = self.aux

        def aux(x):
            return (*(() if before is None else before(x)), value(x))

        return dataclasses.replace(self, aux=aux)

    def replaced(self, kernel: Callable[[], jax.Array]) -> Op:
        """The host's product with another kernel, which is formed again in the backward pass rather
        than kept."""

        def own(x):
            return jax.checkpoint(lambda x: self.contract(x, self.as_factor(kernel())))(x)

        return dataclasses.replace(self, own=own, kernel=kernel, plain=False)

    def as_factor(self, kernel: jax.Array) -> jax.Array:
        """A kernel in the orientation that `contract` wants."""
        return kernel.T if self.input == "transposed" else kernel


def _giving_a_pair(multiply: Callable[..., Any]) -> Callable[..., Any]:
    """`multiply` of a node, whose result must be a pair; what unpacks it would tell of two rows."""

    @functools.wraps(multiply)
    def run(self, op, x, key=None):
        found = multiply(self, op, x, key)
        if not isinstance(found, tuple) or len(found) != 2:
            raise TypeError(
                f"{self.label}.multiply returned a {type(found).__name__}; return (y, aux), the "
                "product and what adapters give beside it, None for nothing"
            )
        return found

    return run


class KernelNode(Short):
    """Base of what may stand in a kernel's place.

    A subclass is a pytree (`jax.tree_util.register_dataclass`) with `shape` and either `dense`, by
    which every product can be made, or `multiply`, where the matrix need not be formed; or both.

    Class attributes:
      whole_matrix: it means nothing for some of its rows or columns alone, so that a program that
        slices the kernel must be given `dense()`.

    >>> import dataclasses, jax, jax.numpy as jnp
    >>> import lowrank_jax as lrx
    >>> @jax.tree_util.register_dataclass
    ... @dataclasses.dataclass(frozen=True)
    ... class Diagonal(lrx.KernelNode):
    ...     entries: jax.Array
    ...
    ...     @property
    ...     def shape(self):
    ...         return (*self.entries.shape, self.entries.shape[-1])
    ...
    ...     @property
    ...     def dtype(self):
    ...         return self.entries.dtype
    ...
    ...     def dense(self, dtype=None):
    ...         return self.entries[..., None] * jnp.eye(self.shape[-1], dtype=self.dtype)
    >>> lrx.matmul(jnp.ones((1, 2)), Diagonal(jnp.array([2.0, 3.0]))).tolist()
    [[2.0, 3.0]]
    """

    whole_matrix: ClassVar[Any] = False

    def __init_subclass__(cls, **options: Any):
        super().__init_subclass__(**options)
        if "multiply" in vars(cls):
            cls.multiply = _giving_a_pair(vars(cls)["multiply"])  # type: ignore[method-assign]

    @property
    def shape(self) -> Shape:
        """Of the kernel."""
        return self._known_base().shape

    @property
    def dtype(self) -> Any:
        """Of the kernel."""
        return self._known_base().dtype

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def path(self) -> str:
        """The "/"-joined path of its leaf; "" where it does not know."""
        return ""

    @property
    def uses(self) -> tuple[str, ...]:
        """The products that see it, out of `USES`; () is all. Others see its base."""
        return ()

    @property
    def view(self) -> MatrixView:
        """Which axes are rows, columns and batch; by default the last two, and those before."""
        last = self.ndim - 1
        return MatrixView(batch=tuple(range(last - 1)), rows=(last - 1,), cols=(last,))

    @property
    def label(self) -> str:
        """What this is, for errors."""
        return f"{type(self).__name__} {self.path!r}" if self.path else type(self).__name__

    @property
    def factored(self) -> bool:
        """Whether `multiply` asks for more than `Op.multiply`, so that a product must contract the
        rows of the view."""
        return type(self).multiply is not KernelNode.multiply

    def base(self) -> Kernel | None:
        """The kernel without this: an array, a quantised one, or another node; None where there is
        none."""
        return None

    def with_base(self, base: Kernel) -> KernelNode:
        """This in front of another base."""
        del base
        raise ValueError(f"{self.label} has no base that could be another one")

    def at(self, use: str) -> Kernel:
        """What a product of one kind multiplies by: this, or its base where `uses` does not name
        it."""
        return self.base() if self.uses and use not in self.uses else self

    def parts(self) -> tuple[Pytree, Pytree]:
        """`(own, shared)`: arrays with the leaf's batch axes in front, which a scan slices, and
        arrays without, which it closes over. By default every array is its own."""
        return jax.tree.leaves(self), ()

    def with_parts(self, own: Pytree, shared: Pytree) -> Any:
        """This with other arrays, as `parts` gives them."""
        del shared
        return jax.tree.unflatten(jax.tree.structure(self), own)

    def multiply(self, op: Op, x: jax.Array, key: Key | None = None) -> tuple[jax.Array, Any]:
        """`(y, aux)`: the product that `op` describes, with this in the kernel's place.

        By default the product with `dense()`, which the backward pass forms again.

        Args:
          op: of the product; its factors are those of `view`.
          x: the host's input.
          key: draws what is random; None is deterministic.
        """
        del key
        # the matrix is formed again in the backward pass, which keeps the node alone
        run = lambda x, node: op.multiply(x, formed(node, x.dtype))  # noqa: E731
        return jax.checkpoint(run)(x, self), None

    def dense(self, dtype: DTypeLike | None = None) -> jax.Array | None:
        """The kernel as one array; None where it may not be formed.

        `dtype` is that of the product: what is decoded is decoded to it, anything else stays in its
        own.
        """
        del dtype
        raise NotImplementedError(f"{type(self).__name__} has neither dense() nor multiply()")

    def __jax_array__(self) -> jax.Array:
        raise ValueError(
            f"{self.label}: the kernel {tuple(self.shape)} is read as an array by a product that "
            "knows no nodes; multiply by lrx.matmul, lrx.einsum or lrx.dot_general, or give "
            "node.dense()"
        )

    def _known_base(self) -> Any:
        base = self.base()
        if base is None:
            raise NotImplementedError(f"{type(self).__name__} must say its shape and dtype")
        return base


def formed(node: KernelNode, dtype: DTypeLike) -> jax.Array:
    """The array of a node; the error of reading it as one where it may not be formed."""
    array = node.dense(dtype)
    return node.__jax_array__() if array is None else array


def parts_of(kernel: Kernel) -> tuple[Pytree, Pytree]:
    """`(own, shared)` of a kernel that may be a node; an array is its own."""
    return kernel.parts() if isinstance(kernel, KernelNode) else (kernel, ())


def with_parts_of(kernel: Kernel, own: Pytree, shared: Pytree) -> Kernel:
    """The kernel with other arrays, as `parts_of` gives them."""
    return kernel.with_parts(own, shared) if isinstance(kernel, KernelNode) else own


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
