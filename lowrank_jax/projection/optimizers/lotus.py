"""Lotus."""

from typing import Any, Unpack

import optax

from lowrank_jax.optim import inner
from lowrank_jax.projection import projectors, refresh_schedules
from lowrank_jax.projection.optimizers.recipe import CommonOptions, named, projector_of, recipe
from lowrank_jax.projection.transformation import ProjectionTransformation
from lowrank_jax.typing import Rank, Scalar


@named
def lotus(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: Rank | None = None,
    gap: Scalar = 50,
    threshold: Scalar = 0.01,
    scale: Scalar = 0.25,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-6,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    projector: Any = None,
    **common: Unpack[CommonOptions],
) -> ProjectionTransformation:
    """Lotus (Miao et al., 2026): GaLore whose bases come of a randomized range finder, and move when
    the direction of the low-rank gradient has turned too little.

    With `R = PᵀG`, `d = R / |R|`, `d_0` that of the first step of a basis and T its steps and one,

        W <- W - lr scale P Adam(R),  then decay
        P <- a new basis at the next step, where T mod gap = 0 and |d - d_0| / T < threshold

    which each matrix decides by itself (`lrx.refresh_schedules.displacement`). State of a leaf that
    shrinks s, keeps k: GaLore's `s r` basis and `2 r k` moments, and `r k` of `d_0`, float32, with
    two int32 a matrix.

    There is no official code: this is Algorithm 1 of the paper (https://arxiv.org/abs/2602.01233),
    in which T is 2 after the step of a switch. Its text also speaks of a ratio of lengths
    `|sum P d| / |sum d|` that must not fall, with no number for it; the algorithm does not use it.

    Args:
      learning_rate: number or schedule; none is given beyond GaLore's setting.
      rank: integer, fraction, or by path, as in GaLore.
      gap: the verifying gap eta, 50 (25 to 100).
      threshold: gamma, .01 (.005 to .02).
      scale, b1, b2, eps, weight_decay: GaLore's, whose code the paper started from.
      projector: in place of `randomized(rank=rank)`, of one power iteration, whose number the paper
        does not say.
      **common: see `galore`.

    Returns:
      An optax transformation.

    >>> import lowrank_jax as lrx
    >>> lrx.lotus(1e-2, rank=8, gap=25).projection.refresh_schedule
    Displacement(gap=25)
    """
    slots = {
        "projector": projector_of(projectors.randomized, rank, projector),
        "inner": inner.adam(b1=b1, b2=b2, eps=eps, convention="hf"),
        "refresh_schedule": refresh_schedules.displacement(gap=gap, threshold=threshold),
        "scale": scale,
    }
    return recipe(learning_rate, weight_decay, "after", common, **slots)
