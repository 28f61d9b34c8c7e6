"""Leaves that train as they are, in PEFT's words: `modules_to_save`, and `bias`.

A module of `modules_to_save` is stored with all its parameters, under its own name. Biases beside
adapted modules are `<module>.base_layer.bias`. `bias="all"` stores every bias, those of saved
modules three times.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from lowrank_jax.interop._peft_config import PREFIX, is_whole
from lowrank_jax.interop._torch_layout import Tree


@dataclasses.dataclass(frozen=True)
class Found:
    """What a file holds beside adapters.

    Attributes:
      keys: `{torch's name: key}` of the parameters that are trained in full.
      copies: `{key: torch's name}` of parameters of the base that PEFT wrote along.
      repeated: keys of further copies.
    """

    keys: dict[str, str]
    copies: dict[str, str]
    repeated: frozenset[str]


def find(config: Mapping[str, Any], bias: str, tree: Tree, adapted: Any, tensors: Any) -> Found:
    """What is trained in full. ValueError for a `bias` that the method lacks, and for some layers of
    a stack only."""
    mode = config.get("bias") or "none"
    if mode not in {"none", "all", bias}:
        raise ValueError(f"bias={mode!r} must be 'none', 'all' or {bias!r}")
    keys: dict[str, str] = {}
    for name, place in tree.places.items():
        beside = place.module in adapted
        if is_whole(config, place.module):
            keys[name] = PREFIX + name
        elif place.leaf == "bias" and (mode == "all" or (mode != "none" and beside)):
            keys[name] = _base(name) if beside and PREFIX + name not in tensors else PREFIX + name
    check_orientation(config, tree, keys)
    whole = {tree.places[name].path for name in keys}
    parts = [path for path in whole if not all(place.name in keys for place in tree.at(path))]
    if parts:
        raise ValueError(
            f"{sorted(parts)}: some layers of these stacks train in full; load it onto single layers"
        )
    copies = {
        key: name
        for name in tree.places
        for key in (PREFIX + name, _base(name))
        if name not in keys
    }
    repeated = {
        _inside(name, part) for name in keys for part in ("original_module", "modules_to_save")
    }
    repeated = repeated if mode == "all" else set()
    return Found(
        keys, {k: n for k, n in copies.items() if k in tensors}, frozenset(repeated & set(tensors))
    )


def check_orientation(config: Mapping[str, Any], tree: Tree, names: Iterable[str]) -> None:
    """ValueError for a square weight of which nothing says whether torch stores it transposed."""
    places = [tree.places[name] for name in names] if config.get("fan_in_fan_out") else []
    shapes = {
        place.name: tree.shape(place)
        for place in places
        if tree.is_matrix(place) and place.leaf == "kernel"
    }
    square = [name for name, (rows, *cols) in shapes.items() if cols == [rows]]
    if square:
        raise ValueError(
            f"fan_in_fan_out=True: nothing says whether the square {square} are transposed"
        )


def check_copies(found: Found, tree: Tree, tensors: Any) -> None:
    """ValueError where the base that PEFT wrote along is not the one that is given."""
    wrong = []
    for key, name in found.copies.items():
        place = tree.places[name]
        own = tree.parameter(place, tree.leaves[place.path])
        theirs = np.asarray(tensors[key]).astype(own.dtype)
        if theirs.shape != own.shape or not np.array_equal(theirs, own):
            wrong.append(f"{key} {theirs.shape}")
    if wrong:
        raise ValueError(
            "the file holds parameters of its base that differ from those of params: "
            f"{', '.join(wrong)}"
        )


def write(
    whole: Mapping[str, Any], bias: str, tree: Tree, adapted: Any, config: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """`(fields of the configuration, tensors)` of leaves that train in full.

    Raises:
      ValueError: the method has no `bias` in PEFT, or `modules_to_save` would take modules that do
        not train.
    """
    trained = {place.name: place for path in whole for place in tree.at(path)}
    beside = [place for place in trained.values() if place.module in adapted]
    wrong = [place.name for place in beside if place.leaf != "bias" or not bias]
    if wrong:
        raise ValueError(
            f"{wrong} belong to adapted modules, of which PEFT trains only biases, and not in all "
            "methods"
        )
    modules = {
        place.module
        for place in trained.values()
        if place.leaf != "bias" and place.module not in adapted
    }
    loose = {
        p.module
        for p in trained.values()
        if p.leaf == "bias" and p.module not in modules | set(adapted)
    }
    biases = [
        place
        for place in tree.places.values()
        if place.leaf == "bias" and place.module not in modules
    ]
    mode = bias if beside else "none"
    if loose and bias and all(place.name in trained for place in biases):
        mode = "all"
    else:
        modules |= loose
    fields: dict[str, Any] = {"modules_to_save": sorted(modules) or None} | (
        {"bias": mode} if bias else {}
    )
    more = {p.module for p in tree.places.values() if is_whole(fields, p.module)} - modules
    if more:
        raise ValueError(
            f"modules_to_save={sorted(modules)} would take {sorted(more)} too: train those as well"
        )
    check_orientation(
        config, tree, [name for name, place in tree.places.items() if place.module in modules]
    )
    tensors = {}
    for name, place in tree.places.items():
        takes = place.leaf == "bias" and (
            mode == "all" or (mode != "none" and place.module in adapted)
        )
        if place.module in modules or takes:
            leaf = whole.get(place.path, tree.leaves[place.path])
            tensors[_base(name) if place.module in adapted else PREFIX + name] = tree.parameter(
                place, leaf
            )
    return fields, tensors


def _base(name: str) -> str:
    return _inside(name, "base_layer")


def _inside(name: str, part: str) -> str:
    module, _, leaf = name.rpartition(".")
    return f"{PREFIX}{module}.{part}.{leaf}"
