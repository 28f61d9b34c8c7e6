"""The one projection transformation: its slots, joined.

A step of one matrix, oriented `(batch..., s, k)` with basis `P (batch..., s, r)`; `reference` has it
for one matrix alone:

    K         = target(G)              the gradient, gradient plus fed-back error, or a momentum
    P, memory = refresh(K)             where the refresh schedule says so, then transport of the moments
    R         = PᵀK                    down
    d, c      = inner(R)               direction and scale, one inner state for each matrix
    U         = combine(K, R, d, c)    residual rule: up(c d), plus or instead of the rest

Whether a refresh is due is one scalar for the whole tree, tested outside any vmap. Leaves that are
not projected form one ordinary group with an inner state of their own.

NaN guard: a step counts as finite if the norm of what is kept of its gradients is at most 2^40,
about 1e12, so that no moment, fed-back error or product of them overflows at any later step either.
Full matrices are read for it only at a due refresh; a normal step tests `R` (a non-finite gradient
makes its low-rank object non-finite, unless it lies in coordinates that a `columns` basis drops),
or the gradient where the residual rule reads it anyway. If a step is not finite, every update is
zero and every field of the state is what it was, except `skipped`; a due refresh stays due.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lowrank_jax import deprecations, sharding
from lowrank_jax.checks import check_floating
from lowrank_jax.optim.inner import Inner
from lowrank_jax.projection import contract
from lowrank_jax.projection import step as step_lib
from lowrank_jax.projection.active import sampled
from lowrank_jax.projection.matrix_step import check_slots, fresh_state
from lowrank_jax.projection.projectors.base import Projector
from lowrank_jax.projection.refresh_schedules import RefreshSchedule
from lowrank_jax.projection.residuals import Residual
from lowrank_jax.projection.samplers import Sampler
from lowrank_jax.projection.slots import Projection
from lowrank_jax.projection.state import FORMAT_VERSION, ProjectionState
from lowrank_jax.projection.targets import Target
from lowrank_jax.projection.transports import Transport
from lowrank_jax.resolution import Report, Views
from lowrank_jax.trees import as_float32, is_placeholder, pure
from lowrank_jax.typing import Pytree, Scalar


def init(config: Projection, params: Pytree) -> ProjectionState:
    """The state of a projection before its first step."""
    with sharding.mesh_of(params):
        return sharding.replicate_rest(_init(config, params))


def _init(config: Projection, params: Pytree) -> ProjectionState:
    check_floating(params, "projection")
    asked_for_structure = is_placeholder(params)  # there are no leaves that rules could match
    report = Report(()) if asked_for_structure else config.report(params)
    leaves, treedef = step_lib.flatten(params)
    views = [leaf.view for leaf in report.leaves]
    kinds = list(contract.different(config, views))
    for kind in kinds:
        contract.check_projector(kind)
    matrices = [optax.MaskedNode() if view is None else fresh_state(config, view) for view in views]
    for view, matrix in zip(views, matrices, strict=True):
        if view is not None:
            check_slots(config, matrix)
    for kind in kinds:
        contract.check_other_slots(kind)
    plain = step_lib.only_plain(treedef, leaves, views)
    low = jnp.zeros(()) if asked_for_structure else pure(jax.tree.unflatten(treedef, matrices))
    zero = functools.partial(jnp.zeros, (), jnp.int32)
    schedule = config.refresh_schedule
    return ProjectionState(
        format_version=jnp.asarray(FORMAT_VERSION, jnp.int32),
        step=zero(),
        skipped=zero(),
        partly_skipped=zero(),
        refreshes=zero(),
        matrices=low,
        plain=config.plain.init_group(jax.tree.map(as_float32, plain)),
        refresh_schedule=() if schedule.per_layer else schedule.init(()),
    )


def update(
    config: Projection, updates: Pytree, state: ProjectionState, params: Pytree = None, **extra: Any
) -> tuple[Any, ProjectionState]:
    """`(updates, state)` of one step, see `scale_by_projection`."""
    with sharding.mesh_of((updates, params)):
        return step_lib.update(config, updates, state, params, extra)


class ProjectionTransformation(optax.GradientTransformationExtraArgs):
    """An optax transformation that remembers the `Projection` it was made from."""

    projection: Projection

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.projection!r})"


@deprecations.options("lrx.scale_by_projection")
def scale_by_projection(
    projector: Projector,
    *,
    inner: Inner | optax.GradientTransformation | None = None,
    refresh_schedule: RefreshSchedule | None = None,
    transport: Transport | None = None,
    target: Target | None = None,
    residual: Residual | None = None,
    sampler: Sampler | None = None,
    scale: Scalar = 1.0,
    side: Any = "paper",
    tie: str = "rows",
    views: Views | None = None,
    plain: Inner | optax.GradientTransformation | None = None,
    guard: bool = True,
    clip_norm: Scalar | None = None,
    seed: Scalar = 0,
) -> ProjectionTransformation:
    """Runs an inner optimizer in a low-rank subspace of each matrix: the one projection
    transformation.

    Returns the positive direction, as optax's `scale_by_*` do; chain a learning rate after it.

    Args:
      projector: which subspace, one of `lrx.projectors`.
      inner: what runs inside, `lrx.inner.adam(...)` (default) or any optax transformation.
      refresh_schedule: when the basis moves, one of `lrx.refresh_schedules` (default
        `every(period=200)`).
      transport: what becomes of the moments, one of `lrx.transports` (default `keep()`).
      target: what is projected, one of `lrx.targets` (default `gradient()`).
      residual: what becomes of the rest of it, one of `lrx.residuals` (default `discard()`).
      sampler: which layers are active, one of `lrx.samplers` (default `all()`); the others keep no
        state and do not move. Needs full gradients, and serves the optax form.
      scale: factor on the step inside the subspace (GaLore's alpha), a number or one of
        `lrx.scales`; a residual rule has its own.
      side, tie: which dimension is shrunk, and which of a square; see `lrx.resolution.resolve`.
      views: which leaves are matrices, `lrx.Views(...)`.
      plain: the inner transformation of leaves that are not projected (default: `inner`).
      guard: skip, and count, steps whose gradients are not finite or have a norm above 2^40, about
        1e12.
      clip_norm: clip the global norm of what is kept: low-rank gradients (full ones where the
        residual rule or the target reads them) and plain gradients alike. With error feedback that
        is `K = G + E`: what clipping takes away is gone, and `E <- c K - up(down(c K))`.
      seed: of random bases and sketches.

    Raises:
      ValueError: for slots that do not fit together, rules that match nothing, ranks that exceed a
        dimension; all at construction or `init`, naming field, value and remedy.

    >>> import jax.numpy as jnp, optax
    >>> import lowrank_jax as lrx
    >>> tx = optax.chain(
    ...     lrx.scale_by_projection(lrx.projectors.dct(rank=2)), optax.scale_by_learning_rate(1e-2)
    ... )
    >>> params = {"dense": {"kernel": jnp.ones((4, 6)), "bias": jnp.ones(6)}}
    >>> state = tx.init(params)
    >>> updates, state = tx.update(params, state, params)
    >>> state[0].matrices["dense"]["kernel"]
    MatrixState('dense/kernel', rank=2, shrinks=rows, basis=[(2,)], 108 bytes)
    """
    slots = {
        "inner": inner,
        "refresh_schedule": refresh_schedule,
        "transport": transport,
        "target": target,
        "residual": residual,
        "sampler": sampler,
        "scale": scale,
        "side": side,
        "tie": tie,
        "views": views,
        "plain": plain,
        "guard": guard,
        "clip_norm": clip_norm,
        "seed": seed,
    }
    given = {name: value for name, value in slots.items() if value is not None}
    return transformation_of(Projection(projector=projector, **given))


def transformation_of(projection: Projection) -> ProjectionTransformation:
    """The optax form of a `Projection`."""

    def build(own):
        return functools.partial(init, own), functools.partial(update, own)

    functions = build(projection)
    if projection.sampler.samples:
        functions = sampled(projection, build, lambda state: state, lambda _, new: new)
    transformation = ProjectionTransformation(*functions)
    transformation.projection = projection
    return transformation


def explain(transformation: Any, params: Pytree) -> Report:
    """What a projection optimizer does with each leaf, as a printable report.

    >>> import jax.numpy as jnp
    >>> import lowrank_jax as lrx
    >>> print(
    ...     lrx.explain(
    ...         lrx.galore(1e-2, rank=4),
    ...         {"dense": {"kernel": jnp.ones((8, 16)), "bias": jnp.ones(16)}},
    ...     )
    ... )
    leaf          shape    matrices  rank  shrinks  note
    dense/bias    (16,)    -         -     -        not named kernel (1-D)
    dense/kernel  (8, 16)  8x16      4     rows     default
    1 of 2 leaves projected: 128 of 144 parameters (88.9 %)

    Raises:
      TypeError: for a transformation that was not made by this library (an optax chain hides what
        is inside it).
    """
    return projection_of(transformation).report(params)


def projection_of(transformation: Any) -> Projection:
    """The `Projection` behind a transformation of this library; TypeError for any other.

    >>> import lowrank_jax as lrx
    >>> lrx.projection.projection_of(lrx.galore(1e-2, rank=8)).scale
    0.25
    """
    projection = getattr(transformation, "projection", None)
    if projection is None:
        raise TypeError(
            f"{type(transformation).__name__} was not made by lowrank_jax. Nothing can look inside "
            "optax.chain or inject_hyperparams: pass the transformation itself, lrx.galore(...) or "
            "lrx.scale_by_projection(...)"
        )
    return projection
