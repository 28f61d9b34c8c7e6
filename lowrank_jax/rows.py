"""Products on one axis of rows: `x (rows..., n)` as `(N, n)`, where that helps and nothing is sent
for it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax

from lowrank_jax import sharding


def fold_rows(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Each `x (rows..., n)` as `(N, n)` on CPUs; all as they are where a mesh divides an axis of
    rows but the first.

    Products are written on one axis of rows there: XLA on CPUs takes a gradient that contracts two
    axes on a slow path. Its compilers for TPUs and GPUs choose that themselves, and one for v5e
    made a copy of folded logits. Where batch and sequence are both divided, folding them would
    gather one of the two.

    Args:
      arrays: of the same rows. On an auto mesh their first axes lie as the rules of `meshes.use`
        say of "batch" and "length".

    >>> import jax.numpy as jnp
    >>> fold_rows(jnp.ones((2, 5, 3)), jnp.ones((2, 5, 4)))[1].shape
    (10, 4)
    """
    if platform() != "cpu" or all(x.ndim <= 2 for x in arrays):
        return arrays
    if any(x.size == 0 or _divides_inner_rows(x) for x in arrays):
        return arrays
    return tuple(
        sharding.reshape(x, (math.prod(x.shape[:-1]), x.shape[-1]), first=0) for x in arrays
    )


def platform() -> str:
    """The platform that is traced for: that of the mesh of `meshes.use`, or the default one."""
    mesh = sharding.current_mesh.get()
    return jax.default_backend() if mesh is None else mesh.devices.flat[0].platform


def _divides_inner_rows(x: jax.Array) -> bool:
    """Whether a mesh divides an axis of `x (rows..., n)` that is neither the first nor the last."""
    spec = sharding.explicit_spec(x)
    if spec is not None:
        return sharding.divides_any(spec[1:-1])
    mesh, rows = sharding.current_mesh.get(), sharding.current_rows.get()
    if rows is None or not sharding.divides():
        return False
    inner = (
        (size, sharding.parts(entry, mesh))
        for size, entry in zip(x.shape[1:-1], rows[1:], strict=False)
    )
    return any(size > 1 and parts > 1 and size % parts == 0 for size, parts in inner)


def over_rows(function: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """`function(x)` of an `x (rows..., n)` that it maps to `(rows..., m...)`, on one axis of rows
    (`fold_rows`).

    The backward pass folds x again: several products of one x in a scan would each keep their own
    copy of it.

    >>> import jax.numpy as jnp
    >>> over_rows(lambda x: x[:, :2], jnp.ones((2, 5, 3))).shape
    (2, 5, 2)
    """
    if fold_rows(x)[0] is x:
        return function(x)

    def run(x):
        y = function(*fold_rows(x))
        y = sharding.reshape(y, (*x.shape[:-1], *y.shape[1:]), first=0)
        spec, own = sharding.explicit_spec(x), sharding.explicit_spec(y)
        if spec is None or own is None:
            return y
        return sharding.reshard(y, (*spec[:-1], *own[x.ndim - 1 :]))

    return jax.checkpoint(run, prevent_cse=False, policy=_all_but_folded)(x)


def _all_but_folded(primitive: Any, *_: Any, **__: Any) -> bool:
    """What thin products within make is kept, as outside of a remat."""
    return primitive.name != "reshape"
