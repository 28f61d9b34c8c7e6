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
from collections.abc import Callable
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
    raise ValueError("the operator of one matrix takes no other kernel")


@dataclasses.dataclass(frozen=True)
class Stack:
    """How the operands of a product are a stack of matrices, for a node that turns or scales them.

    Attributes:
      inputs: x as `(batch..., free..., n)`; of a look-up or a convolution x as it is.
      outputs: the result as `(batch..., free..., m)`.
      result: the inverse of `outputs`, in the result's dtype.
      batch: how many batch axes the node's arrays have.
      mapped: of each batch axis of x and of the result, whether x has it.
      features: whether x holds features, so that `inputs` has n of them in its last axis: not that of
        a look-up or a convolution.
      opaque: whether the product is a call with a derivative of its own, which jax cannot transpose.
      separable: whether the matrices can be told apart: not where the product sums over the batch, or
        over a part of the rows.
      cut: whether the product sees some of the rows or columns alone.
      pad: `(array, axis, "rows" | "cols") -> array` of all of them, with zeros at the others.
      matrix: `(x, y, K) -> Op` of one matrix, whose product y with the host's own x is there.
      by_matrices: `(x, matrices (batch..., n, m)) -> y`, the product with other matrices.
      base, array: what lies beneath the node, `()` for the array itself.
      parts: what its matrices are formed of, with the batch axes in front.
      formed: `parts -> matrices`, of all of them or of one.
      leaf: `() -> array` that the base stands for, as the product sees it.
      make: `(rest, (base, array)) -> Op`, the product again, of other arrays: for a custom VJP.
      rest: the other operands.
      dtype: of the kernel, as the product sees it.
      y: shape and dtype of the result.
    """

    inputs: Callable[[Any], Any]
    outputs: Callable[[jax.Array], jax.Array]
    result: Callable[[jax.Array], jax.Array]
    batch: int
    mapped: tuple[bool, ...]
    features: bool
    opaque: bool
    separable: bool
    cut: bool
    pad: Callable[[jax.Array, int, str], jax.Array]
    matrix: Callable[[Any, jax.Array, Callable[[], jax.Array]], Op]
    by_matrices: Callable[[Any, jax.Array], jax.Array]
    base: Kernel
    array: jax.Array | None
    parts: Pytree
    formed: Callable[[Pytree], jax.Array]
    leaf: Callable[[], jax.Array]
    make: Callable[..., Op]
    rest: tuple[Any, ...]
    dtype: Any
    y: jax.ShapeDtypeStruct

    def each(self, function: Callable) -> Callable:
        """`function(x, trees of a matrix...)` over the batch."""
        return over_matrices(function, self.mapped)


def over_matrices(function: Callable, mapped: tuple[bool, ...]) -> Callable:
    """`function(x, trees of a matrix...)` over batch axes; of each, whether x has it."""

    def over(inner: Callable, has: bool) -> Callable:
        def run(x, *trees):
            return jax.vmap(inner, in_axes=(0 if has else None, *[0] * len(trees)))(x, *trees)

        return run

    for has in reversed(mapped):
        function = over(function, has)
    return function


@dataclasses.dataclass(frozen=True)
class Op:
    """A linear operator without bias: what a host does to its input x, as one matrix `K (n, m)`.

    A host is what multiplies by a kernel: a dense product, a look-up, an output layer tied to one, a
    convolution, experts. The operator that a node is given has the kernel's batch axes in front of
    its factors, and `multiply` and `stack` besides; that of one matrix, which adapters wrap, has none.

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
      multiply: `(x, array) -> y`, the host's own product with an array of the leaf's shape in the
        node's place.
      stack: how its operands are a stack of matrices.
      rows: of an x whose first axis was folded from several, how many the first of them has; None
        of any other.

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
    multiply: Callable[[Any, jax.Array], jax.Array] = _one_matrix
    stack: Stack | None = None
    rows: int | None = None

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
    def forms(self) -> bool:
        """Whether its matrix may be formed, where a program asks for it."""
        return True

    @property
    def remedy(self) -> str:
        """What to do about a use that is no product, for errors."""
        return (
            "Multiply by it, form it by node.dense() before, or allow that for this leaf: "
            "lrx.adapted(function, dense=path)."
        )

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
        dtype = x.dtype if op.stack is None else op.stack.dtype
        run = lambda x, node: op.multiply(x, formed(node, dtype))  # noqa: E731
        return jax.checkpoint(run)(x, self), None

    def dense(self, dtype: DTypeLike | None = None) -> jax.Array | None:
        """The kernel as one array; None where it may not be formed.

        `dtype` is that of the product: what is decoded is decoded to it, anything else stays in its
        own.
        """
        del dtype
        raise NotImplementedError(f"{type(self).__name__} has neither dense() nor multiply()")

    def matrices(self, base: Callable[[], jax.Array]) -> jax.Array | None:
        """The matrices `(batch..., n, m)` of a node on a base, whose matrices are `base()`; None where
        `dense` says it."""
        del base
        return None

    def __jax_array__(self) -> jax.Array:
        raise ValueError(
            f"{self.label}: the kernel {tuple(self.shape)} is read as an array by a product that "
            "knows no nodes; write lrx.adapted(function)(params, ...), multiply by lrx.matmul, "
            "lrx.einsum or lrx.dot_general, or give node.dense()"
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
