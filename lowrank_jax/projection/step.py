"""One update of a whole tree: what the optax form and the fused form share.

`Prepared` holds the leaves after the decisions that concern all of them: is a refresh due, is
everything finite, do projected gradients belong to the bases of this state, which factor clips.
What remains is to finish leaf by leaf, which the optax form does to updates and the fused form to
parameters.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_jax import sharding
from lowrank_jax.checks import check_floating
from lowrank_jax.matrices import ResolvedView
from lowrank_jax.optim.guard import all_finite, energy, select
from lowrank_jax.projection import layout
from lowrank_jax.projection.batches import count, layer_numbers
from lowrank_jax.projection.matrix_step import MatrixStep, sketch_basis
from lowrank_jax.projection.placement import like
from lowrank_jax.projection.slots import Projection
from lowrank_jax.projection.state import (
    MatrixState,
    Now,
    Projected,
    ProjectionState,
    Rebased,
    Sketch,
    matrix_states,
)
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
      due: the schedule's scalar, with everything that forbids a refresh taken into account.
      moved: whether any basis moves at this step, if the step is accepted.
      now: where the step stands.
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
    now: Now

    def plain(self, leaves: list[Any]) -> Any:
        return only_plain(self.treedef, leaves, self.views)


class Decision(NamedTuple):
    """What is decided for the whole tree before a leaf is projected.

    Attributes:
      moved: whether any basis moves at this step, if the step is accepted.
      due: the scalar without which none moves.
      begins: whether first bases are made before the update.
      whole: whether the gradients that bases are made of are finite; None where that is not tested.
      fits: whether projected gradients belong to these bases and bring what is due.
    """

    moved: Any
    due: Any
    begins: Any
    whole: Any
    fits: Any


def prepare(
    config: Projection,
    updates: Any,
    state: ProjectionState,
    params: Any,
    taps: Any,
    rebased: Rebased | None = None,
    learning_rate: Any = None,
) -> Prepared:
    """Projects, moves the bases that move before the update (unless `rebased` has), and decides for
    the whole tree."""
    now = now_of(config, state, learning_rate)
    leaves, treedef = flatten(updates)
    references = leaves
    if params is not None:
        references, treedef = flatten(params)
    _check_projected(leaves, references, params, taps)
    check_floating(updates, "gradients")

    report = config.report(updates if params is None else params)
    views = [leaf.view for leaf in report.leaves]
    paths = [leaf.path for leaf in report.leaves]
    leaves = list(map(layout.as_parameter, paths, leaves))
    matrices = _leaves_of(state.matrices, views)
    _check_state(config, leaves, views, matrices)

    steps, plain = {}, []
    for i, view in enumerate(views):
        if view is None:
            plain.append(leaves[i])
            continue
        steps[i] = MatrixStep(config, view, matrices[i], leaves[i], references[i])

    full = [leaf for leaf in leaves if not isinstance(leaf, Projected)]
    decision = _decide(config, state, steps, full, taps, rebased, now)
    _move_and_project(config, list(steps.values()), decision, now)

    kept = [step.kept for step in steps.values()] + plain
    ok: Any = None if taps is None else decision.fits
    if config.guard:
        judged = [step.judged for step in steps.values()] + plain
        ok = _accepted(judged, kept, decision)
    factor = None if config.clip_norm is None else _clip_factor(config, kept)
    return Prepared(
        treedef=treedef,
        references=references,
        gradients=leaves,
        views=views,
        paths=paths,
        steps=steps,
        due=decision.due,
        moved=decision.moved,
        ok=ok,
        factor=factor,
        now=now,
    )


def _decide(
    config: Projection,
    state: ProjectionState,
    steps: dict[int, MatrixStep],
    full: list[jax.Array],
    taps: Any,
    rebased: Rebased | None,
    now: Now,
) -> Decision:
    """What moves at this step; `full` are the gradients that did not come projected."""
    whole: Any = None
    may_move: Any = False
    if rebased is not None:  # bases have moved, and are not asked again
        moved = rebased.moved
    else:
        moved = due(config, state)
        may_move, whole = _may_move(config, moved, full)

    fits: Any = True
    if taps is not None:
        fits = _belong(taps, state, steps)
        if rebased is None:
            fits = fits & ~_lacks(config, steps, moved, now)
        may_move = False if may_move is False else may_move & fits

    # refreshes come after the update here, so that nothing else has tested the gradients
    begins: Any = False
    if config.starts_before and rebased is None:
        begins, whole = starts(config, now, full)
    return Decision(moved, may_move, begins, whole, fits)


def _move_and_project(
    config: Projection,
    steps: list[MatrixStep],
    decision: Decision,
    now: Now,
) -> None:
    """Sketches, then bases that move before the update, then low-rank objects, in all leaves."""
    sketches = decision.due
    if config.starts_before:
        sketches = sketches | decision.begins
    for step in steps:
        step.look(sketches, now)
        step.start(decision.begins, now)
    if config.refresh_schedule.when == "before":
        for step in steps:
            step.refresh(decision.due, now)
    for step in steps:
        step.project()


def _accepted(judged: list[jax.Array], kept: list[jax.Array], decision: Decision) -> jax.Array:
    """The guard: whether all that the step reads is finite, and belongs together."""
    ok = all_finite(judged) & decision.fits
    ok = ok & (True if decision.whole is None else decision.whole)
    # what earlier steps fed back may overflow where the gradient does not
    square = sum((energy(x) for x in kept), jnp.zeros(()))
    return ok & jnp.isfinite(square)


def rebase(
    config: Projection,
    updates: Any,
    state: ProjectionState,
    params: Any,
    learning_rate: Any = None,
) -> tuple[Any, ProjectionState, Rebased]:
    """`(projected gradients, state, what moved)`: the part of an update that reads full gradients,
    for bases that move before it.

    The rest of the update is `prepare(..., rebased=what moved)`. Where a gradient is not finite
    nothing moves, and projected gradients of NaN tell the rest.
    """
    if config.refresh_schedule.when == "after":
        raise ValueError(
            f"refresh_schedule={config.refresh_schedule!r} moves bases after the update; rebase "
            "serves those that move before"
        )
    prepared = prepare(config, updates, state, params, None, learning_rate=learning_rate)
    leaves, ok = list(prepared.gradients), prepared.ok
    for i, step in prepared.steps.items():
        # what was not accepted here must not be there, though its projection may be finite
        low = step.low if ok is None else jnp.where(ok, step.low, jnp.nan)
        leaves[i] = Projected(low)
    gradients = jax.tree.unflatten(prepared.treedef, leaves)
    rebased = Rebased(jnp.asarray(prepared.moved))
    return gradients, _with_matrices(state, prepared), rebased


def _with_matrices(state: ProjectionState, prepared: Prepared) -> ProjectionState:
    """The state with the matrices as they are so far."""
    new = [step.state() for step in prepared.steps.values()]
    return state._replace(matrices=replace_matrices(state.matrices, new))


def next_state(
    config: Projection, prepared: Prepared, state: ProjectionState, plain: Any
) -> ProjectionState:
    """The new state, after every leaf was written: bases that move after the update move here."""
    ok, due, now = prepared.ok, prepared.due, prepared.now
    for step in prepared.steps.values():
        if config.refresh_schedule.when == "after":
            always = ok is None or due is False
            step.refresh(due if always else ok & due, now)
        step.advance(ok, now)

    # a skipped step counts itself, and leaves all else to be made again
    accepted = jnp.asarray(1 if ok is None else ok, jnp.int32)
    moved = accepted * jnp.asarray(prepared.moved, jnp.int32)
    new = _with_matrices(state, prepared)
    return new._replace(
        refresh_schedule=next_schedule(config, state, prepared.moved, accepted),
        step=state.step + accepted,
        skipped=state.skipped + 1 - accepted,
        refreshes=state.refreshes + moved,
        plain=plain,
    )


def next_schedule(config: Projection, state: ProjectionState, moved: Any, accepted: Any) -> Any:
    """The state of a schedule of the whole tree after a step."""
    schedule, old = config.refresh_schedule, state.refresh_schedule
    if schedule.per_layer:
        return ()
    moved = accepted * jnp.asarray(moved, jnp.int32) > 0
    refreshed = like(schedule.refreshed(old, step=state.step), old)
    new = select(moved, refreshed, old)
    advanced = like(schedule.advance(new, step=state.step), old)
    return select(accepted > 0, advanced, old)


def now_of(config: Projection, state: ProjectionState, learning_rate: Any) -> Now:
    """Where a step stands; ValueError where the projector reads a rate that nobody passes."""
    if config.reads_learning_rate and learning_rate is None:
        raise ValueError(
            f"projector {type(config.projector).__name__} reads the learning rate, which "
            "scale_by_projection does not know: call update(..., learning_rate=rate), or use a "
            "named optimizer, which passes its own"
        )
    schedule = config.refresh_schedule
    all_layers = schedule.due(state.refresh_schedule, state.step) if schedule.sliced else False
    return Now(state.step, state.refreshes, learning_rate, all_layers)


def update_plain(
    config: Projection, prepared: Prepared, state: Any, params: Any, extra: dict[str, Any]
):
    """`([update of each plain leaf], new state)`."""
    factor, ok = prepared.factor, prepared.ok

    def clipped(g):
        return g.astype(jnp.float32) if factor is None else g * factor

    grads = jax.tree.map(clipped, prepared.plain(prepared.gradients))
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
    rate = extra.pop("learning_rate", None)
    prepared = prepare(config, updates, state, params, extra.pop("taps", None), learning_rate=rate)
    references = prepared.references
    if any(map(is_quantized, references)):
        raise ValueError(
            "params: quantised leaves cannot take an update by addition; use lrx.fused(tx).step"
        )
    outputs: list[Any] = list(references)
    for i, step in prepared.steps.items():
        oriented = step.update(prepared.factor, prepared.ok, extra)
        value = step.view.restore(oriented).astype(references[i].dtype)
        gradient = prepared.gradients[i]
        lies_as = references[i] if isinstance(gradient, Projected) else gradient
        outputs[i] = sharding.reshard(value, sharding.explicit_spec(lies_as))
    plain_updates, plain = update_plain(config, prepared, state.plain, params, extra)
    numbers = [i for i, view in enumerate(prepared.views) if view is None]
    for i, value in zip(numbers, plain_updates, strict=True):
        outputs[i] = value.astype(references[i].dtype)
    new_state = next_state(config, prepared, state, plain)
    return jax.tree.unflatten(prepared.treedef, outputs), new_state


def due(config: Projection, state: ProjectionState) -> Any:
    """Scalar: does any basis move at the next step? A Python bool where that does not depend on
    step and state."""
    if not config.projector.moves or not matrix_states(state):
        return False
    found = _scheduled(config, state)
    if config.starts_before and found is not True:
        found = found | (state.step == 0)
    return found


def _scheduled(config: Projection, state: ProjectionState) -> Any:
    """`due`, by the refresh schedule alone."""
    schedule, matrices = config.refresh_schedule, matrix_states(state)
    if schedule.per_layer:
        own = [schedule.due(matrix.refresh_schedule, state.step) for matrix in matrices]
        anywhere = [jnp.any(jnp.asarray(x)) for x in own]
        return functools.reduce(jnp.logical_or, anywhere)
    everything = schedule.due(state.refresh_schedule, state.step)
    if not schedule.sliced:
        return everything
    work = []
    for matrix in matrices:
        layers = count(matrix.view)
        part = schedule.slice(state.step, config.phase(matrix.view), layers)
        # a slice past the last layer of a stack is empty
        work += [] if part is None else [jnp.asarray(part[0] < layers)]
    return everything | jnp.any(jnp.stack(work)) if work else everything


def sketch_bases(
    config: Projection, state: ProjectionState, learning_rate: Any = None
) -> dict[str, Sketch]:
    """`{path: (batch..., k, q)}`: what a refresh through taps contracts the gradients with, for
    `lrx.taps`."""
    now = now_of(config, state, learning_rate)
    found = {}
    for matrix in matrix_states(state):
        view = matrix.view
        numbers = layer_numbers(view)
        found[view.path] = sketch_basis(config, view, matrix, now, numbers)
    return found


def _belong(taps: Any, state: ProjectionState, steps: dict[int, MatrixStep]) -> jax.Array:
    """Whether projected gradients were made with the bases of this state."""
    paths = [step.view.path for step in steps.values() if step.matrix is None]
    missing = sorted(set(paths) - set(taps.refreshes))
    if missing:
        raise ValueError(
            f"taps: {missing} came projected and have no tap; give the taps that the gradients "
            "were taken with"
        )
    counts = {id(taps.refreshes[path]): taps.refreshes[path] for path in paths}
    alike = [jnp.asarray(refreshes == state.refreshes) for refreshes in counts.values()]
    return functools.reduce(jnp.logical_and, alike, jnp.asarray(True))


def _lacks(config: Projection, steps: dict[int, MatrixStep], moved: Any, now: Now) -> jax.Array:
    """Whether a refresh is due for which a projected gradient brought nothing."""
    projected = [step for step in steps.values() if step.matrix is None]
    before = config.refresh_schedule.when == "before"
    if moved is False or not any(before or not step.can_refresh for step in projected):
        starting = bool(projected) and config.starts_before
        return jnp.asarray(now.step == 0 if starting else False)
    if moved is True:
        raise ValueError(
            f"refresh_schedule={config.refresh_schedule!r} moves {type(config.projector).__name__} "
            "at every step by full gradients: take jax.value_and_grad(loss), or a projector that "
            "refreshes through taps (alternating, randomized(iterations=0)) with when='after' and its sketch"
        )
    return jnp.asarray(moved)


def _may_move(config: Projection, moved: Any, grads: list[jax.Array]) -> tuple[Any, Any]:
    """The scalar without which no basis moves, and whether the gradients at a due refresh are finite
    (None where that is not tested).

    A Python bool means that the answer does not depend on step and state.
    """
    if moved is False or not config.guard or config.refresh_schedule.when == "after":
        return moved, None
    if moved is True:
        whole = all_finite(grads)
        return whole, whole
    whole = jax.lax.cond(moved, lambda: all_finite(grads), lambda: jnp.asarray(True))
    return moved & whole, whole


def starts(config: Projection, now: Now, grads: list[jax.Array]) -> tuple[jax.Array, Any]:
    """`(whether a first basis is made at this step, whether its gradients are finite)`; the second
    is None where that is not tested, and true at all later steps."""
    first = jnp.asarray(now.step == 0)
    if not config.guard:
        return first, None
    whole = jax.lax.cond(first, lambda: all_finite(grads), lambda: jnp.asarray(True))
    return first & whole, whole


def _clip_factor(config: Projection, kept: list[jax.Array]) -> jax.Array:
    """`min(1, clip_norm / |kept|)`, over what is kept of projected leaves and over plain ones
    alike."""
    square = sum((energy(x) for x in kept), jnp.zeros(()))
    norm = jnp.maximum(jnp.sqrt(square), 1e-30)
    return jnp.minimum(1.0, config.clip_norm / norm)


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
