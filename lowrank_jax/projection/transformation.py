"""The one projection transformation: projector, clock, transport, inner, residual and storage
joined.

A step of one matrix, oriented `(batch..., s, k)` with basis `P (batch..., s, r)`:

    K        = target(G)                        residual rule: the gradient, or gradient plus fed-back error
    P, state = refresh(K) if the clock is due   projector, then transport of the moments
    R        = PᵀK                              down
    d, c     = inner(R)                         direction and scale, one inner state for each matrix
    U        = combine(K, R, d, c)              residual rule: up(c d), plus or instead of the rest

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

import dataclasses
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lowrank_jax import sharding
from lowrank_jax.checks import check_floating, check_integer, check_number
from lowrank_jax.matrices import ResolvedView
from lowrank_jax.optim import inner as inner_lib
from lowrank_jax.projection import step as step_lib
from lowrank_jax.projection.matrix_step import each, layer_numbers, on_own_matrices, sketch_basis
from lowrank_jax.projection.projectors.base import Projector
from lowrank_jax.projection.refresh_schedules import Clock, Every
from lowrank_jax.projection.residuals import Discard, Residual
from lowrank_jax.projection.state import FORMAT_VERSION, MatrixState, ProjectionState, matrix_states
from lowrank_jax.projection.transports import Keep
from lowrank_jax.resolution import Report, Views, check_side, resolve
from lowrank_jax.trees import as_float32, is_placeholder, pure


@dataclasses.dataclass(frozen=True, kw_only=True)
class Projection:
    """The slots of `scale_by_projection`, validated; `init` and `update` are pure functions of it.

    >>> import lowrank_jax as lrx
    >>> lrx.Projection(projector=lrx.projectors.svd(rank=8)).clock
    Every(when='before', period=200, phase=0, first=True)
    """

    projector: Projector
    inner: Any = dataclasses.field(default_factory=inner_lib.Adam)
    clock: Clock = Every(period=200)
    transport: Any = Keep()
    residual: Residual = Discard()
    scale: Any = 1.0
    side: Any = "paper"
    tie: str = "rows"
    views: Views = Views()
    plain: Any = None
    guard: bool = True
    clip_norm: Any = None
    seed: Any = 0

    def __post_init__(self):
        kinds = {"projector": Projector, "clock": Clock, "residual": Residual, "views": Views}
        for name, kind in kinds.items():
            if not isinstance(getattr(self, name), kind):
                raise ValueError(
                    f"{name}={getattr(self, name)!r} must be one of lrx.{_ROOMS[name]}"
                )
        if not callable(self.transport) or not hasattr(self.transport, "moves"):
            raise ValueError(f"transport={self.transport!r} must be one of lrx.transports")
        object.__setattr__(self, "inner", inner_lib.as_inner(self.inner))
        object.__setattr__(
            self, "plain", self.inner if self.plain is None else inner_lib.as_inner(self.plain)
        )
        check_side(self.side, self.tie)
        check_number("clip_norm", self.clip_norm, above=0, otherwise="None for no clipping")
        check_number("scale", self.scale)
        check_integer("seed", self.seed, at_least=-(2**31))
        no_first = isinstance(self.clock, Every) and not self.clock.first
        if no_first and "grad" in self.projector.needs:
            raise ValueError(
                f"clock: first=False leaves {type(self.projector).__name__} without a basis from "
                "data until the first due step; use first=True, or a random or given projector"
            )

    def report(self, params: Any, shardings: Any = None) -> Report:
        """What is projected, at which rank, and what is not and why."""
        return resolve(
            params,
            self.views,
            rank=self.projector.rank_for,
            side=self.side,
            tie=self.tie,
            shardings=shardings,
        )

    def init(self, params: Any) -> ProjectionState:
        with sharding.mesh_of(params):
            return sharding.settled(self._init(params))

    def _init(self, params: Any) -> ProjectionState:
        check_floating(params, "projection")
        asked_for_structure = is_placeholder(params)  # there are no leaves that rules could match
        report = Report(()) if asked_for_structure else self.report(params)
        leaves, treedef = step_lib.flatten(params)
        views = [leaf.view for leaf in report.leaves]
        step = jnp.zeros((), jnp.int32)
        matrices = [
            optax.MaskedNode() if view is None else self._init_matrix(view) for view in views
        ]
        for view, matrix in zip(views, matrices, strict=True):
            if view is not None:
                self._check_inner(matrix)
        plain = step_lib.only_plain(treedef, leaves, views)
        low = jnp.zeros(()) if asked_for_structure else pure(jax.tree.unflatten(treedef, matrices))
        return ProjectionState(
            format_version=jnp.asarray(FORMAT_VERSION, jnp.int32),
            step=step,
            skipped=jnp.zeros((), jnp.int32),
            refreshes=jnp.zeros((), jnp.int32),
            matrices=low,
            plain=self.plain.init(jax.tree.map(as_float32, plain)),
        )

    def _check_inner(self, matrix: MatrixState) -> None:
        axes = len(matrix.view.batch)
        state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[axes:], x.dtype), matrix.inner)
        state = jax.eval_shape(self.inner.decoded, state)
        self.transport.check(self.inner, state)
        self.residual.check(self.inner, state, matrix.view, self.projector.low_shape(matrix.view))
        if "moments" in self.projector.needs:
            inner_lib.first_moment(self.inner, state)

    def fresh_inner(self, view: ResolvedView) -> Any:
        low = sharding.zeros(
            (*view.batch, *self.projector.low_shape(view)),
            jnp.float32,
            self.projector.low_spec(view),
        )
        return self.inner.init_stack(low, view)

    def _init_matrix(self, view: ResolvedView) -> MatrixState:
        def rest(config, view, trees):
            return config.fresh_inner(view), config.residual.init(view)

        self.projector.check(view)
        layers = layer_numbers(view)
        basis = self.projector.init(view, self.keys(view, jnp.zeros((), jnp.int32), layers))
        inner, residual = on_own_matrices(rest, self, view, {"layers": layers})
        return MatrixState(basis, inner, residual, view.structure(), self.projector.structure())

    def phase(self, view: ResolvedView) -> int:
        """A number of the leaf alone, the same in every process: the CRC32 of its path."""
        return zlib.crc32(view.path.encode())

    def keys(self, view: ResolvedView, step: jax.Array, layers: jax.Array) -> jax.Array:
        """One key for each matrix of a leaf, from the seed, the CRC32 of the path, the step and the
        layer's number."""
        key = jax.random.fold_in(
            jax.random.key(jnp.asarray(self.seed, jnp.int32)), self.phase(view)
        )
        key = jax.random.fold_in(key, step)
        return each(lambda layer: jax.random.fold_in(key, layer), view.batch)(layers)

    def update(self, updates: Any, state: ProjectionState, params: Any = None, **extra: Any):
        with sharding.mesh_of((updates, params)):
            return step_lib.update(self, updates, state, params, extra)

    @property
    def reads_params(self) -> bool:
        return self.inner.reads_params or "param" in self.projector.needs

    def due(self, state: ProjectionState) -> Any:
        """Scalar: does a basis move at the next step? A Python bool where that does not depend on
        the step."""
        return step_lib.due_any(self, state.step, [matrix.view for matrix in matrix_states(state)])

    def sketch_bases(self, state: ProjectionState) -> dict[str, jax.Array]:
        """`{path: (batch..., k, q)}`: what a refresh through taps contracts the gradients with, for
        `lrx.taps`."""
        return {
            matrix.view.path: sketch_basis(
                self, matrix.view, matrix, state.step, layer_numbers(matrix.view)
            )
            for matrix in matrix_states(state)
        }


