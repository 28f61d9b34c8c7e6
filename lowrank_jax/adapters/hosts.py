"""Kernels with adapters, and the hosts that multiply by them.

`attach(params, adaptation)` puts an `AdaptedKernel` in the place of each adapted leaf.
`lrx.matmul`, `lrx.einsum` and `lrx.dot_general` take it as they take an array; `embed`, `attend`
and `conv` here are the other hosts. The Flax skins call the same functions from inside a model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax.core import meta

from lowrank_jax import sharding
from lowrank_jax.adapters.base import Adapter, Site
from lowrank_jax.kernel_node import KernelNode, Op, parts_of, product, with_parts_of
from lowrank_jax.matrices import MatrixView
from lowrank_jax.quantized import decoding, dense, undecoded
from lowrank_jax.reprs import Short
from lowrank_jax.serialization import serializable
from lowrank_jax.typing import Kernel, Key, Pytree


class RawKernelError(ValueError, AttributeError):
    """A kernel with adapters is read as a bare array, past its adapters."""


@jax.tree_util.register_static
@dataclasses.dataclass(eq=False)
class Outside:
    """A value that goes into a model beside its parameters: without batch axes, a scan over a leaf
    must not slice it.

    It is static, and equal to itself alone, so that what a nested jit traced with one value is not
    used for another.
    """

    value: Any


@serializable
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Bound(Short):
    """One adapter of one leaf, with its arrays.

    Attributes:
      arrays: of the site, trained and frozen, with the leaf's batch axes in front; behind those an
        axis of candidates, where rows choose among several adapters.
      shared: of the group, without batch axes; within a Flax model an `Outside` of them.
      keys: random keys `(batch...)` of a stochastic adapter, pairs where it has a common draw, or
        None.
      ids: None, or which candidate each row of the input takes, `(batch..., rows)`; -1 is none.
      adapter, site: static.
    """

    arrays: dict[str, Any]
    shared: Any
    keys: jax.Array | None
    ids: jax.Array | None
    adapter: Adapter = dataclasses.field(metadata={"static": True})
    site: Site = dataclasses.field(metadata={"static": True})

    @property
    def group(self) -> dict[str, Any]:
        """What is shared, wherever it is."""
        return self.shared.value if isinstance(self.shared, Outside) else self.shared

    def wrap(self, op: Op) -> Op:
        """The operator with this adapter."""
        return self.adapter.wrap(op, self.site, self.arrays | {"shared": self.group}, self.keys)

    def effective(self, kernel: jax.Array) -> jax.Array:
        """The matrix with this adapter."""
        return self.adapter.effective(self.site, kernel, self.arrays | {"shared": self.group})

    def boxed(self, box: Any) -> Bound:
        """This adapter with its arrays in boxes like that of its leaf, if that is in one that names
        its axes."""
        names = getattr(box, "names", None) if isinstance(box, meta.AxisMetadata) else None
        if names is None:
            return self
        own = lambda name, x: axis_names(self.adapter, self.site, name, len(x.shape), names)  # noqa: E731
        return dataclasses.replace(
            self,
            arrays={
                name: box.replace(value=x, names=own(name, x)) for name, x in self.arrays.items()
            },
        )

    def of_row(self, number: jax.Array, row: jax.Array) -> Bound:
        """What one row sees: its candidate, where there is a choice, and draws of its own."""
        keys, fold_in = self.keys, jax.random.fold_in
        if keys is not None:
            # one key, or the pair of a family with a common draw
            keys = jax.vmap(fold_in, (0, None))(keys, row) if keys.ndim else fold_in(keys, row)
        if self.ids is None:
            return dataclasses.replace(self, keys=keys)
        take = lambda x: jax.lax.dynamic_index_in_dim(x, jnp.maximum(number, 0), keepdims=False)  # noqa: E731
        arrays, shared = jax.tree.map(take, (self.arrays, self.group))
        # a number that no candidate has would silently be the last one
        weight = jnp.where(number < self.arrays["scale"].shape[0], number >= 0, jnp.nan)
        return dataclasses.replace(
            self,
            arrays=arrays | {"scale": arrays["scale"] * weight},
            shared=shared,
            keys=keys,
            ids=None,
        )


def axis_names(
    adapter: Adapter, site: Site, array: str, ndim: int, names: tuple[Any, ...]
) -> tuple[Any, ...]:
    """Names or partition entries of the axes of one array of a site, from those of its leaf:
    `a (in, None)`.

    A side folded from several axes is named as the first of them.
    """
    names = (*names, *[None] * (len(site.shape) - len(names)))
    along: dict[str | None, Any] = {
        "rows": names[site.view.rows[0]],
        "cols": names[site.view.cols[0]],
    }
    lead, own = [names[axis] for axis in site.view.batch], adapter.axes(site).get(array, ())
    return (*lead, *[None] * (ndim - len(lead) - len(own)), *(along.get(axis) for axis in own))


@serializable
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AdaptedKernel(KernelNode):
    """A kernel that is given to a loss together with its adapters, in the order in which they act.

    >>> import jax, jax.numpy as jnp
    >>> import lowrank_jax as lrx
    >>> params = {"kernel": jnp.ones((4, 6))}
    >>> adaptation = lrx.adapt(params, lrx.adapters.lora(rank=2), jax.random.key(0))
    >>> lrx.matmul(jnp.ones((3, 4)), lrx.attach(params, adaptation)["kernel"]).shape
    (3, 6)
    """

    kernel: Any
    bound: tuple[Bound, ...]

    def __jax_array__(self) -> jax.Array:
        raise self.raw("is read as an array")

    def __getitem__(self, index: Any) -> Any:
        raise self.raw("is indexed")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "bound":
            raise AttributeError(name)
        raise self.raw(f"is asked for .{name}")

    def at(self, use: str) -> Any:
        """What a product of one kind multiplies by: this kernel with the adapters that act there,
        or the bare one."""
        bound = tuple(one for one in self.bound if not one.site.uses or use in one.site.uses)
        if len(bound) == len(self.bound):
            return self
        return dataclasses.replace(self, bound=bound) if bound else self.kernel

    def raw(self, what: str) -> RawKernelError:
        """The error of a use that would pass the adapters by."""
        return RawKernelError(
            f"adapters of {self.bound[0].site.path!r}: the kernel {what}, by a layer or a product "
            "that knows no adapters, which would pass them by. Multiply by lrx.matmul, lrx.einsum, "
            "lrx.adapters.embed, attend or conv, wrap a function of a linen model as "
            "lrx.linen.adapted(function), merge an nnx model by lrx.nnx.merge, or give the model "
            "lrx.effective(params, adaptations) in place of lrx.attach(...)"
        )

    def carried(self) -> AdaptedKernel:
        """This kernel as a Flax model carries it, whose scans slice it: what its adapters share is
        `Outside`."""
        put = lambda shared: Outside(shared) if shared else shared  # noqa: E731
        bound = (dataclasses.replace(one, shared=put(one.shared)) for one in self.bound)
        return dataclasses.replace(self, bound=tuple(bound))

    @property
    def view(self) -> MatrixView:
        """The view of the slice that is here: leading axes that a scan took apart are gone."""
        site = self.bound[0].site
        view, taken = site.view, len(site.shape) - self.ndim
        if (
            taken < 0
            or tuple(site.shape[taken:]) != tuple(self.shape)
            or view.batch[:taken] != tuple(range(taken))
        ):
            raise ValueError(
                f"adapters of {site.path!r}: a product uses a slice of shape {tuple(self.shape)} "
                f"of the kernel of shape {site.shape}; only leading batch axes may be taken apart"
            )
        shift = lambda axes: tuple(axis - taken for axis in axes)  # noqa: E731
        return MatrixView(
            batch=shift(view.batch[taken:]), rows=shift(view.rows), cols=shift(view.cols)
        )

    @property
    def path(self) -> str:
        return self.bound[0].site.path

    @property
    def label(self) -> str:
        return f"adapters of {self.path!r}"

    @property
    def uses(self) -> tuple[str, ...]:
        """The products that see any of the adapters; `at` parts them."""
        uses = [one.site.uses for one in self.bound]
        return tuple(sorted(set().union(*uses))) if all(uses) else ()

    @property
    def whole_matrix(self) -> bool:
        """Whether one of the adapters reads whole rows and columns of the kernel."""
        return any(one.adapter.whole_matrix for one in self.bound)

    def base(self) -> Kernel:
        return self.kernel

    def with_base(self, base: Kernel) -> AdaptedKernel:
        return dataclasses.replace(self, kernel=base)

    def parts(self) -> tuple[Pytree, Pytree]:
        own, shared = parts_of(self.kernel)
        arrays = [(one.arrays, one.keys, one.ids) for one in self.bound]
        return (own, arrays), (shared, [one.shared for one in self.bound])

    def with_parts(self, own: Pytree, shared: Pytree) -> AdaptedKernel:
        bound = (
            dataclasses.replace(one, arrays=arrays, keys=keys, ids=ids, shared=beside)
            for one, (arrays, keys, ids), beside in zip(self.bound, own[1], shared[1], strict=True)
        )
        return AdaptedKernel(with_parts_of(self.kernel, own[0], shared[0]), tuple(bound))

    def dense(self, dtype: Any = None) -> jax.Array | None:
        """The adapted kernel, every adapter's `effective` in turn; None where rows choose."""
        if any(one.ids is not None for one in self.bound):
            return None
        array, view = dense(self.kernel, self.dtype if dtype is None else dtype), self.view

        def adapted(matrix, _, bound):
            for one in bound:
                matrix = one.effective(matrix)
            return matrix

        matrices = view.to_matrices(array)
        matrices = over_batch(adapted, len(view.batch))(matrices, matrices, self.bound)
        return view.from_matrices(matrices, tuple(array.shape)).astype(array.dtype)

    def multiply(self, op: Op, x: jax.Array, key: Key | None = None) -> tuple[jax.Array, Any]:
        """The product of each matrix with every adapter in turn, whose keys are their own."""
        site, view = self.bound[0].site, self.view
        layout, plain = op.layout(view), op.plain and view.rows == (0,)
        spec = sharding.matrix_spec(site.path, site.view) if plain else None

        def whole(x, kernel, bound):
            is_node = isinstance(kernel, KernelNode)
            base = kernel if is_node else dense(kernel, x.dtype, site.path)
            direct = undecoded(kernel, spec) if plain else None
            bare = plain and direct is None and not is_node and kernel.dtype == x.dtype
            inputs, (own, shared) = layout.inputs(x), _matrices_of(base, view)

            def run(x, own, bound):
                one = op.matrix(with_parts_of(base, own, shared))
                one = dataclasses.replace(one, own=direct or one.own, plain=bare)
                adapted = fold(one, bound)
                return adapted(x), None if adapted.aux is None else adapted.aux(x)

            outputs, aux = over_batch(run, layout.batch)(inputs, own, bound)
            outputs = layout.result(outputs, [self.shape[axis] for axis in view.cols])
            return _as_host(outputs, op.multiply, x, base), aux

        return decoding(whole, self.kernel)(x, self.kernel, self.bound)


