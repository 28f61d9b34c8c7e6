"""Fira."""

from typing import Any, Unpack

import optax

from lowrank_jax.optim import inner
from lowrank_jax.projection import projectors, refresh_schedules, residuals
from lowrank_jax.projection.optimizers.recipe import CommonOptions, named, projector_of, recipe
from lowrank_jax.projection.transformation import ProjectionTransformation
from lowrank_jax.typing import Rank, Scalar


@named
def fira(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: Rank | None = None,
    refresh_every: Scalar = 200,
    scale: Scalar = 0.25,
    form: str = "code",
    limiter: Scalar | None = 1.01,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-6,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    projector: Any = None,
    **common: Unpack[CommonOptions],
) -> ProjectionTransformation:
    """Fira (Chen et al., 2024): GaLore inside the subspace, and outside of it SGD at Adam's step
    size.

    With `R = PᵀG`, N Adam's uncorrected direction on R, c its bias correction and
    `f = |N| / (|R| + 1e-8)` for each column,

        S = f (G - scale P R)              form="code"
        S = f (G - P R)                    form="paper"
        W <- W - lr c (scale P N + S)      with |S| <= limiter |S_previous|

    then decay. State of a leaf that shrinks s, keeps k: GaLore's `s r` basis and `2 r k` moments,
    and one norm, float32.

    The paper (https://arxiv.org/abs/2410.01827) takes all of the subspace part out of the rest. Its
    code subtracts the back-projection after it was multiplied by scale: at .25 only a quarter of
    the subspace part is removed. The default is the code's form, which made the published results;
    at scale 1 both are one.

    Args:
      learning_rate: number or schedule; .01 in the scripts (7B: .005), 1e-4 for fine-tuning.
      rank: integer, fraction, or by path, as in GaLore (1B: 512, 7B: 64, fine-tuning: 32).
      refresh_every: T, 200 in the scripts (7B: 500).
      scale: alpha of the step inside the subspace, .25 in the scripts (1B and 7B: .0625).
      form: "code" or "paper", see above.
      limiter: 1.01, or None.
      b1, b2, eps, weight_decay: Adam's in the "hf" convention, decay after the step.
      projector: in place of `svd(rank=rank)`.
      **common: see `galore`.

    Every step reads the full gradient, so that projected backprop refuses it by name.

    >>> import lowrank_jax as lrx
    >>> lrx.fira(1e-2, rank=8, form="paper").projection.residual
    NormScaled(form='paper')
    """
    slots = {
        "projector": projector_of(projectors.svd, rank, projector),
        "inner": inner.adam(b1=b1, b2=b2, eps=eps, convention="hf"),
        "refresh_schedule": refresh_schedules.every(period=refresh_every),
        "residual": residuals.norm_scaled(form=form, limiter=limiter),
        "scale": scale,
    }
    return recipe(learning_rate, weight_decay, "after", common, **slots)
