"""An adaptation: what was decided for a tree of parameters, and the arrays of its adapters."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from lowrank_jax import deprecations
from lowrank_jax.adapters.rules import Layout, Matrices
from lowrank_jax.reprs import Short
from lowrank_jax.serialization import serializable
from lowrank_jax.typing import Pytree


@serializable
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adaptation(Short):
    """One set of adapters on one tree of parameters.

    Attributes:
      train: `{"shared": {group: arrays}, "sites": {path: arrays}, "trainable": {path: leaf}}`, what
        trains.
      frozen: `{"shared": ..., "sites": ...}` of the same layout: scales, index maps, banks, offsets.
      layout: static; what was decided.
      matrices: static; the ranks and alphas it was made with, by path, for reports and files.

    >>> import jax, jax.numpy as jnp
    >>> import lowrank_jax as lrx
    >>> params = {
    ...     "layers": {"q": {"kernel": jnp.ones((2, 8, 8))}},
    ...     "head": {"kernel": jnp.ones((8, 3))},
    ... }
    >>> views = lrx.Views(stacked=("layers/.*",))
    >>> print(
    ...     lrx.adapt(
    ...         params,
    ...         lrx.adapters.lora(rank=2),
    ...         jax.random.key(0),
    ...         views=views,
    ...         trainable="head/.*",
    ...     )
    ... )
    leaf             shape      adapter  rank  trained
    layers/q/kernel  (2, 8, 8)  lora     2     64
    head/kernel      (8, 3)     in full  -     24
    1 leaf adapted, 1 trained in full: 88 trained, 128 frozen of the model's 152 parameters (57.9 %)
    """

    train: dict[str, Pytree]
    frozen: dict[str, Pytree]
    layout: Layout = dataclasses.field(metadata={"static": True})
    matrices: tuple[tuple[str, Matrices], ...] = dataclasses.field(
        metadata={"static": True}, repr=False
    )

    fixed = deprecations.attribute("lrx.adapters.Adaptation", "fixed")
    plan = deprecations.attribute("lrx.adapters.Adaptation", "plan")

    @deprecations.options("lrx.adapters.Adaptation.replace")
    def replace(
        self,
        *,
        train: dict[str, Pytree] | None = None,
        frozen: dict[str, Pytree] | None = None,
        layout: Layout | None = None,
        matrices: tuple[tuple[str, Matrices], ...] | None = None,
    ) -> Adaptation:
        """A copy with other arrays: `adaptation.replace(train=train)`."""
        given = {"train": train, "frozen": frozen, "layout": layout, "matrices": matrices}
        changes = {name: value for name, value in given.items() if value is not None}
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    def arrays(self, path: str) -> dict[str, Any]:
        """All arrays of one site, those of its group under "shared"."""
        _, site = self.layout.by_path[path]
        shared = self.frozen["shared"].get(site.group, {}) | self.train["shared"].get(
            site.group, {}
        )
        return (
            self.frozen["sites"].get(path, {})
            | self.train["sites"].get(path, {})
            | {"shared": shared}
        )

    @property
    def trained(self) -> int:
        """How many numbers train; the padding of smaller ranks does not count."""
        found = self.layout.by_path
        sites = sum(own.trained(*found[path]) for path, own in self.matrices)
        shared = sum(adapter.shared_count(group) for adapter, group in self.layout.groups.values())
        shared *= max(len(self.layout.candidates), 1)
        return (
            sites
            + shared
            + sum(int(np.prod(leaf.shape)) for leaf in self.train["trainable"].values())
        )

    def __str__(self) -> str:
        rows = [("leaf", "shape", "adapter", "rank", "trained")]
        own = dict(self.matrices)
        for path, (adapter, site) in self.layout.by_path.items():
            ranks = sorted(set(own[path].ranks))
            rank = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
            rank = rank if hasattr(adapter, "rank") else "-"
            kind = f"{adapter.kind} at {', '.join(site.uses)}" if site.uses else adapter.kind
            rows.append(
                (path, str(site.shape), kind, rank, f"{own[path].trained(adapter, site):,}")
            )
        for name, (adapter, group) in self.layout.groups.items():
            if adapter.shared_count(group):
                rows.append(
                    (
                        f"(shared by {len(group.sites)})",
                        "",
                        name,
                        "-",
                        f"{adapter.shared_count(group):,}",
                    )
                )
        in_full = self.train["trainable"]
        for path, leaf in in_full.items():
            rows.append(
                (path, str(tuple(leaf.shape)), "in full", "-", f"{int(np.prod(leaf.shape)):,}")
            )
        widths = [max(len(row[i]) for row in rows) + 2 for i in range(4)]
        lines = [
            "".join(c.ljust(w) for c, w in zip(row, widths, strict=False)) + row[4] for row in rows
        ]
        untouched = self.layout.total - sum(int(np.prod(leaf.shape)) for leaf in in_full.values())
        count, sites = self.trained, len(self.layout.sites)
        lines.append(
            f"{sites} {'leaf' if sites == 1 else 'leaves'} adapted, {len(in_full)} trained in full: "
            f"{count:,} trained, {untouched:,} frozen of the model's {self.layout.total:,} parameters "
            f"({100 * count / self.layout.total:.3g} %)"
        )
        return "\n".join(line.rstrip() for line in lines)


Adaptations = Adaptation | Mapping[str, Adaptation]