def _matrices_of(base: Kernel, view: MatrixView) -> tuple[Pytree, Pytree]:
    """`(own, shared)` arrays of a base as `(batch..., n, m)`; a node is a stack of matrices as it
    is."""
    if not isinstance(base, KernelNode):
        return view.to_matrices(base), ()
    if base.view != view:
        raise ValueError(
            f"{base.label} of shape {tuple(base.shape)} is seen as {base.view}, the adapters on it "
            f"see {view}; give them the same views=, or node.dense() as their base"
        )
    return base.parts()


def over_batch(function: Callable, axes: int) -> Callable:
    """`function(x, matrix, bound)`, mapped over the kernel's leading batch axes."""
    for _ in range(axes):
        function = _mapped(function)
    return function


def _mapped(function: Callable) -> Callable:
    def run(x, matrix, bound):
        axes = tuple(
            dataclasses.replace(one, arrays=0, shared=None, keys=0, ids=0) for one in bound
        )
        return jax.vmap(function, in_axes=(0, 0, axes))(x, matrix, bound)

    return run


def fold(op: Op, bound: tuple[Bound, ...]) -> Op:
    """The operator with every adapter in turn; rows that choose among candidates are mapped one by
    one."""
    if all(one.ids is None for one in bound):
        for one in bound:
            op = one.wrap(op)
        return op
    ids = next(
        one.ids for one in bound if one.ids is not None
    )  # one call of attach: the same for all

    def product(x):
        if x.ndim < 1 or x.shape[0] != ids.shape[0]:
            raise ValueError(
                f"adapters of {bound[0].site.path!r}: ids choose for {ids.shape[0]} rows, the "
                f"input of this host has shape {x.shape}; its first axis must be those rows"
            )

        if any((sharding.explicit_spec(x) or ())[:1]):
            raise ValueError(
                f"adapters of {bound[0].site.path!r}: ids choose for rows that an explicit mesh "
                "divides, which is not implemented; make the mesh with explicit=False"
            )

        return by_rows(lambda op, x: op(x)[0], x)

    def by_rows(function, x):
        """`function(operator of the row, the row (1, ...))` of every row."""

        def row(x, number, index):
            own = fold(op, tuple(one.of_row(number, index) for one in bound))
            return function(own, x[None])

        return jax.vmap(row)(x, ids, jnp.arange(ids.shape[0]))

    gives = any(one.adapter.gives_aux for one in bound)
    aux = (lambda x: by_rows(lambda op, x: op.aux(x), x)) if gives else None
    return dataclasses.replace(op, own=product, aux=aux)


