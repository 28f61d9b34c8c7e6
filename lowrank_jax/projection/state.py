"""What a projection optimizer remembers, and what a projector may look at when it moves its basis."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax

from lowrank_jax.matrices import ResolvedView

FORMAT_VERSION = 1


class ProjectionState(NamedTuple):
    """State of `scale_by_projection`.

    Attributes:
      format_version: int32 (), the layout of this state; raised when it changes.
      step: int32 (), accepted steps. The clock of the whole tree; a skipped step does not count.
      skipped: int32 (), steps whose gradients were not finite.
      matrices: like the parameters, a `MatrixState` where a leaf is projected and `optax.MaskedNode` elsewhere.
      plain: state of the inner transformation of the leaves that are not projected.

    >>> import jax.numpy as jnp
    >>> import lowrank_jax as lr
    >>> state = lr.scale_by_projection(lr.projectors.svd(rank=2)).init({"kernel": jnp.ones((4, 8))})
    >>> int(state.format_version), int(state.step), int(state.skipped)
    (1, 0, 0)
    """

    format_version: jax.Array
    step: jax.Array
    skipped: jax.Array
    matrices: Any
    plain: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MatrixState:
    """State of one projected leaf; every array has the leaf's batch axes in front.

    Attributes:
      basis: the projector's basis, for instance `(batch..., s, r)` or int32 indices `(batch..., r)`.
      inner: state of the inner transformation, one for each matrix, on `(r, k)`.
      residual: state of the residual rule; `()` for rules without one.
      view: static; path, shape, axes, side and rank.

    >>> import jax.numpy as jnp
    >>> import lowrank_jax as lr
    >>> state = lr.scale_by_projection(lr.projectors.svd(rank=2)).init({"kernel": jnp.ones((4, 8))})
    >>> state.matrices["kernel"]  # basis 4 x 2, two moments 2 x 8, a count
    MatrixState('kernel', rank=2, shrinks=rows, basis=[(4, 2)], 164 bytes)
    """

    basis: Any
    inner: Any
    residual: Any
    view: ResolvedView = dataclasses.field(metadata={"static": True})

    def __repr__(self) -> str:
        leaves = jax.tree.leaves((self.basis, self.inner, self.residual))
        total = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves if hasattr(leaf, "dtype"))
        shapes = [tuple(leaf.shape) for leaf in jax.tree.leaves(self.basis) if hasattr(leaf, "shape")]
        view = self.view
        return f"MatrixState({view.path!r}, rank={view.rank}, shrinks={view.side}, basis={shapes}, {total:,} bytes)"


class Evidence(NamedTuple):
    """What a projector may use at a refresh; what it did not ask for in `needs` is None.

    Attributes:
      grad: `(batch..., s, k)` float32, the oriented target (gradient plus any fed-back error), whole.
      param: `(batch..., s, k)`, the oriented parameter.
      moments: `(batch..., r, k)`, debiased first moment in the old basis.
      step: int32 (), 0 at the first refresh.
      key: typed random keys `(batch...)`, one for each matrix, new at every step.

    A projector is used without an optimizer by making its evidence by hand:

    >>> import jax, jax.numpy as jnp
    >>> import lowrank_jax as lr
    >>> x = jnp.outer(jnp.arange(1.0, 5.0), jnp.ones(8))
    >>> projector = lr.projectors.svd(rank=1)
    >>> view = lr.resolve(x, rank=projector.rank_for).projected[0]
    >>> basis = projector.refresh(view, projector.init(view, jax.random.key(0)), lr.Evidence(grad=view.orient(x)))
    >>> print(projector.measure(view, basis, view.orient(x)))
    1.0
    """

    grad: jax.Array | None = None
    param: jax.Array | None = None
    moments: jax.Array | None = None
    step: jax.Array | None = None
    key: jax.Array | None = None
