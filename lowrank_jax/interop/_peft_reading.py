"""From a PEFT folder to an adaptation: what is targeted, whether the tensors are those, and where
they go."""

from __future__ import annotations

import dataclasses
import pathlib
import re
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from lowrank_jax.adapters.base import Adapter, Arrays, Site
from lowrank_jax.adapters.rules import Layout, Matrices, Selection
from lowrank_jax.adapters.tree import matrices_of
from lowrank_jax.interop import _peft_config, _peft_parameters, _peft_tied, _peft_whole, safetensors
from lowrank_jax.interop._peft_config import PREFIX
from lowrank_jax.interop._peft_families import FAMILIES
from lowrank_jax.interop._peft_family import Family, Shared
from lowrank_jax.interop._torch_layout import Host, Tree
from lowrank_jax.matrices import Shape
from lowrank_jax.resolution import Views
from lowrank_jax.typing import Kernel

TENSORS = "adapter_model.safetensors"


@dataclasses.dataclass(frozen=True)
class Source:
    """A folder, and the tree that it belongs to.

    Attributes:
      family, config: the method, and its configuration without what the caller ignores.
      tree: the base.
      tensors: of the file.
      hosts: `{module: its kind}` of the adapted modules, in the order of the tree.
      whole: what is trained in full.
      tied: what belongs to an output layer that shares a table.
    """

    family: Family
    config: dict[str, Any]
    tree: Tree
    tensors: safetensors.Reader | _peft_parameters.Opened
    hosts: dict[str, Host]
    whole: _peft_whole.Found
    tied: _peft_tied.Tied

    @classmethod
    def open(
        cls,
        folder: pathlib.Path,
        tree: Tree,
        ignore: Collection[str],
        head: str | None,
        order: Sequence[str] | None,
    ) -> Source:
        """With everything checked; the errors are those of `peft.load`."""
        config = {
            field: value
            for field, value in _peft_config.read(folder).items()
            if field not in ignore
        }
        family = _understood(config, folder / _peft_config.NAME)
        training = [
            text
            for text in _peft_config.of_training(config)
            if text.partition("=")[0] not in family.reads
        ]
        if training:
            warnings.warn(
                f"{folder / _peft_config.NAME}: {'; '.join(training)} change training alone and "
                "are passed over; ignore= says that you know",
                stacklevel=3,
            )
        if not (folder / TENSORS).is_file():
            hint = (
                "; convert adapter_model.bin to it"
                if (folder / "adapter_model.bin").is_file()
                else ""
            )
            raise FileNotFoundError(f"{folder / TENSORS} does not exist{hint}")
        tensors = _peft_parameters.opened(config, tree, safetensors.read(folder / TENSORS), order)
        tied = _peft_tied.find(config, family, tree, head, tensors)
        hosts = _targets(family, config, tree, tensors)
        whole = _peft_whole.find(config, family.bias, tree, hosts, tensors)
        _peft_tied.check_whole(tied, tree, whole.keys)
        whole = dataclasses.replace(whole, copies=whole.copies | _peft_tied.copies(tied, tree))
        source = cls(family, config, tree, tensors, hosts, whole, tied)
        source._check()
        return source

    def size_of(self, module: str) -> int:
        """r of a module, 0 of one that has no adapter."""
        if module not in self.hosts:
            return 0
        return self.family.stored_size(self.config, module, self.tensors.shapes)

    def shapes(self, module: str) -> dict[str, Shape]:
        """`{end of the key: shape}` of an adapted module."""
        return self.family.shapes(self.config, self.hosts[module], self.size_of(module))

    def _check(self) -> None:
        """ValueError for missing, unexpected and misshapen tensors, and for another base."""
        # by key of the file
        expected: dict[str, Shape] = dict(self.family.shared_shapes(self.config, self.hosts))
        for module in self.hosts:
            own = self.shapes(module).items()
            expected |= {f"{PREFIX}{module}.{end}": shape for end, shape in own}
        for name, key in self.whole.keys.items():
            expected[key] = self.tree.shape(self.tree.places[name])
        repeated = self._repeated()
        extra = {*self.whole.copies, *self.whole.repeated, *self.tied.keys, *repeated}
        found = [key for key in self.tensors if key not in extra]
        safetensors.check_names(found, list(expected), str(self.tensors.path))
        shapes = {key: tuple(self.tensors.shapes[key].shape) for key in expected}
        # compared after the names, since only tensors that are there have shapes
        shapes = {key: tuple(self.tensors.shapes[key].shape) for key in expected}
        differ_in_shape = [key for key, shape in expected.items() if shapes[key] != shape]
        wrong = [f"{key} is {shapes[key]}, not {expected[key]}" for key in differ_in_shape]
        if wrong:
            more = f", and {len(wrong) - 20} more" if len(wrong) > 20 else ""
            raise ValueError(f"{self.tensors.path}: {'; '.join(wrong[:20])}{more}")
        # copies of a shared tensor must be copies
        tensors = self.tensors
        pairs = repeated.items()
        differ = [key for key, of in pairs if not np.array_equal(tensors[key], tensors[of])]
        if differ:
            raise ValueError(
                f"{self.tensors.path}: {', '.join(differ[:8])} are not the shared tensors of the "
                "same name, of which all modules have one copy"
            )
        _peft_whole.check_copies(self.whole, self.tree, self.tensors)

    def _repeated(self) -> dict[str, str]:
        """`{key: key of the shared tensor}` of what the file holds once more for a module."""
        copies = self.family.copies(self.config)
        found: dict[str, str] = {}
        for module in self.hosts:
            found |= {f"{PREFIX}{module}.{end}": of for end, of in copies.items()}
        return {key: of for key, of in found.items() if key in self.tensors}

    def layout(
        self, views: Views, name: str, order: Sequence[str] | None
    ) -> tuple[Layout, dict[str, Matrices]]:
        """The layout, and the ranks and alphas of its matrices: 0 of layers of a stack that have no
        adapter."""
        places, family = self.tree.matrices, self.family
        # by path, the size of each matrix
        sizes: dict[str, list[int]] = {}
        for path in dict.fromkeys(places[module].path for module in self.hosts):
            sizes[path] = [self.size_of(place.module) for place in self.tree.at(path)]
        # by path, the adapter of the largest
        rules: dict[str, Adapter] = {}
        for path, own in sizes.items():
            rules[path] = family.make(self.config, self.tree.host(path), max(own))
        uneven = [path for path, own in sizes.items() if len({*own} - {0}) > 1]
        wrong = [path for path in uneven if not rules[path].ranked]
        if wrong:
            raise ValueError(
                f"{wrong}: the layers of a stack have one size in {family.peft_type}; load single "
                "layers"
            )
        tied = [places[module].path for module in self.tied.uses(self.hosts)]
        trainable = dict.fromkeys(self.tree.places[key].path for key in self.whole.keys)
        layout, matrices = Selection(
            rules={re.escape(path): adapter for path, adapter in rules.items()},
            views=_views_of(views, sizes),
            bounded=False,
            uses={re.escape(path): ("gather",) for path in tied},
            trainable=tuple(re.escape(path) for path in trainable),
            order=self._order(order, sizes) if order else None,
        ).layout(self.tree.params, name)
        # ranks and alphas are those of the file
        for path, own in sizes.items():
            matrices[path] = self._matrices(path, own, layout.by_path[path][0])
        return layout, matrices

    def _order(
        self, modules: Sequence[str], sizes: Mapping[str, list[int]]
    ) -> tuple[tuple[str, int], ...]:
        """`((path, index), ...)`: matrices of these modules first, then all others."""
        places = [self.tree.matrices[module] for module in modules]
        first = [(place.path, place.number) for place in places]
        every = [(path, number) for path, own in sizes.items() for number in range(len(own))]
        return tuple(dict.fromkeys([*first, *every]))

    def _matrices(self, path: str, sizes: list[int], adapter: Adapter) -> Matrices:
        """Ranks and alphas of the matrices of a leaf."""
        if adapter.ranked:
            ranks = tuple(sizes)
        else:
            rank = getattr(adapter, "rank", 1)
            ranks = tuple(rank * (size > 0) for size in sizes)
        # None for the adapter's own alpha
        default = getattr(adapter, "alpha", None)
        alphas = [self.family.alpha(self.config, place.module) for place in self.tree.at(path)]
        return Matrices(ranks, tuple(None if alpha == default else alpha for alpha in alphas))

    def arrays(self, site: Site, shared: Shared) -> tuple[Arrays, Arrays]:
        """`(trained, frozen)` arrays of a leaf, one matrix after the other."""
        found: list[tuple[Arrays, Arrays]] = []
        for place in self.tree.at(site.path):
            module, number = place.module, place.number
            if module not in self.hosts:
                found.append(({}, {}))
                continue
            host, alpha = self.hosts[module], self.family.alpha(self.config, module)
            adapter = self.family.make(self.config, host, self.size_of(module))
            if alpha is not None:
                adapter = dataclasses.replace(adapter, alpha=alpha)  # type: ignore[call-arg]
            ends = self.shapes(module)
            tensors = {end: as_float(self.tensors[f"{PREFIX}{module}.{end}"]) for end in ends}

            def kernel(host=host, number=number):
                matrices = matrices_of(self.tree.leaves[site.path], site)
                return matrices.reshape(-1, host.n, host.m)[number]

            train, frozen = self.family.read(adapter, host, tensors, kernel)
            found.append((train, frozen | dict(shared.modules.get(module, {}))))
        trained = _stacked([train for train, _ in found], site)
        return trained, _stacked([frozen for _, frozen in found], site)

    def leaf(self, path: str) -> Kernel:
        """A leaf that is trained in full."""
        keys = [self.whole.keys[place.name] for place in self.tree.at(path)]
        return self.tree.whole(path, [self.tensors[key] for key in keys])


