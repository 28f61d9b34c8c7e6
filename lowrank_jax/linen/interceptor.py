"""The interceptor that puts a kernel with adapters, a tap or 8 bits into the product of its
layer."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta
from jax.interpreters import partial_eval

from lowrank_jax.adapters import layers
from lowrank_jax.adapters.hosts import AdaptedKernel, Outside, attend, embed
from lowrank_jax.projection.tapped import Tapped


def adapted(function: Callable[..., Any], *, partial: bool = False) -> Callable[..., Any]:
    """A function of a linen model, made to accept kernels with adapters, tapped and quantised ones
    in its parameters.

    `lrx.linen.tapped` is another name for it. The products of `nn.Dense`, `nn.DenseGeneral`,
    `nn.Einsum` and `nn.Conv`, the look-up and `attend` of `nn.Embed`, and those of classes derived
    from them, take what `lrx.attach` or `lrx.projected_value_and_grad` put into `params`; a module
    of your own hands `self.param(...)` to `lrx.matmul` and its like. A quantised kernel (a subclass of
    `lrx.linalg.Codes`) is decoded where it is multiplied, one layer at a time.
    Without any of them the function is unchanged.

    Embeddings and convolutions can be adapted, not tapped. Scanned models keep their layers on axis
    0 (`variable_axes={"params": 0}`), and `nn.vmap` over a batch hides the rows that `ids` choose
    for. Jit the function from outside: where adapters share arrays (Uni-LoRA, VeRA), a jit inside
    it is compiled again by each call that is not itself traced.

    Args:
      function: `function(params, *args, **kwargs)`, which calls
        `model.apply({"params": params, ...}, ...)`.
      partial: allows leaves with adapters that the function does not read, such as the decoder's
        while it encodes.

    Raises:
      ValueError: when called, naming the leaf: if a kernel with adapters is used by a product that
        passes them by, such as `embedding.T` of a tied head; if no product uses it at all (without
        `partial`); if the layer has an option that cannot be adapted or tapped, such as groups of a
        convolution.

    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> import lowrank_jax as lrx
    >>> model, x = nn.Dense(6), jnp.ones((3, 4))
    >>> params = model.init(jax.random.key(0), x)["params"]
    >>> adaptation = lrx.adapt(params, lrx.adapters.lora(rank=2), jax.random.key(1))
    >>> function = lrx.linen.adapted(
    ...     lambda params, x: jnp.sum(model.apply({"params": params}, x) ** 2)
    ... )
    >>> loss = lambda train: function(lrx.attach(params, adaptation.replace(train=train)), x)
    >>> jax.grad(loss)(adaptation.train)["sites"]["kernel"]["b"].shape
    (2, 6)
    >>> state = lrx.galore(1e-2, rank=2).init(params)
    >>> value, grads = lrx.projected_value_and_grad(function, lrx.taps(state))(params, x)
    >>> grads["kernel"].low.shape, grads["bias"].shape
    ((2, 6), (6,))
    """

    @functools.wraps(function)
    def run(params: Any, *args: Any, **kwargs: Any) -> Any:
        params, outsides = _carried(params)
        reached: set[str] = set()
        try:
            with nn.intercept_methods(functools.partial(intercept, reached)):
                result = function(params, *args, **kwargs)
                if not partial:
                    _check_reached(
                        params, reached, lambda params: function(params, *args, **kwargs)
                    )
        finally:
            for outside in outsides:
                outside.value = None  # traces that are kept keep no arrays
        return result

    return run


tapped = adapted


def _is_adapted(node: Any) -> bool:
    return isinstance(node, AdaptedKernel)


def _carried(params: Any) -> tuple[Any, list[Outside]]:
    """The parameters with what adapters share put outside, where no scan slices it; and those
    places."""
    params = jax.tree.map(
        lambda node: node.carried() if _is_adapted(node) else node, params, is_leaf=_is_adapted
    )
    nodes = [node for node in jax.tree.leaves(params, is_leaf=_is_adapted) if _is_adapted(node)]
    return params, [
        one.shared for node in nodes for one in node.bound if isinstance(one.shared, Outside)
    ]


def _check_reached(params: Any, reached: set[str], function: Callable[[Any], Any]) -> None:
    """ValueError for an adapted leaf that no product used.

    A layer that was not seen may have been traced before, under a jit within the function, or
    belong to a module that calls `lrx.matmul`: then the program does read the arrays of its
    adapters.
    """
    nodes = [node for node in jax.tree.leaves(params, is_leaf=_is_adapted) if _is_adapted(node)]
    missing = {node.bound[0].site.path for node in nodes} - reached
    if not missing:
        return

    def arrays(params: Any) -> Any:
        return [leaf for leaf in jax.tree.leaves(function(params)) if isinstance(leaf, jax.Array)]

    try:
        jaxpr = jax.make_jaxpr(arrays)(params).jaxpr
    except jax.errors.JAXTypeError:  # the function wants numbers, and cannot be asked
        return
    _, used = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    for node in jax.tree.leaves(
        jax.tree.unflatten(jax.tree.structure(params), used), is_leaf=_is_adapted
    ):
        if _is_adapted(node) and any(jax.tree.leaves(node.bound)):
            missing.discard(node.bound[0].site.path)
    if missing:
        raise ValueError(
            f"adapters of {sorted(missing)}: no layer and no product used these kernels, so their "
            "adapters do nothing. Leave them out with exclude=, or, where this function needs only "
            "a part of the model, write lrx.linen.adapted(function, partial=True). A model that "
            "uses them in a way of its own takes lrx.effective(params, adaptations)"
        )


def intercept(
    reached: set[str], next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Any
) -> Any:
    """Runs a method of a layer of Flax with its kernel in its product, if that is more than an
    array."""
    module, method = context.module, getattr(context.orig_method, "func", None)
    leaf, host = _HOSTS.get(method, (None, None))
    if (
        host is None
        or module.scope is None
        or not module.has_variable("params", leaf)
        or _DONE in vars(module)
    ):
        return next_fun(*args, **kwargs)
    if GIVEN in vars(module):
        value, used = vars(module)[GIVEN]
        used.append(True)
    else:
        value = meta.unbox(module.get_variable("params", leaf))
    if not layers.is_special(value):
        return next_fun(*args, **kwargs)
    if _is_adapted(value) and host is not _setup:
        reached.add(value.bound[0].site.path)
    return host(module, value, next_fun, args, kwargs)


# What is told to an interceptor through a module: that its kernel is in its product already, or the
# kernel that stands in for its variable, with a list that takes note of its use.
_DONE, GIVEN = "_lowrank_done", "_lowrank_kernel"


@contextlib.contextmanager
def shadowed(module: nn.Module, **attributes: Any) -> Iterator[None]:
    """Sets attributes of a bound module, which is frozen, for the time of one call.

    A clone would have to share the scope, whose names are taken, or live apart from it: then other
    interceptors would run twice on it, and what they sow would be lost. Bound modules are made anew
    by every `apply`, so nobody else sees these attributes.
    """
    before = {name: vars(module)[name] for name in attributes if name in vars(module)}
    for name, value in attributes.items():
        object.__setattr__(module, name, value)
    try:
        yield
    finally:
        for name in attributes:
            if name in before:
                object.__setattr__(module, name, before[name])
            else:
                object.__delattr__(module, name)


def _param(module: Any, leaf: str, value: Any, found: Callable[[Any], Any]) -> Callable[..., Any]:
    """`module.param`, which gives `found(kernel)` for the kernel; Flax's check of shapes knows no
    quantised one."""
    original = module.param

    def param(name: str, *init: Any, **options: Any) -> Any:
        if name != leaf:
            return original(name, *init, **options)
        return found(value if layers.is_quantised(value) else original(name, *init, **options))

    return param


def _own(module: Any, field: str, default: Callable[..., Any]) -> Callable[..., Any]:
    """The product of a module: made by its `..._cls`, its own, or that of jax."""
    cls = getattr(module, field + "_cls")
    return cls() if cls is not None else getattr(module, field) or default


def _name(module: nn.Module) -> str:
    return "/".join(module.path) or type(module).__name__


def _dense(module: Any, value: Any, next_fun: Callable, args: Any, kwargs: Any) -> Any:
    product = layers.product_of(
        value, _own(module, "dot_general", jax.lax.dot_general), _name(module)
    )
    param = _param(
        module, "kernel", value, lambda found: layers.array_of(found, module.param_dtype)
    )
    with shadowed(module, dot_general=product, dot_general_cls=None, param=param, **{_DONE: True}):
        return next_fun(*args, **kwargs)


def _conv(module: Any, value: Any, next_fun: Callable, args: Any, kwargs: Any) -> Any:
    own = _own(module, "conv_general_dilated", jax.lax.conv_general_dilated)
    product = layers.convolution_of(value, own, _name(module), module)
    param = _param(
        module, "kernel", value, lambda found: layers.array_of(found, module.param_dtype)
    )
    fields = {
        "conv_general_dilated": product,
        "conv_general_dilated_cls": None,
        "param": param,
        _DONE: True,
    }
    with shadowed(module, **fields):
        return next_fun(*args, **kwargs)


def _einsum(module: Any, value: Any, next_fun: Callable, args: Any, kwargs: Any) -> Any:
    """`nn.Einsum.__call__`, which has no field for its product, line by line but for that
    product."""
    del next_fun
    product = layers.einsum_of(value, jnp.einsum, _name(module))

    def call(inputs: jax.Array, einsum_str: str | None = None) -> jax.Array:
        subscripts = nn.merge_param("einsum_str", module.einsum_str, einsum_str).replace(" ", "")
        bias, broadcast = None, None
        if module.use_bias:
            shape, broadcast = module._get_bias_shape(subscripts, inputs, layers.base(value))
            bias = module.param("bias", module.bias_init, shape, module.param_dtype)
        given = layers.array_of(value, module.param_dtype)
        inputs, given, bias = module.promote_dtype(inputs, given, bias, dtype=module.dtype)
        options = {
            "precision": module.precision,
            "preferred_element_type": module.preferred_element_type,
        }
        y = product(subscripts, inputs, given, **options)
        return y if bias is None else y + jnp.reshape(bias, broadcast)

    return call(*args, **kwargs)


def _table(module: Any, value: Any) -> Any:
    if isinstance(value, Tapped):
        raise ValueError(
            f"{_name(module)}: an embedding cannot be tapped; leave it out with "
            "Views(rules=((path, None),))"
        )
    return layers.table(value, module.param_dtype)


def _only(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The one argument of a method, by position or by name."""
    (argument,) = (*args, *kwargs.values())
    return argument


