"""MoFaSGD."""

from typing import Any, Unpack

import optax

from lowrank_jax.optim import inner, scales
from lowrank_jax.projection import projectors, refresh_schedules
from lowrank_jax.projection.optimizers.recipe import CommonOptions, named, recipe
from lowrank_jax.projection.transformation import ProjectionTransformation
from lowrank_jax.typing import Scalar


@named
def mofasgd(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: int | float,
    momentum: Scalar = 0.95,
    scale: Scalar | scales.Scale = 1.0,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    **common: Unpack[CommonOptions],
) -> ProjectionTransformation:
    """MoFaSGD (Mahdavinia and Mahdavi, TMLR 2025): a momentum kept as r singular triples, along all
    of which a matrix steps alike.

    With `M = U S Vᵀ`, at first of the first gradient,

        M <- [momentum M + U UᵀG + G V Vᵀ - U UᵀG V Vᵀ]_r,  W <- W - lr scale U Vᵀ

    after decay; see `lrx.inner.factored_momentum`. State of m x n: `(m + n) r + r` float32 and a
    count; of the leaves that are no matrices AdamW's.

    Paper: https://arxiv.org/abs/2507.08091. Its code (pmahdavi/MoFaSGD) starts the momentum at the
    singular triples of the weights, and by default steps by `1 / S` in the place of 1, cut off at a
    largest value, neither of which is a momentum's direction; its additional step by what neither U
    nor V sees, `eta2`, 0 in its configurations, is left out. It has no decay.

    Args:
      learning_rate: number or schedule; .05 in the code's configuration for rank 32, with a factor
        of .25 and its other step.
      rank: integer, or fraction of the shorter side; 16 and 32 in the code's examples.
      momentum: .95 there, after a warm-up from .65.
      scale: 1; `lrx.scales.fan_ratio()` and others as in `muon`.
      weight_decay: before the step.
      b1, b2, eps: of AdamW on the other leaves.
      **common: see `galore`.

    Returns:
      An optax transformation.

    >>> import lowrank_jax as lrx
    >>> lrx.mofasgd(1e-2, rank=16).projection.inner.rank
    16
    """
    slots: dict[str, Any] = {
        "projector": projectors.identity(),
        "inner": inner.factored_momentum(rank=rank, momentum=momentum, scale=scale),
        "plain": inner.adam(b1=b1, b2=b2, eps=eps),
        "refresh_schedule": refresh_schedules.never(),
    }
    return recipe(learning_rate, weight_decay, "before", common, **slots)
