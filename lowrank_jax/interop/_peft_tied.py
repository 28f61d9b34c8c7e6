"""A table that is also the output layer: one leaf here, two modules in torch, and what PEFT does to
which.

Without `ensure_weight_tying` PEFT adapts the look-up alone, and what it trains in full
(`modules_to_save`) is a copy that only the look-up reads. With it, which LoRA alone has and only
for a table named `embed_tokens`, the output layer has the same adapter,
`lora_A = lora_embedding_Bᵀ` and `lora_B = lora_embedding_Aᵀ`, or the same copy; a file holds both.

A leaf says the first by `uses=("gather",)`, the second by nothing. A copy for the look-up alone,
and an output layer that is adapted by itself, want a leaf of their own.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from lowrank_jax.adapters.base import Site
from lowrank_jax.adapters.families.dora import Dora
from lowrank_jax.interop._peft_config import HEADS, PREFIX, by_pattern
from lowrank_jax.interop._peft_family import Family
from lowrank_jax.interop._torch_layout import Host, Place, Tree

FIELD = "ensure_weight_tying"
TABLE = "embed_tokens"  # the only table that PEFT ties
OUTPUTS = (*HEADS, "head")
POSITIONS = re.compile(r"wpe|pos|.*(position|pos_emb|token_type|relative_attention_bias).*")
PAIR = {"lora_A.weight": "lora_embedding_B", "lora_B.weight": "lora_embedding_A"}


def may_be_head(module: str) -> bool:
    """Whether an output layer can share a table: those of positions and of token types have no word
    to score.

    >>> (
    ...     may_be_head("transformer.wte"),
    ...     may_be_head("transformer.wpe"),
    ...     may_be_head("embeddings.token_type_embeddings"),
    ... )
    (True, False, False)
    """
    return not POSITIONS.fullmatch(module.rsplit(".", 1)[-1])


def _tables(tree: Tree) -> dict[str, Place]:
    """`{module: its place}` of the tables that an output layer can share."""
    return {
        m: place
        for m, place in tree.matrices.items()
        if place.leaf == "embedding" and may_be_head(m)
    }


def head_of(tree: Tree, head: str | None) -> str | None:
    """Torch's name of the output layer that shares a table; None where the tree has a kernel for
    it, or no table."""
    own = [module for module, place in tree.matrices.items() if place.leaf == "kernel"]
    if any(module == head or module.rsplit(".", 1)[-1] in OUTPUTS for module in own):
        return None
    return head if _tables(tree) else None


def untie(head: str, table: str) -> str:
    """The remedy where a leaf of its own is wanted."""
    return (
        f"give the output layer {head!r} a kernel of its own in params, the transposed table of "
        f"{table!r}, and the model an untied head; or head=None if no output layer shares this "
        "table"
    )


@dataclasses.dataclass(frozen=True)
class Tied:
    """What a file says about the output layer of a tree that has no leaf for it.

    Attributes:
      head: its name, or None where nothing is shared.
      keys: of its tensors.
      both: modules of tables whose adapter or copy it has too.
    """

    head: str | None
    keys: frozenset[str]
    both: frozenset[str]

    def uses(self, hosts: Mapping[str, Host]) -> Collection[str]:
        """The adapted tables of which only the look-up sees the adapter."""
        tables = [
            module
            for module, host in hosts.items()
            if host.kind == "embedding" and may_be_head(module)
        ]
        return [module for module in tables if self.head is not None and module not in self.both]


def find(
    config: Mapping[str, Any],
    family: Family,
    tree: Tree,
    head: str | None,
    tensors: Mapping[str, Any],
) -> Tied:
    """What belongs to the output layer; ValueError where it is adapted or trained in a way of its
    own."""
    name = head_of(tree, head)
    start = f"{PREFIX}{name}."
    keys = frozenset(key for key in tensors if name is not None and key.startswith(start))
    if name is None:
        return Tied(None, keys, frozenset())
    tables = list(_tables(tree))
    changed = sorted(keys - {start + "base_layer.weight"})
    if changed and not config.get(FIELD):
        raise ValueError(
            f"the file adapts or trains the output layer {name!r} by itself "
            f"({', '.join(changed)}), which in params is the table of "
            f"{' or '.join(map(repr, tables))}: {untie(name, tables[0])}"
        )
    if start + "lora_magnitude_vector" in keys:
        raise ValueError(
            f"{FIELD}=True with use_dora=True: {name!r} has magnitudes of its own, of the table's "
            f"rows, and the table those of its columns: {untie(name, tables[0])}"
        )
    both = [module for module in tables if _is_both(module, start, changed, tensors)]
    if changed and not both:
        raise ValueError(
            f"{', '.join(changed)}: not both transposes of a table's factors, nor its copy: the "
            "file is damaged"
        )
    _check_settings(config, family, name, both, changed)
    return Tied(name, keys, frozenset(both))


def _is_both(module: str, start: str, changed: Collection[str], tensors: Mapping[str, Any]) -> bool:
    """Whether what the output layer has is the adapter or the copy of a table: all of its tensors,
    and no others."""
    own = f"{PREFIX}{module}."
    copy = {start + "weight": own + "weight"}
    adapter = {start + end: own + of for end, of in PAIR.items()}
    for pairs, turn in ((copy, False), (adapter, True)):
        if set(changed) == set(pairs) and all(theirs in tensors for theirs in pairs.values()):
            return all(
                np.array_equal(_turned(tensors[theirs], turn), tensors[key])
                for key, theirs in pairs.items()
            )
    return False


def _turned(x: np.ndarray, turn: bool) -> np.ndarray:
    return x.T if turn else x


def _check_settings(
    config: Mapping[str, Any], family: Family, head: str, both: Any, changed: Any
) -> None:
    """ValueError where the two modules have different ranks or scales, or starts that change the
    base they share."""
    if not any("lora" in key for key in changed):
        return
    if config.get("init_lora_weights") in ("pissa", "olora"):
        raise ValueError(
            f"{FIELD}=True with init_lora_weights={config['init_lora_weights']!r}: its start "
            "changes the table by the output layer's part alone, which no leaf can say; convert "
            "the file to plain LoRA with PEFT"
        )
    for module in both:
        values = [
            (by_pattern(config.get("rank_pattern"), name, config["r"]), family.alpha(config, name))
            for name in (module, head)
        ]
        if values[0] != values[1]:
            raise ValueError(
                f"{FIELD}=True: rank and alpha are {values[0]} for {module!r} and {values[1]} for "
                f"{head!r}, which have one adapter: {untie(head, module)}"
            )


def check_whole(tied: Tied, tree: Tree, names: Collection[str]) -> None:
    """ValueError for a table of which the file trains a copy that only the look-up reads."""
    tables = _tables(tree)
    for module in (tree.places[name].module for name in names):
        if tied.head is not None and module in tables and module not in tied.both:
            raise ValueError(
                f"modules_to_save holds a copy of the table of {module!r} that PEFT gives to the "
                f"look-up alone ({FIELD} is not set): {untie(tied.head, module)}"
            )


def copies(tied: Tied, tree: Tree) -> dict[str, str]:
    """`{key: torch's name}` of the table that PEFT wrote as the output layer's base."""
    key = f"{PREFIX}{tied.head}.base_layer.weight"
    tables = [place.name for place in _tables(tree).values()]
    return {key: tables[0]} if key in tied.keys and len(tables) == 1 else {}


