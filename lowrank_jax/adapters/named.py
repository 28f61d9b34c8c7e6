"""Several adaptations of one base, by name: weights, padded ranks, a choice for each row, hot-swap.

An ordinary dict is the store: `{"alice": adaptation, ...}` goes to `lrx.attach`, whose `active=`
orders it; to rename or delete an entry is what it is for any dict. Everything here is a pure
function from adaptations to an adaptation and changes arrays, not shapes, wherever a compiled
program could depend on them.

What must be equal for adaptations to stand in one program: leaves, views, families and their
options. What need not be, because it is in the arrays alone: rank (`scale` masks what is padded),
alpha and its rule, and how the factors started.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_jax.adapters.adaptation import Adaptation
from lowrank_jax.adapters.base import Adapter, Site, check_positive
from lowrank_jax.adapters.rules import Matrices
from lowrank_jax.typing import Kernel, Pytree

TREES = ("train", "frozen")


def weighted(adaptation: Adaptation, weight: Kernel) -> Adaptation:
    """The adaptation with its `scale` times `weight`: 0 is the base, -1 the opposite of an additive
    adaptation.

    The weight may be traced, so one compiled program serves every weight. Multiplicative families
    (OFT) scale their generator. Leaves that are trained in full have no scale and stay as they are;
    leave the name out of `active=`.

    Raises:
      ValueError: if the weight is not a number.

    >>> import jax, jax.numpy as jnp
    >>> import lowrank_jax as lrx
    >>> adaptation = lrx.adapt(
    ...     {"kernel": jnp.ones((4, 6))}, lrx.adapters.lora(rank=2, alpha=4), jax.random.key(0)
    ... )
    >>> weighted(adaptation, 0.5).frozen["sites"]["kernel"]["scale"].tolist()
    [1.0, 1.0]
    """
    if jnp.ndim(weight):
        raise ValueError(
            f"weight: an array of shape {jnp.shape(weight)}; give one number for the whole "
            "adaptation"
        )
    sites = {
        path: arrays | {"scale": arrays["scale"] * jnp.asarray(weight, arrays["scale"].dtype)}
        for path, arrays in adaptation.frozen["sites"].items()
    }
    return adaptation.replace(frozen=adaptation.frozen | {"sites": sites})


def padded(adaptation: Adaptation, rank: int) -> Adaptation:
    """The same adaptation in arrays of a larger rank: what is added is zero, and masked by `scale`.

    For a program that is compiled once for all ranks up to `rank`: see `hot_swap` and `candidates`.
    Families without a rank that `scale` masks stay as they are. The report still counts the ranks
    that train.

    Raises:
      ValueError: if a site has a larger rank, or its family does not say which axes are its rank.

    >>> import jax, jax.numpy as jnp
    >>> import lowrank_jax as lrx
    >>> adaptation = lrx.adapt(
    ...     {"kernel": jnp.ones((4, 6))}, lrx.adapters.lora(rank=2), jax.random.key(0)
    ... )
    >>> padded(adaptation, 3).train["sites"]["kernel"]["a"].shape, padded(adaptation, 3).trained
    ((4, 3), 20)
    """
    check_positive("rank", rank)
    larger = [
        f"{site.path!r} ({site.rank})" for site in adaptation.layout.sites if site.rank > rank
    ]
    if larger:
        raise ValueError(
            f"rank={rank} is smaller than that of {', '.join(larger)}; lrx.to_lora(..., rank=) "
            "compresses"
        )
    ranked = {site.path for adapter, site in adaptation.layout.by_path.values() if adapter.ranked}
    return _padded(adaptation, dict.fromkeys(ranked, rank))


def _padded(adaptation: Adaptation, ranks: Mapping[str, int]) -> Adaptation:
    """The adaptation with the rank of each named site raised."""
    layout = adaptation.layout
    trees = {name: dict(getattr(adaptation, name)) for name in TREES}
    sites, adapters = [], []
    for adapter, site in layout.by_path.values():
        rank = ranks.get(site.path, site.rank)
        sites.append(dataclasses.replace(site, rank=rank))
        if rank == site.rank:
            adapters.append(adapter)
            continue
        adapters.append(dataclasses.replace(adapter, rank=rank))  # type: ignore[call-arg]
        named = adapter.axes(site)
        axes = {**named, "scale": ("rank",)}
        if not any("rank" in own for own in named.values()):
            raise ValueError(
                f"{site.path!r}: {type(adapter).__name__} names no axis 'rank' in its `axes`, so "
                f"its rank {site.rank} cannot be padded to {rank}; give every adaptation the same "
                "rank"
            )
        for tree in trees.values():
            # what the leaf has, and what its group shares
            for kind, place in (("sites", site.path), ("shared", site.group)):
                arrays = tree[kind].get(place, {})
                pad = {key: _pad_rank(x, axes.get(key, ()), rank) for key, x in arrays.items()}
                tree[kind] = tree[kind] | ({place: pad} if pad else {})
    layout = dataclasses.replace(layout, sites=tuple(sites), adapters=tuple(adapters))
    return adaptation.replace(layout=layout, train=trees["train"], frozen=trees["frozen"])


def _pad_rank(x: jax.Array, axes: tuple[str | None, ...], rank: int) -> jax.Array:
    """`x (..., axes)` with zeros up to `rank` along the axes that are the rank."""
    widths = [(0, 0)] * (x.ndim - len(axes))
    for size, axis in zip(x.shape[len(widths) :], axes, strict=True):
        widths.append((0, rank - size) if axis == "rank" else (0, 0))
    return jnp.pad(x, widths) if any(width != (0, 0) for width in widths) else x


def at_rank(adaptation: Adaptation, rank: int) -> Adaptation:
    """The same adaptation with the first `rank` components of every matrix, without any training.

    For families whose components are sorted (`nested`: DyLoRA); others are compressed by
    `lrx.to_lora(..., rank=)`. Matrices of a smaller rank stay as they are. The result is of the
    same family: it merges, is written as LoRA, or trains on.

    Raises:
      ValueError: for a family whose components are in no order; for a rank below those that were
        trained.

    >>> import jax, jax.numpy as jnp
    >>> import lowrank_jax as lrx
    >>> adaptation = lrx.adapt(
    ...     {"kernel": jnp.ones((4, 6))}, lrx.adapters.dylora(rank=4, alpha=8), jax.random.key(0)
    ... )
    >>> at_rank(adaptation, 2).frozen["sites"]["kernel"]["scale"].tolist()
    [4.0, 4.0]
    """
    check_positive("rank", rank)
    layout = adaptation.layout
    trees = {name: dict(getattr(adaptation, name)) for name in TREES}
    for tree in trees.values():
        tree["sites"] = dict(tree["sites"])
    matrices, sites, adapters = dict(adaptation.matrices), [], []
    for path, (adapter, site) in layout.by_path.items():
        _check_nested(adapter, site, rank)
        own, new = matrices[path], min(rank, site.rank)
        smaller = [
            _at_rank_alone(adapter, site, old, alpha, rank)
            for old, alpha in zip(own.ranks, own.alphas, strict=True)
        ]
        ranks, alphas, ratios = zip(*smaller, strict=True)
        matrices[path] = Matrices(ranks=ranks, alphas=alphas)
        axes = {**adapter.axes(site), "scale": ("rank",)}
        for tree in trees.values():
            if path in tree["sites"]:
                tree["sites"][path] = {
                    key: _cut_rank(x, axes.get(key, ()), new)
                    for key, x in tree["sites"][path].items()
                }
        # (batch..., 1) times (batch..., r)
        ratio = jnp.asarray(ratios, jnp.float32).reshape(*site.lead, 1)
        frozen = trees["frozen"]["sites"][path]
        trees["frozen"]["sites"][path] = frozen | {"scale": frozen["scale"] * ratio}
        sites.append(dataclasses.replace(site, rank=new))
        adapters.append(adapter if new == site.rank else adapter.truncated(new))
    layout = dataclasses.replace(layout, sites=tuple(sites), adapters=tuple(adapters))
    return adaptation.replace(
        layout=layout,
        matrices=tuple(matrices.items()),
        train=trees["train"],
        frozen=trees["frozen"],
    )


def _check_nested(adapter: Adapter, site: Site, rank: int) -> None:
    if not adapter.nested:
        raise ValueError(
            f"{site.path!r}: the components of {type(adapter).__name__} are in no order in which "
            "the first would stand alone; lrx.to_lora(..., rank=) compresses"
        )
    smallest = getattr(adapter, "smallest", 1)
    if rank < smallest:
        raise ValueError(
            f"{site.path!r}: rank={rank} is below smallest={smallest}, the smallest rank that was "
            "trained"
        )


def _at_rank_alone(
    adapter: Adapter, site: Site, old: int, alpha: Any, rank: int
) -> tuple[int, Any, float]:
    """The rank and the alpha of one matrix after the cut, and the factor of its scale."""
    new = min(old, rank)
    if new == old:  # also 0, of one that is left out
        return old, alpha, 1.0
    changes = {"rank": old} | ({} if alpha is None else {"alpha": alpha})
    before = dataclasses.replace(adapter, **changes)
    after = before.truncated(new)
    ratio = after.scaling(dataclasses.replace(site, rank=new)) / before.scaling(
        dataclasses.replace(site, rank=old)
    )
    return new, getattr(after, "alpha", None), ratio


def _cut_rank(x: jax.Array, axes: tuple[str | None, ...], rank: int) -> jax.Array:
    """`x (..., axes)` with the first `rank` entries along the axes that are the rank."""
    for i, axis in enumerate(axes):
        if axis == "rank":
            x = jax.lax.slice_in_dim(x, 0, rank, axis=x.ndim - len(axes) + i)
    return x


def candidates(adaptations: Mapping[str, Adaptation]) -> Adaptation:
    """Adaptations among which each row of a batch chooses, by `ids=` of `lrx.attach`; PEFT's
    `adapter_names=`.

    Their arrays are stacked along an axis behind the batch axes of a leaf (in front, where a group
    shares), their ranks padded to the largest. They may adapt different leaves: where one adapts
    none, its arrays are zeros and its rows see the base. Row i of the host's input takes candidate
    `ids[i]`, and the base alone where that is -1. All candidates can train at once: `train` holds
    them all.

    Args:
      adaptations: by name; the order of the dict is the order of the numbers, see `candidate_ids`.

    Raises:
      ValueError: without any; naming everything that differs but what is in the arrays alone (rank,
        alpha, start); for leaves trained in full, of which there is one for all rows.

    >>> import jax, jax.numpy as jnp
    >>> import lowrank_jax as lrx
    >>> params = {"kernel": jnp.ones((4, 6))}
    >>> one, two = (lrx.adapt(params, lrx.adapters.lora(rank=r), jax.random.key(r)) for r in (2, 3))
    >>> both = candidates({"one": one, "two": two})
    >>> both.train["sites"]["kernel"]["a"].shape
    (2, 4, 3)
    >>> adapted = lrx.attach(params, both, ids=candidate_ids(both, ["two", None, "one"]))
    >>> lrx.matmul(jnp.ones((3, 4)), adapted["kernel"]).shape
    (3, 6)
    """
    if not adaptations:
        raise ValueError("candidates: there is no adaptation to choose from")
    for name, one in adaptations.items():
        layout = one.layout
        if layout.trainable or layout.candidates:
            what = "it holds candidates itself"
            if layout.trainable:
                what = f"leaves {layout.trainable} are trained in full"
            raise ValueError(f"candidates: {name!r} cannot be chosen by rows: {what}")
    adaptations = _united(adaptations)
    even = _of_one_shape(adaptations)
    layout = even[0].layout
    matrices = _interleaved([dict(one.matrices) for one in adaptations.values()])
    lead = {site.path: len(site.lead) for site in layout.sites}
    train = _stacked([one.train for one in even], lead) | {"trainable": {}}
    frozen = _stacked([one.frozen for one in even], lead)
    layout = dataclasses.replace(layout, name="candidates", candidates=tuple(adaptations))
    return Adaptation(train, frozen, layout, matrices)


def _of_one_shape(adaptations: Mapping[str, Adaptation]) -> list[Adaptation]:
    """The adaptations with ranks padded to the largest; ValueError where more than ranks differs."""
    (head, first), *rest = adaptations.items()
    for name, one in rest:
        problems = _differences(first, one, head, name)
        if problems:
            raise ValueError(
                f"candidates: {head!r} and {name!r} do not stand in one program: "
                + "; ".join(problems)
            )
    # leaves of a group share arrays, and so one rank
    largest: dict[str, int] = {}
    for one in adaptations.values():
        for site in one.layout.sites:
            _, own = first.layout.by_path[site.path]
            largest[own.group] = max(largest.get(own.group, 0), site.rank)
    ranks = {site.path: largest[site.group] for site in first.layout.sites}
    even = [_padded(one, ranks) for one in adaptations.values()]

    shared = [(one.train["shared"], one.frozen["shared"]) for one in even]
    shapes = {str(jax.tree.map(jnp.shape, arrays)) for arrays in shared}
    if len(shapes) > 1:
        raise ValueError(
            f"candidates: what their groups share has shapes {' and '.join(sorted(shapes))}; adapt "
            "the same leaves, or give leaves that only some adapt a group= of their own"
        )
    return even


def _stacked(trees: list[dict[str, Pytree]], lead: Mapping[str, int]) -> dict[str, Pytree]:
    """Shared arrays `(candidates, ...)`, those of sites `(batch..., candidates, ...)`."""
    shared = jax.tree.map(lambda *xs: jnp.stack(xs), *(tree["shared"] for tree in trees))
    sites: dict[str, Pytree] = {}
    for path, axis in lead.items():
        if path in trees[0]["sites"]:
            own = [tree["sites"][path] for tree in trees]
            sites[path] = {key: jnp.stack([one[key] for one in own], axis=axis) for key in own[0]}
    return {"shared": shared, "sites": sites}


def _interleaved(own: list[dict[str, Matrices]]) -> tuple[tuple[str, Matrices], ...]:
    """Ranks and alphas of a leaf's matrices, those of all candidates for each matrix."""

    def of(path: str, field: str) -> tuple[Any, ...]:
        columns = zip(*(getattr(each[path], field) for each in own), strict=True)
        return tuple(value for column in columns for value in column)

    return tuple(
        (path, Matrices(ranks=of(path, "ranks"), alphas=of(path, "alphas"))) for path in own[0]
    )


