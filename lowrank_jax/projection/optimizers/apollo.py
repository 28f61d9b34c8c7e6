"""APOLLO and APOLLO-Mini."""

from typing import Any, Unpack

import optax

from lowrank_jax.checks import check_number
from lowrank_jax.optim import inner
from lowrank_jax.projection import projectors, refresh_schedules, residuals
from lowrank_jax.projection.optimizers.recipe import CommonOptions, named, projector_of, recipe
from lowrank_jax.projection.transformation import ProjectionTransformation
from lowrank_jax.typing import Rank, Scalar

BASES = {"random": projectors.random, "svd": projectors.svd}
"""The projector by the name that the official code gives its kind of basis."""
HALF_RANK = 0.125


@named
def apollo(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: Rank | None = None,
    refresh_every: Scalar = 200,
    scale: Scalar = 1.0,
    axis: str = "channel",
    limiter: Scalar | None = 1.01,
    projection: str = "random",
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-6,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    projector: Any = None,
    **common: Unpack[CommonOptions],
) -> ProjectionTransformation:
    """APOLLO (Zhu et al., MLSys 2025): a low-rank Adam only estimates how far to go along the raw
    gradient.

    `R = PᵀG` with Gaussian P `(s, r)`, N Adam's uncorrected direction on R,
    `S = sqrt(scale) G |N| / (|R| + 1e-8)` for each channel, norm growth limited,
    `W <- W - lr c_t S`, then decay. State of a leaf that keeps k: `2 r k` moments, one norm and an
    8-byte key (the official code stores P); with `projection="svd"` P, `s r`, in place of the key.

    Args:
      learning_rate: number or schedule; .01 in the paper.
      rank: None is an eighth of the shrunk dimension, the paper's half-rank variant; its other rows
        have a quarter.
      refresh_every: T, 200.
      scale: 1; the update carries its square root. APOLLO-Mini: 128.
      axis: "channel", or "tensor" for one factor a matrix (Mini).
      limiter: 1.01, or None.
      projection: "random" (Gaussian), or "svd" for the paper's "APOLLO w. SVD", whose P holds the
        leading singular vectors of the gradient and takes one decomposition a refresh.
      b1, b2, eps, weight_decay: Adam's in the "hf" convention, decay after the step.
      projector: in place of `projection` and `rank`, for instance `lrx.projectors.power(rank=128)`.
      **common: see `galore`.

    A Gaussian P is not orthonormal, as in the paper (https://arxiv.org/abs/2412.05270). Defaults are
    facts from the official code, whose licence (CC-BY-NC) allows no more; nothing else of it is
    used.

    >>> import lowrank_jax as lrx
    >>> lrx.apollo(1e-2, rank=1, axis="tensor", scale=4.0).projection.residual
    GradientRescale(axis='tensor', scale=2.0)
    >>> lrx.apollo(1e-2, projection="svd").projection.projector
    Svd(rank=0.125)
    """
    check_number("apollo: scale", scale, at_least=0)
    if projection not in BASES:
        raise ValueError(f"apollo: projection={projection!r} must be one of {[*BASES]}")
    if projector is not None and projection != "random":
        raise ValueError(
            f"apollo: projection={projection!r} and projector={projector} both fix the basis; give "
            "one of them"
        )
    if rank is None and projector is None:
        rank = HALF_RANK
    slots = {
        "projector": projector_of(BASES[projection], rank, projector),
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
    projection: str = "random",
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
        projection=projection,
        b1=b1,
        b2=b2,
        eps=eps,
        weight_decay=weight_decay,
        projector=projector,
        **common,
    )