_ROOMS = {"projector": "projectors", "clock": "clocks", "residual": "residuals", "views": "Views"}


class ProjectionTransformation(optax.GradientTransformationExtraArgs):
    """An optax transformation that remembers the `Projection` it was made from."""

    projection: Projection


def scale_by_projection(projector: Projector, **slots: Any) -> ProjectionTransformation:
    """Runs an inner optimizer in a low-rank subspace of each matrix: the one projection
    transformation.

    Returns the positive direction, as optax's `scale_by_*` do; chain a learning rate after it.

    Args:
      projector: which subspace, one of `lrx.projectors`.
      inner: what runs inside, `lrx.inner.adam(...)` (default) or any optax transformation.
      clock: when the basis moves, one of `lrx.clocks` (default `every(period=200)`).
      transport: what becomes of the moments, one of `lrx.transports` (default `keep()`).
      residual: what becomes of the rest of the gradient, one of `lrx.residuals` (default
        `discard()`).
      scale: factor on the step inside the subspace (GaLore's alpha); a residual rule has its own.
      side, tie: which dimension is shrunk, and which of a square; see `lrx.resolve`.
      views: which leaves are matrices, `lrx.Views(...)`.
      plain: the inner transformation of leaves that are not projected (default: `inner`).
      guard: skip, and count, steps whose gradients are not finite or have a norm above 2^40, about
        1e12.
      clip_norm: clip the global norm of what is kept: low-rank gradients (full ones where the
        residual rule reads them) and plain gradients alike.
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
    slots |= slots.pop("slots", {})  # optax.inject_hyperparams hands `**slots` on as one keyword
    return transformation_of(Projection(projector=projector, **slots))


def transformation_of(projection: Projection) -> ProjectionTransformation:
    """The optax form of a `Projection`."""
    transformation = ProjectionTransformation(projection.init, projection.update)
    transformation.projection = projection
    return transformation


def explain(transformation: Any, params: Any) -> Report:
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
    >>> lrx.projection_of(lrx.galore(1e-2, rank=8)).scale
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
