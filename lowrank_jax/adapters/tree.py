"""Adapters on trees: `adapt`, `attach`, `effective`, `merge` and what belongs to them.

    adaptation = lrx.adapt(params, {r".*/(q|v)_proj/kernel": lrx.adapters.lora(rank=8)}, key)
    print(adaptation)                                                   what is adapted, what trains, what does not
    loss = lambda train: objective(lrx.attach(params, adaptation.replace(train=train)), batch)
    grads = jax.grad(loss)(adaptation.train)                            only what trains
    merged = lrx.merge(params, adaptation)                               plain parameters again

`adaptation.train` goes straight into any optax optimizer; the parameters of the model are never in
it.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.core import meta

from lowrank_jax import deprecations, sharding
from lowrank_jax.adapters.adaptation import Adaptation, Adaptations
from lowrank_jax.adapters.base import Adapter, Arrays, Site
from lowrank_jax.adapters.hosts import AdaptedKernel, Bound
from lowrank_jax.adapters.rules import (
    LAYER_IN_PATH,
    Layout,
    Matrices,
    Rules,
    Selection,
    chosen_rows,
)
from lowrank_jax.resolution import Views
from lowrank_jax.trees import dequantized, leaves_with_metadata, map_nodes, stored_like
from lowrank_jax.typing import ArrayLike, Kernel, Pytree


@deprecations.options("lrx.adapt")
def adapt(
    params: Pytree,
    rules: Rules,
    key: jax.Array,
    *,
    views: Views | None = None,
    exclude: Any = (),
    layers: tuple[int, ...] | None = None,
    layers_pattern: str = LAYER_IN_PATH,
    ranks: Any = (),
    alphas: Any = (),
    trainable: Any = (),
    bias: str = "none",
    uses: Any = (),
    order: tuple[tuple[str, int], ...] | None = None,
    stats: Mapping[str, Mapping[str, ArrayLike]] | None = None,
    name: str = "default",
) -> Adaptation:
    """Gives leaves of a tree adapters; the tree itself is not changed.

    Patterns are regular expressions that must match the whole "/"-joined path of a leaf.

    Args:
      params: arrays, `nn.Partitioned` boxes, quantised arrays; under `jax.eval_shape` also abstract
        ones.
      rules: ordered `{pattern: adapter}` or pairs, first match wins, None leaves a leaf out; or one
        adapter for all linear layers, like the pattern "all-linear": leaves named `kernel` outside
        embeddings, heads and norms.
      key: of the initialisers; each site and layer draws its own from its name.
      views: which axes are rows, columns, layers; as for `lrx.resolution.resolve`.
      exclude: patterns of leaves that no rule takes.
      layers: numbers of the layers that are adapted. In a stack the others keep their place with
        scale 0 and train nothing; elsewhere the number is in the path.
      layers_pattern: finds that number, its first group.
      ranks, alphas: `{pattern: number, or one number for each matrix of a stack}`, first match
        wins. Smaller ranks in a stack are padded.
      trainable: patterns of leaves that train in full, without an adapter (a new head, norms).
      uses: `{pattern: products}` of adapted leaves that are used in several ways: ("gather",)
        adapts the look-up of a table and leaves the output layer that shares it as it is, as PEFT
        does; ("dot_general",) the reverse. By default every product sees the adapter. `effective`
        and `merge` cannot say it, and refuse.
      bias: "none"; "adapted" trains the biases beside adapted kernels; "all" every leaf named
        `bias`.
      order: `((path, index), ...)` of all adapted matrices, where an adapter shares along an order.
      stats: `{path: {name: array, batch axes in front}}`, what initialisers read beside the kernel.
      name: of the adaptation.

    Raises:
      ValueError: a pattern that matches nothing (with suggestions), a leaf that is no matrix, an
        axis nobody claimed, an adapter that does not fit a shape, a rank larger than a matrix can
        have, a leaf both adapted and trained in full.

    >>> import jax, jax.numpy as jnp
    >>> import lowrank_jax as lrx
    >>> params = {"dense": {"kernel": jnp.ones((8, 16)), "bias": jnp.zeros(16)}}
    >>> adaptation = lrx.adapt(
    ...     params, {".*/kernel": lrx.adapters.lora(rank=4)}, jax.random.key(0), bias="adapted"
    ... )
    >>> sorted(adaptation.train["sites"]), sorted(adaptation.train["trainable"]), adaptation.trained
    (['dense/kernel'], ['dense/bias'], 112)
    """
    selection = Selection(
        rules=rules,
        exclude=exclude,
        layers=layers,
        layers_pattern=layers_pattern,
        ranks=ranks,
        alphas=alphas,
        trainable=trainable,
        bias=bias,
        uses=uses,
        views=Views() if views is None else views,
        order=order,
    )
    layout, matrices = selection.layout(params, name)
    nodes = {path: node for path, node, _ in leaves_with_metadata(params)}
    trained = {path: nodes[path] for path in layout.trainable}
    key = jax.random.fold_in(key, zlib.crc32(name.encode()))
    shared = _shared(layout, matrices, key)
    train: dict[str, Pytree] = {"shared": shared.train, "sites": {}, "trainable": trained}
    frozen: dict[str, Pytree] = {"shared": shared.frozen, "sites": {}}
    for path, (adapter, site) in layout.by_path.items():
        # a key of the leaf's own name, whatever else is adapted
        site_key = jax.random.fold_in(key, zlib.crc32(path.encode()))
        of_group = shared.train.get(site.group, {}) | shared.frozen.get(site.group, {})
        known = {"scale": matrices[path].scale(adapter, site)} | shared.by_path.get(path, {})
        given = known | {"stats": dict((stats or {}).get(path, {}))}
        made = _initialised(adapter, site, site_key, nodes[path], given, of_group)
        site_train, site_frozen = made
        train["sites"] |= {path: site_train} if site_train else {}
        frozen["sites"][path] = known | site_frozen
        _check_axes(adapter, site, frozen["sites"][path] | site_train, of_group)
    return Adaptation(train, frozen, layout, tuple(matrices.items()))


class _Shared(NamedTuple):
    """What groups make for all their leaves: arrays by group, and what is given to single leaves."""

    train: dict[str, Pytree]
    frozen: dict[str, Pytree]
    by_path: dict[str, dict[str, jax.Array]]


def _shared(layout: Layout, matrices: Mapping[str, Matrices], key: jax.Array) -> _Shared:
    """`init_shared` of every group, each with a key of its own name."""
    train, frozen, by_path = made = _Shared({}, {}, {})
    ranks = {(path, i): rank for path, own in matrices.items() for i, rank in enumerate(own.ranks)}
    for name, (adapter, group) in layout.groups.items():
        own_key = jax.random.fold_in(key, zlib.crc32(f"shared {name}".encode()))
        group = dataclasses.replace(group, ranks=ranks)
        own_train, own_frozen, given = adapter.init_shared(own_key, group)
        train.update({name: own_train} if own_train else {})
        frozen.update({name: own_frozen} if own_frozen else {})
        by_path.update(given)
    return made


def _check_axes(adapter: Adapter, site: Site, own: Arrays, shared: Pytree) -> None:
    """ValueError where `axes` names what is not there: its padding and sharding would be nobody's."""
    name = f"{site.path!r}: {type(adapter).__name__}.axes"
    for array, axes in adapter.axes(site).items():
        if array not in {*own, *shared, *adapter.optional}:
            raise ValueError(
                f"{name} names {array!r}, and its arrays are {sorted([*own, *shared])}; name one of "
                "these, or leave it out"
            )
        unknown = set(axes) - {"rows", "cols", "rank", None}
        if unknown:
            raise ValueError(
                f"{name} says {axes} of {array!r}; an axis is 'rows', 'cols', 'rank' or None"
            )