def _with_table(module: Any, next_fun: Callable) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """The method of an `nn.Embed` as a function of its input and any table."""

    def run(x: jax.Array, table: jax.Array) -> jax.Array:
        with shadowed(module, embedding=table, **{_DONE: True}):
            return next_fun(x)

    return run


def _look_up(module: Any, value: Any, next_fun: Callable, args: Any, kwargs: Any) -> Any:
    return embed(_only(args, kwargs), _table(module, value), _with_table(module, next_fun))


def _attend(module: Any, value: Any, next_fun: Callable, args: Any, kwargs: Any) -> Any:
    value = _table(module, value)
    query, _ = module.promote_dtype(_only(args, kwargs), layers.base(value), dtype=module.dtype)
    return attend(query, value, _with_table(module, next_fun))


def _setup(module: Any, value: Any, next_fun: Callable, args: Any, kwargs: Any) -> Any:
    """`nn.Embed.setup`, which keeps its table as an attribute: the whole kernel, so that no use
    passes adapters by."""
    with shadowed(module, param=_param(module, "embedding", value, lambda found: found)):
        return next_fun(*args, **kwargs)


# Lifted classes (nn.scan(nn.Dense), ...) derive from their target, but what they call is not its
# __call__: the function tells the call that sees one layer from the call that sees the stack.
_HOSTS: dict[Any, tuple[str, Callable[..., Any]]] = {
    inspect.unwrap(method): (leaf, host)
    for method, leaf, host in (
        (nn.Dense.__call__, "kernel", _dense),
        (nn.DenseGeneral.__call__, "kernel", _dense),
        (nn.Einsum.__call__, "kernel", _einsum),
        (nn.Conv.__call__, "kernel", _conv),
        (nn.Embed.__call__, "embedding", _look_up),
        (nn.Embed.attend, "embedding", _attend),
        (nn.Embed.setup, "embedding", _setup),
    )
}
