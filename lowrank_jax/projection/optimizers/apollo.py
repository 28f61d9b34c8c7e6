"""APOLLO and APOLLO-Mini."""

from typing import Any, Unpack

import optax

from lowrank_jax.checks import check_number
from lowrank_jax.optim import inner
from lowrank_jax.projection import projectors, refresh_schedules, residuals
from lowrank_jax.projection.optimizers.recipe import CommonOptions, named, projector_of, recipe
from lowrank_jax.projection.transformation import ProjectionTransformation
from lowrank_jax.typing import Rank, Scalar


@named
def apollo(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: Rank | None = None,
    refresh_every: Scalar = 200,
    scale: Scalar = 1.0,
    axis: str = "channel",
    limiter: Scalar | None = 1.01,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-6,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    projector: Any = None,
    **common: Unpack[CommonOptions],
) -> ProjectionTransformation:
    """APOLLO (Zhu et al., MLSys 2025): a low-rank Adam only estimates how far to go along the raw
    gradient.

    `R = PᵀG` with Gaussian P, N Adam's uncorrected direction on R,
    `S = sqrt(scale) G |N| / (|R| + 1e-8)` for each channel, norm growth limited,
    `W <- W - lr c_t S`, then decay. State of a leaf that keeps k: `2 r k` moments, one norm and an
    8-byte key (the official code stores P).

    Args:
      learning_rate: number or schedule; .01 in the paper.
      rank: a quarter of the width in the paper (an eighth for its half-rank variant).
      refresh_every: T, 200.
      scale: 1; the update carries its square root. APOLLO-Mini: 128.
      axis: "channel", or "tensor" for one factor a matrix (Mini).
      limiter: 1.01, or None.
      b1, b2, eps, weight_decay: Adam's in the "hf" convention, decay after the step.
      projector: in place of `random(kind="gaussian")`, for instance `lrx.projectors.svd(rank=128)`.
      **common: see `galore`.

    P is not orthonormal, as in the paper. Defaults are facts from the official code, whose licence
    (CC-BY-NC) allows no more; nothing else of it is used.

    >>> import lowrank_jax as lrx
    >>> lrx.apollo(1e-2, rank=1, axis="tensor", scale=4.0).projection.residual
    GradientRescale(axis='tensor', scale=2.0)
    """
    check_number("apollo: scale", scale, at_least=0)
    slots = {
        "projector": projector_of(projectors.random, rank, projector),
        "inner": inner.adam(b1=b1, b2=b2, eps=eps, convention="hf"),
        "refresh_schedule": refresh_schedules.every(period=refresh_every),
        "residual": residuals.gradient_rescale(axis=axis, scale=scale**0.5, limiter=limiter),
    }
    return recipe(learning_rate, weight_decay, "after", common, **slots)


@named
def apollo_mini(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: Rank = 1,
    refresh_every: Scalar = 200,
    scale: Scalar = 128.0,
    axis: str = "tensor",
    limiter: Scalar | None = 1.01,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-6,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    projector: Any = None,
    **common: Unpack[CommonOptions],
) -> ProjectionTransformation:
    """APOLLO-Mini: `apollo` at rank 1 with one factor for each matrix and scale 128 (paper; lr .01,
    .02 is better). Options are those of `apollo`.

    >>> import lowrank_jax as lrx
    >>> lrx.apollo_mini(1e-2).projection.projector
    Random(rank=1, stored=False)
    """
    return apollo(
        learning_rate,
        rank=rank,
        refresh_every=refresh_every,
        scale=scale,
        axis=axis,
        limiter=limiter,
        b1=b1,
        b2=b2,
        eps=eps,
        weight_decay=weight_decay,
        projector=projector,
        **common,
    )
