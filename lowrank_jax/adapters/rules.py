"""Which leaves are adapted, how, and at which rank: ordered rules, and the layout that they make."""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lowrank_jax.adapters.base import Adapter, Group, Site
from lowrank_jax.checks import as_python, listed, no_match
from lowrank_jax.kernel_node import USES
from lowrank_jax.reprs import Short
from lowrank_jax.resolution import LeafViews, Views, is_linear, is_stacked
from lowrank_jax.trees import is_quantized, leaves_with_metadata
from lowrank_jax.typing import Kernel, Pytree

ALL_LINEAR = "all-linear"
BIASES = ("none", "adapted", "all")
LAYER_IN_PATH = r"(?:.*/)?(?:layers?|blocks?|h)[_/](\d+)(?:/.*)?"
Rules = Adapter | Mapping[str, Adapter | None] | Iterable[tuple[str, Adapter | None]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout(Short):
    """What an adaptation does, without any array: static under jit.

    Attributes:
      name: of the adaptation; it enters the keys of what is random and of initialisers.
      sites: the adapted leaves.
      adapters: of each site, with its own rank.
      trainable: paths of leaves that are trained in full, without an adapter.
      order: `((path, index), ...)` of all matrices; part of a checkpoint where adapters share
        (Uni-LoRA).
      total: parameters of the tree.
      candidates: names of the adaptations among which rows choose, in their order; () where there
        is no choice.
    """

    name: str
    sites: tuple[Site, ...]
    adapters: tuple[Adapter, ...]
    trainable: tuple[str, ...]
    order: tuple[tuple[str, int], ...]
    total: int
    candidates: tuple[str, ...] = ()

    @property
    def by_path(self) -> dict[str, tuple[Adapter, Site]]:
        """`{path: (adapter, site)}`."""
        return {
            site.path: (adapter, site)
            for adapter, site in zip(self.adapters, self.sites, strict=True)
        }

    @property
    def groups(self) -> dict[str, tuple[Adapter, Group]]:
        """`{group: (adapter, its sites)}`, in the order of first appearance."""
        found: dict[str, tuple[Adapter, dict[str, Site]]] = {}
        for adapter, site in zip(self.adapters, self.sites, strict=True):
            found.setdefault(site.group, (adapter, {}))[1][site.path] = site
        return {
            name: (
                adapter,
                Group(sites=sites, order=tuple(entry for entry in self.order if entry[0] in sites)),
            )
            for name, (adapter, sites) in found.items()
        }

    def check_uses(self, reason: str) -> None:
        """ValueError, naming the leaves, where adapters act on some products only."""
        limited = {site.path: site.uses for site in self.sites if site.uses}
        if limited:
            raise ValueError(
                f"{self.name!r} adapts leaves at some of their uses only, {limited}, and {reason}: "
                "attach it instead, or give the other use a leaf of its own (a model whose output "
                "layer is not tied, its kernel a copy of the transposed table) and adapt that tree "
                "without uses; of a PEFT file for a model whose output layer shares no table, read "
                "it by lrx.interop.peft.load(..., head=None)"
            )

    def banked(self) -> Layout:
        """The layout, its sites told the largest matrix of their group."""
        banks = {group: of.bank for group, (_, of) in self.groups.items()}
        return dataclasses.replace(
            self,
            sites=tuple(dataclasses.replace(site, bank=banks[site.group]) for site in self.sites),
        )


@dataclasses.dataclass(frozen=True)
class Matrices:
    """The rank and the alpha of each matrix of a site; rank 0 is a matrix that is left out."""

    ranks: tuple[int, ...]
    alphas: tuple[float | None, ...]

    def scale(self, adapter: Adapter, site: Site) -> jax.Array:
        """The frozen `scale` of a site: of each matrix its scaling, over the r entries of its own
        rank and 0 beyond."""
        rows = []
        for rank, alpha in zip(self.ranks, self.alphas, strict=True):
            own = adapter if alpha is None else dataclasses.replace(adapter, alpha=alpha)  # type: ignore[call-arg]
            at_rank = dataclasses.replace(site, rank=rank) if adapter.ranked else site
            value = own.scaling(at_rank) if rank else 0.0
            rows.append([value] * rank + [0.0] * (site.rank - rank) if adapter.ranked else value)
        return jnp.asarray(rows, jnp.float32).reshape(
            *site.lead, *((site.rank,) if adapter.ranked else ())
        )

    def trained(self, adapter: Adapter, site: Site) -> int:
        """Trained numbers of the site, padding and what is shared aside."""
        alike = collections.Counter(rank for rank in self.ranks if rank)
        return sum(
            count * adapter.count(dataclasses.replace(site, rank=rank))
            for rank, count in alike.items()
        )


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One leaf of the parameter tree, as the rules see it."""

    path: str
    node: Kernel
    names: tuple[str | None, ...] | None

    @property
    def size(self) -> int:
        return math.prod(self.node.shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Selection:
    """The options of `lrx.adapt` that choose leaves and ranks; they are described there."""

    rules: Any
    exclude: Any = ()
    layers: tuple[int, ...] | None = None
    layers_pattern: str = LAYER_IN_PATH
    ranks: Any = ()
    alphas: Any = ()
    trainable: Any = ()
    bias: str = "none"
    uses: Any = ()
    views: Views = Views()
    order: tuple[tuple[str, int], ...] | None = None
    bounded: bool = True  # whether ranks beyond a family's largest are refused

    def __post_init__(self):
        if self.bias not in BIASES:
            raise ValueError(f"bias={self.bias!r} must be one of {BIASES}")
        rules = ((ALL_LINEAR, self.rules),) if isinstance(self.rules, Adapter) else self.rules
        for field, value in (
            ("rules", rules),
            ("ranks", self.ranks),
            ("alphas", self.alphas),
            ("uses", self.uses),
        ):
            object.__setattr__(
                self, field, tuple(value.items()) if isinstance(value, Mapping) else tuple(value)
            )
        for field in ("exclude", "trainable"):
            value = getattr(self, field)
            object.__setattr__(self, field, (value,) if isinstance(value, str) else tuple(value))
        for pattern, adapter in self.rules:
            if adapter is not None and not isinstance(adapter, Adapter):
                raise ValueError(
                    f"rule {pattern!r}: {adapter!r} is neither an adapter such as lora(rank=8) nor "
                    "None"
                )
        for pattern, products in self.uses:
            if isinstance(products, str) or not products or set(products) - set(USES):
                raise ValueError(
                    f"uses: {pattern!r} names {products!r}; give a tuple out of {USES}"
                )
        mappings = ("rules", "ranks", "alphas", "uses")
        named = [(field, pattern) for field in mappings for pattern, _ in getattr(self, field)]
        named += [
            (field, pattern)
            for field in ("exclude", "trainable")
            for pattern in getattr(self, field)
        ]
        for field, pattern in [*named, ("layers_pattern", self.layers_pattern)]:
            try:
                groups = re.compile(pattern).groups
            except re.error as error:
                raise ValueError(
                    f"{field}: {pattern!r} is not a regular expression: {error}"
                ) from None
            if field == "layers_pattern" and not groups:
                raise ValueError(
                    f"layers_pattern={pattern!r} has no group; put the layer's number in one, as "
                    "(\\d+)"
                )

    def layout(self, params: Pytree, name: str) -> tuple[Layout, dict[str, Matrices]]:
        """The layout, and what the ranks of each site are; ValueError for rules that do not fit the
        tree."""
        found = leaves_with_metadata(params)
        leaves = [Leaf(*entry) for entry in found if not isinstance(entry[1], optax.MaskedNode)]
        used: set[str] = set()
        leaf_views = LeafViews(self.views, params)
        sites, adapters, matrices = [], [], {}
        groups: dict[Adapter, str] = {}
        for leaf in leaves:
            chosen = self._adapter_of(leaf, used)
            site = None if chosen is None else self._site_of(leaf, leaf_views, used)
            if chosen is None or site is None:
                continue
            own = self._matrices_of(chosen, site, leaf, used)
            if not any(own.ranks):
                continue
            adapter = _at_rank(chosen, max(own.ranks))
            if chosen not in groups:
                groups[chosen] = _group_of(chosen, groups)
            rank = max(own.ranks) if adapter.ranked else 0
            sites.append(dataclasses.replace(site, rank=rank, group=groups[chosen]))
            adapters.append(adapter)
            matrices[site.path] = own
        leaf_views.check()
        self._check_used(used, leaves)
        trainable = self._trainable(leaves, {site.path for site in sites})
        if not sites and not trainable:
            paths = listed([leaf.path for leaf in leaves])
            raise ValueError(f"nothing is adapted and nothing trained in full. Paths here: {paths}")
        layout = Layout(
            name=name,
            sites=tuple(sites),
            adapters=tuple(adapters),
            trainable=trainable,
            order=self._order(sites),
            total=sum(leaf.size for leaf in leaves),
        )
        layout = layout.banked()
        for adapter, site in zip(layout.adapters, layout.sites, strict=True):
            for rank in sorted(set(matrices[site.path].ranks) - {0}):
                one, at_rank = (
                    _at_rank(adapter, rank),
                    dataclasses.replace(site, rank=rank if adapter.ranked else 0),
                )
                one.validate(at_rank)
                if self.bounded:
                    one.check_rank(at_rank)
        return layout, matrices

    def _adapter_of(self, leaf: Leaf, used: set[str]) -> Adapter | None:
        excluded = [pattern for pattern in self.exclude if re.fullmatch(pattern, leaf.path)]
        used.update(excluded)
        if excluded:
            return None
        ndim = len(leaf.node.shape) - is_stacked(leaf.path, leaf.names, self.views)
        for pattern, adapter in self.rules:
            if (
                is_linear(leaf.path, ndim, self.views)[0]
                if pattern == ALL_LINEAR
                else re.fullmatch(pattern, leaf.path)
            ):
                used.add(pattern)
                return adapter
        return None

    def _site_of(self, leaf: Leaf, leaf_views: LeafViews, used: set[str]) -> Site | None:
        def take(path: str, ndim: int) -> tuple[bool, str]:
            if ndim < 2:
                raise ValueError(
                    f"a rule matches {path!r} of shape {tuple(leaf.node.shape)}, which is no "
                    "matrix; write the pattern of the kernel alone, or name the leaf in trainable="
                )
            return True, "rule"

        view, _ = leaf_views.of(leaf.path, take)
        if view is None:
            return None
        lookup, uses = leaf.path.rsplit("/", 1)[-1] == "embedding", ()
        for pattern, products in self.uses:
            if re.fullmatch(pattern, leaf.path):
                used.add(f"uses {pattern}")
                uses = tuple(products)
                break
        return Site(
            path=leaf.path, shape=tuple(leaf.node.shape), view=view, lookup=lookup, uses=uses
        )

    def _matrices_of(self, adapter: Adapter, site: Site, leaf: Leaf, used: set[str]) -> Matrices:
        """The ranks and alphas of the matrices of a leaf, 0 where the filter of layers leaves one
        out."""

        def chosen(rules: Any, field: str, default: Any) -> tuple[Any, ...]:
            for pattern, value in rules:
                if re.fullmatch(pattern, site.path):
                    used.add(f"{field} {pattern}")
                    if not hasattr(adapter, field):
                        raise ValueError(
                            f"{field}s: {pattern!r} matches {site.path!r}; {adapter.kind} has no "
                            f"{field}"
                        )
                    values = value if isinstance(value, (tuple, list)) else [value] * site.count
                    if len(values) != site.count:
                        raise ValueError(
                            f"{field}s: {pattern!r} gives {len(values)} for {site.count} of "
                            f"{site.path!r}"
                        )
                    return tuple(values)
            return (default,) * site.count

        ranks = tuple(map(as_python, chosen(self.ranks, "rank", getattr(adapter, "rank", 1))))
        alphas = tuple(map(as_python, chosen(self.alphas, "alpha", None)))
        if not adapter.ranked and len(set(ranks) - {0}) > 1:
            raise ValueError(
                f"ranks: {ranks} for {site.path!r}; those of {adapter.kind} cannot be padded, so "
                "the matrices of one stack have one rank"
            )
        if self.layers is None:
            return Matrices(ranks, alphas)
        if is_stacked(leaf.path, leaf.names, self.views):
            each = site.count // site.shape[0]
            numbers = [index // each for index in range(site.count)]
        else:
            match = re.fullmatch(self.layers_pattern, site.path)
            numbers = [int(match.group(1)) if match else -1] * site.count
        used.update(f"layer {number}" for number in numbers)
        return Matrices(
            tuple(r if n in self.layers else 0 for r, n in zip(ranks, numbers, strict=True)), alphas
        )

    def _trainable(self, leaves: list[Leaf], adapted: set[str]) -> tuple[str, ...]:
        found = []
        for leaf in leaves:
            is_bias = leaf.path.rsplit("/", 1)[-1] == "bias"
            beside = any(
                path.rpartition("/")[0] == leaf.path.rpartition("/")[0] for path in adapted
            )
            trained = is_bias and (self.bias == "all" or (self.bias == "adapted" and beside))
            if not trained and not any(
                re.fullmatch(pattern, leaf.path) for pattern in self.trainable
            ):
                continue
            if leaf.path in adapted:
                raise ValueError(
                    f"{leaf.path!r} is adapted and trained in full; choose one, or leave it out by "
                    "exclude="
                )
            if is_quantized(leaf.node):
                raise ValueError(
                    f"trainable: {leaf.path!r} is quantised, and codes do not train; give it an adapter"
                )
            found.append(leaf.path)
        return tuple(found)

    def _check_used(self, used: set[str], leaves: list[Leaf]) -> None:
        """ValueError for a pattern that matches nothing, with what it may have meant."""
        views = [
            *self.views.stacked,
            *(pattern for pattern, _ in self.views.rules),
        ]  # may be those of the whole model
        here = {
            p
            for p in (*self.trainable, *views)
            if any(re.fullmatch(p, leaf.path) for leaf in leaves)
        }
        fields = [
            ("rules", [pattern for pattern, _ in self.rules], used),
            ("exclude", self.exclude, used),
            ("trainable", self.trainable, here),
            ("views", views, here),
        ]
        for field, prefix in (("ranks", "rank "), ("alphas", "alpha "), ("uses", "uses ")):
            own = {entry.removeprefix(prefix) for entry in used if entry.startswith(prefix)}
            fields.append((field, [pattern for pattern, _ in getattr(self, field)], own))
        paths = [leaf.path for leaf in leaves]
        for field, patterns, matched in fields:
            for pattern in patterns:
                if pattern not in matched:
                    raise no_match(field, pattern, paths)
        layers = {entry.removeprefix("layer ") for entry in used if entry.startswith("layer ")} - {
            "-1"
        }
        missing = [number for number in self.layers or () if str(number) not in layers]
        if missing:
            raise ValueError(
                f"layers: no adapted leaf is of layer {missing}, only of "
                f"{sorted(layers, key=int)}; name stacked ones in Views(stacked=...); of others "
                f"layers_pattern={self.layers_pattern!r} finds the number in the path"
            )

    def _order(self, sites: list[Site]) -> tuple[tuple[str, int], ...]:
        """Layer by layer, in each the sites in the order of the tree; or the order that was
        given."""
        every = {(site.path, index): site for site in sites for index in range(site.count)}
        if self.order is not None:
            given = tuple((path, index) for path, index in self.order)
            if sorted(given) != sorted(every):
                raise ValueError(
                    f"order: names {len(given)} matrices, the adapted ones are "
                    f"{sorted(every)[:6]}, ..."
                )
            return given

        def layer(entry: tuple[str, int]) -> tuple[int, int]:
            site = every[entry]
            match = re.fullmatch(self.layers_pattern, site.path)
            number = int(match.group(1)) if match else -1
            if site.lead and not match:
                number = entry[1] * site.lead[0] // site.count
            return number, sites.index(site)

        return tuple(sorted(every, key=lambda entry: (*layer(entry), entry[1])))


def _at_rank(adapter: Any, rank: int) -> Any:
    """The adapter with another rank, if it has one."""
    return dataclasses.replace(adapter, rank=rank) if hasattr(adapter, "rank") else adapter


def _group_of(adapter: Adapter, groups: Mapping[Adapter, str]) -> str:
    """The name of the group of an adapter that is new; ValueError where its name is that of another
    kind of adapter."""
    if not adapter.group:
        taken = sum(type(other) is type(adapter) for other in groups)
        return adapter.kind + (f"_{taken}" if taken else "")
    plain = lambda one: dataclasses.replace(_at_rank(one, 1), group="")  # noqa: E731
    for other, name in groups.items():
        if name == adapter.group and (
            type(other) is not type(adapter) or plain(other) != plain(adapter)
        ):
            raise ValueError(
                f"group={name!r} holds {other}, with which {adapter} cannot share: within a group "
                "only ranks differ; give one of them another group"
            )
    return adapter.group


def chosen_rows(plans: Iterable[Layout], ids: Any) -> jax.Array | None:
    """`ids` as an array; ValueError where rows must choose among candidates and do not, or where
    there are none."""
    names = [name for layout in plans for name in layout.candidates]
    if names and ids is None:
        raise ValueError(
            f"each row of a batch chooses among the candidates {names}: pass ids= to attach; where "
            "there is no batch, give one of the adaptations that they were made of"
        )
    if ids is not None and not names:
        raise ValueError(
            "ids choose among candidates, and no active adaptation has any; see "
            "lrx.adapters.candidates"
        )
    return None if ids is None else jnp.asarray(ids)
