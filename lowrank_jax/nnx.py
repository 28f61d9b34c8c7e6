"""Projected backprop through Flax nnx models.

    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    params = nnx.to_pure_dict(params)               # paths such as "layers/0/up/kernel", as the default rules want
    loss = lambda params, batch: objective(lr.nnx.merge(graphdef, params, rest)(batch))
    value, grads = lr.projected_value_and_grad(loss, lr.taps(opt_state))(params, batch)

A tapped kernel stays one value of its `nnx.Param`, so the model's own `nnx.scan`, `nnx.vmap`, `nnx.remat` and `nnx.jit`
slice and carry the tap with the kernel. `lr.nnx.merge` only tells the modules that multiply: two of their fields,
`promote_dtype` and `dot_general`, learn to take such values.

Known to work with flax 0.12.8 on jax 0.10.2. The nnx of flax 0.12.8 cannot be imported on jax 0.11.1 or later, which
`lowrank_jax.nnx` reports; the rest of the library does not need it, and `import lowrank_jax` does not import it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp

from lowrank_jax.projection.tapped import Tapped, dot_general, einsum

try:
    from flax import nnx
except (ImportError, AttributeError) as error:
    raise ImportError(
        f"flax.nnx of flax {flax.__version__} cannot be imported with jax {jax.__version__} ({error}): flax 0.12.8 "
        "needs jax<0.11.1. Linen models (lr.linen) and bare functions work without it"
    ) from error

_HOSTS = (nnx.Linear, nnx.LinearGeneral, nnx.Einsum)


def merge(graphdef: Any, *states: Any) -> Any:
    """`nnx.merge(graphdef, *states)` for states with tapped or quantised kernels.

    Where the `kernel` of a `nnx.Linear`, `nnx.LinearGeneral` or `nnx.Einsum`, or of a class derived from them, is a
    `Tapped` or a quantised array (an object with `shape` and `dequantize(dtype)`), the products of the merged module
    use it; dtypes, promotion and bias stay Flax's. Stacked layers work when the model maps or scans over axis 0 of
    their parameters. Without such kernels this is `nnx.merge`. A module of your own hands its value,
    `self.kernel[...]`, to `lr.matmul`.

    Args:
      graphdef: of `nnx.split`.
      *states: of `nnx.split`, each a `nnx.State` or a pure dict. `nnx.to_pure_dict(params)` has the paths that the
        default rules want, "up/kernel"; leaves of a `nnx.State` have paths such as "up/kernel/value".

    Raises:
      ValueError: where a tapped or quantised parameter belongs to another module of Flax, such as `nnx.Conv` or
        `nnx.Embed`, or to one with a product of its own that is more than `jax.lax.dot_general` or `jnp.einsum` with
        keyword options. The message names its path.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> import lowrank_jax as lr
    >>> graphdef, params = nnx.split(nnx.Linear(4, 6, rngs=nnx.Rngs(0)))
    >>> params = nnx.to_pure_dict(params)
    >>> state = lr.galore(1e-2, rank=2).init(params)
    >>> loss = lambda params, x: jnp.sum(lr.nnx.merge(graphdef, params)(x) ** 2)
    >>> value, grads = lr.projected_value_and_grad(loss, lr.taps(state))(params, jnp.ones((3, 4)))
    >>> grads["kernel"].low.shape, grads["bias"].shape
    ((2, 6), (6,))
    """
    model = nnx.merge(graphdef, *map(_hold, states))
    for keys, module in list(nnx.iter_graph(model)):
        if not isinstance(module, nnx.Module):
            continue
        special = [name for name, value in vars(module).items() if _is_held(value)]
        path = "/".join(map(str, keys)) or type(module).__name__
        if isinstance(module, _HOSTS):
            if "kernel" in special:
                _prepare(module, path)
        elif special and _flax_class(module) is not nnx.Module:
            raise ValueError(
                f"{path}: {special[0]} of nnx.{_flax_class(module).__name__} is tapped or quantised, but only kernels "
                "of nnx.Linear, nnx.LinearGeneral and nnx.Einsum can be; leave it out with Views(rules=((path, None),))"
            )
    return model


def _hold(state: Any) -> Any:
    """A state whose tapped and quantised values are held; the same object where there are none.

    A merged model shares its Variables with the states, so theirs must not be changed in place.
    """

    def is_special(node: Any) -> bool:
        # a Variable has the attributes of its value, but is not it
        return isinstance(node, Tapped) or (hasattr(node, "dequantize") and not isinstance(node, nnx.Variable))

    leaves, treedef = jax.tree.flatten(state, is_leaf=is_special)
    if not any(map(is_special, leaves)):
        return state
    return jax.tree.unflatten(treedef, [_Held(leaf) if is_special(leaf) else leaf for leaf in leaves])


def _is_held(value: Any) -> bool:
    return isinstance(value, nnx.Variable) and isinstance(value.get_raw_value(), _Held)


def _flax_class(module: Any) -> type:
    """The class of Flax that a module is, or is derived from."""
    return next(cls for cls in type(module).__mro__ if cls.__module__.partition(".")[0] == "flax")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Held:
    """The value of a Variable that is no array: `variable[...]`, by which modules read it, gives the value."""

    value: Any

    def __getitem__(self, index: Any) -> Any:
        if index is not Ellipsis:
            raise TypeError(f"a tapped or quantised parameter can be read as a whole only, [...], not [{index!r}]")
        return self.value


def _prepare(module: Any, path: str) -> None:
    """Gives a module that multiplies the two functions that understand its kernel.

    They hold no arrays and compare equal when they do the same, so a module that is split again, by a scan or a jit
    within the model, stays as static as it was.
    """
    is_tapped = isinstance(module.kernel[...], Tapped)
    if isinstance(module, nnx.Einsum):
        module.einsum_op = _product(einsum, jnp.einsum, module.einsum_op, path, is_tapped)
    else:
        own = module.dot_general
        if getattr(module, "dot_general_cls", None) is not None:
            own, module.dot_general_cls = module.dot_general_cls(), None
        module.dot_general = _product(dot_general, jax.lax.dot_general, own or jax.lax.dot_general, path, is_tapped)
    module.promote_dtype = _Promote(module.promote_dtype)


@dataclasses.dataclass(frozen=True)
class _Promote:
    """A `promote_dtype(arrays, dtype=...)` that casts the kernel inside a `Tapped` and leaves quantised ones alone."""

    own: Callable[..., Any]

    def __call__(self, arrays: tuple[Any, ...], **options: Any) -> tuple[Any, ...]:
        inputs, value, bias = arrays
        kernel = value.kernel if isinstance(value, Tapped) else value
        quantised = hasattr(kernel, "dequantize")
        # of a quantised kernel only the dtype takes part in the promotion
        inputs, cast, bias = self.own((inputs, jnp.zeros((), _dtype(kernel)) if quantised else kernel, bias), **options)
        cast = kernel if quantised else cast
        return inputs, Tapped(cast, value.tap) if isinstance(value, Tapped) else cast, bias


def _dtype(kernel: Any) -> Any:
    dtype = getattr(kernel, "dtype", jnp.float32)
    return dtype if jnp.issubdtype(dtype, jnp.floating) else jnp.float32


@dataclasses.dataclass(frozen=True)
class _Product:
    """`dot_general` or `einsum` of this library with the keyword options of the module's own."""

    function: Callable[..., Any]
    options: tuple[tuple[str, Any], ...]

    def __call__(self, *args: Any, **options: Any) -> jax.Array:
        return self.function(*args, **(dict(self.options) | options))


def _product(function: Callable, flax_default: Callable, own: Callable, path: str, is_tapped: bool) -> Callable:
    """The module's product, made to take its kernel; ValueError if it is tapped and the product is a user's own."""
    if own is flax_default:
        return _Product(function, ())
    if isinstance(own, functools.partial) and own.func is flax_default and not own.args:
        return _Product(function, tuple(sorted(own.keywords.items())))
    if not is_tapped:
        return _Dequantized(own)
    raise ValueError(
        f"{path} has its own {flax_default.__name__}, {own!r}, which cannot be tapped; jax's own can, also as "
        "functools.partial(..., keyword=...). Leave its kernel out with Views(rules=((path, None),))"
    )


@dataclasses.dataclass(frozen=True)
class _Dequantized:
    """A user's product of a quantised kernel: `(x, kernel, ...)` or `(subscripts, x, kernel)`."""

    own: Callable[..., Any]

    def __call__(self, *args: Any, **options: Any) -> jax.Array:
        dtype = next(arg.dtype for arg in args if isinstance(arg, jax.Array))
        return self.own(*(arg.dequantize(dtype) if hasattr(arg, "dequantize") else arg for arg in args), **options)
