"""Which leaves of a tree are matrices: ordered rules, and the printable report of what they did."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import optax

from lowrank_jax import default_views, sharding
from lowrank_jax.matrices import DENSE, MatrixView, ResolvedView, Shape
from lowrank_jax.reprs import Short
from lowrank_jax.trees import is_quantized, leaves_with_metadata
from lowrank_jax.typing import Kernel, Pytree

_DEFAULT_EXCLUDE = (
    r"(.*/)?(lm_head|head|logits|classifier|[a-z_]*embed[a-z_]*|[a-z_]*norm[a-z_0-9]*)(/.*)?"
)
_LAYER_AXES = frozenset({"layer", "layers", "expert", "experts"})
SIDES = ("paper", "larger", "rows", "cols", "sharding")


# What a product does with an axis of a leaf, and what that makes the axis of a matrix.
_SIDE_OF = {
    "contracted": "rows",
    "looked up": "rows",
    "kept": "cols",
    "batched": "batch",
    "taken apart": "batch",
}


@dataclasses.dataclass(frozen=True)
class Use(Short):
    """One equation of a program that reads a leaf, see `lrx.functions.uses`.

    Attributes:
      primitive: its name in jaxprs.
      line: where the user's program makes it.
      axes: what it does with each axis of the leaf: "contracted" with its input, "kept" in its result,
        "batched" (in input and result), "looked up" by indices, or "taken apart" before (scanned,
        indexed, gathered); several words, joined by "+", where parts of the axis differ. () where it is
        no product.
      note: why it is none, where there is more to say.

    >>> print(Use("dot_general", "model.py:30", ("taken apart", "contracted", "kept")))
    dot_general at model.py:30: axis 0 taken apart, axis 1 contracted, axis 2 kept
    """

    primitive: str
    line: str
    axes: tuple[str, ...] = ()
    note: str = ""

    @property
    def sides(self) -> dict[str, tuple[int, ...]] | None:
        """The axes by what they are of a matrix; None where it is no product, or where a part of an
        axis is one thing and a part another."""
        found: dict[str, tuple[int, ...]] = {"batch": (), "rows": (), "cols": ()}
        for axis, words in enumerate(self.axes):
            sides = {_SIDE_OF[word] for word in words.split("+")}
            if len(sides) > 1:
                return None
            found[sides.pop()] += (axis,)
        return found if self.axes else None

    @property
    def view(self) -> MatrixView | None:
        """The matrix that it multiplies by; None where it is none."""
        sides = self.sides
        return MatrixView(**sides) if sides and sides["rows"] and sides["cols"] else None

    @property
    def looks_up(self) -> bool:
        return "looked up" in self.axes

    def __str__(self) -> str:
        axes = ", ".join(f"axis {axis} {word}" for axis, word in enumerate(self.axes))
        more = axes or self.note
        line = self.line.rpartition("/")[2]  # without folders
        return f"{self.primitive} at {line}" + (f": {more}" if more else "")


@dataclasses.dataclass(frozen=True)
class ViewRow(Short):
    """A leaf, the matrix that a program reads it as, and why it has none. Rows are equal where their
    views are."""

    path: str
    shape: Shape
    view: MatrixView | None
    reason: str = dataclasses.field(default="", compare=False)
    uses: tuple[Use, ...] = dataclasses.field(default=(), compare=False)


@dataclasses.dataclass(frozen=True)
class ViewReport(Short):
    """The views of the leaves of one tree as a program reads them: `lrx.functions.views_of` makes it,
    `lrx.Views(inferred=report)` takes it. `str()` gives the table.

    It is a proposal to be looked at, and pinned: shapes of optimizer states depend on it. `to_json`
    is what to store beside a run, and `from_json` what a resumed run starts from.
    """

    rows: tuple[ViewRow, ...]

    def at(self, path: str, shape: Shape | None = None) -> ViewRow:
        """The row of a leaf; ValueError where it is none of this tree."""
        row = next((row for row in self.rows if row.path == path), None)
        if row is None or (shape is not None and row.shape != tuple(shape)):
            known = [row.path for row in self.rows][:12] if row is None else row
            raise ValueError(
                f"views: inferred does not know the leaf {path!r} of shape {shape}, but {known}: it "
                "was read from another program. Give lrx.functions.views_of(fn, params, ...) of this "
                "one, or a rule for the leaf"
            )
        return row

    def to_json(self) -> list[dict[str, Any]]:
        """The views, of lists and strings alone."""
        return [
            {"path": row.path, "shape": list(row.shape), "reason": row.reason}
            | {name: list(own) for name, own in _axes_of(row.view).items()}
            for row in self.rows
        ]

    @classmethod
    def from_json(cls, entries: list[dict[str, Any]]) -> ViewReport:
        """The report that `to_json` was of, without its uses.

        >>> report = ViewReport(
        ...     (ViewRow("w", (3, 4), MatrixView()), ViewRow("b", (4,), None, "add"))
        ... )
        >>> ViewReport.from_json(report.to_json()) == report
        True
        """
        rows = []
        for entry in entries:
            axes = {name: tuple(entry[name]) for name in _axes_of(DENSE) if name in entry}
            view = MatrixView(**axes) if axes else None
            rows.append(ViewRow(entry["path"], tuple(entry["shape"]), view, entry["reason"]))
        return cls(tuple(rows))

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("leaf", "shape", "batch", "rows", "cols", "read by")]
        for row in self.rows:
            axes = _axes_of(row.view) or dict.fromkeys(_axes_of(DENSE), ())
            why = row.reason or ", ".join(dict.fromkeys(use.primitive for use in row.uses))
            cells = (" ".join(map(str, own)) or "-" for own in axes.values())
            rows.append((row.path or "(bare array)", str(row.shape), *cells, why))
        return _table(rows)


def _axes_of(view: MatrixView | None) -> dict[str, tuple[int, ...]]:
    """By name, in the order of the value's axes; empty for None."""
    names = ("batch", "rows", "cols")
    return {} if view is None else {name: getattr(view, name) for name in names}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Views(Short):
    """Ordered rules that say which leaves are matrices. Patterns must match the whole "/"-joined
    path.

    A leaf is decided by the first of `rules` that matches its path (None leaves it out); else by
    the default: leaves named `kernel`, and leaves of trees without names (bare arrays, tuples), are
    matrices unless they belong to an embedding, a head or a norm, as in the papers. Stacking is
    never guessed from a shape: name the scanned leaves in `stacked`, or carry `nn.Partitioned`
    boxes whose names contain "layers" or "experts". Of kernels of more axes than two a bias beside
    them, or the name of a convolution or of a layer of attention, says which are outputs
    (`default_views`); leaves of which nothing does are an error that proposes views for all of
    them.

    Args:
      rules: `((pattern, MatrixView or None), ...)`. The view of a stacked leaf is written for one
        layer.
      stacked: patterns of leaves with a leading layer axis.
      inferred: the `ViewReport` of `lrx.functions.views_of`, which takes the default's place: a leaf
        is the matrix that the program read it as, layers and all, but embeddings, heads and norms
        are left out by their names all the same. It is never made anew: leaves that it does not
        know are an error.

    Raises:
      ValueError: at `resolve`, if a rule or a stacked pattern matches nothing, or leaves have axes
        nobody claimed.

    >>> import jax.numpy as jnp
    >>> params = {
    ...     "layers": {"q": {"kernel": jnp.ones((2, 16, 4, 4))}},
    ...     "embed": {"embedding": jnp.ones((9, 16))},
    ... }
    >>> views = Views(
    ...     rules=((r".*/q/kernel", MatrixView(rows=(0,), cols=(1, 2))),), stacked=(r"layers/.*",)
    ... )
    >>> print(resolve(params, views, rank=4))
    leaf             shape          matrices   rank  shrinks  note
    embed/embedding  (9, 16)        -          -     -        embedding, head or norm
    layers/q/kernel  (2, 16, 4, 4)  2 x 16x16  4     rows     rule '.*/q/kernel', stacked
    1 of 2 leaves projected: 512 of 656 parameters (78.0 %)
    """

    rules: tuple[tuple[str, MatrixView | None], ...] = ()
    stacked: tuple[str, ...] = ()
    inferred: ViewReport | None = None

    def __post_init__(self):
        if isinstance(self.rules, dict):
            object.__setattr__(self, "rules", tuple(self.rules.items()))
        if isinstance(self.stacked, str):
            object.__setattr__(self, "stacked", (self.stacked,))
        for pattern in [pattern for pattern, _ in self.rules] + list(self.stacked):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f"views: {pattern!r} is not a regular expression: {error}"
                ) from None