def _united(adaptations: Mapping[str, Adaptation]) -> dict[str, Adaptation]:
    """The adaptations on the leaves of all of them: zeros, and a scale of 0, where one did not
    adapt a leaf."""
    donors: dict[str, Adaptation] = {}
    for one in adaptations.values():
        donors |= {path: one for path in one.layout.by_path if path not in donors}
    return {name: _widened(one, donors) for name, one in adaptations.items()}


def _widened(one: Adaptation, donors: Mapping[str, Adaptation]) -> Adaptation:
    """The adaptation with leaves of others, off."""
    found = {
        path: one.layout.by_path.get(path) or donor.layout.by_path[path]
        for path, donor in donors.items()
    }
    trees = {name: {part: dict(own) for part, own in getattr(one, name).items()} for name in TREES}
    matrices = dict(one.matrices)
    for path, donor in donors.items():
        if path in one.layout.by_path:
            continue
        count, group = found[path][1].count, found[path][1].group
        matrices[path] = Matrices(ranks=(0,) * count, alphas=(None,) * count)
        for name, tree in trees.items():
            given = getattr(donor, name)
            for part, key in (("sites", path), ("shared", group)):
                if key in given[part]:
                    tree[part].setdefault(key, jax.tree.map(jnp.zeros_like, given[part][key]))
    order = [
        *one.layout.order,
        *(
            entry
            for path, donor in donors.items()
            if path not in one.layout.by_path
            for entry in donor.layout.order
            if entry[0] == path
        ),
    ]
    adapters, sites = zip(*found.values(), strict=True)
    layout = dataclasses.replace(one.layout, adapters=adapters, sites=sites, order=tuple(order))
    return one.replace(
        layout=layout, matrices=tuple((path, matrices[path]) for path in found), **trees
    )


