"""What a projection optimizer remembers, and what a projector may look at when it moves its
basis."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lowrank_jax import deprecations
from lowrank_jax.matrices import ResolvedView
from lowrank_jax.optim.surgery import register_fields
from lowrank_jax.reprs import Short, show
from lowrank_jax.serialization import serializable
from lowrank_jax.typing import Pytree, Scalar

Sketch = jax.Array | tuple[jax.Array, jax.Array]
"""What a refresh is told of a matrix by thin products: of its kept side, or of both."""

FORMAT_VERSION = 3  # 2: refreshes; 3: memory, target, refresh_schedule, sampler, partly_skipped


class ProjectionState(NamedTuple):
    """State of `scale_by_projection`.

    Attributes:
      format_version: int32 (), the layout of this state; raised when it changes.
      step: int32 (), accepted steps, by which the refresh schedule counts; a skipped step does not.
      skipped: int32 (), steps whose gradients were not finite, or were projected on a basis that is
        not this one.
      partly_skipped: int32 (), steps of the layer-wise form that were found not to be finite when
        some layers had moved already.
      refreshes: int32 (), steps at which a basis moved, with a sampler those since the last draw;
        taps carry it, so that stale ones are noticed.
      matrices: like the parameters, a `MatrixState` where a leaf is projected and
        `optax.MaskedNode` elsewhere.
      plain: state of the inner transformation of the leaves that are not projected.
      refresh_schedule: state of a refresh schedule of the whole tree; `()` for most.
      sampler: which layers are active; `()` where all are.

    >>> import jax.numpy as jnp
    >>> import lowrank_jax as lrx
    >>> state = lrx.scale_by_projection(lrx.projectors.svd(rank=2)).init(
    ...     {"kernel": jnp.ones((4, 8))}
    ... )
    >>> int(state.format_version), int(state.step), int(state.skipped)
    (3, 0, 0)
    """

    format_version: jax.Array
    step: jax.Array
    skipped: jax.Array
    partly_skipped: jax.Array
    refreshes: jax.Array
    matrices: Pytree
    plain: Any
    refresh_schedule: Any = ()
    sampler: Any = ()

    def __repr__(self) -> str:
        return show(self)


@serializable
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class MatrixState:
    """State of one projected leaf; every array has the leaf's batch axes in front.

    Attributes:
      basis: the projector's basis, for instance `(batch..., s, r)` or int32 indices
        `(batch..., r)`. Taps carry it.
      memory: what the projector remembers beside it; `()` for most.
      inner: state of the inner transformation, one for each matrix, on `(r, k)`.
      target: state of what is projected beside the gradient, such as an error; or `()`.
      residual: state of the residual rule; `()` for rules without one.
      refresh_schedule: state of a refresh schedule that decides layer by layer; or `()`.
      view: static; path, shape, axes, side and rank.
      projector: static; what the basis means (`Projector.structure()`), without any number.

    >>> import jax.numpy as jnp
    >>> import lowrank_jax as lrx
    >>> state = lrx.scale_by_projection(lrx.projectors.svd(rank=2)).init(
    ...     {"kernel": jnp.ones((4, 8))}
    ... )
    >>> state.matrices["kernel"]  # basis 4 x 2, two moments 2 x 8, a count
    MatrixState('kernel', rank=2, shrinks=rows, basis=[(4, 2)], 164 bytes)
    """

    basis: Pytree
    memory: Any = ()
    inner: Any
    target: Pytree = ()
    residual: Any = ()
    refresh_schedule: Any = ()
    view: ResolvedView = dataclasses.field(metadata={"static": True})
    projector: Any = dataclasses.field(metadata={"static": True})

    def __repr__(self) -> str:
        leaves = jax.tree.leaves(parts_of(self))
        total = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves if hasattr(leaf, "dtype"))
        shapes = [
            tuple(leaf.shape) for leaf in jax.tree.leaves(self.basis) if hasattr(leaf, "shape")
        ]
        view = self.view
        return (
            f"MatrixState({view.path!r}, rank={view.rank}, shrinks={view.side}, basis={shapes}, "
            f"{total:,} bytes)"
        )


# moments and error live in the projection, where a policy can say nothing of single entries
_KEPT = {"basis": "kept", "memory": "kept", "refresh_schedule": "kept"}
register_fields(MatrixState, _KEPT | {"target": "first", "residual": "first"}, of_parameter=True)

PARTS = ("basis", "memory", "inner", "target", "residual", "refresh_schedule")


def parts_of(state: MatrixState) -> dict[str, Pytree]:
    """The arrays of a matrix's state, by field."""
    return {name: getattr(state, name) for name in PARTS}


