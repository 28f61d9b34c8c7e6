"""The walk of an update where a sampler says which layers are active.

    small params, small gradients = the layers in the slots, at the paths of the first layers
    small updates, state          = the ordinary update of that model of few layers
    updates                       = small updates at the layers in the slots, zeros elsewhere

A stacked leaf `(L, ...)` becomes `(slots, ...)`; of leaves that count, `layers_0/...`, the first
`slots` stand for the slots and the others are `optax.MaskedNode`. So nothing below knows of
samplers, and the state is that of a model of few layers: its bytes are those that the formulas say
of it. The small model counts its steps from the last draw, at which its matrices start afresh:
`Projector.start` and a schedule's first refresh come then, as at any first step.

Gradients of inactive layers are what the caller computes anyway; nothing here reads them, the guard
and clipping neither.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from lowrank_jax import sharding
from lowrank_jax.checks import listed
from lowrank_jax.optim.guard import select
from lowrank_jax.projection.samplers import OUTSIDE, Group
from lowrank_jax.projection.slots import Projection
from lowrank_jax.projection.state import Projected, ProjectionState
from lowrank_jax.trees import is_placeholder, is_quantized
from lowrank_jax.typing import Kernel, Pytree, Scalar

Marks = Callable[[Pytree], Pytree] | None

Maps = dict[str, jax.Array]
"""The layers in the slots `(slots,)`, by the number of layers."""


def _is_masked(x: Pytree) -> bool:
    return isinstance(x, optax.MaskedNode)


def _is_leaf(x: Pytree) -> bool:
    return _is_masked(x) or isinstance(x, Projected) or is_quantized(x)


@dataclasses.dataclass(frozen=True)
class Layers:
    """Where the layers of a tree are.

    Attributes:
      config: the slots.
      groups: of the matrices that are sampled.
      paths: of all leaves, with None for masked ones.
    """

    config: Projection
    groups: tuple[Group, ...]
    paths: tuple[str | None, ...]

    @classmethod
    def of(cls, config: Projection, tree: Pytree, marks: Marks = None) -> Layers:
        leaves = jax.tree.leaves(tree, is_leaf=_is_leaf)
        refused = [leaf for leaf in leaves if isinstance(leaf, Projected) or is_quantized(leaf)]
        if refused:
            raise ValueError(
                f"sampler={config.sampler!r} takes full gradients and plain arrays, and a leaf is a "
                f"{type(refused[0]).__name__}; take jax.value_and_grad(loss) of float parameters, or "
                "give sampler=lrx.samplers.all()"
            )
        report = config.report(tree)
        rows = iter(report.leaves)
        paths = tuple(None if _is_masked(leaf) else next(rows).path for leaf in leaves)
        groups = config.sampler.groups(report)
        outside = [leaf.path for leaf in report.leaves if leaf.note == OUTSIDE]
        if outside and not groups:
            raise ValueError(
                f"sampler={config.sampler!r}: no matrix belongs to a layer, so that nothing would be "
                f"sampled; say where layers count by layers=, or name stacks by "
                f"views=lrx.Views(stacked=...). Matrices here: {listed(outside)}"
            )
        flags: dict[str | None, Pytree] | None = None
        if marks is not None:
            found = jax.tree.leaves(marks(tree), is_leaf=_is_masked)
            flags = dict(zip(paths, found, strict=True))
        for group in groups:
            _check_alike(config, group, flags)
        return cls(config, groups, paths)

    @property
    def totals(self) -> list[int]:
        return sorted({group.total for group in self.groups})

    def draw(self, number: Scalar) -> Maps:
        """The map of a draw."""
        seed = jnp.asarray(self.config.seed, jnp.int32)
        key = jax.random.key(seed)
        draw = self.config.sampler.draw
        return {str(total): draw(number, total, key) for total in self.totals}

    def take(self, tree: Pytree, maps: Maps) -> Pytree:
        """The small tree: of the layers in the slots."""
        leaves, treedef = jax.tree.flatten(tree, is_leaf=_is_leaf)
        by_path = dict(zip(self.paths, leaves, strict=True))
        new = dict(by_path)
        for group in self.groups:
            chosen = maps[str(group.total)]
            parts = [_layer(group, by_path, number) for number in chosen]
            if group.stacked:
                # (L, ...) -> (slots, ...)
                new[group.paths[0]] = jnp.stack(parts)
                continue
            # layers of their own stand at the paths of the first ones, and the other paths are empty
            absent = [optax.MaskedNode()] * (group.total - len(parts))
            new |= zip(group.paths, parts + absent, strict=True)
        return jax.tree.unflatten(treedef, self._ordered(new))

    def _ordered(self, by_path: dict[str | None, Kernel]) -> list[Kernel]:
        """The leaves in the order of the tree, masked ones where there is none."""
        return [by_path[path] if path else optax.MaskedNode() for path in self.paths]

    def put(self, small: Pytree, like: Pytree, maps: Maps) -> Pytree:
        """The tree like `like` with the small one's layers at their places, and zeros elsewhere."""
        leaves, treedef = jax.tree.flatten(like, is_leaf=_is_leaf)
        by_path = dict(zip(self.paths, leaves, strict=True))
        small_leaves = jax.tree.leaves(small, is_leaf=_is_leaf)
        new = dict(zip(self.paths, small_leaves, strict=True))
        for group in self.groups:
            chosen = maps[str(group.total)]
            if group.stacked:
                # (slots, ...) -> (L, ...)
                path = group.paths[0]
                new[path] = _scattered(new[path], by_path[path], chosen)
                continue
            # every layer's slot is known when the program runs
            parts = [new[path] for path in group.paths[: len(chosen)]]
            for number, path in enumerate(group.paths):
                new[path] = _where_chosen(parts, chosen, number)
        return jax.tree.unflatten(treedef, self._ordered(new))


