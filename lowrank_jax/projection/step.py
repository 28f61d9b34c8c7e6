"""One update of a whole tree: what the optax form and the fused form share.

`Prepared` holds the leaves after the decisions that concern all of them: is a refresh due, is
everything finite, do projected gradients belong to the bases of this state, which factor clips.
What remains is to finish leaf by leaf, which the optax form does to updates and the fused form to
parameters.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lowrank_jax import sharding
from lowrank_jax.checks import check_floating
from lowrank_jax.matrices import ResolvedView
from lowrank_jax.optim.guard import all_finite, energy
from lowrank_jax.projection import layout
from lowrank_jax.projection.batches import count, layer_numbers
from lowrank_jax.projection.matrix_step import MatrixStep, sketch_basis
from lowrank_jax.projection.refresh_schedules import Staggered
from lowrank_jax.projection.slots import Projection
from lowrank_jax.projection.state import MatrixState, Projected, ProjectionState, matrix_states
from lowrank_jax.trees import is_quantized, pure


def flatten(tree: Any) -> tuple[list[Any], Any]:
    """Leaves and structure, with projected gradients and quantised arrays as one leaf each."""
    return jax.tree.flatten(tree, is_leaf=lambda x: isinstance(x, Projected) or is_quantized(x))


def only_plain(treedef: Any, leaves: list[Any], views: list[ResolvedView | None]) -> Any:
    """The tree with `optax.MaskedNode` in place of the projected leaves, without nnx Variables, as
    states are."""
    left = [
        leaf if view is None else optax.MaskedNode()
        for leaf, view in zip(leaves, views, strict=True)
    ]
    return pure(jax.tree.unflatten(treedef, left))


@dataclasses.dataclass
class Prepared:
    """An update before it is finished.

    Attributes:
      treedef, references: structure of the parameters and their leaves (of the gradients, where
        there are no parameters).
      gradients: leaves.
      views: of each leaf, or None.
      paths: of each leaf.
      steps: of each projected leaf, by its number.
      due: the clock's scalar, with everything that forbids a refresh taken into account.
      moved: whether any basis moves at this step, if the step is accepted.
      ok: scalar, or None where nothing can go wrong.
      factor: of clipping, or None.
    """

    treedef: Any
    references: list[Any]
    gradients: list[Any]
    views: list[ResolvedView | None]
    paths: list[str]
    steps: dict[int, MatrixStep]
    due: Any
    moved: Any
    ok: Any
    factor: Any

    def plain(self, leaves: list[Any]) -> Any:
        return only_plain(self.treedef, leaves, self.views)


def prepare(
    config: Projection,
    updates: Any,
    state: ProjectionState,
    params: Any,
    taps: Any,
    rebased: bool = False,
) -> Prepared:
    """Projects, moves the bases that move before the update (unless `rebased`), and decides for the
    whole tree."""
    leaves, treedef = flatten(updates)
    references = leaves
    if params is not None:
        references, treedef = flatten(params)
    _check_projected(leaves, references, params, taps)
    check_floating(updates, "gradients")
    report = config.report(updates if params is None else params)
    views = [leaf.view for leaf in report.leaves]
    leaves = [
        layout.as_parameter(own.path, leaf) for own, leaf in zip(report.leaves, leaves, strict=True)
    ]
    matrices = _leaves_of(state.matrices, views)
    _check_state(config, leaves, views, matrices)
    steps = {
        i: MatrixStep(config, view, matrices[i], leaves[i], references[i])
        for i, view in enumerate(views)
        if view is not None
    }
    due, whole = _due(
        config, state.step, [leaf for leaf in leaves if not isinstance(leaf, Projected)]
    )
    moved = due_any(config, state.step, [view for view in views if view is not None])
    fits: Any = True
    if taps is not None:
        fits = jnp.asarray(taps.refreshes == state.refreshes)
        fits = fits if rebased else fits & ~_lacks(config, steps.values(), moved)
        due = False if due is False else due & fits
    if rebased:
        due, whole = False, None
    for step in steps.values():
        step.look(due, state.step)
    if config.clock.when == "before":
        for step in steps.values():
            step.refresh(due, state.step)
    for step in steps.values():
        step.project()
    plain = [leaf for leaf, view in zip(leaves, views, strict=True) if view is None]
    kept = [step.kept for step in steps.values()] + plain
    ok: Any = None if taps is None else fits
    if config.guard:
        ok = (
            all_finite([step.judged for step in steps.values()] + plain)
            & fits
            & (True if whole is None else whole)
        )
        ok = ok & jnp.isfinite(sum((energy(x) for x in kept), jnp.zeros(())))
    factor = None if config.clip_norm is None else _clip_factor(config, kept)
    paths = [leaf.path for leaf in report.leaves]
    return Prepared(treedef, references, leaves, views, paths, steps, due, moved, ok, factor)


def rebase(
    config: Projection, updates: Any, state: ProjectionState, params: Any
) -> tuple[Any, ProjectionState]:
    """`(projected gradients, state)`: the part of an update that reads full gradients, for bases
    that move before it.

    The rest of the update is `prepare(..., rebased=True)`. Where a gradient is not finite nothing
    moves, and projected gradients of NaN tell the rest.
    """
    if config.clock.when == "after":
        raise ValueError(
            f"clock={config.clock!r} moves bases after the update; rebase serves those that move "
            "before"
        )
    prepared = prepare(config, updates, state, params, None)
    leaves = list(prepared.gradients)
    for i, step in prepared.steps.items():
        # what was not accepted here must not be there, though its projection may be finite
        leaves[i] = Projected(
            step.low if prepared.ok is None else jnp.where(prepared.ok, step.low, jnp.nan)
        )
    matrices = [step.state() for step in prepared.steps.values()]
    return (
        jax.tree.unflatten(prepared.treedef, leaves),
        state._replace(matrices=replace_matrices(state.matrices, matrices)),
    )


def finished(
    config: Projection, prepared: Prepared, state: ProjectionState, plain: Any
) -> ProjectionState:
    """The new state, after every leaf was finished: bases that move after the update move here."""
    ok, due = prepared.ok, prepared.due
    for step in prepared.steps.values():
        if config.clock.when == "after":
            step.refresh(due if ok is None or due is False else ok & due, state.step)
    accepted = jnp.asarray(1 if ok is None else ok, jnp.int32)
    return state._replace(
        step=state.step + accepted,
        skipped=state.skipped + 1 - accepted,
        refreshes=state.refreshes + accepted * jnp.asarray(prepared.moved, jnp.int32),
        matrices=replace_matrices(
            state.matrices, [step.state() for step in prepared.steps.values()]
        ),
        plain=plain,
    )


def update_plain(
    config: Projection, prepared: Prepared, state: Any, params: Any, extra: dict[str, Any]
):
    """`([update of each plain leaf], new state)`."""
    grads, factor, ok = prepared.plain(prepared.gradients), prepared.factor, prepared.ok
    grads = jax.tree.map(lambda g: g.astype(jnp.float32) if factor is None else g * factor, grads)
    given = None
    if params is not None and config.plain.reads_params:
        given = prepared.plain(prepared.references)
    direction, scale, new = config.plain.guarded(grads, state, params=given, ok=ok, **extra)
    updates = [jnp.asarray(scale * x) for x in jax.tree.leaves(direction)]
    return updates if ok is None else [jnp.where(ok, x, 0) for x in updates], new


def update(
    config: Projection, updates: Any, state: ProjectionState, params: Any, extra: dict[str, Any]
):
    """The optax form: `(updates, state)`."""
    prepared = prepare(config, updates, state, params, extra.pop("taps", None))
    references = prepared.references
    if any(map(is_quantized, references)):
        raise ValueError(
            "params: quantised leaves cannot take an update by addition; use lrx.fused(tx).step"
        )
    outputs: list[Any] = list(references)
    for i, step in prepared.steps.items():
        value = step.view.restore(step.finish(prepared.factor, prepared.ok, extra)).astype(
            references[i].dtype
        )
        like = (
            references[i] if isinstance(prepared.gradients[i], Projected) else prepared.gradients[i]
        )
        outputs[i] = sharding.reshard(value, sharding.explicit_spec(like))
    plain_updates, plain = update_plain(config, prepared, state.plain, params, extra)
    for i, value in zip(
        [i for i, v in enumerate(prepared.views) if v is None], plain_updates, strict=True
    ):
        outputs[i] = value.astype(references[i].dtype)
    return jax.tree.unflatten(prepared.treedef, outputs), finished(config, prepared, state, plain)


def due(config: Projection, state: ProjectionState) -> Any:
    """Scalar: does a basis move at the next step? A Python bool where that does not depend on the
    step."""
    return due_any(config, state.step, [matrix.view for matrix in matrix_states(state)])


def sketch_bases(config: Projection, state: ProjectionState) -> dict[str, jax.Array]:
    """`{path: (batch..., k, q)}`: what a refresh through taps contracts the gradients with, for
    `lrx.taps`."""
    return {
        matrix.view.path: sketch_basis(
            config, matrix.view, matrix, state.step, layer_numbers(matrix.view)
        )
        for matrix in matrix_states(state)
    }


def due_any(config: Projection, step: jax.Array, views: list[ResolvedView]) -> Any:
    """Scalar: does any basis move at this step? A Python bool where that does not depend on the
    step."""
    if not config.projector.moves or not views:
        return False
    clock = config.clock
    if not isinstance(clock, Staggered):
        return clock.due(step)
    work = [clock.start(step, config.phase(view), count(view)) < count(view) for view in views]
    return (step == 0) | jnp.any(jnp.stack([jnp.asarray(x) for x in work]))


def _lacks(config: Projection, steps: Any, moved: Any) -> jax.Array:
    """Whether a refresh is due for which a projected gradient brought nothing."""
    projected = [step for step in steps if step.target is None]
    before = config.clock.when == "before"
    if moved is False or not any(before or not step.can_refresh for step in projected):
        return jnp.asarray(False)
    if moved is True:
        raise ValueError(
            f"clock={config.clock!r} moves {type(config.projector).__name__} at every step by full "
            "gradients: take jax.value_and_grad(loss), or a projector that refreshes through taps "
            "(alternating, randomized(iterations=0)) with when='after' and its sketch"
        )
    return jnp.asarray(moved)


def _due(config: Projection, step: jax.Array, grads: list[jax.Array]) -> tuple[Any, Any]:
    """The clock's scalar, and whether the gradients at a due refresh are finite (None where that is
    not tested).

    A Python bool means that the answer does not depend on the step.
    """
    if not config.projector.moves:
        return False, None
    due = True if isinstance(config.clock, Staggered) else config.clock.due(step)
    if not config.guard or config.clock.when == "after":
        return due, None
    if due is True:
        whole = all_finite(grads)
        return whole, whole
    whole = jax.lax.cond(due, lambda: all_finite(grads), lambda: jnp.asarray(True))
    return due & whole, whole


def _clip_factor(config: Projection, kept: list[jax.Array]) -> jax.Array:
    """`min(1, clip_norm / |kept|)`, over what is kept of projected leaves and over plain ones
    alike."""
    norm = jnp.sqrt(sum((energy(x) for x in kept), jnp.zeros(())))
    return jnp.minimum(1.0, config.clip_norm / jnp.maximum(norm, 1e-30))


def _leaves_of(matrices: Any, views: list[ResolvedView | None]) -> list[Any]:
    """The `MatrixState` of each leaf, or None."""
    nodes = jax.tree.leaves(matrices, is_leaf=lambda x: isinstance(x, MatrixState))
    found = {node.view.path: node for node in nodes if isinstance(node, MatrixState)}
    return [None if view is None else found.get(view.path) for view in views]


def _check_projected(leaves: list[Any], references: list[Any], params: Any, taps: Any) -> None:
    projected = any(isinstance(leaf, Projected) for leaf in leaves)
    if projected and (params is None or taps is None):
        raise ValueError(
            "updates hold projected gradients: call update(grads, state, params, taps=taps) with "
            "the taps that lrx.projected_value_and_grad took, so that gradients of another basis "
            "are noticed"
        )
    if len(leaves) != len(references):
        raise ValueError(
            f"updates have {len(leaves)} leaves and params {len(references)}; give trees of one "
            "structure"
        )


def _check_state(
    config: Projection, leaves: list[Any], views: list[Any], matrices: list[Any]
) -> None:
    kind = config.projector.structure()
    for leaf, view, matrix in zip(leaves, views, matrices, strict=True):
        if view is None:
            if isinstance(leaf, Projected):
                raise ValueError(
                    "a leaf that this transformation does not project came projected; give its own "
                    "taps"
                )
            continue
        if matrix is None or matrix.view != view.structure() or matrix.projector != kind:
            raise ValueError(
                f"leaf {view.path!r}: the state was made for "
                f"{None if matrix is None else (matrix.view, matrix.projector)}, the update "
                f"resolves to {(view.structure(), kind)}; give update the tree, projector, views, "
                "rank and sides that init saw"
            )


def replace_matrices(tree: Any, matrices: list[Any]) -> Any:
    """`tree` with its `MatrixState` nodes replaced, by path."""
    found = {node.view.path: node for node in matrices if node is not None}
    is_state = lambda x: isinstance(x, MatrixState)  # noqa: E731
    return jax.tree.map(
        lambda node: found[node.view.path] if is_state(node) else node, tree, is_leaf=is_state
    )
