"""Shardings of optimizer state from outside: for `jax.jit` on auto meshes, for checkpoints, and for
choosing sides.

On an explicit mesh every array's type carries its sharding, so `init` itself says where each leaf
of the state lives. `state_shardings` asks it: it traces `init`, without running it, on a twin of
the mesh whose axes are all explicit. So the answer is the same on both kinds of mesh, and covers
whatever is chained around our transformations.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lowrank_jax import sharding
from lowrank_jax.projection.layout import Layout
from lowrank_jax.projection.state import MatrixState, parts_of
from lowrank_jax.resolution import Views, resolve
from lowrank_jax.trees import leaves_with_metadata, nodes_with_keys, path_of
from lowrank_jax.typing import Kernel, Pytree


def state_shardings(
    transformation: Any, params: Pytree, shardings: Pytree = None, *, spread: bool = False
) -> Any:
    """NamedShardings of the whole state of any optax transformation, as a tree like
    `transformation.init(params)`.

    Of a projected leaf, batch axes keep their sharding, the kept dimension keeps its own, the rank
    and the shrunk dimension of a basis are unsharded; error feedback is placed like the parameter. State
    shaped like a parameter (moments of plain leaves, of `optax.adamw`, accumulated gradients) is placed
    like that parameter; all else is replicated.

    Args:
      transformation: ours, or optax's, or any pipeline of both.
      params: arrays or ShapeDtypeStructs.
      shardings: a tree like `params` of NamedShardings; by default what the leaves carry.
      spread: divide the low-rank state too over every axis that its matrix is divided over, so that
        each device holds its share of all of it; `projection.layout` says how. An update on an auto
        mesh then needs to know where the parameters lie,
        `with lrx.meshes.use(mesh, parameters=...)`: without, the partitioner may gather whole
        matrices (`tests/multi_device/test_mesh_training.py`).

    Raises:
      ValueError: if a leaf has no NamedSharding, or the leaves lie on different meshes.

    >>> import jax, jax.numpy as jnp
    >>> import lowrank_jax as lrx
    >>> mesh = jax.make_mesh(
    ...     (1, 1), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2
    ... )
    >>> params = {"kernel": jax.ShapeDtypeStruct((8, 16), jnp.float32)}
    >>> shardings = {"kernel": jax.NamedSharding(mesh, jax.P("data", "model"))}
    >>> state = state_shardings(lrx.dct_adamw(1e-3, rank=4), params, shardings)
    >>> tuple(state.projection.matrices["kernel"].inner.mu.spec)
    (None, 'model')
    """
    leaves, treedef = jax.tree.flatten(params)
    given = _given(params, leaves, shardings)
    mesh = given[0][1].mesh
    twin = mesh.abstract_mesh.update_axis_types(dict.fromkeys(mesh.axis_names, AxisType.Explicit))
    abstract = [
        jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(twin, kind.spec))
        for leaf, (_, kind) in zip(leaves, given, strict=True)
    ]
    with jax.sharding.use_abstract_mesh(twin):
        state = jax.eval_shape(transformation.init, jax.tree.unflatten(treedef, abstract))
    by_shape = [(path, leaf.shape, kind) for leaf, (path, kind) in zip(leaves, given, strict=True)]

    def place(keys, leaf):
        if leaf.sharding is not None and any(leaf.sharding.spec):
            return NamedSharding(mesh, PartitionSpec(*leaf.sharding.spec))
        path = path_of(keys)
        for (
            name,
            shape,
            kind,
        ) in by_shape:  # made without the parameter's sharding, for instance by jnp.zeros(p.shape)
            if shape == leaf.shape and name and (path == name or path.endswith("/" + name)):
                return kind
        return NamedSharding(mesh, PartitionSpec())

    def of_node(keys, node):
        if not isinstance(node, MatrixState):
            return place(keys, node)
        if spread:
            return _spread(node, dict(reversed(given))[node.view.path])
        return jax.tree.map(lambda leaf: NamedSharding(mesh, _spec_of(leaf)), node)

    is_matrix = lambda x: isinstance(x, MatrixState)  # noqa: E731
    placed = [of_node(keys, node) for keys, node in nodes_with_keys(state, is_matrix)]
    return jax.tree.unflatten(jax.tree.structure(state, is_leaf=is_matrix), placed)


def _spec_of(leaf: jax.ShapeDtypeStruct) -> PartitionSpec:
    return PartitionSpec() if leaf.sharding is None else PartitionSpec(*leaf.sharding.spec)


def _spread(node: MatrixState, kind: NamedSharding) -> MatrixState:
    """The shardings of one matrix's state with bases and low-rank objects divided as far as the
    matrix is."""
    view = node.view
    own_layout = Layout.of(view, kind.mesh, sharding.spec_of(kind, len(view.shape)))

    def place(shape, spec):
        def put(leaf):
            return NamedSharding(kind.mesh, spec if tuple(leaf.shape) == shape else _spec_of(leaf))

        return put

    basis = place((*view.batch, view.shrunk, view.rank), own_layout.basis)
    low = place((*view.batch, view.rank, view.kept), own_layout.low)
    own = lambda leaf: NamedSharding(kind.mesh, _spec_of(leaf))  # noqa: E731
    rules = {"basis": basis, "memory": basis, "inner": low}
    placed = {
        name: jax.tree.map(rules.get(name, own), part) for name, part in parts_of(node).items()
    }
    return dataclasses.replace(node, **placed)


def _given(
    params: Pytree, leaves: list[Kernel], shardings: Pytree
) -> list[tuple[str, NamedSharding]]:
    """`[(path, NamedSharding), ...]` of the parameters, all on one mesh; of a quantised one, codes
    come first."""
    paths = [path for path, leaf, _ in leaves_with_metadata(params) for _ in jax.tree.leaves(leaf)]
    if shardings is None:
        kinds: list[Any] = [getattr(leaf, "sharding", None) for leaf in leaves]
    else:
        kinds = jax.tree.leaves(shardings, is_leaf=lambda x: x is None)
    if len(kinds) != len(leaves):
        raise ValueError(
            f"shardings has {len(kinds)} leaves, params {len(leaves)}: give one sharding for each "
            "leaf"
        )
    for path, kind in zip(paths, kinds, strict=True):
        if not isinstance(kind, NamedSharding):
            raise ValueError(
                f"shardings: leaf {path!r} has {kind!r}, not a NamedSharding; place the parameters "
                "on a mesh first, or pass shardings= as a tree like params"
            )
        if kind.mesh.abstract_mesh != kinds[0].mesh.abstract_mesh:
            raise ValueError(
                f"shardings: leaf {path!r} is placed on another mesh than {paths[0]!r}; use one mesh"
            )
    return list(zip(paths, kinds, strict=True))


def _dividing(kind: NamedSharding) -> NamedSharding:
    """The same sharding without axes of size 1."""
    names = [
        [name for name in sharding.axis_names_of(entry) if kind.mesh.shape[name] > 1]
        for entry in kind.spec
    ]
    return NamedSharding(kind.mesh, PartitionSpec(*(tuple(entry) or None for entry in names)))


def sides_for(
    params: Pytree,
    shardings: Pytree = None,
    *,
    views: Views | None = None,
    side: Any = "sharding",
    tie: str = "rows",
) -> tuple[tuple[str, str], ...]:
    """`((path, side), ...)` to be passed as `side=`: which dimension each projected leaf shrinks,
    known before tracing.

    With "sharding" the unsharded dimension of a matrix is shrunk, so that projecting and lifting
    need no communication along the sharded one; where both or neither are sharded, the smaller
    ("paper"). An axis of the mesh of size 1 divides nothing.

    Args:
      params: arrays or ShapeDtypeStructs.
      shardings: a tree like `params`; by default what the leaves carry.
      views, side, tie: as of the optimizer, see `lrx.resolution.resolve`.

    Raises:
      ValueError: as `lrx.state_shardings`, and as `lrx.resolution.resolve`.

    >>> import jax, jax.numpy as jnp
    >>> mesh = jax.sharding.AbstractMesh((8,), ("model",))
    >>> params = {"kernel": jax.ShapeDtypeStruct((8, 16), jnp.float32)}
    >>> sides_for(params, {"kernel": jax.NamedSharding(mesh, jax.P("model", None))})
    (('kernel', 'cols'),)
    """
    given = _given(params, jax.tree.leaves(params), shardings)
    placed = jax.tree.unflatten(jax.tree.structure(params), [_dividing(kind) for _, kind in given])
    return resolve(params, views, rank=1, side=side, tie=tie, shardings=placed).sides


def resolved_sides(transformation: Any, params: Pytree) -> tuple[tuple[str, str], ...]:
    """`((path, side), ...)` of every projected leaf of any pipeline, for a checkpoint's manifest;
    () if there is none.

    >>> import jax.numpy as jnp, optax
    >>> import lowrank_jax as lrx
    >>> tx = optax.chain(optax.clip(1.0), lrx.galore(1e-2, rank=4))
    >>> resolved_sides(tx, {"kernel": jnp.ones((8, 16))})
    (('kernel', 'rows'),)
    """
    state = jax.eval_shape(transformation.init, params)
    nodes = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, MatrixState))
    return tuple(
        (node.view.path, node.view.side) for node in nodes if isinstance(node, MatrixState)
    )
