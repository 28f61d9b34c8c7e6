"""Where the arrays of adapters lie on a mesh: it follows from where their kernels lie.

Of a pair, `a (n, r)` is sharded along its rows as the kernel's rows are, `b (r, m)` along its
columns as the kernel's columns are, and the rank is unsharded; so the base product and the thin
products meet the same collectives. Batch axes keep the sharding of the leaf's, axes folded into
rows or columns that of their first axis (`sharding.fold_spec`).
"""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from lowrank_jax import sharding
from lowrank_jax.adapters.adaptation import Adaptation
from lowrank_jax.adapters.base import Adapter, Site
from lowrank_jax.trees import is_quantized, nodes_with_keys, path_of


def partition_specs(
    adaptation: Adaptation, param_specs: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Trees like `adaptation.train` and `adaptation.frozen` of PartitionSpecs, from those of the
    parameters.

    Each array of a site follows its kernel along the axes that its family names in `axes`; along
    others, and of arrays that are not named there, it is unsharded. Shared arrays are replicated,
    leaves trained in full lie as before. What is cut into blocks (OFT's) needs a number of blocks
    that the mesh axis divides.

    Args:
      adaptation: arrays or ShapeDtypeStructs.
      param_specs: a tree like the parameters of PartitionSpecs; None is replicated. Of a quantised
        parameter, its matrix's, or what `lrx.meshes.partition_specs` makes.

    Raises:
      ValueError: for an adapted leaf without a spec, or with one of more axes than it has.

    >>> import jax, jax.numpy as jnp
    >>> import lowrank_jax as lrx
    >>> adaptation = lrx.adapt(
    ...     {"kernel": jnp.ones((8, 6))}, lrx.adapters.lora(rank=2), jax.random.key(0)
    ... )
    >>> train, frozen = partition_specs(adaptation, {"kernel": jax.P("fsdp", "tensor")})
    >>> train["sites"]["kernel"]
    {'a': P('fsdp', None), 'b': P(None, 'tensor')}
    """
    is_spec = lambda x: x is None or isinstance(x, PartitionSpec) or is_quantized(x)  # noqa: E731
    flat = nodes_with_keys(param_specs, is_spec)
    given = {path_of(keys): sharding.codes_of(spec) or PartitionSpec() for keys, spec in flat}
    missing = [
        path
        for path in [*adaptation.layout.by_path, *adaptation.layout.trainable]
        if path not in given
    ]
    if missing:
        raise ValueError(f"param_specs: no spec for {missing}; give a tree like the parameters")
    choice = (None,) * bool(adaptation.layout.candidates)
    trees = []
    for tree in (adaptation.train, adaptation.frozen):
        placed: dict[str, Any] = {
            "shared": jax.tree.map(lambda _: PartitionSpec(), tree["shared"]),
            "sites": {},
        }
        for path, arrays in tree["sites"].items():
            adapter, site = adaptation.layout.by_path[path]
            placed["sites"][path] = {
                name: _spec_of(adapter, site, given[path], name, len(x.shape), choice)
                for name, x in arrays.items()
            }
        if "trainable" in tree:
            placed["trainable"] = {
                path: jax.tree.map(lambda _, own=given[path]: own, node)
                for path, node in tree["trainable"].items()
            }
        trees.append(placed)
    return trees[0], trees[1]


def shardings(
    adaptation: Adaptation, param_shardings: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """As `partition_specs`, but NamedShardings of NamedShardings; an axis that the mesh does not divide
    evenly stays unsharded.

    Args:
      adaptation: arrays or ShapeDtypeStructs.
      param_shardings: a tree like the parameters, on one mesh, as `lrx.meshes.shardings` makes.

    Raises:
      ValueError: for anything but a NamedSharding; and as `partition_specs`.

    >>> import jax, jax.numpy as jnp
    >>> import lowrank_jax as lrx
    >>> params, mesh = {"kernel": jnp.ones((8, 6))}, lrx.meshes.make_mesh(data=-1)
    >>> placed = lrx.meshes.shardings(params, [("kernel", ("embed", "mlp"))], mesh)
    >>> train, frozen = shardings(
    ...     lrx.adapt(params, lrx.adapters.lora(rank=2), jax.random.key(0)), placed
    ... )
    >>> train["sites"]["kernel"]["b"].spec
    P(None, 'tensor')
    """
    is_one = lambda x: x is None or is_quantized(x)  # noqa: E731
    treedef = jax.tree.structure(param_shardings, is_leaf=is_one)
    flat = [
        (keys, sharding.codes_of(own)) for keys, own in nodes_with_keys(param_shardings, is_one)
    ]
    for keys, own in flat:
        if not isinstance(own, NamedSharding):
            raise ValueError(
                f"param_shardings: {own!r} at {path_of(keys)!r} is no NamedSharding; give "
                "lrx.meshes.shardings(params, table, mesh)"
            )
    mesh = flat[0][1].mesh

    def place(leaf, spec):
        return NamedSharding(mesh, sharding.even(mesh, leaf.shape, spec))

    train, frozen = partition_specs(
        adaptation, jax.tree.unflatten(treedef, [own.spec for _, own in flat])
    )
    return jax.tree.map(place, adaptation.train, train), jax.tree.map(
        place, adaptation.frozen, frozen
    )


def _spec_of(
    adapter: Adapter,
    site: Site,
    spec: PartitionSpec,
    name: str,
    ndim: int,
    choice: tuple[None, ...],
) -> PartitionSpec:
    """The spec of one array `(batch..., candidates, own axes)` of a site."""
    if len(spec) > len(site.shape):
        raise ValueError(
            f"param_specs: {site.path!r} of shape {site.shape} has fewer axes than its spec {spec}"
        )
    entries = tuple(spec) + (None,) * (len(site.shape) - len(spec))
    *batch, rows, cols = sharding.fold_spec(
        entries, site.view.batch, site.view.rows, site.view.cols
    )
    # how many axes are the array's own
    own = ndim - len(batch) - len(choice)
    axes = adapter.axes(site).get(name, (None,) * own)
    if len(axes) != own:
        raise ValueError(
            f"{site.path!r}: {type(adapter).__name__} names {len(axes)} axes of {name!r}, which "
            f"has {own} of its own"
        )
    along: dict[str | None, Any] = {"rows": rows, "cols": cols}
    return PartitionSpec(*batch, *choice, *(along.get(axis) for axis in axes))