def _views_of(views: Views, paths: Iterable[str]) -> Views:
    """The views without rules and stacks that name none of these leaves, which would be refused."""

    def is_used(pattern):
        return any(re.fullmatch(pattern, path) for path in paths)

    rules = tuple(rule for rule in views.rules if is_used(rule[0]))
    return dataclasses.replace(views, rules=rules, stacked=tuple(filter(is_used, views.stacked)))


def _understood(config: Mapping[str, Any], file: pathlib.Path) -> Family:
    """The family of a configuration; ValueError unless every field is understood."""
    kind = config["peft_type"]
    if kind not in FAMILIES:
        raise ValueError(
            f"{file}: peft_type={kind!r} is not supported; known are {', '.join(FAMILIES)}"
        )
    family = FAMILIES[kind]
    missing = [field for field in family.required if field not in config]
    if missing:
        raise ValueError(f"{file} lacks {', '.join(missing)}")
    wrong = family.problems(config) + _peft_config.unsupported(
        config, {*family.required, *family.reads, *family.free}
    )
    if wrong:
        raise ValueError(
            f"{file} sets what is not supported here: {'; '.join(wrong)}. ignore= passes over "
            "fields of which you know that they do not matter"
        )
    return family


def _targets(
    family: Family, config: Mapping[str, Any], tree: Tree, tensors: Mapping[str, Any]
) -> dict[str, Host]:
    """`{module: its kind}` of the adapted modules, in the order of the tree."""
    places = tree.matrices
    linear = {module: tree.is_linear(place.path) for module, place in places.items()}
    parts = [key.removeprefix(PREFIX).split(".") for key in tensors]
    present = {".".join(part[:end]) for part in parts for end in range(1, len(part))}
    hosts = {m: tree.host(places[m].path) for m in _peft_config.targeted(config, linear, present)}
    wrong = [
        f"{module} ({host.kind})" for module, host in hosts.items() if not family.sits_on(host)
    ]
    if wrong:
        raise ValueError(
            f"{family.peft_type} does not adapt modules of this kind: {', '.join(wrong)}"
        )
    return hosts


def _stacked(matrices: Sequence[Arrays], site: Site) -> Arrays:
    """Arrays with the batch axes of a leaf in front; smaller ranks are padded with zeros, as are
    layers left out."""
    stacked: Arrays = {}
    for name in next((own for own in matrices if own), {}):
        arrays = [np.asarray(own[name]) for own in matrices if own]
        shape = tuple(max(sizes) for sizes in zip(*(array.shape for array in arrays), strict=True))
        whole = np.zeros((len(matrices), *shape), arrays[0].dtype)
        for place, own in zip(whole, matrices, strict=True):
            if own:
                place[tuple(slice(size) for size in own[name].shape)] = own[name]
        stacked[name] = jnp.asarray(whole.reshape(*site.lead, *shape))
    return stacked


def as_float(array: np.ndarray) -> np.ndarray:
    """Any floating array as float32; indices as they are."""
    return array.astype(np.float32) if jnp.issubdtype(array.dtype, jnp.floating) else array
