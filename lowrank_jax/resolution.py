"""Which leaves of a tree are matrices: ordered rules, and the printable report of what they did."""

from __future__ import annotations

import dataclasses
import math
import re
import sys
from collections.abc import Callable, Iterable
from typing import Any

import jax
import optax
from flax.core import meta

from lowrank_jax import sharding
from lowrank_jax.matrices import DENSE, MatrixView, ResolvedView, Shape

_DEFAULT_EXCLUDE = r"(.*/)?(lm_head|head|logits|classifier|[a-z_]*embed[a-z_]*|[a-z_]*norm[a-z_0-9]*)(/.*)?"
_LAYER_AXES = frozenset({"layer", "layers", "expert", "experts"})
SIDES = ("paper", "larger", "rows", "cols", "sharding")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Views:
    """Ordered rules that say which leaves are matrices. Patterns must match the whole "/"-joined path.

    A leaf is decided by the first of `rules` that matches its path (None leaves it out); else by the default: leaves
    named `kernel`, and leaves of trees without names (bare arrays, tuples), are matrices unless they belong to an
    embedding, a head or a norm, as in the papers. Stacking is never guessed from a shape: name the scanned leaves in
    `stacked`, or carry `nn.Partitioned` boxes whose names contain "layers" or "experts".

    Args:
      rules: `((pattern, MatrixView or None), ...)`. The view of a stacked leaf is written for one layer.
      stacked: patterns of leaves with a leading layer axis.

    Raises:
      ValueError: at `resolve`, if a rule or a stacked pattern matches nothing, or a leaf has axes nobody claimed.

    >>> import jax.numpy as jnp
    >>> params = {"layers": {"q": {"kernel": jnp.ones((2, 16, 4, 4))}}, "embed": {"embedding": jnp.ones((9, 16))}}
    >>> views = Views(rules=((r".*/q/kernel", MatrixView(rows=(0,), cols=(1, 2))),), stacked=(r"layers/.*",))
    >>> print(resolve(params, views, rank=4))
    leaf             shape          matrices   rank  shrinks  note
    embed/embedding  (9, 16)        -          -     -        embedding, head or norm
    layers/q/kernel  (2, 16, 4, 4)  2 x 16x16  4     rows     rule '.*/q/kernel', stacked
    1 of 2 leaves projected: 512 of 656 parameters (78.0 %)
    """

    rules: tuple[tuple[str, MatrixView | None], ...] = ()
    stacked: tuple[str, ...] = ()

    def __post_init__(self):
        if isinstance(self.rules, dict):
            object.__setattr__(self, "rules", tuple(self.rules.items()))
        if isinstance(self.stacked, str):
            object.__setattr__(self, "stacked", (self.stacked,))
        for pattern in [pattern for pattern, _ in self.rules] + list(self.stacked):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"views: {pattern!r} is not a regular expression: {error}") from None


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One row of a report: a leaf and what became of it (`view` is None where it is not projected)."""

    path: str
    shape: Shape
    note: str
    view: ResolvedView | None = None
    masked: bool = False


@dataclasses.dataclass(frozen=True)
class Report:
    """What is projected, at which rank, and what is not and why. `str()` gives the table.

    >>> import jax.numpy as jnp
    >>> report = resolve({"dense": {"kernel": jnp.ones((8, 16)), "bias": jnp.ones(16)}}, rank=4)
    >>> report.sides
    (('dense/kernel', 'rows'),)
    """

    leaves: tuple[Leaf, ...]

    @property
    def projected(self) -> tuple[ResolvedView, ...]:
        return tuple(leaf.view for leaf in self.leaves if leaf.view is not None)

    @property
    def sides(self) -> tuple[tuple[str, str], ...]:
        """`((path, side), ...)`, to be stored with a checkpoint and passed as `side=` on resume."""
        return tuple((view.path, view.side) for view in self.projected)

    def __str__(self) -> str:
        rows = [("leaf", "shape", "matrices", "rank", "shrinks", "note")]
        for leaf in self.leaves:
            view = leaf.view
            if view is None:
                rows.append((leaf.path or "(bare array)", str(leaf.shape), "-", "-", "-", leaf.note))
                continue
            *_, m, n = view.view.matrix_shape(view.shape)
            matrices = " x ".join(map(str, view.batch)) + (" x " if view.batch else "") + f"{m}x{n}"
            rows.append((leaf.path or "(bare array)", str(leaf.shape), matrices, str(view.rank), view.side, leaf.note))
        widths = [max(len(row[i]) for row in rows) + 2 for i in range(5)]
        lines = ["".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)) + row[5] for row in rows]
        sizes = [(math.prod(leaf.shape), leaf.view is not None) for leaf in self.leaves if not leaf.masked]
        total, inside = sum(size for size, _ in sizes), sum(size for size, projected in sizes if projected)
        share = f"{100 * inside / total:.1f} %" if total else "0 %"
        lines.append(
            f"{len(self.projected)} of {len(sizes)} leaves projected: {inside:,} of {total:,} parameters ({share})"
        )
        return "\n".join(line.rstrip() for line in lines)


def _key_name(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def is_node(x: Any) -> bool:
    """What counts as one leaf of a parameter tree: a masked one, a box of metadata, a quantised array."""
    return isinstance(x, (optax.MaskedNode, meta.AxisMetadata)) or hasattr(x, "dequantize")


def path_of(keys: Iterable[Any]) -> str:
    """ "/"-joined path of a leaf, of keys as `nodes_with_keys` gives them."""
    return "/".join(_key_name(key) for key in keys)


def _is_variable(x: Any) -> bool:
    """Whether this is an nnx Variable; where nobody imported flax.nnx there is none, and it is not imported here."""
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(x, nnx.Variable)


def pure(tree: Any) -> Any:
    """The tree with values in place of nnx Variables, which is how `nnx.Optimizer` hands trees to `update`.

    >>> from flax import nnx
    >>> state = nnx.state(nnx.Linear(2, 3, use_bias=False, rngs=nnx.Rngs(0)))
    >>> pure(state)["kernel"].shape
    (2, 3)
    """
    nnx = sys.modules.get("flax.nnx")
    return tree if nnx is None else nnx.as_pure(tree)


def nodes_with_keys(tree: Any, is_leaf: Callable[[Any], bool] = is_node) -> list[tuple[tuple[Any, ...], Any]]:
    """`[(keys, node), ...]` in the order of `jax.tree.leaves(tree, is_leaf=is_leaf)`.

    The value of an nnx Variable is a leaf under the Variable's own keys, so that paths are the same with Variables, as
    `nnx.Optimizer` gives them to `init`, and without, as it gives them to `update`.
    """
    found: list[tuple[tuple[Any, ...], Any]] = []
    stops = lambda x: is_leaf(x) or _is_variable(x)  # noqa: E731
    for keys, node in jax.tree_util.tree_flatten_with_path(tree, is_leaf=stops)[0]:
        if _is_variable(node):
            found += [((*keys, *inner), leaf) for inner, leaf in nodes_with_keys(node.get_raw_value(), is_leaf)]
        else:
            found.append((keys, node))
    return found


def map_nodes(function: Callable[[str, Any], Any], tree: Any) -> Any:
    """The tree with `function(path, node)` of every node; boxes and quantised arrays are nodes, Variables stay."""
    made = [function(path_of(keys), node) for keys, node in nodes_with_keys(tree)]
    return jax.tree.unflatten(jax.tree.structure(tree, is_leaf=is_node), made)


def leaves_with_metadata(tree: Any) -> list[tuple[str, Any, tuple[str | None, ...] | None]]:
    """`[(path, leaf or MaskedNode, logical axis names or None), ...]` in the order of `jax.tree.leaves`."""
    found = []
    for keys, node in nodes_with_keys(tree):
        names = None
        while isinstance(node, meta.AxisMetadata):
            names = getattr(node, "names", names)
            node = node.unbox()
        found.append((path_of(keys), node, names))
    return found


def is_linear(path: str, ndim: int) -> tuple[bool, str]:
    """Whether the default rule takes a leaf, and why."""
    if re.fullmatch(_DEFAULT_EXCLUDE, path):
        return False, "embedding, head or norm"
    last = path.rsplit("/", 1)[-1]
    if last != "kernel" and not (last == "" or last.isdigit()):
        return False, f"not named kernel ({ndim}-D)"
    return ndim >= 2, "default" if ndim >= 2 else f"{ndim}-D"


def is_stacked(path: str, names: tuple[str | None, ...] | None, views: Views) -> bool:
    """Whether the first axis of a leaf counts layers or experts: by the views, or by the names of its axes."""
    named = names is not None and len(names) > 0 and names[0] in _LAYER_AXES
    return named or any(re.fullmatch(pattern, path) for pattern in views.stacked)


def view_of(
    path: str, shape: Shape, names, views: Views, used: set[str], take_by_default: Callable = is_linear
) -> tuple[MatrixView | None, str]:
    """The view that the rules give a leaf, and a note that says which rule it was."""
    used.update(pattern for pattern in views.stacked if re.fullmatch(pattern, path))
    layered = is_stacked(path, names, views)
    ndim = len(shape) - layered
    for pattern, view in views.rules:
        if not re.fullmatch(pattern, path):
            continue
        used.add(pattern)
        if view is None:
            return None, f"rule {pattern!r}"
        note = f"rule {pattern!r}" + (", stacked" if layered else "")
        return (view.stacked() if layered else view), note
    take, note = take_by_default(path, ndim)
    if not take:
        return None, note
    if ndim > 2:
        raise ValueError(
            f"leaf {path!r} of shape {shape} has {ndim} axes and no rule. If its first axis counts layers or experts, "
            f"name it in Views(stacked=({path!r},)); if it is one matrix, give its axes, for instance "
            f"Views(rules=(({path!r}, MatrixView(rows=(0,), cols={tuple(range(1, ndim))})),)); None leaves it out"
        )
    return (DENSE.stacked() if layered else DENSE), note + (", stacked" if layered else "")


def _side_of(path: str, rows: int, cols: int, spec, side, tie: str) -> str:
    """Which dimension of a (rows, cols) matrix is shrunk."""
    if not isinstance(side, str):
        stored = dict(side)
        if path not in stored:
            raise ValueError(f"side: the stored sides name no {path!r}; they were resolved for another model")
        return stored[path]
    if side in ("rows", "cols"):
        return side
    if side == "sharding":
        if spec is None:
            raise ValueError(
                "side='sharding' needs to know the sharding before tracing: pass side=lr.sides_for(params, shardings)"
            )
        if (spec[-2] is None) != (spec[-1] is None):
            return "rows" if spec[-2] is None else "cols"
        side = "paper"
    if rows == cols:
        return tie
    return "rows" if (rows < cols) == (side == "paper") else "cols"


def check_side(side, tie: str) -> None:
    """ValueError unless `side` is a known word or stored `((path, side), ...)`, and `tie` a dimension."""
    if isinstance(side, str) and side not in SIDES:
        raise ValueError(f"side={side!r} is unknown; use one of {SIDES} or the ((path, side), ...) of lr.sides_for")
    if tie not in ("rows", "cols"):
        raise ValueError(f"tie={tie!r} must be 'rows' or 'cols': which dimension of a square kernel is shrunk")


def _check_leaf(path: str, node: Any) -> None:
    if not hasattr(node, "shape"):
        raise TypeError(
            f"leaf {path!r} is {type(node).__name__}, not an array. optax.tree_utils.tree_map_params calls init with "
            "placeholders, which cannot work where state shapes depend on parameter shapes: use lr.state_shardings"
        )


def resolve(
    params: Any,
    views: Views | None = None,
    *,
    rank: int | Callable[[str, int], int],
    side: str | tuple[tuple[str, str], ...] = "paper",
    tie: str = "rows",
    shardings: Any = None,
) -> Report:
    """Applies the rules to a tree of arrays or ShapeDtypeStructs.

    Args:
      params: the tree; `optax.MaskedNode` leaves are skipped.
      views: the rules.
      rank: r, or a function `(path, shrunk) -> r`.
      side: "paper" (shrink the smaller dimension), "larger", "rows", "cols", "sharding" (keep the sharded axis
        whole), or stored `((path, side), ...)`.
      tie: which dimension of a square kernel is shrunk by "paper" and "larger".
      shardings: a tree like `params` of NamedShardings, where the leaves do not carry their own.

    Raises:
      ValueError: a rule that matches nothing, a leaf of three or more axes nobody claimed, no projected leaf at all,
        or an impossible rank; each names the path and the remedy.

    >>> import jax.numpy as jnp
    >>> print(resolve(jnp.ones((8, 16)), rank=4))
    leaf          shape    matrices  rank  shrinks  note
    (bare array)  (8, 16)  8x16      4     rows     default
    1 of 1 leaves projected: 128 of 128 parameters (100.0 %)
    """
    views = Views() if views is None else views
    check_side(side, tie)
    given = None if shardings is None else dict(_sharding_leaves(params, shardings))
    found = leaves_with_metadata(params)
    if not found:
        _check_leaf("", params)
    used: set[str] = set()
    leaves = []
    for path, node, names in found:
        if isinstance(node, optax.MaskedNode):
            used.update(p for p in [*views.stacked, *(p for p, _ in views.rules)] if re.fullmatch(p, path))
            continue
        _check_leaf(path, node)
        shape = tuple(node.shape)
        view, note = view_of(path, shape, names, views, used)
        if view is None:
            leaves.append(Leaf(path, shape, note))
            continue
        *batch, rows, cols = view.matrix_shape(shape)
        spec = sharding.explicit_spec(node) if given is None else sharding.spec_of(given[path], len(shape))
        matrix_spec = None if spec is None else sharding.fold_spec(spec, view.batch, view.rows, view.cols)
        leaf_side = _side_of(path, rows, cols, matrix_spec, side, tie)
        shrunk = rows if leaf_side == "rows" else cols
        leaf_rank = rank(path, shrunk) if callable(rank) else rank
        resolved = ResolvedView(path=path, shape=shape, view=view, rank=leaf_rank, side=leaf_side, batch=tuple(batch))
        leaves.append(Leaf(path, shape, note, resolved.lying(node) if given is None else resolved))
    _check_coverage(views, used, leaves, any(isinstance(node, optax.MaskedNode) for _, node, _ in found))
    return Report(tuple(leaves))


def _sharding_leaves(params, shardings):
    paths = [path for path, _, _ in leaves_with_metadata(params)]
    is_one = lambda x: isinstance(x, jax.sharding.Sharding) or x is None or hasattr(x, "dequantize")  # noqa: E731
    leaves = [sharding.codes_of(kind) for kind in jax.tree.leaves(shardings, is_leaf=is_one)]
    if len(paths) != len(leaves):
        raise ValueError(f"shardings has {len(leaves)} leaves, params {len(paths)}: give one sharding for each leaf")
    return zip(paths, leaves, strict=True)


def _check_coverage(views: Views, used: set[str], leaves: list[Leaf], masked: bool) -> None:
    paths = [leaf.path for leaf in leaves]
    for pattern in [*(p for p, _ in views.rules), *views.stacked]:
        if pattern not in used and not (masked and not paths):
            raise ValueError(
                f"views: {pattern!r} matches no leaf (patterns must match the whole path). Paths here: {paths[:12]}"
            )
    if not masked and not any(leaf.view is not None for leaf in leaves):
        raise ValueError(
            f"no leaf is projected. By default these are leaves named 'kernel' outside embeddings, heads and norms; "
            f"name yours, for instance Views(rules=((r'.*/w', MatrixView()),)). Paths here: {paths[:12]}"
        )