def _check_alike(config: Projection, group: Group, flags: dict[str | None, Pytree] | None) -> None:
    """ValueError where something says by path that layers which share their slots differ."""
    if group.stacked:
        return
    # these read paths when a small model is stepped, whose paths are those of the first layers
    readers = (config.projector, config.inner, config.scale)
    first = group.paths[0]
    expected = _said(readers, first, flags)
    for path in group.paths:
        said = _said(readers, path, flags)
        pairs = zip(said, expected, strict=True)
        wrong = [own[0] for own, other in pairs if own != other]
        if wrong:
            raise ValueError(
                f"sampler={config.sampler!r}: {wrong[0]} says one thing of {first!r} and another of "
                f"{path!r}, and one slot serves both in turn; give all layers one rule, or "
                "sampler=lrx.samplers.all()"
            )


Said = list[tuple[str, Pytree]]
"""`(field, what it says of a path)` of each field with rules."""


def _said(readers: Pytree, path: str, flags: dict[str | None, Pytree] | None) -> Said:
    """What rules and a mask say of a leaf."""
    mask = [] if flags is None else [("mask", flags[path])]
    return mask + _by_path(readers, path)


def _by_path(node: Pytree, path: str, name: str = "") -> Said:
    """`(field, what it says of this path)` of all rules `((pattern, value), ...)` in nested fields."""
    if isinstance(node, tuple) and _are_rules(node):
        values = [value for pattern, value in node if re.fullmatch(pattern, path)]
        # the first match; numbers by value, all else by the rule that gives it
        first = values[0] if values else None
        return [(name, first if isinstance(first, int | float) else id(first))]
    parts: Said = []
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        names = [field.name for field in dataclasses.fields(node)]
        parts = [(own, getattr(node, own)) for own in names]
    elif isinstance(node, tuple):
        parts = [(name, part) for part in node]
    found: Said = []
    for own, part in parts:
        found += _by_path(part, path, own)
    return found


def _are_rules(node: tuple[Pytree, ...]) -> bool:
    """Whether a tuple is `((pattern, value), ...)`."""
    return all(isinstance(rule, tuple) and rule and isinstance(rule[0], str) for rule in node)


def _small_of(layers: Layers, params: Pytree, maps: Maps) -> Pytree:
    """The small tree, of shapes where the parameters are shapes."""
    is_shape = lambda x: isinstance(x, jax.ShapeDtypeStruct)  # noqa: E731
    if any(map(is_shape, jax.tree.leaves(params))):
        return jax.eval_shape(layers.take, params, maps)
    return layers.take(params, maps)