def alone(op: Op, bound: tuple[Bound, ...], host: str) -> Op:
    """The operator with every adapter; ValueError where one gives a value that this host cannot hand
    out."""
    adapted = fold(op, bound)
    if adapted.aux is not None:
        raise ValueError(
            f"adapters of {bound[0].site.path!r}: one gives a value beside the product, such as a "
            f"router's loss, which lrx.adapters.{host} has no way to hand out; adapt a dense product "
            "in its place, and multiply by lrx.matmul(x, kernel, aux=True)"
        )
    return adapted


def _as_host(y: jax.Array, own: Callable[..., jax.Array], *operands: Any) -> jax.Array:
    """`y` in the dtype of `own(*operands)`, and on an explicit mesh where that lies."""
    made = jax.eval_shape(own, *operands)
    return sharding.reshard(y.astype(made.dtype), sharding.explicit_spec(made))


def _at(kernel: Any, use: str) -> Any:
    """A kernel as a product of one kind sees it."""
    return kernel.at(use) if isinstance(kernel, KernelNode) else kernel


def embed(indices: jax.Array, table: Any, base: Callable | None = None) -> jax.Array:
    """Rows of an embedding `(V, d)` that may have adapters: `table[indices]`.

    >>> import jax, jax.numpy as jnp
    >>> import lowrank_jax as lrx
    >>> params = {"embedding": jnp.ones((9, 4))}
    >>> adaptation = lrx.adapt(params, {"embedding": lrx.adapters.lora(rank=2)}, jax.random.key(0))
    >>> lrx.adapters.embed(jnp.array([[1, 2]]), lrx.attach(params, adaptation)["embedding"]).shape
    (1, 2, 4)
    """
    own, table = base or _rows_of, _at(table, "gather")
    if not isinstance(table, AdaptedKernel):
        return own(indices, dense(table, getattr(table, "dtype", jnp.float32)))

    def whole(table, bound):
        matrix = dense(table, table.dtype)
        op = Op(matrix.shape, _rows_of, lambda: matrix, lambda x: own(x, matrix), "indices")
        return _as_host(alone(op, bound, "embed")(indices), own, indices, matrix)

    return decoding(whole, table.kernel)(table.kernel, table.bound)


