"""Inside `jax.shard_map`: arrays that vary over mesh axes, and what must vary alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType


def varying(*trees: Any) -> frozenset[str]:
    """The mesh axes of `jax.shard_map` over which any array of the trees, or its shape, varies;
    none outside of it."""
    types = (
        x if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x) for x in jax.tree.leaves(trees)
    )
    kinds = (getattr(kind, "manual_axis_type", None) for kind in types)
    return frozenset(name for kind in kinds if kind is not None for name in kind.varying)


def vary(tree: Any, names: frozenset[str]) -> Any:
    """The same numbers, varying over these mesh axes too, over which the transpose sums
    cotangents."""

    def one(x):
        missing = tuple(sorted(names - varying(x)))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(one, tree)


def varying_alike(*trees: Any) -> Any:
    """The trees, each array varying over the mesh axes over which any of them does.

    For the arguments of a custom VJP inside `jax.shard_map`: cotangents that its backward pass
    makes of all of them then have its arguments' types, and what did not vary gets their sum over
    the devices, as from a product of JAX.
    """
    return vary(trees, varying(trees))


def alike(*functions: Callable[[], Any]) -> tuple[Callable[[], Any], ...]:
    """The functions, each array of a result varying over the mesh axes over which that array of any
    of them does.

    For the branches of a cond inside `jax.shard_map`, one of which returns what it has read and
    another a constant.
    """
    if AxisType.Manual not in jax.sharding.get_abstract_mesh().axis_types:
        return functions
    results = [jax.eval_shape(function) for function in functions]
    names = jax.tree.map(varying, *results)
    return tuple(
        lambda function=function: jax.tree.map(vary, function(), names) for function in functions
    )


def everywhere(ok: jax.Array, *own: Any) -> jax.Array:
    """Whether `ok` on every device along the mesh axes over which it varies and the trees `own` do
    not."""
    names = tuple(sorted(varying(ok) - varying(own)))
    return jax.lax.pmin(ok.astype(jnp.int32), names) > 0 if names else ok


def scan(body: Callable, start: Any, parts: Any) -> Any:
    """`jax.lax.scan`, whose carry varies over mesh axes from the start where it does after a
    step."""
    if AxisType.Manual in jax.sharding.get_abstract_mesh().axis_types:
        first = jax.tree.map(lambda x: x[0], parts)
        after = jax.eval_shape(body, start, first)[0]
        start = jax.tree.map(lambda x, made: vary(x, varying(made)), start, after)
    return jax.lax.scan(body, start, parts)