def _layer(group: Group, by_path: dict[str | None, Kernel], number: jax.Array) -> jax.Array:
    """One layer, `(...)`."""
    if group.stacked:
        stack = by_path[group.paths[0]]
        return jax.lax.dynamic_index_in_dim(stack, number, keepdims=False)
    # one of L arrays, so that no stack of them exists
    branches = [lambda x=by_path[path]: x for path in group.paths]
    return jax.lax.switch(number, branches)


def _scattered(parts: jax.Array, like: jax.Array, chosen: jax.Array) -> jax.Array:
    """`(L, ...)` with the parts `(slots, ...)` at the chosen layers."""
    full = sharding.zeros(like.shape, parts.dtype, sharding.explicit_spec(like))
    for slot in range(len(chosen)):
        full = jax.lax.dynamic_update_index_in_dim(full, parts[slot], chosen[slot], 0)
    return full


def _where_chosen(parts: list[jax.Array], chosen: jax.Array, number: int) -> jax.Array:
    """The part in whose slot the layer of this number is, or zeros."""
    full = jnp.zeros_like(parts[0])
    for slot, part in enumerate(parts):
        full = jnp.where(chosen[slot] == number, part, full)
    return full


def sampled(
    config: Projection,
    build: Callable[[Projection], tuple[Callable, Callable]],
    get: Callable[[Pytree], ProjectionState],
    put: Callable[[Pytree, ProjectionState], Pytree],
    marks: Marks = None,
) -> tuple[Callable, Callable]:
    """`(init, update)` of a transformation whose layers are sampled.

    Args:
      config: its slots.
      build: the ordinary `(init, update)` of a `Projection`.
      get, put: the projection's state in the state of the transformation.
      marks: `params -> tree` of what else the transformation decides leaf by leaf, which layers
        that share their slots must have in common.
    """

    def init(params):
        if is_placeholder(params):
            raise ValueError(
                f"sampler={config.sampler!r}: the state has no leaf for each parameter, which "
                "optax.tree_utils.tree_map_params asks for; lrx.state_shardings places it"
            )
        with sharding.mesh_of(params):
            layers = Layers.of(config, params, marks)
            maps = layers.draw(jnp.zeros((), jnp.int32))
            state = build(config)[0](_small_of(layers, params, maps))
            return put(state, get(state)._replace(sampler=sharding.replicate_rest(maps)))

    def update(updates, state, params=None, **extra):
        if extra.get("taps") is not None:
            raise ValueError(
                f"sampler={config.sampler!r} takes full gradients: leave taps out, and take "
                "jax.value_and_grad(loss)"
            )
        with sharding.mesh_of((updates, params)):
            layers = Layers.of(config, updates if params is None else params, marks)
            old = get(state)
            number, since = config.sampler.begun(old.step)
            begins = jnp.asarray(since == 0)
            maps = select(begins, layers.draw(number), old.sampler)
            small = layers.take(updates, maps)
            small_params = None if params is None else layers.take(params, maps)
            # random bases and sketches differ from draw to draw
            own = dataclasses.replace(config, seed=config.seed + SEEDS_APART * number)
            start, step = build(own)

            def fresh():
                return _drawn(get(start(small if params is None else small_params)))

            drawn = jax.lax.cond(begins, fresh, lambda: _drawn(old))
            begun = old._replace(step=jnp.asarray(since), **drawn)
            found, new_state = step(small, put(state, begun), small_params, **extra)
            new = _kept(config, old, get(new_state), since, begins, maps)
            return layers.put(found, updates, maps), put(new_state, new)

    return init, update


SEEDS_APART = 40503
"""Odd, so that the seeds of two runs that count from 0 on do not meet."""


def _drawn(state: ProjectionState) -> dict[str, Pytree]:
    """What starts afresh at a draw."""
    names = ("matrices", "refresh_schedule", "refreshes")
    return {name: getattr(state, name) for name in names}


def _kept(
    config: Projection,
    old: ProjectionState,
    new: ProjectionState,
    since: Scalar,
    begins: jax.Array,
    maps: Maps,
) -> ProjectionState:
    """The state after a step; where the step of a draw is skipped, that before it."""
    accepted = new.step - jnp.asarray(since)
    new = new._replace(step=old.step + accepted, sampler=maps)
    if not config.guard:
        return new
    stands = (accepted > 0) | ~begins
    drawn = _drawn(new) | {"sampler": maps}
    before = _drawn(old) | {"sampler": old.sampler}
    return new._replace(**select(stands, drawn, before))
