"""RSO."""

from typing import Unpack

import optax

from lowrank_jax.optim import inner
from lowrank_jax.projection import projectors, refresh_schedules, transports
from lowrank_jax.projection.optimizers.recipe import CommonOptions, named, projector_of, recipe
from lowrank_jax.projection.transformation import ProjectionTransformation
from lowrank_jax.typing import Rank, Scalar


@named
def rso(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: Rank | None = None,
    refresh_every: Scalar = 200,
    kind: str = "gaussian",
    scale: Scalar = 1.0,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    **common: Unpack[CommonOptions],
) -> ProjectionTransformation:
    """RSO (Chen et al., ICML 2025): a sequence of small problems, each to train B of `W + P B` in a
    random subspace for a while, from zero and with an Adam of its own.

    With P of entries `N(0, 1) / sqrt(r)`, so that `P Pᵀ` is the identity in the mean,

        P new, moments and their count zero     after the steps T, 2T, ...
        W <- W - lr scale P Adam(PᵀG)           after decay

    which is Adam on B: its gradient is `PᵀG`, and what it gained is in W already when P moves. No
    refresh sees data, so that projected backprop never forms G and keeps `PᵀX` of a layer's inputs.
    State of a leaf that shrinks s, keeps k: an 8-byte key, `2 r k` float32 of moments and a count.

    Paper: https://arxiv.org/abs/2502.07222, by its abstract and its iteration as others restate it;
    no code was found. Its small problem is `f(W + P B) + |B|² / (2 eta)`, and how large eta was in
    its runs is not known here: there is no penalty, the limit of a large eta.

    Args:
      learning_rate: number or schedule.
      rank: integer, fraction, or by path.
      refresh_every: T, steps on one small problem; 200, GaLore's, since the abstract has none.
      kind: of the basis, "gaussian", or "orthonormal" (then stored, `s r` float32) or "structured",
        see `lrx.projectors.random`.
      scale: of the step, 1, as `W + P B` has it.
      b1, b2, eps: Adam's own.
      weight_decay: of W, before the step; not the paper's.
      **common: see `galore`.

    Returns:
      An optax transformation.

    >>> import jax.numpy as jnp
    >>> import lowrank_jax as lrx
    >>> state = lrx.rso(1e-2, rank=4).init({"kernel": jnp.ones((8, 16))})
    >>> state.projection.matrices["kernel"]
    MatrixState('kernel', rank=4, shrinks=rows, basis=[(2,)], 524 bytes)
    """
    schedule = refresh_schedules.every(
        period=refresh_every, phase=refresh_every - 1, first=False, when="after"
    )
    slots = {
        "projector": projector_of(projectors.random, rank, None, kind=kind),
        "inner": inner.adam(b1=b1, b2=b2, eps=eps),
        "transport": transports.reset(),
        "refresh_schedule": schedule,
        "scale": scale,
    }
    return recipe(learning_rate, weight_decay, "before", common, **slots)
