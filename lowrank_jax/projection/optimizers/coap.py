"""COAP."""

from typing import Any, Unpack

import optax

from lowrank_jax.optim import inner
from lowrank_jax.projection import projectors, refresh_schedules
from lowrank_jax.projection.optimizers.recipe import CommonOptions, named, projector_of, recipe
from lowrank_jax.projection.transformation import ProjectionTransformation
from lowrank_jax.typing import Rank, Scalar


@named
def coap(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: Rank | None = None,
    refresh_every: Scalar = 40,
    recalibrate_every: Scalar = 5,
    step_size: Scalar = 0.1,
    scale: Scalar = 0.25,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-6,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    projector: Any = None,
    **common: Unpack[CommonOptions],
) -> ProjectionTransformation:
    """COAP (Xiao et al., CVPR 2025): GaLore whose basis is moved by gradient steps that keep it close
    to the momentum, and recalibrated by a cheap SVD now and then.

    Every T steps P takes one clipped step on
    `mean((P PᵀG - G)²) (1 - mean_j cos(P m, G)_j)`, and at every `recalibrate_every`-th of them
    becomes the left singular vectors of `G qr(GᵀP)`; see `lrx.projectors.correlated`. Then

        W <- W - lr scale P Adam(PᵀG)

    and decay; moments are kept. State of a leaf that shrinks s, keeps k: GaLore's `s r` basis and
    `2 r k` moments, float32.

    The paper (https://arxiv.org/abs/2412.00071) writes all for matrices with fewer columns, whose
    cosines run over the dimension that shrinks. Its code (bytedance/coap) takes rows of W whichever
    side that is, so that a wide matrix moves otherwise than its transpose; here both move as in the
    paper. Its option `restore_state`, off by default and for LLaMA, is
    `transport=lrx.transports.rotate()` but for second moments, which it turns by their roots. Its
    Tucker form of convolutions is left out.

    Args:
      learning_rate: number or schedule; .01 in the script for LLaMA-1B.
      rank: integer, fraction, or by path; 512 at 1B.
      refresh_every: T, 40 in that script (32 in the code).
      recalibrate_every: in refreshes, 5.
      step_size: of the basis, .1 in the code, with its gradient clipped to norm 1.
      scale: .25 in that script.
      b1, b2, eps, weight_decay: of Adam in the "hf" convention, decay after the step.
      projector: in place of `correlated(...)`.
      **common: see `galore`.

    Returns:
      An optax transformation.

    >>> import lowrank_jax as lrx
    >>> lrx.coap(1e-2, rank=8, recalibrate_every=10).projection.projector.recalibrate_every
    10
    """
    options = {"step_size": step_size, "recalibrate_every": recalibrate_every}
    slots = {
        "projector": projector_of(projectors.correlated, rank, projector, **options),
        "inner": inner.adam(b1=b1, b2=b2, eps=eps, convention="hf"),
        "refresh_schedule": refresh_schedules.every(period=refresh_every),
        "scale": scale,
    }
    return recipe(learning_rate, weight_decay, "after", common, **slots)
