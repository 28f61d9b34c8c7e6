"""Layers of Flax whose kernel is more than an array: what the skins for linen and nnx share.

Such a kernel is a `Tapped`, an `AdaptedKernel`, or a quantised array. Flax's own code promotes
dtypes and adds biases; these functions stand in for its product. They are given the array that Flax
promoted, which replaces the one inside.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_jax.adapters.hosts import AdaptedKernel, conv
from lowrank_jax.functions.products import dot_general, einsum, multiplied
from lowrank_jax.projection.tapped import Tapped
from lowrank_jax.trees import is_quantized

NODES = (Tapped, AdaptedKernel)


def is_special(value: Any) -> bool:
    """Whether a kernel is more than an array."""
    return isinstance(value, NODES) or is_quantized(value)


def base(value: Any) -> Any:
    """The array or quantised array of a kernel."""
    return value.kernel if isinstance(value, NODES) else value


def is_quantised(value: Any) -> bool:
    """Whether the array of a kernel is quantised."""
    return is_quantized(base(value))


def with_base(value: Any, array: Any) -> Any:
    """The kernel with another array in the place of its own; a quantised one stays as it is."""
    if is_quantised(value):
        return value
    return dataclasses.replace(value, kernel=array) if isinstance(value, NODES) else array


def array_of(value: Any, dtype: Any) -> jax.Array:
    """What Flax checks and promotes; of a quantised kernel it has the shape and dtype, and no
    product reads it."""
    if not is_quantised(value):
        return base(value)
    own = getattr(base(value), "dtype", dtype)
    return jnp.zeros(base(value).shape, own if jnp.issubdtype(own, jnp.floating) else dtype)


def table(value: Any, dtype: Any) -> Any:
    """An embedding with its table as an array; `dtype` is that of a decoded one."""
    if not is_quantised(value):
        return value
    array = base(value).dequantize(dtype)
    return dataclasses.replace(value, kernel=array) if isinstance(value, NODES) else array


def keyword_options(
    value: Any, own: Callable[..., Any], default: Callable[..., Any], where: str
) -> dict[str, Any]:
    """The options of a product that is `default` but for keywords; ValueError, naming the layer,
    for any other.

    `lrx.dot_general` is `jax.lax.dot_general` on rows.
    """
    known = (default, dot_general) if default is jax.lax.dot_general else (default,)
    if own in known:
        return {}
    if isinstance(own, functools.partial) and own.func in known and not own.args:
        return own.keywords
    done, remedy = "adapted", "exclude=path"
    if isinstance(value, Tapped):
        done, remedy = "tapped", "Views(rules=((path, None),))"
    raise ValueError(
        f"{where} has its own {default.__name__}, {own!r}, which cannot be {done}; jax's own can, "
        f"also as functools.partial(..., keyword=...). Leave its kernel out with {remedy}"
    )


def product_of(value: Any, own: Callable[..., Any], where: str) -> Callable[..., jax.Array]:
    """The `dot_general(x, given, dimension_numbers, ...)` of a layer whose own one is `own`."""
    if isinstance(value, Tapped):
        keyword_options(value, own, jax.lax.dot_general, where)  # or an error

    def product(x: jax.Array, given: Any, dimension_numbers: Any, **call: Any) -> jax.Array:
        kernel = with_base(value, given)
        if isinstance(kernel, NODES):
            return multiplied(x, kernel, dimension_numbers, own, **_given(call))
        return own(x, kernel.dequantize(x.dtype), dimension_numbers, **call)

    return product


def einsum_of(value: Any, own: Callable[..., Any], where: str) -> Callable[..., jax.Array]:
    """The `einsum(subscripts, x, given, ...)` of a layer whose own one is `own`."""
    options = keyword_options(value, own, jnp.einsum, where) if isinstance(value, NODES) else {}

    def product(subscripts: str, x: jax.Array, given: Any, **call: Any) -> jax.Array:
        kernel = with_base(value, given)
        if isinstance(kernel, NODES):
            return einsum(subscripts, x, kernel, **_given(options | call))
        return own(subscripts, x, kernel.dequantize(x.dtype), **call)

    return product


def convolution_of(
    value: Any, own: Callable[..., Any], where: str, module: Any
) -> Callable[..., jax.Array]:
    """The `conv_general_dilated(x, given, ...)` of a layer whose own one is `own`.

    Raises:
      ValueError: for a tap, and where the kernel is not the whole of one matrix: groups, a mask,
        unshared weights.
    """
    what = next(
        (
            text
            for text, found in (
                ("taps", isinstance(value, Tapped)),
                (
                    f"feature_group_count={module.feature_group_count}",
                    module.feature_group_count != 1,
                ),
                ("a mask", module.mask is not None),
                (
                    "weights that differ from place to place",
                    not getattr(module, "shared_weights", True),
                ),
            )
            if found
        ),
        None,
    )
    if what is not None:
        raise ValueError(
            f"{where}: a convolution with {what} cannot have a tapped, adapted or quantised "
            "kernel; leave it out, or give the model lrx.effective(params, adaptations) in place "
            "of lrx.attach(...)"
        )

    def convolve(x: jax.Array, given: Any, *rest: Any, **call: Any) -> jax.Array:
        return conv(x, with_base(value, given), lambda x, kernel: own(x, kernel, *rest, **call))

    return convolve


def _given(options: dict[str, Any]) -> dict[str, Any]:
    """Options without those that say nothing, which a product of one's own need not know; precision
    always is one."""
    return {
        name: option
        for name, option in options.items()
        if option is not None or name == "precision"
    }
