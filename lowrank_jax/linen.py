"""Projected backprop through Flax linen models, also unmodified ones of other people.

    loss = lr.linen.tapped(lambda params, batch: objective(model.apply({"params": params}, batch)))
    value, grads = lr.projected_value_and_grad(loss, lr.taps(opt_state))(params, batch)

A tapped kernel travels as two siblings, `kernel` and `kernel_tap`, inside `params`: other people's `nn.scan`, `nn.vmap`
and `nn.remat` lift that collection only, and a sibling with the same leading axes needs no look-up by path. Where
`nn.Dense`, `nn.DenseGeneral` or `nn.Einsum` is called, a method interceptor puts the tap into its product; dtypes,
promotion and bias stay Flax's.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta

from lowrank_jax.projection.tapped import Tapped, dot_general, einsum

SUFFIX = "_tap"
# Lifted classes (nn.scan(nn.Dense), ...) derive from their target, but what they call is not its __call__: the function
# tells the call that sees one layer from the call that sees the stack.
_HOST_CALLS = tuple(inspect.unwrap(host.__call__) for host in (nn.Dense, nn.DenseGeneral, nn.Einsum))
_EINSUM = _HOST_CALLS[2]


def tapped(loss: Callable[..., Any]) -> Callable[..., Any]:
    """The loss of a linen model, made to accept tapped and quantised kernels.

    In `params` (nested dicts or FrozenDicts, the first argument) a node `name: Tapped(kernel, tap)` becomes
    `name: kernel` and `name_tap: tap`; a kernel inside a `nn.Partitioned` box stays there. The products of `nn.Dense`,
    `nn.DenseGeneral` and `nn.Einsum`, and of classes derived from them, use the tap. A quantised kernel (an object with
    `shape` and `dequantize(dtype)`), tapped or not, is dequantised where it is multiplied, one layer at a time, so that
    forward passes and evaluations also run as `tapped(function)(params, ...)`. Without either, the loss is unchanged.

    Not tapped: `nn.Embed`, `nn.Conv`, and products of your own (hand those to `lr.matmul`): their taps stay unused,
    which `lr.projected_value_and_grad` reports; leave such kernels out with `Views(rules=((path, None),))`. A quantised
    kernel of another module is refused by Flax. Scanned models keep their layers on axis 0
    (`variable_axes={"params": 0}`).

    Args:
      loss: `loss(params, *args, **kwargs)`, which calls `model.apply({"params": params, ...}, ...)`.

    Raises:
      ValueError: when called, if a `Tapped` has no name or its sibling's name is taken, or if the `dot_general` of a
        tapped module is more than `jax.lax.dot_general` with keyword options.

    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> import lowrank_jax as lr
    >>> model, x = nn.Dense(6), jnp.ones((3, 4))
    >>> params = model.init(jax.random.key(0), x)["params"]
    >>> state = lr.galore(1e-2, rank=2).init(params)
    >>> loss = lr.linen.tapped(lambda params, x: jnp.sum(model.apply({"params": params}, x) ** 2))
    >>> value, grads = lr.projected_value_and_grad(loss, lr.taps(state))(params, x)
    >>> grads["kernel"].low.shape, grads["bias"].shape
    ((2, 6), (6,))
    """

    @functools.wraps(loss)
    def run(params: Any, *args: Any, **kwargs: Any) -> Any:
        with nn.intercept_methods(_intercept):
            return loss(_split(params), *args, **kwargs)

    return run


def _split(params: Any) -> Any:
    """Every `name: Tapped(kernel, tap)` as `name: kernel, name_tap: tap`."""
    is_known = lambda node: isinstance(node, (Mapping, Tapped))  # noqa: E731

    def one(node: Any) -> Any:
        if isinstance(node, Tapped):
            raise ValueError(
                f"tap {node.tap.view.path!r}: a linen model keeps its parameters in dicts, and this one is no entry of "
                "a dict; multiply a bare kernel with lr.matmul, without lr.linen.tapped"
            )
        if not isinstance(node, Mapping):
            return node
        new: dict[str, Any] = {}
        for name, value in node.items():
            if not isinstance(value, Tapped):
                new[name] = _split(value)
                continue
            if name + SUFFIX in node:
                raise ValueError(f"tap {value.tap.view.path!r}: its place {name + SUFFIX!r} is a parameter; rename it")
            new |= {name: value.kernel, name + SUFFIX: value.tap}
        return type(node)(new)  # type: ignore[call-arg]

    return jax.tree.map(one, params, is_leaf=is_known)


def _intercept(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
    """Runs the `__call__` of a host with the tap, or the quantised kernel, in its product."""
    module, method = context.module, getattr(context.orig_method, "func", None)
    if method not in _HOST_CALLS or module.scope is None or not module.has_variable("params", "kernel"):
        return next_fun(*args, **kwargs)
    kernel = meta.unbox(module.get_variable("params", "kernel"))
    tap = module.get_variable("params", "kernel" + SUFFIX)
    quantised = hasattr(kernel, "dequantize")
    if tap is None and not quantised:
        return next_fun(*args, **kwargs)
    if method is _EINSUM:
        return _einsum(module, kernel, tap, *args, **kwargs)
    own = module.dot_general_cls() if module.dot_general_cls is not None else module.dot_general or jax.lax.dot_general
    options = {} if tap is None else _keyword_options(own, module)

    def product(x: jax.Array, given: Any, dimension_numbers: Any, **call: Any) -> jax.Array:
        if tap is not None:
            given = Tapped(kernel if quantised else given, tap)
            return dot_general(x, given, dimension_numbers, **(options | call))
        return own(x, kernel.dequantize(x.dtype), dimension_numbers, **call)

    def param(name: str, *init: Any, **options: Any) -> Any:
        return _stand_in(kernel, module) if name == "kernel" else original(name, *init, **options)

    original, new = module.param, {"dot_general": product, "dot_general_cls": None}
    with _shadowed(module, **(new | ({"param": param} if quantised else {}))):
        return next_fun(*args, **kwargs)


@contextlib.contextmanager
def _shadowed(module: nn.Module, **attributes: Any) -> Iterator[None]:
    """Sets attributes of a bound module, which is frozen, for the time of one call.

    A clone would have to share the scope, whose names are taken, or live apart from it: then other interceptors would
    run twice on it, and what they sow would be lost. Bound modules are made anew by every `apply`, so nobody else sees
    these attributes.
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


