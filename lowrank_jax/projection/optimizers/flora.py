"""Flora."""

from typing import Any, Unpack

import optax

from lowrank_jax.optim import inner
from lowrank_jax.projection import projectors, refresh_schedules, residuals, targets, transports
from lowrank_jax.projection.optimizers.recipe import CommonOptions, named, projector_of, recipe
from lowrank_jax.projection.transformation import ProjectionTransformation
from lowrank_jax.typing import Rank, Scalar


@named
def flora(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: Rank | None = None,
    refresh_every: Scalar = 1000,
    b1: Scalar = 0.9,
    power: Scalar = 0.8,
    eps: Scalar = 1e-30,
    rms: Scalar | None = 1.0,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    projector: Any = None,
    **common: Unpack[CommonOptions],
) -> ProjectionTransformation:
    """Flora (Hao et al., ICML 2024): Adafactor whose momentum is kept in a random subspace that
    changes now and then.

    With U the direction of Adafactor without a momentum, P of entries `N(0, 1) / sqrt(r)`, so that
    `P Pᵀ` is the identity in the mean,

        M <- P_newᵀ P_old M                     at a refresh
        D  = b1 P M + (1 - b1) U                the current direction is whole
        M <- b1 M + (1 - b1) PᵀU
        W <- W - lr D / max(1, rms(D))          after decay

    State of a leaf that shrinks s, keeps k: an 8-byte key, `r k` float32 of momentum, `s + k` of
    second moments and two counts. Of the leaves that are no matrices Adafactor's with a momentum.

    Paper: https://arxiv.org/abs/2402.03293; the rule is that of its code (BorealisAI/flora-opt), of
    which three things differ. At the step of a refresh it projects U by the new P, where here M,
    which holds the U of the step before, moves whole. Its rate is multiplied by the root mean square
    of the parameter by default. It clips other leaves after their momentum.

    Flora's other half, gradients that are summed in the subspace, is `accumulate=` of
    `lrx.projected_value_and_grad` with `lrx.projectors.random(rank=rank)`.

    Args:
      learning_rate: number or schedule.
      rank: integer, fraction, or by path.
      refresh_every: kappa, 1000 in the code.
      b1: of the momentum, .9.
      power, eps: of Adafactor's second moment, .8 and 1e-30.
      rms: largest root mean square of a matrix' direction, 1, or None.
      weight_decay: before the step, as in the code.
      projector: in place of `random(rank=rank)`.
      **common: see `galore`.

    Returns:
      An optax transformation.

    >>> import jax.numpy as jnp
    >>> import lowrank_jax as lrx
    >>> state = lrx.flora(1e-2, rank=4).init({"kernel": jnp.ones((8, 16))})
    >>> state.projection.matrices["kernel"]
    MatrixState('kernel', rank=4, shrinks=rows, basis=[(2,)], 368 bytes)
    """
    momentum = inner.from_optax(optax.ema(b1, debias=False), decay=(("first", b1),))
    slots = {
        "projector": projector_of(projectors.random, rank, projector),
        "target": targets.preconditioned(inner=inner.adafactor(power=power, eps=eps, clip=None)),
        "inner": momentum,
        "residual": residuals.sgd(scale=1 - b1, rms=rms),
        "transport": transports.rotate(),
        "plain": inner.adafactor(b1=b1, power=power, eps=eps),
        "refresh_schedule": refresh_schedules.every(period=refresh_every),
    }
    return recipe(learning_rate, weight_decay, "before", common, **slots)
