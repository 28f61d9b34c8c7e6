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
from lowrank_jax.functions.products import Layout, dense, dot_general
from lowrank_jax.matrices import ResolvedView
from lowrank_jax.projection.batches import each
from lowrank_jax.projection.projectors.base import thin_product
from lowrank_jax.rows import fold_rows
from lowrank_jax.serialization import serializable


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

    basis: Any
    low: jax.Array | None
    sketch_basis: jax.Array | None
    sketch: jax.Array | None
    view: ResolvedView = dataclasses.field(metadata={"static": True})
    projector: Any = dataclasses.field(metadata={"static": True})

    def placed(self) -> Tap:
        """This tap with its zeros, ready for a product."""
        low, sketch = self.zeros(None)
        return dataclasses.replace(self, low=low, sketch=sketch)

    def zeros(self, kernel: Any) -> tuple[jax.Array, jax.Array | None]:
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
            sharding.zeros(shape, jnp.float32, sharding.whole_spec(view.spec)), names
        )


@serializable
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tapped:
    """A kernel that is given to a loss together with its tap; `dot_general`, `matmul` and `einsum`
    take it.

    >>> import jax, jax.numpy as jnp
    >>> import lowrank_jax as lrx
    >>> params = {"kernel": jnp.ones((4, 6))}
    >>> state = lrx.scale_by_projection(lrx.projectors.svd(rank=2)).init(params)
    >>> loss = lambda params, x: jnp.sum(lrx.matmul(x, params["kernel"]) ** 2)
    >>> value, grads = lrx.projected_value_and_grad(loss, lrx.taps(state))(params, jnp.ones((3, 4)))
    >>> grads["kernel"].low.shape
    (2, 6)
    """

    kernel: Any
    tap: Tap

    @property
    def shape(self) -> tuple[int, ...]:
        return self.kernel.shape

    @property
    def dtype(self) -> Any:
        return self.kernel.dtype

    @property
    def ndim(self) -> int:
        return len(self.kernel.shape)

    def __jax_array__(self) -> jax.Array:
        raise ValueError(
            f"tap {self.tap.view.path!r}: the kernel is read as an array, and its projected "
            "gradient would lack that use; multiply by lrx.matmul, lrx.einsum or lrx.dot_general, "
            "or leave it out with Views(rules=((path, None),))"
        )

    def dot_general(
        self,
        x: jax.Array,
        dimension_numbers: Any,
        precision: Any = None,
        preferred_element_type: Any = None,
        product: Callable[..., jax.Array] | None = None,
        **options: Any,
    ) -> jax.Array:
        """`lrx.dot_general(x, self, ...)`: contracted axes must be the kernel's rows, batched axes
        its batch axes.

        `product` makes the base product in place of `lrx.dot_general`, as equal numbers.
        """
        options |= {"dimension_numbers": dimension_numbers, "precision": precision}
        if preferred_element_type is not None:  # keywords of `product` stay
            options |= {"preferred_element_type": preferred_element_type}
        product = functools.partial(product or dot_general, **options)
        view = _view_of_product(self, dimension_numbers)
        layout = Layout.of(x.ndim, self.ndim, view.view, dimension_numbers)
        tap = self.tap
        arrays = (x, self.kernel, tap.basis, tap.sketch_basis, tap.low, tap.sketch)
        return _tapped(product, layout, view, tap.projector, *sharding.varying_alike(*arrays))


def _view_of_product(kernel: Tapped, dimension_numbers: Any) -> ResolvedView:
    """The view of the slice of the leaf that this product uses: scanned axes are gone, the rest
    must fit."""
    view = kernel.tap.view
    while len(view.shape) > kernel.ndim and view.layered:
        view = view.layer()
    if view.shape != tuple(kernel.shape):
        raise ValueError(
            f"tap {view.path!r}: a product uses a slice of shape {tuple(kernel.shape)} of the "
            f"kernel of shape {kernel.tap.view.shape}; only leading batch axes may be taken apart"
        )
    (_, contract), (_, batch) = (tuple(map(tuple, axes)) for axes in dimension_numbers)
    if set(contract) != set(view.view.rows) or set(batch) != set(view.view.batch):
        raise ValueError(
            f"tap {view.path!r}: the product contracts axes {contract} and batches axes {batch} of "
            f"the kernel, but its view has rows {view.view.rows} and batch {view.view.batch}; give "
            "it another MatrixView, or leave it out"
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