def _initialised(
    adapter: Adapter,
    site: Site,
    key: jax.Array,
    node: Kernel,
    given: dict[str, Pytree],
    shared: Pytree,
) -> tuple[Arrays, Arrays]:
    """`init_site` of every matrix, one after the other so that an SVD of a large stack fits; on
    explicit meshes unsharded."""

    def one(of):
        key, kernel, given = of
        if kernel is not None:
            spec = sharding.unsharded_spec(sharding.explicit_spec(kernel))
            kernel = sharding.reshard(kernel, spec)
        return adapter.init_site(key, site, kernel, given | {"shared": shared})

    kernel = matrices_of(node, site) if adapter.reads_kernel else None
    with sharding.mesh_of(kernel):
        if not site.lead:
            return one((key, kernel, given))
        # one matrix after the other, whatever the batch axes
        flat = lambda x: x.reshape(site.count, *x.shape[len(site.lead) :])  # noqa: E731
        keys = jax.random.split(key, site.lead)
        stacks = jax.tree.map(flat, (keys, kernel, given))
        made = jax.lax.map(one, stacks)
        return jax.tree.map(lambda x: x.reshape(*site.lead, *x.shape[1:]), made)


def matrices_of(node: Kernel, site: Site) -> jax.Array:
    """A leaf as `(batch..., n, m)` in float32; boxes are opened, quantised arrays decoded."""
    array = dequantized(meta.unbox(node)).astype(jnp.float32)
    return site.view.to_matrices(array)


