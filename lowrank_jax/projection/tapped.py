"""The tapped product: `y = x W` whose backward pass gives `PᵀG` in place of `G`.

With `G = XᵀdY` the projected gradient is two thin products. Where the rows (inputs) are shrunk

    PᵀG = (XP)ᵀ dY       the forward pass saves XP (N, r) in place of X (N, s)

and where the columns (outputs) are

    GQ = Xᵀ (dY Q)       the backward pass still needs X.

A `Tap` carries the basis and a float32 zero, `low`, whose cotangent is the low-rank object; a
`Tapped` is a kernel with its tap. Products are counted in the dtype of x and summed in float32. The
kernel itself gets no cotangent: the product must be its only use, which `check_taps` proves on a
batch.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_jax import sharding
from lowrank_jax.kernel_node import KernelNode, Op, Stack, parts_of, with_parts_of
from lowrank_jax.matrices import MatrixView, ResolvedView
from lowrank_jax.projection.batches import each
from lowrank_jax.projection.projectors.base import thin_product
from lowrank_jax.projection.state import Sketch, sketch_of
from lowrank_jax.rows import fold_rows
from lowrank_jax.serialization import serializable
from lowrank_jax.typing import DTypeLike, Kernel, Pytree


@serializable
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tap:
    """What a product needs to return a low-rank gradient. Every array has the leaf's batch axes in
    front.

    Attributes:
      basis: the basis of the optimizer state.
      low: zeros like the low-rank object, float32; its cotangent is the projected gradient. None
        before it is placed.
      sketch_basis: `(batch..., k, q)`, or None: at a refresh, what the kept side is contracted
        with; or a pair, the second of which `(batch..., s, q')` contracts the shrunk one.
      sketch: zeros `(batch..., s, q)`, or None; its cotangent is `G sketch_basis`. Of a pair also
        `(batch..., q', k)`.
      view, projector: static structure, as in `MatrixState`.
    """

    basis: Pytree
    low: jax.Array | None
    sketch_basis: Sketch | None
    sketch: Sketch | None
    view: ResolvedView = dataclasses.field(metadata={"static": True})
    projector: Any = dataclasses.field(metadata={"static": True})

    def placed(self) -> Tap:
        """This tap with its zeros, ready for a product."""
        low, sketch = self.zeros(None)
        return dataclasses.replace(self, low=low, sketch=sketch)

    def zeros(self, kernel: Kernel) -> tuple[jax.Array, Sketch | None]:
        """`(low, sketch)`, the points at which the gradient is taken; on an explicit mesh divided
        as the kernel is."""
        view = self.view if kernel is None else self.view.lying(getattr(kernel, "value", kernel))
        shape, spec = (*view.batch, *self.projector.low_shape(view)), self.projector.low_spec(view)
        # inside `jax.shard_map` a kernel of which each device has its own has a gradient of its own
        # too, not their sum
        names = sharding.varying(kernel, self.basis, self.sketch_basis)
        low = sharding.vary(sharding.zeros(shape, jnp.float32, spec), names)
        if self.sketch_basis is None:
            return low, None
        whole = jax.ShapeDtypeStruct(view.oriented, jnp.float32)
        spec = sharding.unsharded_spec(view.spec)

        def zeros(made):
            return sharding.vary(sharding.zeros(made.shape, jnp.float32, spec), names)

        shapes = jax.eval_shape(sketch_of, whole, self.sketch_basis)
        return low, jax.tree.map(zeros, shapes)


@serializable
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tapped(KernelNode):
    """A kernel that is given to a loss together with its tap; `lrx.matmul` and its like take it.

    >>> import jax, jax.numpy as jnp
    >>> import lowrank_jax as lrx
    >>> params = {"kernel": jnp.ones((4, 6))}
    >>> state = lrx.scale_by_projection(lrx.projectors.svd(rank=2)).init(params)
    >>> loss = lambda params, x: jnp.sum(lrx.matmul(x, params["kernel"]) ** 2)
    >>> value, grads = lrx.projected_value_and_grad(loss, lrx.taps(state))(params, jnp.ones((3, 4)))
    >>> grads["kernel"].low.shape
    (2, 6)
    """

    kernel: Kernel
    tap: Tap

    def __jax_array__(self) -> jax.Array:
        raise ValueError(
            f"tap {self.tap.view.path!r}: the kernel is read as an array, and its projected "
            "gradient would lack that use; write lrx.tapped(function)(params, ...), multiply by "
            "lrx.matmul, lrx.einsum or lrx.dot_general, or leave it out with "
            "Views(rules=((path, None),))"
        )

    @property
    def forms(self) -> bool:
        return False

    @property
    def remedy(self) -> str:
        return (
            "Its projected gradient would lack that use: move a regulariser to the optimizer's "
            "weight_decay, or leave the leaf out with Views(rules=((path, None),))."
        )

    @property
    def path(self) -> str:
        return self.tap.view.path

    @property
    def label(self) -> str:
        return f"tap {self.path!r}"

    @property
    def view(self) -> MatrixView:
        return self._view().view

    def base(self) -> Kernel:
        return self.kernel

    def with_base(self, base: Kernel) -> Tapped:
        return dataclasses.replace(self, kernel=base)

    def parts(self) -> tuple[Pytree, Pytree]:
        own, shared = parts_of(self.kernel)
        return (own, self.tap), shared

    def with_parts(self, own: Pytree, shared: Pytree) -> Tapped:
        return Tapped(with_parts_of(self.kernel, own[0], shared), own[1])

    def dense(self, dtype: DTypeLike | None = None) -> None:
        """None: the projected gradient would lack what the matrix is used for."""

    def multiply(self, op: Op, x: jax.Array, key: Any = None) -> tuple[jax.Array, Any]:
        """The base product, whose backward pass gives the tap its low-rank gradient."""
        stack, tap = op.stack, self.tap
        assert stack is not None
        # the view of one matrix
        view = tap.view.matrix
        arrays = (x, (stack.base, stack.array, stack.rest), tap.basis, tap.sketch_basis)
        alike = sharding.varying_alike(*arrays, tap.low, tap.sketch)
        return _tapped(stack.make, view, tap.projector, *alike), None

    def _view(self) -> ResolvedView:
        """The view of the slice of the leaf that is here: scanned axes are gone."""
        view = self.tap.view
        while len(view.shape) > self.ndim and view.layered:
            view = view.layer()
        return view


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _tapped(make, view, projector, x, kernel, basis, sketch_basis, low, sketch):
    del view, projector, basis, sketch_basis, low, sketch
    return _own(make, x, kernel)


def _own(make, x, kernel):
    base, array, rest = kernel
    op = make(rest, (base, array))
    return op.own(x).astype(op.stack.y.dtype)


def _forward(make, view, projector, x, kernel, basis, sketch_basis, low, sketch):
    base, array, rest = kernel
    op = make(rest, (base, array))
    thin = _Products.low(op, view, projector).saved(x, basis)
    rows = [
        _Products.sketch(op, view, side).saved(x, own)
        for side, own in _contracted_sides(view, sketch_basis)
    ]
    shape = jax.eval_shape(lambda: x)  # with its sharding, and with what it varies over
    places = [jax.typeof(leaf).sharding for leaf in jax.tree.leaves(sketch)]
    static = _Static(shape, jax.typeof(low).sharding, tuple(places))
    return _own(make, x, kernel), (thin, rows, kernel, basis, sketch_basis, static)


def _contracted_sides(view: ResolvedView, sketch_basis: Sketch | None) -> list[tuple[str, Any]]:
    """`[(side, what contracts it), ...]` of a sketch basis: the kept side first."""
    kept = "cols" if view.side == "rows" else "rows"
    return list(zip((kept, view.side), jax.tree.leaves(sketch_basis), strict=False))


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Static:
    """What the backward pass knows without arrays: the shape of x, and where the low-rank results
    lie on a mesh."""

    x: jax.ShapeDtypeStruct
    low: Any
    sketch: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class _Products:
    """The thin products of one cotangent of a tap: `PᵀG`, `(G Q)ᵀ`, `Pᵀ G Q`, or the sketch `G S`
    or `SᵀG`.

    With `G = XᵀdY` a basis multiplies X, dY or both. A product whose input holds features is
    multiplied by `projector.thin`, whose basis may be indices. Any other is linear in a factor,
    `y = expand(contract(x, A), B)`, and its transposes in A and B are the gradient. The object has
    the shrunk side of the view in front.

    Attributes:
      op: of the product.
      view: of one matrix.
      thin: `(x (..., n), basis, "rows" | "cols") -> x times the basis`, or x.
    """

    op: Op
    view: ResolvedView
    thin: Callable[[jax.Array, Any, str], jax.Array]

    @classmethod
    def low(cls, op: Op, view: ResolvedView, projector: Any) -> _Products:
        """`(r, k)`, or what the projector's is."""
        return cls(op, view, lambda x, basis, side: projector.thin(view, basis, x, side))

    @classmethod
    def sketch(cls, op: Op, view: ResolvedView, contracted: str) -> _Products:
        """`(s, q)` or `(q, k)`: one side is contracted."""
        return cls(
            op, view, lambda x, basis, side: thin_product(x, basis) if side == contracted else x
        )

    @property
    def stack(self) -> Stack:
        """How the product's operands are a stack of matrices."""
        assert self.op.stack is not None
        return self.op.stack

    @property
    def explicit(self) -> bool:
        """Whether x can be seen as rows of features."""
        return self.stack.separable and self.stack.features

    @property
    def sides(self) -> tuple[str, str]:
        """Along which side of the kernel the input lies, and the result."""
        return ("cols", "rows") if self.op.input == "transposed" else ("rows", "cols")

    def shrinks(self, basis: Any, side: str) -> bool:
        """Whether the basis multiplies this side."""
        one = jax.eval_shape(lambda basis: jax.tree.map(self._first, basis), basis)
        x = jax.ShapeDtypeStruct((1, self.view.size_of(side)), jnp.float32)
        thin = jax.make_jaxpr(lambda x, basis: self.thin(x, basis, side))(x, one).jaxpr
        # a basis of full rank changes no shape: what counts is whether x comes back as it was
        return thin.outvars[0] is not thin.invars[0]

    def saved(self, x: Any, basis: Any) -> Any:
        """What the forward pass keeps: x times the basis, or x."""
        side = self.sides[0]
        shrinks = self.shrinks(basis, side)
        if not self.explicit:
            return self.op.contract(x, self._matrices(basis, side)) if shrinks else x
        inputs = self.stack.inputs(x)
        return self._times(inputs, basis, side, self.stack.each) if shrinks else inputs

    def gradient(self, saved: Any, dy: jax.Array, basis: Any, where: Any) -> jax.Array:
        """The cotangent of the object."""
        found = (self._contracted if self.explicit else self._transposed)(saved, dy, basis, where)
        # rows or columns that the product does not see have no gradient
        front = self.view.side
        other = "cols" if front == "rows" else "rows"
        for axis, side in ((-2, front), (-1, other)):
            if not self.shrinks(basis, side) and found.shape[axis] != self.view.size_of(side):
                found = self.stack.pad(found, axis, side)
        return found

    def _first(self, x: jax.Array) -> jax.Array:
        return x[(0,) * self.stack.batch]

    def _times(self, x: jax.Array, basis: Any, side: str, over: Callable) -> jax.Array:
        """`x` of all rows (or columns), times the basis."""
        x = self.stack.pad(x, -1, side) if self.stack.cut else x
        return over(lambda x, basis: self.thin(x, basis, side))(x, basis)

    def _over_batch(self, function: Callable) -> Callable:
        return each(function, (0,) * self.stack.batch)

    def _matrices(self, basis: Any, side: str) -> jax.Array:
        """The basis as `(batch..., n, r)`."""
        eye = jnp.eye(self.view.size_of(side))
        return self._over_batch(lambda basis: self.thin(eye, basis, side))(basis)

    def _contracted(self, saved, dy, basis, where):
        stack, (x_side, y_side) = self.stack, self.sides
        outputs = stack.outputs(dy)
        if self.shrinks(basis, y_side):
            outputs = self._times(outputs, basis, y_side, self._over_batch)
        x_first = x_side == self.view.side
        explicit = sharding.is_explicit(where) and not stack.mapped

        def one(left, right):
            left, right = fold_rows(left, right)
            axes = tuple(range(left.ndim - 1))
            wide = jnp.promote_types(left.dtype, right.dtype)
            a, b = (left, right) if x_first else (right, left)
            a, b = a.astype(wide), b.astype(wide)
            options = {"out_sharding": where} if explicit else {}
            return jax.lax.dot_general(
                a, b, ((axes, axes), ((), ())), preferred_element_type=jnp.float32, **options
            )

        # an x that all matrices see has no axis of them, unless a basis of each has multiplied it
        many = self.shrinks(basis, x_side)
        for has in reversed(stack.mapped):
            one = jax.vmap(one, in_axes=(0 if has or many else None, 0))
        return one(saved, outputs)

    def _transposed(self, saved, dy, basis, where):
        del where
        op, (x_side, y_side) = self.op, self.sides
        lead = jax.tree.leaves(basis)[0].shape[: self.stack.batch]
        wide = lambda *sizes: jax.ShapeDtypeStruct((*lead, *sizes), jnp.float32)  # noqa: E731
        n, m = self.view.size_of(x_side), self.view.size_of(y_side)
        right = self._matrices(basis, y_side)  # (batch..., m, b), or the identity
        if self.shrinks(basis, x_side):
            # z = contract(x, L) is there: dB (a, m) of expand(z, B)
            rank = self._matrices(basis, x_side).shape[-1]
            expand = lambda b: op.expand(saved, b).astype(dy.dtype)  # noqa: E731
            (found,) = jax.linear_transpose(expand, wide(rank, m))(dy)
            found = found @ right if self.shrinks(basis, y_side) else found
        else:
            # dz of expand(z, Rᵀ), then dA (n, b) of contract(x, A)
            contract = lambda a: op.contract(saved, a)  # noqa: E731
            z = jax.eval_shape(contract, wide(n, right.shape[-1]))
            back = jnp.swapaxes(right, -1, -2)
            expand = lambda z: op.expand(z, back).astype(dy.dtype)  # noqa: E731
            (dz,) = jax.linear_transpose(expand, z)(dy)
            (found,) = jax.linear_transpose(contract, wide(n, right.shape[-1]))(dz)
        return found if x_side == self.view.side else jnp.swapaxes(found, -1, -2)


def _backward(make, view, projector, residuals, dy):
    thin, rows, kernel, basis, sketch_basis, static = residuals
    base, array, rest = kernel
    op = make(rest, (base, array))
    dx, own = None, lambda x: _own(make, x, kernel)
    if jnp.issubdtype(static.x.dtype, jnp.floating):
        if op.stack.opaque:  # linear in x all the same
            (dx,) = jax.vjp(own, sharding.zeros_like(static.x))[1](dy)
        else:
            (dx,) = jax.linear_transpose(own, static.x)(dy)
    d_low = _Products.low(op, view, projector).gradient(thin, dy, basis, static.low)
    sides = _contracted_sides(view, sketch_basis)
    sketches = [
        _Products.sketch(op, view, side).gradient(saved, dy, own, place)
        for (side, own), saved, place in zip(sides, rows, static.sketch, strict=True)
    ]
    d_sketch = jax.tree.unflatten(jax.tree.structure(sketch_basis), sketches)
    return dx, None, None, None, d_low, d_sketch


_tapped.defvjp(_forward, _backward)
