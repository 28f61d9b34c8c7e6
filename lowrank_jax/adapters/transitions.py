"""What adapters do between two updates: merging, pruning, swapping, growing.

Some methods are more than a parameterisation: every few hundred steps they write the adapter into
the kernel and start it again, or drop components. That needs the base, the adapter and the
optimizer's moments together, so it is a step of the training loop. The family says what happens
(`Adapter.transition`), this function does it to the trees.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.core import meta

from lowrank_jax import sharding
from lowrank_jax.adapters.adaptation import Adaptation
from lowrank_jax.adapters.base import Adapter, Group, Site, Transition
from lowrank_jax.adapters.tree import matrices_of
from lowrank_jax.optim.surgery import Keep, Policy, apply_policy
from lowrank_jax.reprs import show
from lowrank_jax.trees import leaves_with_metadata, map_nodes, stored_like
from lowrank_jax.typing import Kernel, Pytree, Shape


class Moved(NamedTuple):
    """What `transition` gives.

    Attributes:
      adaptation: with the arrays after it.
      base: the parameters after it; leaves that no family changed are the given ones.
      opt_state: the state after it; None where none was given.
      policy: a tree like `adaptation.train`, for other states of the same parameters.
    """

    adaptation: Adaptation
    base: Pytree
    opt_state: Pytree
    policy: Pytree

    def __repr__(self) -> str:
        return show(self)


def transition(
    adaptation: Adaptation,
    key: jax.Array,
    step: jax.Array | int,
    base: Pytree,
    opt_state: Pytree = None,
    *,
    stats: Mapping[str, Mapping[str, Any]] | None = None,
) -> Moved:
    """What the families of an adaptation do between two updates; nothing, for most.

    Call it after each update, inside the same jitted step or apart:

        updates, opt_state = tx.update(grads, opt_state, adaptation.train)
        adaptation = adaptation.replace(train=optax.apply_updates(adaptation.train, updates))
        adaptation, params, opt_state, _ = lrx.adapters.transition(
            adaptation, key, step, params, opt_state
        )

    Shapes, dtypes and the layout stay, so one compiled program serves all steps. A changed kernel
    is computed in float32 and stored as its leaf is.

    Args:
      adaptation: one that trains; of several named ones each by itself.
      key: of this step.
      step: updates that were made.
      base: the parameters that the adaptation belongs to.
      opt_state: of any optimizer on `adaptation.train`, see `lrx.surgery.apply_policy`.
      stats: `{path: {name: array}}`, for families that read measurements.

    Raises:
      ValueError: for candidates; for leaves that are not in base; for a family that changes the
        names, shapes or dtypes of its arrays; as `lrx.surgery.apply_policy`.

    >>> import jax, jax.numpy as jnp
    >>> import lowrank_jax as lrx
    >>> params = {"kernel": jnp.ones((4, 6))}
    >>> adaptation = lrx.adapt(params, lrx.adapters.lora(rank=2), jax.random.key(0))
    >>> moved = lrx.adapters.transition(adaptation, jax.random.key(1), 0, params)
    >>> moved.base["kernel"] is params["kernel"]  # LoRA does nothing between updates
    True
    """
    layout = adaptation.layout
    if layout.candidates:
        raise ValueError(
            f"transition: rows choose among {layout.candidates}; move each of them by itself"
        )
    moved = _moved(adaptation, key, jnp.asarray(step, jnp.int32), base, stats or {})
    train, frozen, policy, written = moved
    if written:
        sites = {site.path: site for site in layout.sites}

        def with_written(path, node):
            return _with_matrices(node, sites[path], written[path]) if path in written else node

        base = map_nodes(with_written, base)
    if opt_state is not None:
        opt_state = apply_policy(policy, opt_state)
    return Moved(adaptation.replace(train=train, frozen=frozen), base, opt_state, policy)


def _moved(
    adaptation: Adaptation, key: jax.Array, step: jax.Array, base: Pytree, stats: Mapping
) -> tuple[Pytree, Pytree, Pytree, dict[str, jax.Array]]:
    """`(train, frozen, policy, {path: new kernels})` after the transitions of all groups."""
    layout, train, frozen = adaptation.layout, adaptation.train, adaptation.frozen
    nodes = {path: node for path, node, _ in leaves_with_metadata(base)}
    # what no family names keeps its moments
    policy: dict[str, Pytree] = jax.tree.map(lambda _: Keep(), train)
    written: dict[str, jax.Array] = {}
    key = jax.random.fold_in(key, zlib.crc32(layout.name.encode()))
    for name, (adapter, group) in layout.groups.items():
        own_key = jax.random.fold_in(key, zlib.crc32(name.encode()))
        before = _of_group(train, name, group), _of_group(frozen, name, group)
        kernels = Kernels(nodes, group)
        found = adapter.transition(group, own_key, step, kernels, *before, stats)
        if found is None:
            continue
        _check(adapter, before, found)
        train = _with_group(train, name, found.train)
        frozen = _with_group(frozen, name, found.frozen)
        policy = _with_policy(policy, name, found.policy)
        written |= found.base
    return train, frozen, policy, written


class Kernels(Mapping):
    """`{path: kernels (batch..., n, m)}` of a group in float32, made when they are read."""

    def __init__(self, nodes: Mapping[str, Kernel], group: Group):
        def fits(path, site):
            return path in nodes and tuple(nodes[path].shape) == site.shape

        missing = sorted(path for path, site in group.sites.items() if not fits(path, site))
        if missing:
            raise ValueError(
                f"base: adapted leaves {missing} are missing or of another shape; give the tree "
                "that adapt saw"
            )
        self._nodes, self._group = nodes, group

    def __getitem__(self, path: str) -> jax.Array:
        with sharding.mesh_of(self._nodes[path]):
            return matrices_of(self._nodes[path], self._group.sites[path])

    def __iter__(self) -> Iterator[str]:
        return iter(self._group.sites)

    def __len__(self) -> int:
        return len(self._group.sites)


def _with_matrices(node: Kernel, site: Site, matrices: jax.Array) -> Kernel:
    """A leaf with other matrices: as it is stored, in its box."""
    array = meta.unbox(node)
    value = site.view.from_matrices(matrices, tuple(array.shape))
    new = stored_like(value, array)
    return node.replace_boxed(new) if isinstance(node, meta.AxisMetadata) else new


def _of_group(tree: dict[str, Pytree], name: str, group: Group) -> dict[str, Pytree]:
    """The part of a tree that belongs to one group."""
    sites = {path: dict(tree["sites"].get(path, {})) for path in group.sites}
    return {"shared": dict(tree["shared"].get(name, {})), "sites": sites}


def _with_group(tree: dict[str, Pytree], name: str, part: dict[str, Pytree]) -> dict[str, Pytree]:
    """The tree with another part for one group."""
    shared = {name: part["shared"]} if part["shared"] else {}
    sites = {path: arrays for path, arrays in part["sites"].items() if arrays}
    return tree | {"shared": tree["shared"] | shared, "sites": tree["sites"] | sites}


def _with_policy(
    policy: dict[str, Pytree], name: str, part: dict[str, Pytree]
) -> dict[str, Pytree]:
    """The policies with those that a family names; what it does not name keeps its moments."""
    given = {
        "shared": {name: part.get("shared", {})} if part.get("shared") else {},
        "sites": part.get("sites", {}),
    }
    found = dict(policy)
    for kind, named in given.items():
        own = dict(found[kind])
        for place, arrays in named.items():
            unknown = sorted(set(arrays) - set(own.get(place, {})))
            if unknown:
                raise ValueError(
                    f"transition: policy names {unknown} at {place!r}, which do not train"
                )
            wrong = [key for key, one in arrays.items() if not isinstance(one, Policy)]
            if wrong:
                raise ValueError(
                    f"transition: policy of {wrong} at {place!r} is none of lrx.surgery's"
                )
            own[place] = own[place] | arrays
        found[kind] = own
    return found


def _check(adapter: Adapter, before: tuple[Pytree, Pytree], found: Transition) -> None:
    """ValueError where names, shapes or dtypes of arrays changed."""
    # `found` names its trees as they are named here
    for what, old, new in zip(("train", "frozen"), before, found[1:3], strict=True):
        one, other = _described(old), _described(new)
        if one != other:
            changed = [name for name in {*one, *other} if one.get(name) != other.get(name)]
            pairs = [f"{name}: {one.get(name)} -> {other.get(name)}" for name in sorted(changed)]
            raise ValueError(
                f"transition of {adapter.kind}: {what} changes names, shapes or dtypes: "
                f"{'; '.join(pairs[:6])}; padded arrays and `scale` say what is gone"
            )


def _described(tree: Pytree) -> dict[str, tuple[Shape, str]]:
    """`{path: (shape, dtype)}`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(keys): (leaf.shape, str(leaf.dtype)) for keys, leaf in leaves}