def named(adaptations: Adaptations, active: tuple[str, ...] | None) -> dict[str, Adaptation]:
    """The active adaptations in their order; ValueError for a name that is not there."""
    found = (
        {adaptations.layout.name: adaptations}
        if isinstance(adaptations, Adaptation)
        else dict(adaptations)
    )
    if active is None:
        return found
    missing = [name for name in active if name not in found]
    if missing:
        raise ValueError(f"active: {missing} are not among the adaptations {sorted(found)}")
    return {name: found[name] for name in active}


def attach(
    params: Pytree,
    adaptations: Adaptations,
    *,
    active: tuple[str, ...] | None = None,
    key: jax.Array | None = None,
    ids: jax.Array | None = None,
) -> Pytree:
    """The tree with an `AdaptedKernel` in place of each adapted leaf, and the trained leaves in
    place of theirs.

    Where a leaf is in a box that names its axes (`nn.Partitioned`), the arrays of its adapters are
    in boxes like it.

    Any function takes it as `lrx.adapted(function)`; so do `lrx.matmul`, `lrx.einsum`,
    `lrx.dot_general`, and `lrx.adapters.embed`, `attend` and `conv`.

    Args:
      params: the tree that `adapt` saw.
      adaptations: one, or several by name. They act in the order of `active`; additive ones
        commute.
      active: names in that order; None takes all, () none.
      key: draws dropout, and whatever else is random in a family (`stochastic`), of its own for
        each site and layer; None is deterministic.
      ids: for adaptations of `lrx.adapters.candidates`: which one each row of the batch takes, -1
        for none (a number that no candidate has gives NaN).

    Raises:
      ValueError: an unknown name, a leaf that is missing or has another shape, two adaptations that
        train one leaf.

    >>> import jax, jax.numpy as jnp
    >>> import lowrank_jax as lrx
    >>> params = {"kernel": jnp.ones((4, 6))}
    >>> adaptation = lrx.adapt(params, lrx.adapters.lora(rank=2), jax.random.key(0))
    >>> loss = lambda train: lrx.matmul(
    ...     jnp.ones(4), lrx.attach(params, adaptation.replace(train=train))["kernel"]
    ... ).sum()
    >>> jax.grad(loss)(adaptation.train)["sites"]["kernel"]["b"].shape
    (2, 6)
    """
    chosen = named(adaptations, active)
    # which candidate each row takes, where there are any
    numbers = chosen_rows((one.layout for one in chosen.values()), ids)
    bound: dict[str, list[Bound]] = {}
    for name, adaptation in chosen.items():
        own = numbers if adaptation.layout.candidates else None
        for path, (adapter, site) in adaptation.layout.by_path.items():
            arrays = adaptation.arrays(path)
            shared, keys = arrays.pop("shared"), None
            # (batch..., rows), so that a scan over layers slices it too
            rows = None if own is None else jnp.broadcast_to(own, (*site.lead, *own.shape))
            if key is not None and adapter.stochastic:
                keys = site_keys(key, name, adapter, site)
            bound.setdefault(path, []).append(Bound(arrays, shared, keys, rows, adapter, site))

    def place(path: str, node: Kernel) -> Pytree:
        return (
            AdaptedKernel(node, tuple(one.boxed(node) for one in bound[path]))
            if path in bound
            else node
        )

    return _placed(params, chosen, set(bound), place)


