"""What a projection optimizer remembers, and what a projector may look at when it moves its
basis."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax

from lowrank_jax.matrices import ResolvedView
from lowrank_jax.optim.surgery import register_fields
from lowrank_jax.serialization import serializable

FORMAT_VERSION = 2  # 2: refreshes


class ProjectionState(NamedTuple):
    """State of `scale_by_projection`.

    Attributes:
      format_version: int32 (), the layout of this state; raised when it changes.
      step: int32 (), accepted steps. The clock of the whole tree; a skipped step does not count.
      skipped: int32 (), steps whose gradients were not finite, or were projected on a basis that is
        not this one.
      refreshes: int32 (), steps at which a basis moved; taps carry it, so that stale ones are
        noticed.
      matrices: like the parameters, a `MatrixState` where a leaf is projected and
        `optax.MaskedNode` elsewhere.
      plain: state of the inner transformation of the leaves that are not projected.

    >>> import jax.numpy as jnp
    >>> import lowrank_jax as lrx
    >>> state = lrx.scale_by_projection(lrx.projectors.svd(rank=2)).init(
    ...     {"kernel": jnp.ones((4, 8))}
    ... )
    >>> int(state.format_version), int(state.step), int(state.skipped)
    (2, 0, 0)
    """

    format_version: jax.Array
    step: jax.Array
    skipped: jax.Array
    refreshes: jax.Array
    matrices: Any
    plain: Any


@serializable
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MatrixState:
    """State of one projected leaf; every array has the leaf's batch axes in front.

    Attributes:
      basis: the projector's basis, for instance `(batch..., s, r)` or int32 indices
        `(batch..., r)`.
      inner: state of the inner transformation, one for each matrix, on `(r, k)`.
      residual: state of the residual rule; `()` for rules without one.
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

    basis: Any
    inner: Any
    residual: Any
    view: ResolvedView = dataclasses.field(metadata={"static": True})
    projector: Any = dataclasses.field(metadata={"static": True})

    def __repr__(self) -> str:
        leaves = jax.tree.leaves((self.basis, self.inner, self.residual))
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
register_fields(MatrixState, {"basis": "kept", "residual": "first"}, of_parameter=True)


def matrix_states(state: ProjectionState) -> list[MatrixState]:
    """The states of the projected leaves, in the order of the tree."""
    is_matrix = lambda x: isinstance(x, MatrixState)  # noqa: E731
    return [node for node in jax.tree.leaves(state.matrices, is_leaf=is_matrix) if is_matrix(node)]


@serializable
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Projected:
    """The gradient of a tapped kernel: its low-rank object, and at a refresh by a sketch that too.

    Attributes:
      low: `(batch..., r, k)` float32, `PᵀG` of the oriented gradient.
      sketch: `(batch..., s, q)` float32, `G Q`, or None.

    >>> import jax, jax.numpy as jnp
    >>> import lowrank_jax as lrx
    >>> len(jax.tree.leaves(lrx.Projected(jnp.ones((2, 8)))))
    1
    """

    low: jax.Array
    sketch: jax.Array | None = None


class Evidence(NamedTuple):
    """What a projector may use at a refresh; what it did not ask for in `needs` is None.

    Attributes:
      grad: `(batch..., s, k)` float32, the oriented target (gradient plus any fed-back error),
        whole.
      param: `(batch..., s, k)`, the oriented parameter.
      moments: `(batch..., r, k)`, debiased first moment in the old basis, before this step's
        update.
      sketch: `(batch..., s, q)`, the target times the projector's `sketch_basis (batch..., k, q)`.
      step: int32 (), 0 at the first refresh.
      key: typed random keys `(batch...)`, one for each matrix, new at every step.

    A projector is used without an optimizer by making its evidence by hand:

    >>> import jax, jax.numpy as jnp
    >>> import lowrank_jax as lrx
    >>> x = jnp.outer(jnp.arange(1.0, 5.0), jnp.ones(8))
    >>> projector = lrx.projectors.svd(rank=1)
    >>> view = lrx.resolve(x, rank=projector.rank_for).projected[0]
    >>> basis = projector.refresh(
    ...     view, projector.init(view, jax.random.key(0)), lrx.Evidence(grad=view.orient(x))
    ... )
    >>> print(projector.measure(view, basis, view.orient(x)))
    1.0
    """

    grad: jax.Array | None = None
    param: jax.Array | None = None
    moments: jax.Array | None = None
    sketch: jax.Array | None = None
    step: jax.Array | None = None
    key: jax.Array | None = None