def candidate_ids(adaptation: Adaptation, names: Any) -> jax.Array:
    """`ids` for `lrx.attach`: the number of each name among the candidates, -1 for None, the base.

    Raises:
      ValueError: for a name that is not among them.

    >>> import jax, jax.numpy as jnp
    >>> import lowrank_jax as lrx
    >>> one = lrx.adapt({"kernel": jnp.ones((4, 6))}, lrx.adapters.lora(rank=2), jax.random.key(0))
    >>> candidate_ids(candidates({"a": one, "b": one}), ["b", None]).tolist()
    [1, -1]
    """
    known = adaptation.layout.candidates
    missing = [name for name in names if name is not None and name not in known]
    if missing:
        raise ValueError(f"{missing} are not among the candidates {known}; None is the base")
    return jnp.asarray([-1 if name is None else known.index(name) for name in names], jnp.int32)


def hot_swap(old: Adaptation, new: Adaptation) -> Adaptation:
    """`new` in the place of `old` without recompiling: its arrays, in the static layout, the dtypes
    and places of `old`.

    Ranks are padded to those of `old`, alphas are in `scale`; sites that `new` does not adapt are
    off. Attached, the result is `new`; its printed report is that of `old`, which is part of the
    compiled program.

    Raises:
      ValueError: listing all that does not fit: sites, or leaves trained in full, that only one of them has,
        larger ranks, other views, families, options or arrays.

    >>> import jax, jax.numpy as jnp
    >>> import lowrank_jax as lrx
    >>> params = {"kernel": jnp.ones((4, 6))}
    >>> room = padded(lrx.adapt(params, lrx.adapters.lora(rank=2), jax.random.key(0)), 8)
    >>> swapped = hot_swap(
    ...     room, lrx.adapt(params, lrx.adapters.lora(rank=4, alpha=16), jax.random.key(1))
    ... )
    >>> swapped.layout == room.layout, swapped.frozen["sites"]["kernel"]["scale"].tolist()
    (True, [4.0, 4.0, 4.0, 4.0, 0.0, 0.0, 0.0, 0.0])
    """
    problems = _differences(old, new, "old", "new", fewer=True)
    mine, theirs = set(old.layout.trainable), set(new.layout.trainable)
    if mine != theirs:
        problems.append(
            f"leaves {sorted(mine ^ theirs)} are trained in full by one of them alone; name them for "
            "both"
        )
    room = {site.path: site.rank for site in old.layout.sites}
    for site in new.layout.sites:
        if site.rank > room.get(site.path, site.rank):
            problems.append(
                f"{site.path!r}: rank {site.rank} exceeds {room[site.path]}; pad the old one by "
                f"lrx.adapters.padded(old, {site.rank}) before it is compiled, or compress the new "
                "one by lrx.to_lora"
            )
    if problems:
        raise ValueError("hot_swap: the new adaptation does not fit: " + "; ".join(problems))
    even = _padded(new, {path: rank for path, rank in room.items() if path in new.layout.by_path})
    # arrays of the new one in the structure of the old one
    trees = {}
    for name in TREES:
        mine, theirs = getattr(old, name), getattr(even, name)
        sites = {
            path: {
                key: _like(theirs["sites"].get(path, {}).get(key, 0), x) for key, x in own.items()
            }
            for path, own in mine["sites"].items()
        }
        rest = {
            part: jax.tree.map(_like, theirs[part], mine[part]) for part in mine if part != "sites"
        }
        trees[name] = rest | {"sites": sites}
    return old.replace(train=trees["train"], frozen=trees["frozen"])