def site_keys(key: jax.Array, name: str, adapter: Adapter, site: Site) -> jax.Array:
    """The keys `(batch...)` from which one site of the adaptation `name` draws; `(batch..., 2)` for
    a family with a common draw, the second the same at all sites and layers."""
    keys = jax.random.fold_in(key, zlib.crc32(f"{name}/{site.path}".encode()))
    keys = jax.random.split(keys, site.lead) if site.lead else keys
    if not adapter.common_draw:
        return keys
    common = jax.random.fold_in(key, zlib.crc32(name.encode()))
    return jnp.stack([keys, jnp.broadcast_to(common, keys.shape)], axis=-1)


def effective(
    params: Pytree, adaptations: Adaptations, *, active: tuple[str, ...] | None = None
) -> Pytree:
    """Plain parameters with the adapters worked in: `K'` of every site, computed in float32, in the
    leaf's dtype.

    Differentiable in both arguments, and right for every model; the dense matrices are formed.

    Raises:
      ValueError: as `attach`; for an adapter that only some products see (`uses`), which no plain
        leaf can say.

    >>> import jax, jax.numpy as jnp
    >>> import lowrank_jax as lrx
    >>> params = {"kernel": jnp.ones((4, 6))}
    >>> adaptation = lrx.adapt(params, lrx.adapters.lora(rank=2), jax.random.key(0))
    >>> bool(jnp.array_equal(lrx.effective(params, adaptation)["kernel"], params["kernel"]))
    True
    """
    chosen = named(adaptations, active)

    def work(adapter: Adapter, site: Site, kernel: jax.Array, p: dict[str, Any]) -> jax.Array:
        return adapter.effective(site, kernel, p)

    return _worked(params, chosen, work, jax.vmap)


def merge(
    params: Pytree, adaptations: Adaptations, *, active: tuple[str, ...] | None = None
) -> Pytree:
    """`effective`, matrix by matrix, and only if everything is finite; the given tree stays as it
    is.

    Keep `params` to unmerge exactly: float32 arithmetic restores a kernel to about 1e-6, bfloat16
    does not.

    Raises:
      ValueError: as `attach`; and naming the leaf, where a merged matrix is not finite.

    >>> import jax, jax.numpy as jnp
    >>> import lowrank_jax as lrx
    >>> params = {"kernel": jnp.ones((4, 6))}
    >>> adaptation = lrx.adapt(params, lrx.adapters.lora(rank=2), jax.random.key(0))
    >>> lrx.merge(params, adaptation)["kernel"].shape
    (4, 6)
    """
    chosen = named(adaptations, active)
    merged = _worked(params, chosen, lambda adapter, *rest: adapter.effective(*rest), _mapped)
    _check_finite(merged, {path for one in chosen.values() for path in one.layout.by_path})
    return merged


def unmerge(
    merged: Pytree,
    adaptations: Adaptations,
    *,
    base: Pytree = None,
    active: tuple[str, ...] | None = None,
) -> Pytree:
    """The parameters before `merge`: bit for bit from `base`, else by arithmetic, up to rounding.

    Raises:
      ValueError: as `attach`; without a base, an adapter that has no inverse (DoRA), or leaves
        trained in full.

    >>> import jax, jax.numpy as jnp
    >>> import lowrank_jax as lrx
    >>> params = {"kernel": jnp.ones((4, 6))}
    >>> adaptation = lrx.adapt(params, lrx.adapters.lora(rank=2), jax.random.key(0))
    >>> merged = lrx.merge(params, adaptation)
    >>> bool(
    ...     jnp.array_equal(
    ...         lrx.adapters.unmerge(merged, adaptation, base=params)["kernel"], params["kernel"]
    ...     )
    ... )
    True
    """
    chosen = named(adaptations, active)
    paths = {
        path for one in chosen.values() for path in [*one.layout.by_path, *one.layout.trainable]
    }
    if base is not None:
        kept = {path: node for path, node, _ in leaves_with_metadata(base)}
        missing = sorted(paths - set(kept))
        if missing:
            raise ValueError(
                f"base: leaves {missing} are missing; give the parameters from before the merge"
            )
        return map_nodes(
            lambda path, node: _boxed_as(node, kept[path]) if path in paths else node, merged
        )
    trained = [path for one in chosen.values() for path in one.layout.trainable]
    if trained:
        raise ValueError(
            f"leaves {trained} were trained in full; only base= brings back what they were"
        )
    backwards = dict(reversed(list(chosen.items())))
    return _worked(merged, backwards, lambda adapter, *rest: adapter.remove(*rest), _mapped)