@dataclasses.dataclass(frozen=True)
class Leaf(Short):
    """One row of a report: a leaf and what became of it (`view` is None where it is not
    projected)."""

    path: str
    shape: Shape
    note: str
    view: ResolvedView | None = None
    masked: bool = False


@dataclasses.dataclass(frozen=True)
class Report(Short):
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
        rows: list[tuple[str, ...]] = [("leaf", "shape", "matrices", "rank", "shrinks", "note")]
        for leaf in self.leaves:
            view = leaf.view
            if view is None:
                rows.append(
                    (leaf.path or "(bare array)", str(leaf.shape), "-", "-", "-", leaf.note)
                )
                continue
            matrices = _product(view.view.matrix_shape(view.shape))
            rows.append(
                (
                    leaf.path or "(bare array)",
                    str(leaf.shape),
                    matrices,
                    str(view.rank),
                    view.side,
                    leaf.note,
                )
            )
        lines = [_table(rows)]
        sizes = [
            (math.prod(leaf.shape), leaf.view is not None)
            for leaf in self.leaves
            if not leaf.masked
        ]
        total, inside = (
            sum(size for size, _ in sizes),
            sum(size for size, projected in sizes if projected),
        )
        share = f"{100 * inside / total:.1f} %" if total else "0 %"
        lines.append(
            f"{len(self.projected)} of {len(sizes)} leaves projected: {inside:,} of {total:,} "
            f"parameters ({share})"
        )
        return "\n".join(lines)


