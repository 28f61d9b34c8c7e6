"""Kernels with adapters, and the hosts that multiply by them.

`attach(params, adaptation)` puts an `AdaptedKernel` in the place of each adapted leaf.
`lrx.adapted(function)` takes it as the function takes an array, and so do `lrx.matmul`, `lrx.einsum`,
`lrx.dot_general`, and `embed`, `attend` and `conv` here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax.core import meta

from lowrank_jax import sharding
from lowrank_jax.adapters.base import Adapter, Site, dropout
from lowrank_jax.functions.adapted import adapted
from lowrank_jax.kernel_node import KernelNode, Op, Stack, parts_of, product, with_parts_of
from lowrank_jax.matrices import MatrixView
from lowrank_jax.quantized import QuantizedKernel, decoding, dense, undecoded
from lowrank_jax.reprs import Short
from lowrank_jax.serialization import serializable
from lowrank_jax.trees import is_quantized
from lowrank_jax.typing import Kernel, Key, Pytree


class RawKernelError(ValueError, AttributeError):
    """A kernel with adapters is read as a bare array, past its adapters."""


@serializable
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Bound(Short):
    """One adapter of one leaf, with its arrays.

    Attributes:
      arrays: of the site, trained and frozen, with the leaf's batch axes in front; behind those an
        axis of candidates, where rows choose among several adapters.
      shared: of the group, without batch axes.
      keys: random keys `(batch...)` of a stochastic adapter, pairs where it has a common draw, or
        None.
      ids: None, or which candidate each row of the input takes, `(batch..., rows)`; -1 is none.
      adapter, site: static.
    """

    arrays: dict[str, Any]
    shared: dict[str, Any]
    keys: jax.Array | None
    ids: jax.Array | None
    adapter: Adapter = dataclasses.field(metadata={"static": True})
    site: Site = dataclasses.field(metadata={"static": True})

    def wrap(self, op: Op) -> Op:
        """The operator with this adapter."""
        return self.adapter.wrap(op, self.site, self.arrays | {"shared": self.shared}, self.keys)

    def factors(self) -> Any:
        """The factors of one matrix, or None."""
        return self.adapter.checked_factors(self.site, self.arrays | {"shared": self.shared})

    @property
    def is_thin(self) -> bool:
        """Whether the delta is one of thin factors, which may be cut with the kernel."""
        lead = self.arrays["scale"].ndim - int(self.adapter.ranked)
        one = lambda x: jax.ShapeDtypeStruct(x.shape[lead:], x.dtype)  # noqa: E731
        arrays = jax.tree.map(one, self.arrays)

        def run(arrays, shared):
            found = dataclasses.replace(self, arrays=arrays, shared=shared).factors()
            return None if found is None else (found.a, found.b)

        return jax.eval_shape(run, arrays, self.shared) is not None

    def effective(self, kernel: jax.Array) -> jax.Array:
        """The matrix with this adapter."""
        return self.adapter.effective(self.site, kernel, self.arrays | {"shared": self.shared})

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
        arrays, shared = jax.tree.map(take, (self.arrays, self.shared))
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
            f"adapters of {self.bound[0].site.path!r}: the kernel {what}, outside of "
            "lrx.adapted(function), which would pass its adapters by. Write "
            "lrx.adapted(function)(lrx.attach(params, adaptations), ...), multiply by lrx.matmul or "
            "lrx.einsum, or give the model lrx.effective(params, adaptations)"
        )

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
        """Whether one of the adapters means nothing for some rows or columns alone."""
        return any(one.adapter.whole_matrix or not one.is_thin for one in self.bound)

    @property
    def forms(self) -> bool:
        return all(one.ids is None for one in self.bound)

    @property
    def remedy(self) -> str:
        return (
            "Adapters act on products: leave the leaf out with exclude=, allow its matrix to be formed "
            "there, lrx.adapted(function, dense=path), or give the function "
            "lrx.effective(params, adaptations)."
        )

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
        if not self.forms:
            return None
        array, view = dense(self.kernel, self.dtype if dtype is None else dtype), self.view
        matrices = self.matrices(lambda: view.to_matrices(array))
        return view.from_matrices(matrices, tuple(array.shape)).astype(array.dtype)

    def matrices(self, base: Callable[[], jax.Array]) -> jax.Array:
        """Every adapter's `effective` in turn, of matrices `(batch..., n, m)`."""

        def adapted(matrix, bound):
            for one in bound:
                matrix = one.effective(matrix)
            return matrix

        matrices = base()
        return over_batch(adapted, matrices.ndim - 2)(matrices, self.bound)

    def multiply(self, op: Op, x: jax.Array, key: Key | None = None) -> tuple[jax.Array, Any]:
        """The product of each matrix with every adapter in turn, whose keys are their own."""
        stack = op.stack
        assert stack is not None
        if not stack.separable:
            return self._together(op, stack, x), None
        if op.input != "features" and any(one.adapter.gives_aux for one in self.bound):
            raise ValueError(
                f"{self.label}: one gives a value beside the product, of the features that it "
                f"multiplies, and a product of {op.input} at {op.line} has none; adapt a dense "
                "product in its place"
            )

        def whole(x, bound):
            # codes are decoded once, for the product and for whoever asks for the kernel
            own, stack = decoded(op)
            inputs, outputs = stack.inputs(x), stack.outputs(own.own(x))

            def run(x, y, parts, bound):
                adapted = fold(stack.matrix(x, y, lambda: stack.formed(parts)), bound)
                return adapted(x), None if adapted.aux is None else adapted.aux(x)

            # x may be that of all matrices, as when every expert sees it
            mapped = _over_stack(run, stack.mapped)
            outputs, aux = mapped(inputs, outputs, stack.parts, bound)
            return stack.result(outputs), aux

        return decoding(whole, stack.base)(x, self.bound)

    def _together(self, op: Op, stack: Stack, x: jax.Array) -> jax.Array:
        """The product with all matrices at once, by factors, or by the effective matrices."""
        if any(one.ids is not None or one.adapter.gives_aux for one in self.bound):
            raise ValueError(
                f"{self.label}: a product that sums over its matrices, or sorts rows into groups, has "
                "no rows to choose adapters for (ids=) and hands out no values beside it"
            )
        if not all(one.is_thin for one in self.bound):
            matrices = jax.checkpoint(
                lambda x, node: stack.by_matrices(x, node.matrices(op.kernel))
            )
            return matrices(x, self)
        y = op.own(x)
        for one in self.bound:
            a, scale, b = over_batch(lambda bound: bound.factors()[:3], stack.batch)(one)
            key = None if one.keys is None else one.keys.ravel()[0]
            dropped = dropout(x, one.adapter.dropout_rate, key)
            thin = op.through(dropped, a * scale[..., None, :], b)
            y = y + sharding.match_sharding(thin.astype(y.dtype), y)
        return y


