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
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_jax import sharding
from lowrank_jax.kernel_node import KernelNode, Op, parts_of, with_parts_of
from lowrank_jax.matrices import MatrixView, ResolvedView
from lowrank_jax.projection.batches import each
from lowrank_jax.projection.projectors.base import thin_product
from lowrank_jax.quantized import dense
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
        with.
      sketch: zeros `(batch..., s, q)`, or None; its cotangent is `G sketch_basis`.
      view, projector: static structure, as in `MatrixState`.
    """

    basis: Pytree
    low: jax.Array | None
    sketch_basis: jax.Array | None
    sketch: jax.Array | None
    view: ResolvedView = dataclasses.field(metadata={"static": True})
    projector: Any = dataclasses.field(metadata={"static": True})

    def placed(self) -> Tap:
        """This tap with its zeros, ready for a product."""
        low, sketch = self.zeros(None)
        return dataclasses.replace(self, low=low, sketch=sketch)

    def zeros(self, kernel: Kernel) -> tuple[jax.Array, jax.Array | None]:
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
        shape = (*view.batch, view.shrunk, self.sketch_basis.shape[-1])
        return low, sharding.vary(
            sharding.zeros(shape, jnp.float32, sharding.unsharded_spec(view.spec)), names
        )


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
            "gradient would lack that use; multiply by lrx.matmul, lrx.einsum or lrx.dot_general, "
            "or leave it out with Views(rules=((path, None),))"
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
        view, tap = self._view(), self.tap
        layout = op.layout(view.view)
        arrays = (x, self.kernel, tap.basis, tap.sketch_basis, tap.low, tap.sketch)
        alike = sharding.varying_alike(*arrays)
        return _tapped(op.multiply, layout, view, tap.projector, *alike), None

    def _view(self) -> ResolvedView:
        """The view of the slice of the leaf that is here: scanned axes are gone, the rest must
        fit."""
        view = self.tap.view
        while len(view.shape) > self.ndim and view.layered:
            view = view.layer()
        if view.shape != tuple(self.shape):
            raise ValueError(
                f"tap {view.path!r}: a product uses a slice of shape {tuple(self.shape)} of the "
                f"kernel of shape {self.tap.view.shape}; only leading batch axes may be taken apart"
            )
        return view


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _tapped(product, layout, view, projector, x, kernel, basis, sketch_basis, low, sketch):
    del layout, view, projector, basis, sketch_basis, low, sketch
    return product(x, dense(kernel, x.dtype))


def _forward(product, layout, view, projector, x, kernel, basis, sketch_basis, low, sketch):
    inputs = layout.inputs(x)
    thin = each(lambda x, basis: projector.thin(view, basis, x, "rows"), view.batch)(inputs, basis)
    rows = None
    if sketch_basis is not None:
        rows = each(lambda x, basis: _sketched(view, x, basis, "rows"), view.batch)(
            inputs, sketch_basis
        )
    shape = jax.eval_shape(lambda: x)  # with its sharding, and with what it varies over
    static = _Static(
        shape, *(None if leaf is None else jax.typeof(leaf).sharding for leaf in (low, sketch))
    )
    return product(x, dense(kernel, x.dtype)), (thin, rows, kernel, basis, sketch_basis, static)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Static:
    """What the backward pass knows without arrays: the shape of x, and where the low-rank results
    lie on a mesh."""

    x: jax.ShapeDtypeStruct
    low: Any
    sketch: Any


def _sketched(view: ResolvedView, x: jax.Array, basis: jax.Array, axis: str) -> jax.Array:
    """The kept side times the sketch's basis; the shrunk side stays whole."""
    return x if axis == view.side else thin_product(x, basis)


def _backward(product, layout, view, projector, residuals, dy):
    thin, rows, kernel, basis, sketch_basis, static = residuals
    (dx,) = jax.linear_transpose(lambda x: product(x, dense(kernel, static.x.dtype)), static.x)(dy)
    outputs = layout.outputs(dy)

    def contract(left, right, where):
        explicit = sharding.is_explicit(where) and not view.batch

        def one(left, right):
            left, right = fold_rows(left, right)
            axes = tuple(range(left.ndim - 1))
            wide = jnp.promote_types(left.dtype, right.dtype)
            a, b = (left, right) if view.side == "rows" else (right, left)
            a, b = a.astype(wide), b.astype(wide)
            options = {"out_sharding": where} if explicit else {}
            return jax.lax.dot_general(
                a, b, ((axes, axes), ((), ())), preferred_element_type=jnp.float32, **options
            )

        return each(one, view.batch)(left, right)

    shrunk = each(lambda dy, basis: projector.thin(view, basis, dy, "cols"), view.batch)(
        outputs, basis
    )
    d_low = contract(thin, shrunk, static.low)
    d_sketch = None
    if sketch_basis is not None:
        cols = each(lambda dy, basis: _sketched(view, dy, basis, "cols"), view.batch)(
            outputs, sketch_basis
        )
        d_sketch = contract(rows, cols, static.sketch)
    return dx, None, None, None, d_low, d_sketch


_tapped.defvjp(_forward, _backward)
