"""Where the arrays of one leaf lie while a step works on them: the one wrapper around its
mathematics.

`matrix_step` holds pure functions `(config, view, trees, ...) -> trees` of one stack, which know no
mesh. `placed` says, by names of roles, where the trees must lie for such a function and where its
results are kept; on one device, and where nothing is divided, no role does anything.
`on_own_matrices` runs a chain of them on each device's own matrices where a batch axis is divided.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax

from lowrank_jax import sharding
from lowrank_jax.matrices import ResolvedView
from lowrank_jax.projection import layout
from lowrank_jax.projection.slots import Projection
from lowrank_jax.projection.state import Sketch
from lowrank_jax.typing import Pytree

Trees = dict[str, Pytree]


def _rows(config: Projection, view: ResolvedView, x: jax.Array) -> jax.Array:
    """What a refresh decomposes or scores: rows whole on each device."""
    x = sharding.reshard(x, sharding.unsharded_spec(view.spec))
    return layout.rows(view, x, pad=config.projector.of_rows)


def _sketch(config: Projection, view: ResolvedView, x: Sketch) -> Sketch:
    """A sketch `(s, q)`, divided along s, and of a pair `(q, k)` along k: Gram matrices do the
    rest."""
    spec = sharding.unsharded_spec(view.spec)
    if not isinstance(x, tuple):
        return layout.divided(view, sharding.reshard(x, spec), -2)
    right, left = (sharding.reshard(own, spec) for own in x)
    return layout.divided(view, right, -2), layout.divided(view, left, -1)


def _unsharded(config: Projection, view: ResolvedView, x: jax.Array) -> jax.Array:
    return sharding.reshard(x, sharding.unsharded_spec(view.spec))


def _momentum(config: Projection, view: ResolvedView, x: jax.Array) -> jax.Array:
    """A moment `(r, k)`, divided along k."""
    x = sharding.reshard(x, sharding.unsharded_spec(sharding.explicit_spec(x)))
    return layout.divided(view, x, -1)


def _mixed(config: Projection, view: ResolvedView, tree: Pytree) -> Pytree:
    """Moments `(r, k)` whole along the rank, which a transport mixes."""
    return layout.mixed(view, tree)


def _layout(role: str) -> Callable[..., Pytree]:
    """A role of `layout.Layout`."""
    return lambda config, view, tree: layout.placed(view, tree, role)


ROLES: dict[str, Callable[[Projection, ResolvedView, Any], Any]] = {
    "rows": _rows,
    "sketch": _sketch,
    "unsharded": _unsharded,
    "momentum": _momentum,
    "mixed": _mixed,
    "basis": _layout("basis"),
    "basis_at_use": _layout("basis_at_use"),
    "low": _layout("low"),
    "low_at_use": _layout("low_at_use"),
}


def laid(config: Projection, view: ResolvedView, trees: Trees, roles: dict[str, str]) -> Trees:
    """`trees` with those that `roles` names laid out; several roles of one are separated by
    spaces."""
    found = dict(trees)
    for name, chain in roles.items():
        for role in chain.split():
            if found.get(name) is not None:
                found[name] = ROLES[role](config, view, found[name])
    return found


def placed(*, takes: dict[str, str], gives: dict[str, str]) -> Callable[[Callable], Callable]:
    """A decorator of `(config, view, trees, ...) -> trees`.

    Args:
      takes: roles of the trees that the function works on, by name.
      gives: roles of its results.
    """

    def decorate(function: Callable[..., Trees]) -> Callable[..., Trees]:
        @functools.wraps(function)
        def run(config, view, trees, *rest):
            results = function(config, view, laid(config, view, trees, takes), *rest)
            return laid(config, view, results, gives)

        return run

    return decorate


def like(new: Pytree, old: Pytree) -> Pytree:
    """`new` in the dtypes of `old`, and on an explicit mesh in its types."""
    return jax.tree.map(sharding.sharded_like, new, old)


def on_own_matrices(
    function: Callable, config: Projection, view: ResolvedView, trees: Pytree, *shared: Pytree
) -> Any:
    """`function(config, view, trees, *shared)`, on each device's own matrices where a batch axis is
    sharded.

    The leaves of `trees` and of the result have the batch axes in front. There the view's batch is
    the local one, and every array that the function uses must come through its arguments: `shared`,
    or numbers inside `config`.
    """
    axes, whole = len(view.batch), view.spec or ()
    if not sharding.batch_axes(whole, axes):
        return function(config, view, trees, *shared)
    leaves, treedef = jax.tree.flatten((_numbers(config), shared))
    arrays = [isinstance(leaf, jax.Array) for leaf in leaves]

    def own(trees, traced):
        traced = iter(traced)
        filled = [
            next(traced) if array else leaf for leaf, array in zip(leaves, arrays, strict=True)
        ]
        numbers, shared = jax.tree.unflatten(treedef, filled)
        spec = (*[None] * axes, *whole[axes:])
        local = dataclasses.replace(
            view, batch=jax.tree.leaves(trees)[0].shape[:axes], spec=spec if any(spec) else None
        )
        return function(_with_numbers(config, iter(numbers)), local, trees, *shared)

    traced = [leaf for leaf, array in zip(leaves, arrays, strict=True) if array]
    return sharding.over_batch(own, whole, axes)(trees, traced)


def _numbers(config: Any) -> list[jax.Array]:
    """The scalar arrays in the fields of nested dataclasses, and in tuples such as rules by path:
    hyper-parameters that somebody injected."""
    if isinstance(config, jax.Array):
        return [config] if config.ndim == 0 else []
    if type(config) is tuple:
        return [x for part in config for x in _numbers(part)]
    if not dataclasses.is_dataclass(config):
        return []
    return [
        x for field in dataclasses.fields(config) for x in _numbers(getattr(config, field.name))
    ]


def _with_numbers(config: Any, numbers: Iterator[jax.Array]) -> Any:
    """`config` with its scalar arrays replaced, in the order of `_numbers`."""
    if isinstance(config, jax.Array):
        return next(numbers) if config.ndim == 0 else config
    if not _numbers(config):
        return config
    if type(config) is tuple:
        return tuple(_with_numbers(part, numbers) for part in config)
    new = {
        field.name: _with_numbers(getattr(config, field.name), numbers)
        for field in dataclasses.fields(config)
        if field.init
    }
    return dataclasses.replace(config, **new)