def decoded(op: Op) -> tuple[Op, Stack]:
    """A product with codes as one with their value, but where a kernel multiplies by the codes."""
    assert op.stack is not None
    base = op.stack.base
    codes = base.codes if isinstance(base, QuantizedKernel) else base
    if not is_quantized(codes) or (op.plain and undecoded(codes) is not None):
        return op, op.stack
    made = op.stack.make(op.stack.rest, ((), op.stack.leaf()))
    assert made.stack is not None
    return made, made.stack


def _axes_of(bound: tuple[Bound, ...]) -> Any:
    """Which arrays of adapters have the kernel's batch axes: all but the shared ones."""
    places: Any = {"arrays": 0, "shared": None, "keys": 0, "ids": 0}
    return tuple(dataclasses.replace(one, **places) for one in bound)


def over_batch(function: Callable, axes: int) -> Callable:
    """`function(trees..., bound)`, mapped over leading batch axes."""

    def mapped(inner: Callable) -> Callable:
        def run(*trees):
            *others, bound = trees
            many = bound if isinstance(bound, tuple) else (bound,)
            places = _axes_of(many)
            own = places if isinstance(bound, tuple) else places[0]
            return jax.vmap(inner, in_axes=(*[0] * len(others), own))(*others, bound)

        return run

    for _ in range(axes):
        function = mapped(function)
    return function


def _over_stack(function: Callable, batch: tuple[bool, ...]) -> Callable:
    """`function(x, y, parts, bound)`, mapped over the batch axes, of which x may lack some."""

    def mapped(inner: Callable, has: bool) -> Callable:
        def run(x, y, parts, bound):
            places = (0 if has else None, 0, 0, _axes_of(bound))
            return jax.vmap(inner, in_axes=places)(x, y, parts, bound)

        return run

    for has in reversed(batch):
        function = mapped(function, has)
    return function