def _mapped(function: Callable) -> Callable:
    """Like `jax.vmap(function)`, one after the other."""
    return lambda *args: jax.lax.map(lambda one: function(*one), args)


def _worked(
    params: Pytree, chosen: dict[str, Adaptation], work: Callable, over: Callable
) -> Pytree:
    """The tree with `work(adapter, site, kernel, arrays)` of every active adapter on every
    matrix."""
    with sharding.mesh_of(params):
        return _worked_there(params, chosen, work, over)


def _worked_there(
    params: Pytree, chosen: dict[str, Adaptation], work: Callable, over: Callable
) -> Pytree:
    paths = {path for adaptation in chosen.values() for path in adaptation.layout.by_path}
    for adaptation in chosen.values():
        adaptation.layout.check_uses("a plain leaf serves all of them")
    chosen_rows((adaptation.layout for adaptation in chosen.values()), None)

    def place(path: str, node: Kernel) -> Pytree:
        box, array = node, meta.unbox(node)
        matrices: Pytree = None
        view: Any = None
        for adaptation in chosen.values():
            if path not in adaptation.layout.by_path:
                continue
            adapter, site = adaptation.layout.by_path[path]
            arrays = adaptation.arrays(path)
            shared = arrays.pop("shared")
            matrices, view = matrices_of(array, site) if matrices is None else matrices, site.view

            def one(kernel, own, adapter=adapter, site=site, shared=shared):
                return work(adapter, site, kernel, own | {"shared": shared})

            # over the batch axes, each adapter on what those before it made
            for _ in site.lead:
                one = over(one)
            matrices = one(matrices, arrays)
        whole = view.from_matrices(matrices, tuple(array.shape))
        whole = stored_like(whole, array)
        return _boxed_as(box, whole)

    return _placed(
        params, chosen, paths, lambda path, node: place(path, node) if path in paths else node
    )


def _placed(
    params: Pytree, chosen: dict[str, Adaptation], paths: set[str], place: Callable
) -> Pytree:
    """The tree with `place(path, node)` at adapted paths and trained leaves at theirs, after
    checking both."""
    nodes = {path: node for path, node, _ in leaves_with_metadata(params)}
    trained: dict[str, Pytree] = {}
    views: dict[str, Any] = {}
    for adaptation in chosen.values():
        for path, (_, site) in adaptation.layout.by_path.items():
            if path not in nodes or tuple(nodes[path].shape) != site.shape:
                found = "missing" if path not in nodes else f"of shape {tuple(nodes[path].shape)}"
                raise ValueError(
                    f"adapted leaf {path!r}, {site.shape}, is {found}; give the tree that adapt saw"
                )
            if views.setdefault(path, site.view) != site.view:
                raise ValueError(
                    f"{path!r} is seen as {views[path]} by one active adaptation and as "
                    f"{site.view} by another; give both the same views="
                )
        twice = [path for path in adaptation.layout.trainable if path in trained]
        if twice:
            raise ValueError(
                f"leaves {twice} are trained in full by two active adaptations; activate one of them"
            )
        trained |= adaptation.train["trainable"]
    missing = [path for path in trained if path not in nodes]
    if missing:
        raise ValueError(
            f"leaves {missing}, trained in full, are missing in params; give the tree that adapt saw"
        )

    # a leaf that one adaptation trains in full may be adapted by another
    now = lambda path, node: _boxed_as(node, trained[path]) if path in trained else node  # noqa: E731
    return map_nodes(lambda path, node: place(path, now(path, node)), params)


def _boxed_as(node: Kernel, value: Kernel) -> Kernel:
    """A value in a box like that of a leaf, if that is in one."""
    return node.replace_boxed(value) if isinstance(node, meta.AxisMetadata) else value


def _check_finite(tree: Pytree, paths: set[str]) -> None:
    wrong = []
    for path, node, _ in leaves_with_metadata(tree):
        if path not in paths or isinstance(node, jax.core.Tracer):
            continue
        leaves = [
            leaf for leaf in jax.tree.leaves(node) if jnp.issubdtype(leaf.dtype, jnp.floating)
        ]
        if not all(bool(jnp.isfinite(leaf).all()) for leaf in leaves):
            wrong.append(path)
    if wrong:
        raise ValueError(
            f"merged kernels {wrong} are not finite; the adapters or the base hold a NaN or an "
            "infinity"
        )