def matrix_states(state: ProjectionState) -> list[MatrixState]:
    """The states of the projected leaves, in the order of the tree."""
    is_matrix = lambda x: isinstance(x, MatrixState)  # noqa: E731
    return [node for node in jax.tree.leaves(state.matrices, is_leaf=is_matrix) if is_matrix(node)]


@serializable
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Projected(Short):
    """The gradient of a tapped kernel: its low-rank object, and at a refresh by a sketch that too.

    Attributes:
      low: `(batch..., r, k)` float32, `PᵀG` of the oriented gradient.
      sketch: `(batch..., s, q)` float32, `G Q`, or None; of a sketch of both sides a pair of it and
        `(batch..., q', k)`.

    >>> import jax, jax.numpy as jnp
    >>> import lowrank_jax as lrx
    >>> len(jax.tree.leaves(lrx.projection.Projected(jnp.ones((2, 8)))))
    1
    """

    low: jax.Array
    sketch: Sketch | None = None


class Now(NamedTuple):
    """Where a step stands, for all matrices of the tree.

    Attributes:
      step: int32 (), accepted steps before this one.
      refreshes: int32 (), refreshes before this one.
      learning_rate: of this step, or None where the caller does not pass it.
      all_layers: whether a schedule that gives each step a slice moves all layers at this one.
    """

    step: Scalar
    refreshes: Scalar
    learning_rate: Scalar | None = None
    all_layers: Scalar = False


class Rebased(NamedTuple):
    """What `rebase` found out, for the rest of the step: it must not be asked again.

    Attributes:
      moved: bool (), whether any basis moved.
    """

    moved: Scalar


@deprecations.options("lrx.projectors.RefreshInputs")
@dataclasses.dataclass(frozen=True, kw_only=True)
class RefreshInputs(Short):
    """What a projector may use at a refresh; what it did not name in `reads` is None.

    Attributes:
      target: `(batch..., s, k)` float32, the oriented matrix that is projected (gradient, gradient
        plus fed-back error, momentum), unsharded.
      momentum: `(batch..., r, k)`, debiased first moment in the old basis, before this step's
        update.
      param: `(batch..., s, k)`, the oriented parameter.
      sketch: `(batch..., s, q)`, the target times the projector's `sketch_basis (batch..., k, q)`; of
        a pair of sketch bases a pair, `sketch_of(target, sketch_basis)`.
      low: `(batch..., r, k)`, this step's low-rank object in the old basis.
      learning_rate: of this step.
      refreshes: int32 (), refreshes of the tree before this one.
      step: int32 (), accepted steps before this one.
      key: typed random keys `(batch...)`, one for each matrix, new at every step.

    A projector is used without an optimizer by making its inputs by hand:

    >>> import jax, jax.numpy as jnp
    >>> import lowrank_jax as lrx
    >>> x = jnp.outer(jnp.arange(1.0, 5.0), jnp.ones(8))
    >>> projector = lrx.projectors.svd(rank=1)
    >>> view = lrx.resolution.resolve(x, rank=projector.rank_for).projected[0]
    >>> basis, memory = projector.init(view, jax.random.key(0))
    >>> inputs = lrx.projectors.RefreshInputs(target=view.orient(x))
    >>> basis, memory = projector.refresh(view, basis, memory, inputs)
    >>> print(projector.measure(view, basis, view.orient(x)))
    1.0
    """

    target: jax.Array | None = None
    momentum: jax.Array | None = None
    param: jax.Array | None = None
    sketch: Sketch | None = None
    low: jax.Array | None = None
    learning_rate: Scalar | None = None
    refreshes: Scalar | None = None
    step: Scalar | None = None
    key: jax.Array | None = None


def sketch_of(target: jax.Array, basis: Sketch) -> Sketch:
    """`G Q (batch..., s, q)` of `G (batch..., s, k)`; of a pair `(Q, S)` also `SᵀG (batch..., q', k)`."""
    if not isinstance(basis, tuple):
        return target @ basis
    right, left = basis
    return target @ right, jnp.swapaxes(left, -1, -2) @ target


READABLE = frozenset(field.name for field in dataclasses.fields(RefreshInputs))