# writing


def check_site(family: Family, tree: Tree, site: Site, head: str | None) -> str | None:
    """The name of the output layer that must have the site's adapter too, or None.

    Raises:
      ValueError: for uses, or for a table with both of its uses, that the method cannot say.
    """
    module = tree.at(site.path)[0].module
    if not site.lookup or site.uses not in ((), ("gather",)):
        if site.uses:
            raise ValueError(
                f"uses: {site.path!r} is adapted at {site.uses}, which no PEFT file can say"
            )
        return None
    name = head_of(tree, head)
    if name is None or site.uses or not may_be_head(module):
        return None
    _check_both(
        family,
        name,
        module,
        "is adapted as the look-up and as the output layer; PEFT adapts the look-up",
    )
    return name


def write_whole(
    family: Family, tree: Tree, whole: Mapping[str, Any], head: str | None
) -> dict[str, Any]:
    """Tensors of the output layer whose table is trained in full; ValueError where the method cannot
    say it."""
    name = head_of(tree, head)
    found = {}
    for place in _tables(tree).values():
        if name is not None and place.path in whole:
            _check_both(
                family,
                name,
                place.module,
                "is trained as the look-up and as the output layer; PEFT copies it",
            )
            found[f"{PREFIX}{name}.weight"] = tree.parameter(place, whole[place.path])
    return found


def _check_both(family: Family, head: str, module: str, what: str) -> None:
    if FIELD not in family.reads or module.rsplit(".", 1)[-1] != TABLE:
        raise ValueError(
            f"{module!r} {what} alone, but for LoRA on a table named {TABLE!r} with {FIELD}. Adapt "
            f"the look-up by uses=('gather',) in lrx.adapt, or {untie(head, module)}"
        )


def pair_of(
    head: str, module: str, adapter: Any, tensors: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The tensors of the output layer out of those of its table, `{end of the key: tensor}`."""
    if isinstance(adapter, Dora):
        raise ValueError(
            f"{module!r} has DoRA as the look-up and as the output layer, whose magnitudes PEFT "
            f"keeps apart: {untie(head, module)}"
        )
    return {
        f"{PREFIX}{head}.{end}": np.ascontiguousarray(tensors[of].T) for end, of in PAIR.items()
    }


def ties(targets: list[str] | str) -> list[str] | str:
    """`target_modules` by which PEFT sees that a table is adapted: a regular expression must match
    its bare name."""
    return targets if isinstance(targets, list) else f"{targets}|{TABLE}"
