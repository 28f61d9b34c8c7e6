"""The interface of inner transformations: `Inner`, a base class that anybody may extend.

An inner transformation works on one matrix of low-rank objects `(r, k)`, or on the group of plain
leaves as a tree, and returns a direction and a scale apart: the step is `scale * direction`. Rules
that rescale gradients by the inner direction need it without the bias correction, which therefore
belongs to the scale.

It owns its storage: `encoded` says how a state is kept, `decoded` how it is computed with, and
nobody else asks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_jax.matrices import ResolvedView
from lowrank_jax.optim.inner.moments import Moment, fields_of, registered
from lowrank_jax.reprs import Short
from lowrank_jax.typing import Pytree, Scalar, Shape

Update = tuple[Pytree, Scalar, Pytree]
"""What `Inner.update` returns: direction, scale, new state."""


class Inner(Short):
    """Base of the inner transformations: pure functions on one matrix, or on a tree of leaves.

    A subclass, usually a frozen dataclass, implements `init` and `update`, and may give more:

        init(tree, view=None) -> state
        update(grads, state, *, view=None, params=None, ok=None, **extra) -> direction, scale, state
        decays() -> {kind: rate}             decay rates of its moments, for transports
        moments(state) -> [Moment]           of a decoded state; by default the registered ones
        decoded(state), encoded(state)       storage: what is computed with, what is kept
        state_bytes(shapes) -> int           formula of the state of leaves of these shapes
        matrix_bytes(shape, view) -> int     and of one matrix, where its view matters

    `view` is the view of the matrix (`None` for plain leaves), which knows its fan-in, fan-out and
    the axes behind them: the gradient is `(r, k)`, the leaf's own size is in the view. `params` is
    the parameter, projected as the gradient is, where the transformation `reads_params`. `extra` is
    what the caller of the optimizer passed on.

    Attributes:
      splits: the direction is without its bias correction, which is in the scale.
      guards: `update` takes `ok`, a scalar, and leaves its state as it was where it is False; the
        base class selects afterwards otherwise, see `guarded`.
      elementwise: an entry moves by its own gradients alone and all state but registered moments is
        shared, so that a leaf may be updated in parts.
      reads_params: `update` needs `params`.
      trees: `init` and `update` take a tree of leaves and no view too, so that it also serves the
        leaves that are not projected. One without is for single matrices: it is never called on the
        other leaves, for which `plain=` gives another.
      takes_extra: `update` may demand arguments of its own from the caller of the optimizer.
      decomposes: its program holds decompositions (QR, eigenvectors), which TPUs compile for long.
      batched: `init` and `update` take the whole stack `(batch..., r, k)` and its view, with counts
        `(batch...)`. Otherwise they see one matrix and are vmapped. An inner transformation that
        decomposes or decides must be batched: vmap makes one batched call of a decomposition, and
        pays both sides of a condition.

    >>> import dataclasses, jax.numpy as jnp
    >>> import lowrank_jax as lrx
    >>> @dataclasses.dataclass(frozen=True)
    ... class Sign(lrx.inner.Inner):
    ...     def init(self, tree, view=None):
    ...         return ()
    ...
    ...     def update(self, grads, state, *, view=None, params=None, **extra):
    ...         return jnp.sign(grads), 1 / view.fan_in, state
    >>> tx = lrx.scale_by_projection(
    ...     lrx.projectors.identity(), inner=Sign(), plain=lrx.inner.adam()
    ... )
    >>> params = {"kernel": jnp.ones((2, 4))}
    >>> tx.update(params, tx.init(params), params)[0]["kernel"].tolist()
    [[0.5, 0.5, 0.5, 0.5], [0.5, 0.5, 0.5, 0.5]]
    """

    splits = False
    guards = False
    elementwise = False
    reads_params = False
    trees = False
    takes_extra = False
    decomposes = False
    batched = False

    def init(self, tree: Pytree, view: ResolvedView | None = None) -> Pytree:
        """The state before the first step."""
        raise TypeError(f"{type(self).__name__} does not implement init")

    def update(
        self,
        grads: Pytree,
        state: Pytree,
        *,
        view: ResolvedView | None = None,
        params: Pytree = None,
        **extra: Any,
    ) -> Update:
        """`(direction, scale, new state)`; `scale` broadcasts over what it scales."""
        raise TypeError(f"{type(self).__name__} does not implement update")

    def decays(self) -> dict[str, Scalar]:
        """Decay rates by kind of moment, as far as they are known."""
        return {}

    def moments(self, state: Pytree) -> list[Moment]:
        """The moments inside a decoded state, in the order of its leaves."""
        return registered(state, self.decays())

    def decoded(self, state: Pytree) -> Pytree:
        """A state as it is computed with."""
        return state

    def encoded(self, state: Pytree) -> Pytree:
        """A decoded state as it is stored."""
        return state

    def stored(self, node: Pytree) -> bool:
        """Whether a node of the state is what one array is stored as."""
        return False

    def as_adam(self) -> Inner | None:
        """The Adam whose moments this state holds, which kernels may then move; None for others."""
        return None

    def state_bytes(self, shapes: Sequence[Shape | int]) -> int:
        """Bytes of the state of leaves of these shapes: what `init` makes of them."""
        leaves = [jax.ShapeDtypeStruct(shape_of(shape), jnp.float32) for shape in shapes]
        groups = [leaves] if self.trees else leaves
        states = [jax.eval_shape(self.init, group) for group in groups]
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(states))

    def matrix_bytes(self, shape: Shape, view: ResolvedView) -> int:
        """Bytes of the state of one matrix; a class whose state depends on the view says so here."""
        del view
        return self.state_bytes([shape])

    def init_group(self, tree: Pytree) -> Pytree:
        """The state of the leaves that are not projected; `()` where one without `trees` has none.

        Raises:
          ValueError: for leaves that it does not take.
        """
        if self.trees:
            return self.init(tree)
        leaves = jax.tree.leaves(tree)
        if leaves:
            raise ValueError(
                f"inner {type(self).__name__} is for single matrices, and {len(leaves)} leaves are "
                f"not projected, the first of shape {tuple(leaves[0].shape)}: give them another, "
                "plain=lrx.inner.adam(...), or set trees = True in the class if its init and "
                "update take a tree and view=None too"
            )
        return ()

    def guarded(
        self,
        grads: Pytree,
        state: Pytree,
        *,
        view: ResolvedView | None = None,
        params: Pytree = None,
        ok: jax.Array | None = None,
        **extra: Any,
    ) -> Update:
        """`update`, whose state stays where not `ok`.

        A transformation that `guards` takes `ok` itself and derives its direction from the moments
        that it keeps: each moment is then read and written by one pass, in place, where a selection
        afterwards would need a copy of the old ones.
        """
        if view is None and not self.trees and not jax.tree.leaves(grads):
            return grads, 1.0, state  # an empty group
        if ok is not None and self.guards:
            return self.update(grads, state, view=view, params=params, ok=ok, **extra)
        direction, scale, new = self.update(grads, state, view=view, params=params, **extra)
        if ok is not None:
            new = jax.tree.map(lambda a, b: jnp.where(ok, a, b), new, state)
        return direction, scale, new

    def init_stack(self, low: jax.Array, view: ResolvedView) -> Pytree:
        """The state of the matrices `low (batch..., r, k)` of one leaf."""
        if self.batched:
            return self.init(low, view)
        matrix = view.matrix
        return _each(lambda x: self.init(x, matrix), view)(low)

    def update_stack(
        self,
        low: jax.Array,
        state: Pytree,
        view: ResolvedView,
        params: Pytree = None,
        ok: jax.Array | None = None,
        extra: dict[str, Any] | None = None,
    ) -> Update:
        """`guarded` of the matrices of one leaf: direction `(batch..., r, k)`, scale `(batch...)`."""
        extra = extra or {}
        if self.batched:
            return self.guarded(low, state, view=view, params=params, ok=ok, **extra)
        matrix = view.matrix

        def one(low, state, params):
            return self.guarded(low, state, view=matrix, params=params, ok=ok, **extra)

        return _each(one, view)(low, state, params)

    def by_leaf(self, state: Pytree) -> list[Pytree]:
        """The states of the single leaves of a tree, where the transformation is `elementwise`."""
        fields = fields_of(state)
        columns = [jax.tree.leaves(getattr(state, field), is_leaf=self.stored) for field in fields]
        rows = zip(*columns, strict=True)
        return [state._replace(**dict(zip(fields, row, strict=True))) for row in rows]

    def of_leaves(
        self,
        state: Pytree,
        parts: list[Pytree],
        ok: jax.Array | None,
        extra: dict[str, Any],
    ) -> Pytree:
        """State whose leaves moved to `parts`: the inverse of `by_leaf`.

        What the leaves share, such as a count, moves too.
        """
        fields = fields_of(state)
        nothing = state._replace(**dict.fromkeys(fields, ()))
        params = () if self.reads_params else None
        _, _, shared = self.guarded((), nothing, params=params, ok=ok, **extra)

        def tree(field):
            structure = jax.tree.structure(getattr(state, field), is_leaf=self.stored)
            return jax.tree.unflatten(structure, [getattr(part, field) for part in parts])

        return shared._replace(**{field: tree(field) for field in fields})


def shape_of(shape: Shape | int) -> Shape:
    """A shape; a number stands for a vector of that size."""
    return tuple(shape) if isinstance(shape, Sequence) else (int(shape),)


def size_of(shape: Shape | int) -> int:
    """The number of entries of a shape."""
    return math.prod(shape_of(shape))


def _each(function: Callable[..., Pytree], view: ResolvedView) -> Callable[..., Pytree]:
    """`function` of one matrix, vmapped over the batch axes."""
    for _ in view.batch:
        function = jax.vmap(function)
    return function


def map_moments(
    inner: Inner, state: Pytree, function: Callable[[Moment, jax.Array], jax.Array]
) -> Pytree:
    """A decoded `state` with every moment replaced by `function(moment, value)`."""
    by_path = {moment.path: moment for moment in inner.moments(state)}

    def visit(path, value):
        moment = by_path.get(tuple(path))
        return value if moment is None else function(moment, value).astype(value.dtype)

    return jax.tree_util.tree_map_with_path(visit, state)


def of_served(inner: Inner, state: Pytree, served: jax.Array) -> Pytree:
    """A decoded `state` whose moments `(batch..., r, k)` are zero in the rows that are not `served
    (batch..., r)`."""

    def zeroed(moment, value):
        return jnp.where(served[..., None], value, 0)

    return map_moments(inner, state, zeroed)


def first_moment(inner: Inner, state: Pytree) -> tuple[Moment, jax.Array]:
    """The one first moment inside a decoded state, for rules that need it.

    Raises:
      ValueError: where there is none, or more than one, or its decay is unknown.
    """
    firsts = [moment for moment in inner.moments(state) if moment.kind == "first"]
    if len(firsts) != 1 or firsts[0].decay is None:
        raise ValueError(
            f"inner {type(inner).__name__} has {len(firsts)} registered first moments with a known "
            "decay; this rule needs exactly one: use lrx.inner.adam, or from_optax(tx, "
            "decay=(('first', 0.9),)) and register_moments"
        )
    values = {tuple(p): v for p, v in jax.tree_util.tree_flatten_with_path(state)[0]}
    return firsts[0], values[firsts[0].path]
