"""Adapters as parameters of a linen model, for authors who want them in it."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta
from flax.core.scope import subtract_filters

from lowrank_jax.adapters.adaptation import Adaptation
from lowrank_jax.adapters.base import Adapter, Site
from lowrank_jax.adapters.hosts import AdaptedKernel, Bound
from lowrank_jax.adapters.tree import adapt
from lowrank_jax.functions.adapted import adapted
from lowrank_jax.matrices import MatrixView
from lowrank_jax.resolution import Views
from lowrank_jax.trees import is_node, path_of

_HOSTS = (nn.Dense, nn.DenseGeneral, nn.Einsum, nn.Conv, nn.Embed)
_SLOT = r"(?P<leaf>(?:.*/)?(?:kernel|embedding))_[a-z0-9_]+"


class WithAdapter(nn.Module):
    """A layer whose adapter is part of the model:
    `WithAdapter(nn.Dense(64), lrx.adapters.lora(rank=8))(x)`.

    For authors of models whose surroundings know one tree of plain arrays, made by `model.init`:
    shardings from `nn.get_partition_spec`, checkpoints, export, serving. To adapt a model that
    exists, leave it as it is and wrap the function, `lrx.adapted`. There adapters can also
    share arrays (Uni-LoRA, VeRA), come by name, be chosen by row.

    The paths of the wrapped layer stay as they were, and beside its kernel stand the arrays of the
    adapter, trained and frozen: `kernel`, `kernel_lora/a`, `kernel_lora/b`, `kernel_lora/scale`.
    Where the kernel is in a box that names its axes (`nn.with_partitioning`), they are too. `init`
    makes them zeros, and zeros are off: the layer is the base layer. So it is with the parameters
    of the base model, without these arrays. The only initialiser is `lrx.adapt` on the loaded
    parameters, with the adapters that the model names; `lrx.linen.insert` puts its arrays in their
    places:

        declared = jax.eval_shape(model.init, key, x)["params"]
        adaptation = lrx.adapt(base, {".*/up/kernel": lrx.adapters.lora(rank=8)}, key)
        params = lambda train: lrx.linen.insert(declared, base, adaptation.replace(train=train))
        loss = lambda train: objective(model.apply({"params": params(train)}, x))

    Dropout, and whatever else is random in the adapter, is drawn where `apply` is given
    `rngs={"dropout": key}`; a scan over layers splits them (`split_rngs={"dropout": True}`).

    Args:
      wrapped: an `nn.Dense`, `nn.DenseGeneral`, `nn.Einsum`, `nn.Conv` or `nn.Embed`, or of a class
        derived from them.
      adapter: such as `lrx.adapters.lora(rank=8)`.

    Raises:
      ValueError: when called: for another layer, an adapter that does not fit the kernel, or one
        that shares arrays.

    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> import lowrank_jax as lrx
    >>> model = lrx.linen.WithAdapter(nn.Dense(6), lrx.adapters.lora(rank=2))
    >>> params = model.init(jax.random.key(0), jnp.ones((3, 4)))["params"]
    >>> sorted(params), {name: leaf.shape for name, leaf in params["kernel_lora"].items()}
    (['bias', 'kernel', 'kernel_lora'], {'scale': (2,), 'a': (4, 2), 'b': (2, 6)})
    """

    wrapped: nn.Module
    adapter: Adapter

    def setup(self):
        if not isinstance(self.wrapped, _HOSTS):
            names = ", ".join(f"nn.{host.__name__}" for host in _HOSTS)
            raise ValueError(
                f"wrapped={type(self.wrapped).__name__}: an adapter belongs to one layer, of "
                f"{names}"
            )
        if self.adapter.common_draw:
            raise ValueError(
                f"adapter={self.adapter!r} draws once for all layers, which no layer can; give it "
                "draw='site', or wrap the function: lrx.adapted(function)"
            )
        nn.share_scope(self, self.wrapped)

    @nn.compact
    def __call__(self, *args, **kwargs):
        """The call of the wrapped layer, with the adapter."""
        if self.is_mutable_collection("params") and not self.has_variable("params", self._slot):
            y = self.wrapped(*args, **kwargs)
            self.param(self._slot, self._zeros, self._view(*args, **kwargs))
            return y
        return self._adapted("__call__", self._view(*args, **kwargs), *args, **kwargs)

    def attend(self, query):
        """`nn.Embed.attend`, with the adapter."""
        return self._adapted("attend", MatrixView(), query)

    @property
    def _leaf(self) -> str:
        return "embedding" if isinstance(self.wrapped, nn.Embed) else "kernel"

    @property
    def _slot(self) -> str:
        return f"{self._leaf}_{self.adapter.kind}"

    @nn.nowrap
    def _site(self, kernel: Any, view: MatrixView) -> tuple[Adapter, Site, dict[str, Any]]:
        path = "/".join((*self.wrapped.path, self._leaf))
        return _declared(self.adapter, path, tuple(meta.unbox(kernel).shape), view)

    @nn.nowrap
    def _zeros(self, key: jax.Array, view: MatrixView) -> dict[str, Any]:
        kernel: Any = self.get_variable("params", self._leaf)
        adapter, site, shapes = self._site(kernel, view)
        arrays = {name: jnp.zeros(leaf.shape, leaf.dtype) for name, leaf in shapes.items()}
        return Bound(arrays, {}, None, None, adapter, site).boxed(kernel).arrays

    @nn.nowrap
    def _adapted(self, method: str, view: MatrixView, *args: Any, **kwargs: Any) -> Any:
        """A method of the wrapped layer: its parameters with the adapter attached, adapted(apply)."""
        kernel: Any = self.get_variable("params", self._leaf)
        arrays = meta.unbox(self.get_variable("params", self._slot))
        if kernel is None or arrays is None:
            return getattr(self.wrapped, method)(*args, **kwargs)
        bare = meta.unbox(kernel)
        adapter, site, _ = self._site(bare, view)
        keys = None
        if adapter.stochastic and self.has_rng("dropout"):
            # the layer may draw too, from the first key on
            keys = jax.random.fold_in(self.make_rng("dropout"), 1)
            keys = jax.random.split(keys, site.lead) if site.lead else keys
        node: Any = AdaptedKernel(bare, (Bound(dict(arrays), {}, keys, None, adapter, site),))
        if isinstance(kernel, meta.AxisMetadata):
            node = kernel.replace_boxed(node)
        layer, variables = self.wrapped.unbind()
        # what a derived class draws, and what it writes, such as values that it sows
        assert self.scope is not None
        rngs = self.scope.rngs
        mutable = subtract_filters(self.scope.mutable, "params")

        def apply(params, others, rngs, *args, **kwargs):
            return layer.apply(
                {**others, "params": params},
                *args,
                rngs=rngs,
                method=method,
                mutable=mutable,
                **kwargs,
            )

        others = {name: tree for name, tree in variables.items() if name != "params"}
        params = {**variables["params"], self._leaf: node}
        y, written = adapted(apply)(params, others, rngs, *args, **kwargs)
        for collection, tree in written.items():
            for name, value in tree.items():
                self.put_variable(collection, name, value)
        return y

    @nn.nowrap
    def _view(self, *args: Any, **kwargs: Any) -> MatrixView:
        """Which axes of the kernel the wrapped layer contracts."""
        layer: Any = self.wrapped
        count = lambda x: 1 if isinstance(x, int) else len(x)  # noqa: E731
        if isinstance(layer, nn.DenseGeneral):
            batch, rows = count(layer.batch_dims), count(layer.batch_dims) + count(layer.axis)
            cols = tuple(range(rows, rows + count(layer.features)))
            return MatrixView(batch=tuple(range(batch)), rows=tuple(range(batch, rows)), cols=cols)
        if isinstance(layer, nn.Conv):
            last = count(layer.kernel_size) + 1
            return MatrixView(rows=tuple(range(last)), cols=(last,))
        if isinstance(layer, nn.Einsum):
            given = kwargs.get("einsum_str", args[1] if len(args) > 1 else None)
            operands, _, out = (
                nn.merge_param("einsum_str", layer.einsum_str, given)
                .replace(" ", "")
                .partition("->")
            )
            left, right = operands.split(",")
            kinds = [(name in left, name in out) for name in right]
            axes = lambda kind: tuple(i for i, own in enumerate(kinds) if own == kind)  # noqa: E731
            return MatrixView(
                batch=axes((True, True)), rows=axes((True, False)), cols=axes((False, True))
            )
        return MatrixView()


@functools.cache
def _declared(
    adapter: Adapter, path: str, shape: tuple[int, ...], view: MatrixView
) -> tuple[Adapter, Site, dict[str, Any]]:
    """The adapter of one layer, its site, and the shapes of its arrays, as `lrx.adapt` makes
    them."""
    views = Views(rules=((re.escape(path), view),))
    params = {path: jax.ShapeDtypeStruct(shape, jnp.float32)}
    start = functools.partial(
        adapt, rules={re.escape(path): adapter}, key=jax.random.key(0), views=views
    )
    made = jax.eval_shape(start, params)
    arrays = made.arrays(path)
    if arrays.pop("shared"):
        raise ValueError(
            f"{path!r}: {adapter.kind} shares arrays between layers, which no layer can hold; "
            "leave the model as it is and wrap the function, lrx.adapted(function)"
        )
    return *made.layout.by_path[path], arrays


def insert(declared: Any, base: Any, adaptation: Adaptation) -> Any:
    """The parameters of a model with `WithAdapter` layers: those of the base model and the arrays
    of an adaptation.

    Differentiable in `base` and in the arrays. Layers that the adaptation leaves out stay off, with
    zeros.

    Args:
      declared: the parameters that `model.init` makes, or their shapes (`jax.eval_shape`).
      base: those of the base model, for instance from its checkpoint; arrays of adapters in it do
        not count.
      adaptation: of `lrx.adapt(base, ...)`, with the adapters that the model names.

    Raises:
      ValueError: naming the path: a parameter that the base lacks, an array of another shape than
        the declared one, an adapter that the model does not declare.

    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> import lowrank_jax as lrx
    >>> lora, x = lrx.adapters.lora(rank=2), jnp.ones((3, 4))
    >>> base = nn.Dense(6).init(jax.random.key(0), x)["params"]
    >>> model = lrx.linen.WithAdapter(nn.Dense(6), lora)
    >>> declared = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    >>> params = lrx.linen.insert(declared, base, lrx.adapt(base, lora, jax.random.key(1)))
    >>> model.apply({"params": params}, x).shape
    (3, 6)
    """
    given = _nodes(base) | adaptation.train["trainable"]
    leaves = _nodes(declared)
    arrays: dict[str, Any] = {}
    for path, (adapter, _) in adaptation.layout.by_path.items():
        own = adaptation.arrays(path)
        own.pop("shared")
        arrays |= {f"{path}_{adapter.kind}/{name}": array for name, array in own.items()}

    def place(keys: Any, node: Any) -> Any:
        path = path_of(keys)
        slot = re.fullmatch(_SLOT, path.rpartition("/")[0])
        if path in arrays:
            found = arrays.pop(path)
        elif slot and slot["leaf"] in leaves:
            found = jnp.zeros(_inner(node).shape, _inner(node).dtype)
        elif path in given:
            found = given[path]
        else:
            raise ValueError(
                f"base: {path!r}, which the model declares, is missing; give the tree of the base "
                "model"
            )
        shape, wanted = tuple(_inner(found).shape), tuple(_inner(node).shape)
        if shape != wanted:
            raise ValueError(
                f"{path!r}: shape {shape}, and the model declares {wanted}; adapt with the same "
                "adapter"
            )
        boxed = isinstance(node, meta.AxisMetadata) and not isinstance(found, meta.AxisMetadata)
        return node.replace_boxed(found) if boxed else found

    result = jax.tree_util.tree_map_with_path(place, declared, is_leaf=is_node)
    if arrays:
        raise ValueError(
            f"the model declares no {sorted(arrays)}: wrap these layers, WithAdapter(layer, "
            "adapter), with the adapter that the adaptation has, or leave them out with exclude="
        )
    return result


def extract(params: Any, adaptation: Adaptation) -> tuple[Any, Adaptation]:
    """The inverse of `insert`: the parameters of the base model, and the adaptation with the arrays
    in `params`.

    For `lrx.merge`, files, and another model. Leaves trained in full are in both.

    Raises:
      ValueError: if `params` lacks an array of the adaptation.

    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> import lowrank_jax as lrx
    >>> lora, x = lrx.adapters.lora(rank=2), jnp.ones((3, 4))
    >>> params = lrx.linen.WithAdapter(nn.Dense(6), lora).init(jax.random.key(0), x)["params"]
    >>> base, _ = lrx.linen.extract(params, lrx.adapt(params, lora, jax.random.key(1)))
    >>> sorted(base)
    ['bias', 'kernel']
    """
    nodes = _nodes(params)

    def read(path: str) -> Any:
        if path not in nodes:
            raise ValueError(
                f"{path!r} is missing; give the parameters of a model with this adapter"
            )
        return meta.unbox(nodes[path])

    def sites(tree: dict[str, Any]) -> dict[str, Any]:
        kinds = {path: adapter.kind for path, (adapter, _) in adaptation.layout.by_path.items()}
        own = {
            path: {name: read(f"{path}_{kinds[path]}/{name}") for name in arrays}
            for path, arrays in tree["sites"].items()
        }
        return tree | {"sites": own}

    def without(node: Any) -> Any:
        if not isinstance(node, Mapping):
            return node

        def slot(name):
            return (match := re.fullmatch(_SLOT, name)) is not None and match["leaf"] in node

        return type(node)({name: without(value) for name, value in node.items() if not slot(name)})  # type: ignore[call-arg]

    train = sites(adaptation.train) | {
        "trainable": {path: read(path) for path in adaptation.layout.trainable}
    }
    return without(params), adaptation.replace(train=train, frozen=sites(adaptation.frozen))


def _inner(node: Any) -> Any:
    """The array or shape in a leaf; unboxing would constrain its sharding, which a shape does not
    have."""
    return jax.tree.leaves(node)[0]


def _nodes(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by path; boxes stay."""
    return {
        path_of(keys): node
        for keys, node in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_node)[0]
    }
