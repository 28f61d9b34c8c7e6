"""Inside `jax.shard_map`: arrays that vary over mesh axes, and what must vary alike."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from lowrank_jax.typing import Pytree

Branch = Callable[[], Pytree]


def varying(*trees: Pytree) -> frozenset[str]:
    """The mesh axes over which any array of the trees, or its shape, varies.

    None outside of `jax.shard_map`.
    """
    leaves = jax.tree.leaves(trees)
    types = [x if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x) for x in leaves]
    kinds = [getattr(kind, "manual_axis_type", None) for kind in types]
    return frozenset(name for kind in kinds if kind is not None for name in kind.varying)


def vary(tree: Pytree, names: frozenset[str]) -> Pytree:
    """The same numbers, varying over these mesh axes too; the transpose sums cotangents over them."""

    def one(x):
        missing = tuple(sorted(names - varying(x)))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(one, tree)


def varying_alike(*trees: Pytree) -> Pytree:
    """The trees, each array varying over the mesh axes over which any of them does.

    For the arguments of a custom VJP inside `jax.shard_map`: cotangents that its backward pass
    makes of all of them then have its arguments' types, and what did not vary gets their sum over
    the devices, as from a product of JAX.
    """
    return vary(trees, varying(trees))


def alike(*functions: Branch) -> tuple[Branch, ...]:
    """The functions, whose results vary alike: an array over the axes over which any's does.

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


def everywhere(ok: jax.Array, *own: Pytree) -> jax.Array:
    """Whether `ok` on every device of the mesh axes over which it varies and `own` do not."""
    names = tuple(sorted(varying(ok) - varying(own)))
    if not names:
        return ok
    # all are true where the least is
    return jax.lax.pmin(ok.astype(jnp.int32), names) > 0


def scan(body: Callable, start: Pytree, parts: Pytree) -> Pytree:
    """`jax.lax.scan`, whose carry varies from the start over the axes over which it does later."""
    if AxisType.Manual in jax.sharding.get_abstract_mesh().axis_types:
        first = jax.tree.map(lambda x: x[0], parts)
        after = jax.eval_shape(body, start, first)[0]
        start = jax.tree.map(lambda x, made: vary(x, varying(made)), start, after)
    return jax.lax.scan(body, start, parts)