def fold(op: Op, bound: tuple[Bound, ...]) -> Op:
    """The operator with every adapter in turn; rows that choose among candidates are mapped one by
    one."""
    if all(one.ids is None for one in bound):
        for one in bound:
            op = one.wrap(op)
        return op
    # one call of attach: the same for all
    ids = next(one.ids for one in bound if one.ids is not None)

    def by_rows(x, function):
        """`function(operator of the row, the row (1, ...))` of every row."""
        rows, y = _rows(op, bound, ids, x), op(x)
        y = y.reshape(*rows.shape[:-1], y.shape[-1]) if op.rows else y

        def row(x, y, number, index):
            # the product of this row is there
            x, y = x[None], y[None]
            given = dataclasses.replace(op, own=lambda z: y if z is x else op(z), rows=None)
            return function(fold(given, tuple(one.of_row(number, index) for one in bound)), x)

        return jax.vmap(row)(rows, y, ids, jnp.arange(ids.shape[0]))

    def product(x):
        y = by_rows(x, lambda op, x: op(x)[0])
        return y.reshape(-1, y.shape[-1]) if op.rows else y

    gives = any(one.adapter.gives_aux for one in bound)
    aux = (lambda x: by_rows(x, lambda op, x: op.aux(x))) if gives else None
    return dataclasses.replace(op, own=product, aux=aux)


def _rows(op: Op, bound: tuple[Bound, ...], ids: jax.Array, x: jax.Array) -> jax.Array:
    """x with the rows that ids choose for as its first axis; ValueError where that is another."""
    count = op.rows or (x.shape[0] if x.ndim else 0)
    if count != ids.shape[0]:
        raise ValueError(
            f"adapters of {bound[0].site.path!r}: ids choose for {ids.shape[0]} rows, the input of "
            f"this host has shape {x.shape}; its first axis must be those rows"
        )
    if any((sharding.explicit_spec(x) or ())[:1]):
        raise ValueError(
            f"adapters of {bound[0].site.path!r}: ids choose for rows that an explicit mesh "
            "divides, which is not implemented; make the mesh with explicit=False"
        )
    return x.reshape(count, -1, x.shape[-1]) if op.rows else x


def embed(indices: jax.Array, table: Any, base: Callable | None = None) -> jax.Array:
    """Rows of an embedding `(V, d)` that may be a node: `lrx.adapted` of `table[indices]`, or of
    `base(indices, table)`.

    >>> import jax, jax.numpy as jnp
    >>> import lowrank_jax as lrx
    >>> params = {"embedding": jnp.ones((9, 4))}
    >>> adaptation = lrx.adapt(params, {"embedding": lrx.adapters.lora(rank=2)}, jax.random.key(0))
    >>> lrx.adapters.embed(jnp.array([[1, 2]]), lrx.attach(params, adaptation)["embedding"]).shape
    (1, 2, 4)
    """
    return adapted(base or _rows_of)(indices, table)


def _rows_of(indices: jax.Array, table: jax.Array) -> jax.Array:
    """`table[indices]`, on an explicit mesh unsharded along the axis that is looked up."""
    left, right = sharding.explicit_spec(indices), sharding.explicit_spec(table)
    if left is None or right is None:
        return table[indices]
    place = jax.sharding.PartitionSpec(*left, *(None for _ in right[1:]))
    return table.at[indices].get(out_sharding=place)


def attend(x: jax.Array, table: Any, base: Callable | None = None) -> jax.Array:
    """`x (..., d) @ tableᵀ`, or `base(x, table)`, for an embedding `(V, d)` that may be a node: a
    tied output layer.

    >>> import jax.numpy as jnp
    >>> attend(jnp.ones((2, 4)), jnp.ones((9, 4))).shape
    (2, 9)
    """
    return adapted(base or _attended)(x, table)


def _attended(x: jax.Array, table: jax.Array) -> jax.Array:
    return product(x, table.T).astype(jnp.result_type(x, table))


def conv(x: jax.Array, kernel: Any, convolve: Callable[..., jax.Array]) -> jax.Array:
    """`convolve(x, kernel)` for a kernel `(window..., c_in, c_out)` that may be a node.

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
    return adapted(convolve)(x, kernel)