def _like(x: Any, old: jax.Array) -> jax.Array:
    """`x` in the dtype of `old`, and where `old` was put, so that a compiled program takes it."""
    x = jnp.broadcast_to(jnp.asarray(x, old.dtype), old.shape)
    concrete = not isinstance(x, jax.core.Tracer) and not isinstance(old, jax.core.Tracer)
    return jax.device_put(x, old.sharding) if concrete and old.committed else x


def _differences(
    one: Adaptation, other: Adaptation, first: str, second: str, fewer: bool = False
) -> list[str]:
    """What keeps two adaptations out of one program; with `fewer` the second may adapt fewer
    leaves."""
    mine, theirs = one.layout.by_path, other.layout.by_path
    lacking = [(first, [path for path in theirs if path not in mine])]
    lacking += [] if fewer else [(second, [path for path in mine if path not in theirs])]
    found = [
        f"{name!r} does not adapt {paths}; give it these sites" for name, paths in lacking if paths
    ]
    if one.layout.candidates != other.layout.candidates:
        found.append(f"their candidates are {one.layout.candidates} and {other.layout.candidates}")
    for path in mine:
        if path not in theirs:
            continue
        (adapter, site), (with_adapter, with_site) = mine[path], theirs[path]
        for field in ("shape", "view", "lookup", "uses"):
            if getattr(site, field) != getattr(with_site, field):
                found.append(
                    f"{path!r}: {field} is {getattr(site, field)} and {getattr(with_site, field)}"
                )
        if adapter.reads_bank and site.bank != with_site.bank:
            banks = f"{site.bank} and {with_site.bank}"
            found.append(f"{path!r}: the group's largest matrix is {banks}; adapt the same leaves")
        found += [f"{path!r}: {text}" for text in _other_options(adapter, with_adapter)]
        for tree in TREES:
            parts = [getattr(each, tree) for each in (one, other)]
            names = [sorted(part["sites"].get(path, {})) for part in parts]
            shared = [
                {site.group: sorted(part["shared"].get(site.group, {}))}
                for part, site in zip(parts, (site, with_site), strict=True)
            ]
            if names[0] != names[1]:
                found.append(
                    f"{path!r}: arrays are {names[0]} and {names[1]}; lrx.to_lora makes plain "
                    "pairs of both"
                )
            if shared[0] != shared[1] and any(any(each.values()) for each in shared):
                found.append(
                    f"{path!r}: shared arrays are {shared[0]} and {shared[1]}; share in the same "
                    "groups"
                )
    return found


def _other_options(one: Adapter, other: Adapter) -> list[str]:
    """Options in which two adapters differ, but for those that are in the arrays alone."""
    if type(one) is not type(other):
        return [f"the adapter is {type(one).__name__} and {type(other).__name__}"]
    fields = [field.name for field in dataclasses.fields(one) if field.name != "group"]
    # a rank that `scale` does not mask fixes shapes
    alike = one.in_arrays if one.ranked else set(one.in_arrays) - {"rank"}
    values = [
        (name, getattr(one, name), getattr(other, name)) for name in fields if name not in alike
    ]
    return [
        f"{name} is {value!r} and {with_value!r}"
        for name, value, with_value in values
        if value != with_value
    ]