def _rows_of(indices: jax.Array, factor: jax.Array) -> jax.Array:
    """`factor[indices]`, on an explicit mesh whole along the axis that is looked up."""
    left, right = sharding.explicit_spec(indices), sharding.explicit_spec(factor)
    if left is None or right is None:
        return factor[indices]
    return factor.at[indices].get(
        out_sharding=jax.sharding.PartitionSpec(*left, *(None for _ in right[1:]))
    )


def attend(x: jax.Array, table: Any, base: Callable | None = None) -> jax.Array:
    """`x (..., d) @ tableᵀ` for an embedding `(V, d)` that may have adapters: a tied output layer.

    >>> import jax.numpy as jnp
    >>> attend(jnp.ones((2, 4)), jnp.ones((9, 4))).shape
    (2, 9)
    """
    own = base or (lambda x, matrix: product(x, matrix.T).astype(jnp.result_type(x, matrix)))
    table = _at(table, "dot_general")
    if not isinstance(table, AdaptedKernel):
        return decoding(lambda x, table: own(x, dense(table, x.dtype)), table)(x, table)

    def whole(x, table, bound):
        matrix = dense(table, x.dtype, bound[0].site.path)
        op = Op(matrix.shape, product, lambda: matrix, lambda x: own(x, matrix), "transposed")
        return _as_host(alone(op, bound, "attend")(x), own, x, matrix)

    return decoding(whole, table.kernel)(x, table.kernel, table.bound)