def _stand_in(kernel: Any, module: Any) -> jax.Array:
    """What Flax checks and promotes in place of a quantised kernel: its shape and dtype. No product reads it."""
    dtype = getattr(kernel, "dtype", module.param_dtype)
    return jnp.zeros(kernel.shape, dtype if jnp.issubdtype(dtype, jnp.floating) else module.param_dtype)


def _keyword_options(product: Callable[..., Any], module: nn.Module) -> dict[str, Any]:
    """The options of a `dot_general` that is `jax.lax.dot_general` but for keywords; ValueError for any other."""
    if product is jax.lax.dot_general:
        return {}
    if isinstance(product, functools.partial) and product.func is jax.lax.dot_general and not product.args:
        return product.keywords
    raise ValueError(
        f"{'/'.join(module.path) or type(module).__name__} has its own dot_general, {product!r}, which cannot be "
        "tapped; jax.lax.dot_general and functools.partial(jax.lax.dot_general, keyword=...) can. Leave its kernel out "
        "with Views(rules=((path, None),))"
    )


def _einsum(module: Any, kernel: Any, tap: Any, inputs: jax.Array, einsum_str: str | None = None) -> jax.Array:
    """`nn.Einsum.__call__`, which has no field for its product, line by line but for that product."""
    subscripts = nn.merge_param("einsum_str", module.einsum_str, einsum_str).replace(" ", "")
    quantised = hasattr(kernel, "dequantize")
    bias, broadcast = None, None
    if module.use_bias:
        shape, broadcast = module._get_bias_shape(subscripts, inputs, kernel)
        bias = module.param("bias", module.bias_init, shape, module.param_dtype)
    given = _stand_in(kernel, module) if quantised else kernel
    inputs, given, bias = module.promote_dtype(inputs, given, bias, dtype=module.dtype)
    given = kernel if quantised else given
    options = {"precision": module.precision, "preferred_element_type": module.preferred_element_type}
    y = einsum(subscripts, inputs, given if tap is None else Tapped(given, tap), **options)
    return y if bias is None else y + jnp.reshape(bias, broadcast)
