"""From an adaptation to a PEFT folder: one method, one matrix after the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np

from lowrank_jax.adapters.adaptation import Adaptation
from lowrank_jax.adapters.base import Adapter, Arrays, Site
from lowrank_jax.interop._peft_config import INFORMATION
from lowrank_jax.interop._peft_families import FAMILIES
from lowrank_jax.interop._peft_family import Family
from lowrank_jax.interop._torch_layout import Place, Tree


def family_of(adaptation: Adaptation, options: Collection[str]) -> Family:
    """The family of all adapters; ValueError for several, for candidates, and for fields that are
    not the caller's."""
    if adaptation.layout.candidates:
        raise ValueError(
            f"rows choose among {adaptation.layout.candidates} here: save each of the adaptations by "
            "itself"
        )
    kinds = {type(adapter) for adapter in adaptation.layout.adapters}
    found = [family for family in FAMILIES.values() if kinds and kinds <= set(family.adapters)]
    if not found:
        known = ", ".join(
            kind.__name__.lower() for family in FAMILIES.values() for kind in family.adapters
        )
        have = sorted(kind.__name__.lower() for kind in kinds)
        raise ValueError(
            f"the adaptation has adapters {have}; a PEFT file holds those of one method, out of "
            f"{known}"
        )
    (family,), allowed = found, (INFORMATION - {"peft_type"}) | found[0].options
    wrong = sorted(set(options) - allowed)
    if wrong:
        raise ValueError(
            f"{wrong} follow from the adaptation or mean nothing to {family.peft_type}; yours may "
            f"be {sorted(allowed)}"
        )
    return family


def check_site(family: Family, tree: Tree, site: Site) -> None:
    """ValueError unless the tree has the site, sees it alike, and PEFT has the method for its kind
    of module."""
    if site.path not in tree.leaves or tuple(tree.leaves[site.path].shape) != site.shape:
        raise ValueError(
            f"adapted leaf {site.path!r}, {site.shape}, is missing or of another shape in params"
        )
    if tree.views[site.path] != site.view:
        raise ValueError(
            f"views: {site.path!r} is {tree.views[site.path]}, adapted as {site.view}; give the "
            "same"
        )
    host = tree.host(site.path)
    if not family.sits_on(host):
        raise ValueError(
            f"{site.path!r}: PEFT's {family.peft_type} does not adapt such a module ({host.kind})"
        )


def matrices(
    adaptation: Adaptation, tree: Tree, adapter: Adapter, site: Site
) -> Iterator[tuple[Place, Adapter, Arrays, Any]]:
    """`(place, its own adapter, its arrays, what its scale holds beyond the adapter's scaling or
    None)`."""
    arrays = {
        name: np.asarray(array)
        for name, array in adaptation.arrays(site.path).items()
        if name != "shared"
    }
    flat = {
        name: array.reshape(site.count, *array.shape[len(site.lead) :])
        for name, array in arrays.items()
    }
    own = dict(adaptation.matrices)[site.path]
    for place, rank, alpha in zip(tree.at(site.path), own.ranks, own.alphas, strict=True):
        if rank == 0:
            continue
        p = {name: array[place.number] for name, array in flat.items()}
        changes: dict[str, Any] = {"rank": rank} if hasattr(adapter, "rank") else {}
        mine = dataclasses.replace(adapter, **changes | ({} if alpha is None else {"alpha": alpha}))
        scale = p.pop("scale")
        at_rank = dataclasses.replace(site, rank=rank) if adapter.ranked else site
        nominal = np.float32(mine.scaling(at_rank))
        scale = scale[:rank] if adapter.ranked else scale
        if not np.any(scale):
            raise ValueError(
                f"{place.module!r} is switched off by its scale, which no PEFT file can say: "
                "switch it on"
            )
        yield place, mine, p, None if np.all(scale == nominal) else scale / nominal


def shared_arrays(adaptation: Adaptation) -> Arrays:
    """The arrays of the one group that shares, if any; ValueError for several."""
    groups = {*adaptation.train["shared"], *adaptation.frozen["shared"]}
    if len(groups) > 1:
        raise ValueError(
            f"group: {sorted(groups)} share apart; in a PEFT file all modules share: save them one "
            "by one"
        )
    found: Arrays = {}
    for group in groups:
        found = adaptation.frozen["shared"].get(group, {}) | adaptation.train["shared"].get(
            group, {}
        )
    return {name: np.asarray(array) for name, array in found.items()}