def conv(x: jax.Array, kernel: Any, convolve: Callable[..., jax.Array]) -> jax.Array:
    """`convolve(x, kernel)` for a kernel `(window..., c_in, c_out)` that may have adapters.

    A factor `a (window... c_in, r)` is a convolution with r channels, `b (r, c_out)` one without a
    window.

    Args:
      x: the input.
      kernel: an array or an adapted kernel, whose view folds all axes but the last into rows, in
        their order.
      convolve: `(x, kernel of any number of output channels) -> (..., channels)`; strides, padding
        and so on are its.

    Raises:
      ValueError: for a kernel whose view is another, and for a convolution in groups.

    >>> import jax, jax.numpy as jnp
    >>> import lowrank_jax as lrx
    >>> layout = ("NWC", "WIO", "NWC")
    >>> convolve = lambda x, k: jax.lax.conv_general_dilated(
    ...     x, k, (1,), "SAME", dimension_numbers=layout
    ... )
    >>> params = {"kernel": jnp.ones((3, 4, 6))}
    >>> views = lrx.Views(rules={"kernel": lrx.MatrixView(rows=(0, 1), cols=(2,))})
    >>> adaptation = lrx.adapt(params, lrx.adapters.lora(rank=2), jax.random.key(0), views=views)
    >>> lrx.adapters.conv(
    ...     jnp.ones((1, 5, 4)), lrx.attach(params, adaptation)["kernel"], convolve
    ... ).shape
    (1, 5, 6)
    """
    kernel = _at(kernel, "conv_general_dilated")
    if not isinstance(kernel, AdaptedKernel):
        return decoding(lambda x, kernel: convolve(x, dense(kernel, x.dtype)), kernel)(x, kernel)
    view, last = kernel.view, kernel.ndim - 1
    if view != MatrixView(rows=tuple(range(last)), cols=(last,)):
        raise ValueError(
            f"adapters of {kernel.bound[0].site.path!r}: a convolution's kernel "
            f"{tuple(kernel.shape)} wants the view MatrixView(rows={tuple(range(last))}, "
            f"cols=({last},)), not rows={view.rows}, cols={view.cols}"
        )
    window = kernel.shape[:-1]
    try:
        jax.eval_shape(convolve, x, jax.ShapeDtypeStruct((*window, 1), x.dtype))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"adapters of {kernel.bound[0].site.path!r}: convolve must take a kernel of any number "
            "of output channels, and cannot take one of a single channel: a convolution in groups "
            "is no product of its whole input with factors. Give it the kernel of "
            "lrx.effective(params, adaptations)"
        ) from error

    def contract(x, factor):
        wide = jnp.promote_types(x.dtype, jnp.float32)
        return convolve(x, factor.astype(x.dtype).reshape(*window, factor.shape[-1])).astype(wide)

    def whole(x, kernel, bound):
        array = dense(kernel, x.dtype)
        matrix = view.to_matrices(array)
        op = Op(matrix.shape, contract, lambda: matrix, lambda x: convolve(x, array), "windows")
        return _as_host(alone(op, bound, "conv")(x), convolve, x, array)

    return decoding(whole, kernel.kernel)(x, kernel.kernel, kernel.bound)
