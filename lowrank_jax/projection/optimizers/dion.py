"""Dion."""

import dataclasses
from typing import Any, ClassVar, Unpack

import jax
import jax.numpy as jnp
import optax

from lowrank_jax import linalg, sharding
from lowrank_jax.checks import check_number
from lowrank_jax.optim import inner, scales
from lowrank_jax.projection import refresh_schedules, targets
from lowrank_jax.projection.batches import count
from lowrank_jax.projection.optimizers.recipe import CommonOptions, named, projector_of, recipe
from lowrank_jax.projection.projectors.base import StoredProjector
from lowrank_jax.projection.projectors.given import stack_of
from lowrank_jax.projection.projectors.random import normal
from lowrank_jax.projection.transformation import ProjectionTransformation
from lowrank_jax.typing import Rank, Scalar

SPECTRAL = scales.fan_ratio()  # sqrt(fan_out / fan_in)


def unit_rows(low: jax.Array, eps: Scalar) -> jax.Array:
    """Rows of `low (..., r, k)` over their norms, to which `eps` is added."""
    norms = jnp.sqrt(jnp.sum(jnp.square(low), axis=-1, keepdims=True))
    return low / (norms + eps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnitRows(inner.Inner):
    """Every row of the low-rank object over its norm, without a state.

    Args:
      eps: added to the norms, 1e-8 in microsoft/dion.

    >>> import jax.numpy as jnp
    >>> direction, scale, _ = UnitRows(eps=0.0).update(jnp.array([[3.0, 4.0], [0.0, 2.0]]), ())
    >>> direction.round(3).tolist(), scale
    ([[0.6000000238418579, 0.800000011920929], [0.0, 1.0]], 1.0)
    """

    eps: Scalar = 1e-8

    def __post_init__(self):
        check_number("dion: eps", self.eps, at_least=0)

    def init(self, tree, view=None):
        return ()

    def update(self, grads, state, *, view=None, params=None, **extra):
        return unit_rows(grads, self.eps), 1.0, state


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class HalfPower(StoredProjector):
    """Half a power step from the other side: `P = qr(K Q)`, where Q is `KᵀP` of the step before
    with unit columns, which the projector remembers.

    Args:
      first: `Q_0 (k, r)` or `(batch..., k, r)`, or one by path as `((pattern, matrix), ...)`;
        None for standard normal entries, as in microsoft/dion.
      eps: added to the norms of Q's columns.
    """

    first: Any = None
    eps: Scalar = 1e-8
    reads: ClassVar[frozenset[str]] = frozenset({"target"})
    sees: ClassVar[frozenset[str]] = frozenset({"low"})
    of_range: ClassVar[bool] = True

    def init(self, view, keys):
        basis, _ = super().init(view, keys)
        if self.first is None:
            memory = normal(keys, (view.kept, view.rank))
        else:
            memory = stack_of("dion: first", self.first, view, view.kept)
        return basis, sharding.reshard(memory, sharding.unsharded_spec(view.spec))

    def refresh(self, view, basis, memory, inputs):
        # (s, k) by (k, r); in full precision, since Q is all that earlier steps leave
        product = jnp.matmul(inputs.target, memory, precision="highest")
        return self.store(view, linalg.orthonormalize(product)), memory

    def seen(self, view, basis, memory, low, target):
        return jnp.swapaxes(unit_rows(low, self.eps), -1, -2)

    def memory_bytes(self, view):
        return 4 * count(view) * view.kept * view.rank


@named
def dion(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: Rank | None = None,
    momentum: Any = 0.95,
    first: Any = None,
    eps: Scalar = 1e-8,
    scale: Any = SPECTRAL,
    weight_decay: optax.ScalarOrSchedule = 0.01,
    projector: Any = None,
    **common: Unpack[CommonOptions],
) -> ProjectionTransformation:
    """Dion (Ahn et al. 2025, arXiv 2504.05295, algorithm 1): an orthonormal update of the leading
    directions of a momentum, followed from step to step by power iteration.

    With W `(m, n)` of m outputs: `K = M + G`, `P = qr(K Q)`, `R = KᵀP`, `M <- K - (1 - momentum) P Rᵀ`,
    `Q <- R` with unit columns, and `W <- (1 - lr wd) W - lr sqrt(m / n) P Qᵀ`. What the r directions
    do not see stays in M undecayed, and so is not lost. State: momentum `m n`, P `m r` (which
    microsoft/dion makes anew) and Q `n r`, float32.

    Args:
      learning_rate: number or schedule; .01 in the paper and in microsoft/dion.
      rank: at most m and n. A fraction is of the outputs m, in microsoft/dion of min(m, n).
      momentum: mu, .95.
      first: Q_0 `(n, r)`, or `((pattern, array), ...)`; by default standard normal entries.
      eps: added to the norms of Q's columns, 1e-8.
      scale: `lrx.scales.fan_ratio()`, which is `sqrt(m / n)`.
      weight_decay: before the step, .01.
      projector: in place of the half power step, for instance `lrx.projectors.dct(rank=8)`.
      **common: see `galore`. Other leaves take Adam with b1 .9, b2 .95 at the same rate.

    P is on the side of the outputs, as in the official code; `side="paper"` puts it on the smaller.

    >>> import jax.numpy as jnp
    >>> import lowrank_jax as lrx
    >>> tx, params = lrx.dion(1e-2, rank=2), {"kernel": jnp.ones((4, 6))}
    >>> updates, state = tx.update(params, tx.init(params), params)
    >>> state.projection.matrices["kernel"].memory.shape
    (4, 2)
    """
    own = {"first": first, "eps": eps}
    slots = {
        "projector": projector_of(HalfPower, rank, projector, **own),
        "inner": UnitRows(eps=eps),
        "refresh_schedule": refresh_schedules.every_step(),
        "target": targets.momentum(mu=momentum),
        "plain": inner.adam(b1=0.9, b2=0.95),
        "scale": scale,
        "side": "cols",
    }
    return recipe(learning_rate, weight_decay, "before", common, **slots)
