"""States of `optax.contrib.galore`, so that a run that began there goes on here."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import GaLoreState

from lowrank_jax.checks import is_zero
from lowrank_jax.optim import inner
from lowrank_jax.projection import MatrixState
from lowrank_jax.projection.optimizers import RecipeState
from lowrank_jax.projection.projectors import svd
from lowrank_jax.projection.refresh_schedules import every
from lowrank_jax.projection.transformation import ProjectionTransformation
from lowrank_jax.typing import Pytree, Scalar

Leaves = dict[tuple, jax.Array]


def load(state: Pytree, optimizer: ProjectionTransformation, params: Pytree) -> RecipeState:
    """The state of `optimizer` that goes on where a state of `optax.contrib.galore` stands.

    optax projects the larger dimension of each matrix, rows of squares, by PyTorch's Adam, and decays
    before the step. Of `lrx.galore` that is

        side="larger", tie="rows", inner=lrx.inner.adam(), scale=1.0

    with `rank`, `scale` and `refresh_every` of `optax.contrib.galore(rank, scale=, update_proj_gap=)`
    and the rates and eps of its Adam; weight decay there is `dataclasses.replace(tx.recipe,
    decay="before").optax()` here. No number of these stands in a state, and so none is compared.

    Steps are then the same up to rounding until the next refresh. From there on they are as good as
    the same: a singular vector has no sign, moments stay where they are, and the signs of a LAPACK,
    which optax takes, are not the canonical ones here.

    Args:
      state: of `optax.contrib.galore`, or the `GaLoreState` in it.
      optimizer: `lrx.galore(...)`, with `views` that say which leaves are matrices as
        `weight_dimension_numbers` did; optax projects every leaf of two axes.
      params: what both optimize.

    Returns:
      The state, as `optimizer.init(params)` has it.

    Raises:
      ValueError: where there is no such state or more than one, for what optax cannot have run
        (another projector, inner transformation or order of decay), and for a leaf that is not
        projected alike: its rank, side or stack.

    >>> import lowrank_jax as lrx
    >>> params = {"kernel": jnp.ones((8, 4))}
    >>> theirs = optax.contrib.galore(1e-2, rank=2).init(params)
    >>> tx = lrx.galore(1e-2, rank=2, scale=1.0, side="larger", tie="rows", inner=lrx.inner.adam())
    >>> load(theirs, tx, params).projection.matrices["kernel"].basis.shape
    (8, 2)
    """
    theirs = _state_of(state)
    period = _period_of(optimizer)
    adam = theirs.base_optimizer_state
    if not isinstance(adam, optax.ScaleByAdamState):
        raise ValueError(
            f"base_optimizer: {type(adam).__name__} has no counterpart that is read here; only the "
            "default, optax.scale_by_adam(), is. Start the moments anew with optimizer.init(params)"
        )
    bases, firsts, seconds = (_by_path(tree) for tree in (theirs.projector, adam.mu, adam.nu))
    ours = {path for path, _ in jax.tree_util.tree_leaves_with_path(params)}
    if ours != bases.keys():
        names = sorted(jax.tree_util.keystr(path) for path in ours ^ bases.keys())
        raise ValueError(
            f"params: {names} stand in one of state and params alone; give the same tree"
        )
    start: Any = optimizer.init(params)

    def matrix(path, node):
        if not isinstance(node, MatrixState):
            return node
        moments = [_oriented(node, bases[path], tree[path]) for tree in (firsts, seconds)]
        after = node.inner._replace(count=adam.count, mu=moments[0], nu=moments[1])
        basis = bases[path].astype(node.basis.dtype)
        return dataclasses.replace(node, basis=basis, inner=after)

    def plain(moments):
        def one(path, like):
            if bases[path].size:
                raise ValueError(
                    f"leaf {jax.tree_util.keystr(path)}: optax projected it and optimizer does not; "
                    "give views that make it a matrix"
                )
            return moments[path].astype(like.dtype)

        return one

    is_matrix = lambda node: isinstance(node, MatrixState)  # noqa: E731
    over = jax.tree_util.tree_map_with_path
    projection = start.projection
    rest = projection.plain
    projection = projection._replace(
        step=theirs.count,
        refreshes=(theirs.count + period - 1) // period,
        matrices=over(matrix, projection.matrices, is_leaf=is_matrix),
        plain=rest._replace(
            count=adam.count, mu=over(plain(firsts), rest.mu), nu=over(plain(seconds), rest.nu)
        ),
    )
    return start._replace(projection=projection, rate=start.rate._replace(count=theirs.count))


def _state_of(state: Pytree) -> GaLoreState:
    """The one `GaLoreState` in a state."""
    is_one = lambda node: isinstance(node, GaLoreState)  # noqa: E731
    found = [node for node in jax.tree.leaves(state, is_leaf=is_one) if is_one(node)]
    if len(found) != 1:
        raise ValueError(
            f"state holds {len(found)} states of optax.contrib.galore; give the one that is meant"
        )
    return found[0]


def _period_of(optimizer: Any) -> Scalar:
    """The steps between refreshes of an optimizer that optax's can have been."""
    recipe = getattr(optimizer, "recipe", None)
    if recipe is None:
        raise ValueError(f"optimizer={optimizer!r} must be lrx.galore(...)")
    slots = recipe.projection
    schedule = slots.refresh_schedule
    if type(slots.projector) is not svd or schedule != every(period=getattr(schedule, "period", 1)):
        raise ValueError(
            f"optimizer: {slots.projector!r} with {schedule!r} is not what optax does; "
            "take lrx.galore(..., rank=, refresh_every=)"
        )
    for name in ("inner", "plain"):
        own = getattr(slots, name)
        if type(own) is not inner.adam or own.convention != "torch":
            raise ValueError(
                f"optimizer: {name}={own!r} is not optax.scale_by_adam; give lrx.galore "
                "inner=lrx.inner.adam(b1=, b2=, eps=)"
            )
    if recipe.decay != "before" and not is_zero(recipe.weight_decay):
        raise ValueError(
            f"optimizer: decay={recipe.decay!r} with weight_decay={recipe.weight_decay!r}, where "
            'optax decays before the step; give dataclasses.replace(tx.recipe, decay="before").optax()'
        )
    return schedule.period


def _by_path(tree: Pytree) -> Leaves:
    return dict(jax.tree_util.tree_leaves_with_path(tree))


def _oriented(node: MatrixState, basis: jax.Array, moment: jax.Array) -> jax.Array:
    """A moment of optax's, `(r, k)` or its transpose `(k, r)`, as `(r, k)`."""
    view, name = node.view, f"leaf {node.view.path!r}"
    if view.batch:
        raise ValueError(
            f"{name}: optimizer has a stack of {view.batch} matrices, and optax none; give views "
            "without it, and lrx.galore's own state to stacks"
        )
    if not basis.size:
        raise ValueError(f"{name}: optimizer projects it and optax did not; leave it out of views")
    if basis.shape != node.basis.shape:
        raise ValueError(
            f"{name}: optax keeps a basis {basis.shape}, optimizer one of {node.basis.shape}; give "
            'lrx.galore side="larger", tie="rows", and the rank that optax was given'
        )
    turned = moment if view.side == "rows" else moment.T
    if turned.shape != (view.rank, view.kept):
        raise ValueError(
            f"{name}: optax keeps moments {moment.shape}, not of {(view.rank, view.kept)} or its "
            'transpose; give lrx.galore side="larger", tie="rows"'
        )
    return turned.astype(jnp.float32)


__all__ = ["load"]
__dir__ = functools.partial(sorted, __all__)
