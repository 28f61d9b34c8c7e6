"""SubTrack++."""

from typing import Any, Unpack

import optax

from lowrank_jax.optim import inner
from lowrank_jax.projection import projectors, refresh_schedules, residuals, transports
from lowrank_jax.projection.optimizers.recipe import CommonOptions, named, projector_of, recipe
from lowrank_jax.projection.transformation import ProjectionTransformation
from lowrank_jax.typing import Rank, Scalar


@named
def subtrack(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: Rank | None = None,
    refresh_every: Scalar = 200,
    step_size: optax.ScalarOrSchedule = 10.0,
    scale: Scalar = 0.25,
    form: str = "paper",
    limiter: Scalar | None = 1.01,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-6,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    projector: Any = None,
    **common: Unpack[CommonOptions],
) -> ProjectionTransformation:
    """SubTrack++ (Rajabi et al., NeurIPS 2025): a subspace that is tracked by small turns, moments
    that turn with it, and Fira's step outside of it.

    After the singular vectors of the first gradient P moves every T steps along a geodesic, against
    the leading triple of `-2 (G - P PᵀG) GᵀP` (`lrx.projectors.grassmann`). Moments move by LDAdam's
    rule, and the rest is added as in Fira. With N Adam's direction on `R = PᵀG` and c its bias
    correction,

        S = f (G - P R),  f = |N| / (|R| + 1e-8) by column,  |S| <= limiter |S_previous|
        W <- W - lr c (scale P N + S)

    then decay. State of a leaf that shrinks s, keeps k: GaLore's `s r` basis and `2 r k` moments,
    and one norm, float32.

    The paper (https://arxiv.org/abs/2502.01586) and its code (criticalml-uw/SubTrack) differ, and
    the paper is followed where nothing else is said: the code moves moments one step before the
    basis does, always from the first basis, by a rule without bias corrections and with
    `(1 - b2)` in front; of a matrix whose inputs are shrunk its tangent is zero but for rounding, so
    that half of the layers never move; it takes `scale P R` out of the rest (`form="code"`). The
    sign of the turn is the code's, which descends.

    Args:
      learning_rate: number or schedule; 1e-3 in the scripts (1B and larger: 1e-4).
      rank: integer, fraction, or by path; 128 at 60M, 512 at 1B.
      refresh_every: T, 200 in the scripts (7B: 500).
      step_size: of the turn, number or schedule of the step; 10 in the scripts of pre-training
        (10000 in the README), .001 to 50 in those of fine-tuning. The code's
        "iterative_decrease" is `lambda step: 10 / step`.
      scale: alpha of the step inside the subspace, .25 in the scripts (fine-tuning: 4).
      form: "paper" or "code", see `lrx.residuals.norm_scaled`.
      limiter: 1.01, or None.
      b1, b2, eps, weight_decay: Adam's in the "hf" convention, decay after the step.
      projector: in place of `grassmann(...)`.
      **common: see `galore`.

    Every step reads the full gradient, so that projected backprop refuses it by name.

    Returns:
      An optax transformation.

    >>> import lowrank_jax as lrx
    >>> lrx.subtrack(1e-3, rank=8, step_size=5.0).projection.projector.step_size
    5.0
    """
    slots = {
        "projector": projector_of(projectors.grassmann, rank, projector, step_size=step_size),
        "inner": inner.adam(b1=b1, b2=b2, eps=eps, convention="hf"),
        "refresh_schedule": refresh_schedules.every(period=refresh_every),
        "transport": transports.ldadam(),
        "residual": residuals.norm_scaled(form=form, limiter=limiter),
        "scale": scale,
    }
    return recipe(learning_rate, weight_decay, "after", common, **slots)