def _product(shape: Shape) -> str:
    """ "2 x 16x8" of a shape (2, 16, 8)."""
    *batch, rows, cols = shape
    return "".join(f"{size} x " for size in batch) + f"{rows}x{cols}"


def _table(rows: list[tuple[str, ...]]) -> str:
    """Rows as aligned lines."""
    widths = [max(map(len, column)) + 2 for column in zip(*rows, strict=True)]
    lines = [
        "".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def is_linear(path: str, ndim: int, views: Views | None = None) -> tuple[bool, str]:
    """Whether a leaf that no rule names is taken, and why: by its name, and of inferred views where
    it has one."""
    if re.fullmatch(_DEFAULT_EXCLUDE, path):
        return False, "embedding, head or norm"
    if views is not None and views.inferred is not None:
        row = views.inferred.at(path)
        return row.view is not None, row.reason or "inferred"
    last = path.rsplit("/", 1)[-1]
    if last != "kernel" and not (last == "" or last.isdigit()):
        return False, f"not named kernel ({ndim}-D)"
    return ndim >= 2, "default" if ndim >= 2 else f"{ndim}-D"


def is_stacked(path: str, names: tuple[str | None, ...] | None, views: Views) -> bool:
    """Whether the first axis of a leaf counts layers or experts: by the views, or by the names of
    its axes."""
    named = names is not None and len(names) > 0 and names[0] in _LAYER_AXES
    return named or any(re.fullmatch(pattern, path) for pattern in views.stacked)


class LeafViews:
    """The views of the leaves of one tree, and one error about all leaves that neither rules nor
    defaults decide.

    Attributes:
      views: the rules.
      used: patterns of `views` that some leaf matched.
      undecided: `{path: shape of one layer}` of leaves whose axes nothing names.
    """

    def __init__(self, views: Views, params: Pytree):
        self.views = views
        self.used: set[str] = set()
        self.undecided: dict[str, Shape] = {}
        self._params = params
        self._names: dict[str, tuple[str | None, ...] | None] = {}
        self._shapes: dict[str, Shape] = {}
        self._own: dict[str, Shape] = {}
        self._masked: set[str] = set()
        for path, node, names in leaves_with_metadata(params):
            if isinstance(node, optax.MaskedNode):
                self._masked.add(path)
            elif hasattr(node, "shape"):
                shape = tuple(node.shape)
                self._names[path], self._shapes[path] = names, shape
                self._own[path] = shape[is_stacked(path, names, views) :]

    def layered(self, path: str) -> bool:
        """Whether the first axis of a leaf counts layers or experts."""
        return len(self._own[path]) < len(self._shapes[path])

    def own_shape(self, path: str) -> Shape:
        """The shape of one layer of a leaf."""
        return self._own[path]

    def for_what_is_masked(self, pattern: str) -> bool:
        """Whether a pattern that matches no leaf here is for a leaf that a mask took, alone or with
        its whole subtree.

        A pattern is for a subtree if its head, up to one of its slashes, matches the subtree's path
        and nothing that is here: `.*enc[^/]*/w` is for a masked `encoder`, and `.*/w` is for every
        module.
        """
        if any(re.fullmatch(pattern, path) for path in self._masked):
            return True
        heads = _heads(pattern) if self._masked else []
        heads = [head for head in heads if any(re.fullmatch(head, path) for path in self._masked)]
        here = {above for path in self._shapes for above in _upwards(path)}
        return any(not any(re.fullmatch(head, path) for path in here) for head in heads)

    def of(self, path: str, take: Callable | None = None) -> tuple[MatrixView | None, str]:
        """The view of a leaf, or None; and a note that says which rule or default it was.

        Args:
          path: of the leaf.
          take: `(path, ndim) -> (whether, note)`: which leaves are taken that no rule names; None is
            the default, `is_linear`.
        """
        self.used.update(pattern for pattern in self.views.stacked if re.fullmatch(pattern, path))
        layered, own = self.layered(path), self.own_shape(path)
        found = self._by_rule(path)
        if found is None and self.views.inferred is not None:
            # of the whole leaf, layers and all
            found, layered = self._by_inference(path, take), False
        view, note = found or self._by_default(path, own, take or is_linear)
        if view is None:
            return None, note
        if 0 in self._shapes[path]:
            return None, "no entries"
        return (view.stacked(), f"{note}, stacked") if layered else (view, note)

    def _by_inference(self, path: str, take: Callable | None) -> tuple[MatrixView | None, str]:
        shape, report = self._shapes[path], self.views.inferred
        assert report is not None
        row = report.at(path, shape)
        if take is None:
            taken, note = is_linear(path, len(shape), self.views)
            return (row.view if taken else None), note
        note = take(path, len(shape))[1]
        if row.view is None:
            raise ValueError(
                f"a rule matches {path!r} of shape {shape}, which is no matrix by views.inferred: "
                f"{row.reason}. Leave it out by exclude=, or say what it is by "
                f"lrx.Views(rules=(({_escaped(path)!r}, lrx.MatrixView(...)),), inferred=...)"
            )
        return row.view, note

    def _by_rule(self, path: str) -> tuple[MatrixView | None, str] | None:
        for pattern, view in self.views.rules:
            if re.fullmatch(pattern, path):
                self.used.add(pattern)
                return view, f"rule {pattern!r}"
        return None

    def _by_default(self, path: str, own: Shape, take: Callable) -> tuple[MatrixView | None, str]:
        taken, note = take(path, len(own))
        if not taken or len(own) <= 2:
            return (DENSE if taken else None), note
        names = self._names[path]
        own_names = None if names is None else names[self.layered(path) :]
        found = default_views.read(path, own, own_names, self._own, self._masked)
        if found is not None:
            return found[0], f"{note}, {found[1]}"
        if 0 not in own:
            self.undecided[path] = own
        return None, "undecided"

    def check(self) -> None:
        """ValueError with all leaves whose axes nothing names, and rules for them that can be
        pasted."""
        if not self.undecided:
            return
        proposed = self._proposed()
        rows: list[tuple[str, ...]] = [("leaf", "shape", "read as", "batch", "rows", "cols")]
        for path in self.undecided:
            shape, view = self._shapes[path], proposed.of(path, _any_matrix)[0] or DENSE
            axes = [" ".join(map(str, own)) or "-" for own in (view.batch, view.rows, view.cols)]
            rows.append(
                (path or "(bare array)", str(shape), _product(view.matrix_shape(shape)), *axes)
            )
        unread = [
            path
            for path in self.undecided
            if default_views.path_beside(path, "bias") in self._masked
        ]
        silent = (
            f" The biases beside {unread} are masked here, so that their shapes cannot say."
            if unread
            else ""
        )
        raise ValueError(
            "views: no rule, name or bias says which axes of these leaves are inputs (rows), "
            f"outputs (cols), and layers or experts (batch).{silent} A "
            f"proposal:\n{_table(rows)}\nWhere it is right, pass views={_code(proposed.views)}. "
            "Where the first axis of a leaf counts layers or experts, name the leaf in stacked= in "
            "place of its rule; None in place of a view leaves it out. A function that multiplies by "
            "them says what they are: lrx.Views(inferred=lrx.functions.views_of(function, params, ...))"
        )

    def _proposed(self) -> LeafViews:
        """These views and rules for all undecided leaves: likely, and to be checked by somebody who
        knows the model."""
        roots = [
            default_views.stack_root(path) or ""
            for path in self.undecided
            if not self.layered(path)
        ]
        stacks = [f"{_escaped(root)}/.*" for root in roots if root and self._alike(root)]
        stacked = dict.fromkeys((*self.views.stacked, *stacks))
        proposed = LeafViews(dataclasses.replace(self.views, stacked=tuple(stacked)), self._params)
        for path in self.undecided:
            proposed.of(path, _any_matrix)
        shapes = proposed._own
        rules = [
            (_escaped(path), default_views.guess(path, shapes[path], shapes))
            for path in proposed.undecided
        ]
        return LeafViews(
            dataclasses.replace(proposed.views, rules=(*self.views.rules, *rules)), self._params
        )

    def _alike(self, root: str) -> bool:
        """Whether all leaves below a module have one first axis."""
        return (
            len({shape[:1] for path, shape in self._shapes.items() if path.startswith(f"{root}/")})
            == 1
        )


def _any_matrix(path: str, ndim: int) -> tuple[bool, str]:
    del path
    return ndim >= 2, ""


def _patterns(views: Views) -> tuple[str, ...]:
    return (*(pattern for pattern, _ in views.rules), *views.stacked)


def _heads(pattern: str) -> list[str]:
    """What stands before each slash of a pattern, where that is a pattern itself."""
    heads = []
    for slash in re.finditer("/", pattern):
        head = pattern[: slash.start()]
        try:
            re.compile(head)
        except re.error:  # the slash stands inside a group or a set
            continue
        heads.append(head)
    return heads


def _upwards(path: str) -> list[str]:
    """A path and those of all modules above it."""
    names = path.split("/")
    return ["/".join(names[:end]) for end in range(1, len(names) + 1)]


def _escaped(path: str) -> str:
    """A pattern for a path: the path as it stands where it matches itself."""
    try:
        return path if re.fullmatch(path, path) else re.escape(path)
    except re.error:
        return re.escape(path)


def _code(views: Views) -> str:
    """The expression that makes the views."""

    def rule(pattern: str, view: MatrixView | None) -> str:
        axes = (
            {}
            if view is None
            else {name: getattr(view, name) for name in ("batch", "rows", "cols")}
        )
        made = ", ".join(f"{name}={own}" for name, own in axes.items() if own)
        return f"({pattern!r}, {None if view is None else f'lrx.MatrixView({made})'}),"

    rules = f"rules=({' '.join(rule(*entry) for entry in views.rules)})" if views.rules else ""
    stacked = f"stacked={views.stacked}" if views.stacked else ""
    return f"lrx.Views({', '.join(filter(None, (rules, stacked)))})"


def _side_of(path: str, rows: int, cols: int, spec, side, tie: str) -> str:
    """Which dimension of a (rows, cols) matrix is shrunk."""
    if not isinstance(side, str):
        stored = dict(side)
        if path not in stored:
            raise ValueError(
                f"side: the stored sides name no {path!r}; they were resolved for another model"
            )
        return stored[path]
    if side in ("rows", "cols"):
        return side
    if side == "sharding":
        if spec is None:
            raise ValueError(
                "side='sharding' needs to know the sharding before tracing: pass "
                "side=lrx.projection.sides_for(params, shardings)"
            )
        if (spec[-2] is None) != (spec[-1] is None):
            return "rows" if spec[-2] is None else "cols"
        side = "paper"
    if rows == cols:
        return tie
    return "rows" if (rows < cols) == (side == "paper") else "cols"


def check_side(side, tie: str) -> None:
    """ValueError unless `side` is a known word or stored `((path, side), ...)`, and `tie` a
    dimension."""
    if isinstance(side, str) and side not in SIDES:
        raise ValueError(
            f"side={side!r} is unknown; use one of {SIDES} or the ((path, side), ...) of "
            "lrx.projection.sides_for"
        )
    if tie not in ("rows", "cols"):
        raise ValueError(
            f"tie={tie!r} must be 'rows' or 'cols': which dimension of a square kernel is shrunk"
        )


def _check_leaf(path: str, node: Kernel) -> None:
    if not hasattr(node, "shape"):
        raise TypeError(
            f"leaf {path!r} is {type(node).__name__}, not an array; give a tree of arrays"
        )


def resolve(
    params: Pytree,
    views: Views | None = None,
    *,
    rank: int | Callable[..., int],
    side: str | tuple[tuple[str, str], ...] = "paper",
    tie: str = "rows",
    shardings: Pytree = None,
) -> Report:
    """Applies the rules to a tree of arrays or ShapeDtypeStructs.

    Args:
      params: the tree; `optax.MaskedNode` leaves are skipped.
      views: the rules.
      rank: r, or a function `(path, shrunk, kept) -> r`; one of `(path, shrunk)` serves too.
      side: "paper" (shrink the smaller dimension), "larger", "rows", "cols", "sharding" (keep the
        sharded axis whole), or stored `((path, side), ...)`.
      tie: which dimension of a square kernel is shrunk by "paper" and "larger".
      shardings: a tree like `params` of NamedShardings, where the leaves do not carry their own.

    Raises:
      ValueError: a rule that matches nothing (unless it is for a masked leaf, for a masked subtree
        of which its head up to a slash is the path, or all is masked), leaves of three or more axes
        that nobody claimed, a tree with leaves of two or more axes of which none is projected, or
        an impossible rank; each names paths and remedy.

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
    leaf_views, leaves = LeafViews(views, params), []
    for path, node, _ in found:
        if isinstance(node, optax.MaskedNode):
            continue
        _check_leaf(path, node)
        shape = tuple(node.shape)
        view, note = leaf_views.of(path)
        if view is None:
            leaves.append(Leaf(path, shape, note))
            continue
        *batch, rows, cols = view.matrix_shape(shape)
        spec = (
            sharding.explicit_spec(node)
            if given is None
            else sharding.spec_of(given[path], len(shape))
        )
        matrix_spec = (
            None if spec is None else sharding.fold_spec(spec, view.batch, view.rows, view.cols)
        )
        leaf_side = _side_of(path, rows, cols, matrix_spec, side, tie)
        shrunk, kept = (rows, cols) if leaf_side == "rows" else (cols, rows)
        leaf_rank = _rank_of(rank, path, shrunk, kept)
        resolved = ResolvedView(
            path=path, shape=shape, view=view, rank=leaf_rank, side=leaf_side, batch=tuple(batch)
        )
        leaves.append(Leaf(path, shape, note, resolved.lying(node) if given is None else resolved))
    leaf_views.check()
    _check_coverage(leaf_views, leaves, masked=len(leaves) < len(found))
    return Report(tuple(leaves))


def _rank_of(rank: int | Callable[..., int], path: str, shrunk: int, kept: int) -> int:
    """r of a leaf: the number, or what the function says of as much as it takes."""
    if not callable(rank):
        return rank
    given = (path, shrunk, kept)
    return rank(*given[: len(inspect.signature(rank).parameters)])


def _sharding_leaves(params, shardings):
    paths = [path for path, _, _ in leaves_with_metadata(params)]
    is_one = lambda x: isinstance(x, jax.sharding.Sharding) or x is None or is_quantized(x)  # noqa: E731
    leaves = [sharding.codes_of(kind) for kind in jax.tree.leaves(shardings, is_leaf=is_one)]
    if len(paths) != len(leaves):
        raise ValueError(
            f"shardings has {len(leaves)} leaves, params {len(paths)}: give one sharding for each "
            "leaf"
        )
    return zip(paths, leaves, strict=True)


def _check_coverage(leaf_views: LeafViews, leaves: list[Leaf], masked: bool) -> None:
    """ValueError for a rule that matches nothing, and for a tree with matrices of which none is
    projected."""
    paths = [leaf.path for leaf in leaves]
    for pattern in _patterns(leaf_views.views):
        excused = masked and (not paths or leaf_views.for_what_is_masked(pattern))
        if pattern not in leaf_views.used and not excused:
            remedy = (
                " If it is for what is masked here, leave it out of the views of this optimizer"
                if masked
                else ""
            )
            raise ValueError(
                f"views: {pattern!r} matches no leaf (patterns must match the whole path). Paths "
                f"here: {paths[:12]}.{remedy}"
            )
    matrices = [
        leaf.path
        for leaf in leaves
        if len(leaf_views.own_shape(leaf.path)) >= 2 and 0 not in leaf.shape
    ]
    if matrices and not any(leaf.view is not None for leaf in leaves):
        raise ValueError(
            f"no leaf is projected, and {len(matrices)} have two or more axes: {matrices[:12]}. By "
            "default these are leaves named 'kernel' outside embeddings, heads and norms; name "
            "yours, for instance Views(rules=((r'.*/w', MatrixView()),)), or give them another "
            "optimizer with optax.partition"
        )


__all__ = ["Leaf", "Report", "ResolvedView", "Use", "ViewReport", "ViewRow", "resolve"]
__dir__ = functools.partial(sorted, __all__)
