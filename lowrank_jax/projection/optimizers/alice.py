"""Alice."""

from typing import Any, Unpack

import optax

from lowrank_jax.optim import inner
from lowrank_jax.projection import projectors, refresh_schedules, residuals
from lowrank_jax.projection.optimizers.recipe import CommonOptions, named, projector_of, recipe
from lowrank_jax.projection.transformation import ProjectionTransformation
from lowrank_jax.typing import Rank, Scalar


@named
def alice(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: Rank | None = None,
    refresh_every: Scalar = 200,
    leading: int | float | None = None,
    scale: Scalar = 0.3,
    compensation: Scalar = 0.4,
    limiter: Scalar | None = 1.01,
    b1: Scalar = 0.9,
    b2: Scalar = 0.9,
    b3: Scalar = 0.999,
    eps: Scalar = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    projector: Any = None,
    **common: Unpack[CommonOptions],
) -> ProjectionTransformation:
    """Alice (Gong et al., 2025): Adam in a subspace that follows the gradients' covariance and tries
    random directions too, and normalised columns of what it misses.

    With `R = UᵀG`, moments m and v of it without bias correction, and the average energies p of the
    columns of `G - U R`,

        C = sqrt(s - r) (G - U R) diag(p)^-1/2,  |C| <= limiter |C_previous|
        W <- W - lr scale (U m / sqrt(v) + compensation C)

    after decay. U moves at steps 0, T-1, 2T-1, ..., see `lrx.projectors.switching`; moments are
    kept. State of a leaf that shrinks s, keeps k: `s r` basis, `r²` covariance, `2 r k` moments, `k`
    energies and one norm, float32. `b3=0` is the paper's Alice-0, without the covariance.

    Paper: https://arxiv.org/abs/2502.07752, Algorithms 2 to 4; there is no official code. Two
    things are not as written: the algorithm begins with `U = 0`, of which a power iteration makes
    nothing, where singular vectors of the first gradient serve here; and random directions are
    drawn from the complement itself, uniformly, and not among the columns of a QR factorisation
    with a square factor s x s.

    Args:
      learning_rate: number or schedule; .02 in the paper.
      rank: integer, fraction, or by path; 128/256/256/512 for 60M/130M/350M/1.3B.
      refresh_every: K, 200.
      leading: columns that follow the covariance, an integer or a fraction of the rank; .3125
        (None), which is 40 of 128 and 160 of 512 (130M and 350M: 40 of 256).
      scale: alpha, .3 (1.3B: .25).
      compensation: alpha_c, .4 (1.3B: .2).
      limiter: 1.01, or None.
      b1, b2, b3: (.9, .9) of the moments, the first of p too, and .999 of the covariance.
      eps: beside the root of v; the paper has none.
      weight_decay: before the step; the paper has none.
      projector: in place of `switching(...)`.
      **common: see `galore`.

    Every step reads the full gradient, so that projected backprop refuses it by name.

    Returns:
      An optax transformation.

    >>> import lowrank_jax as lrx
    >>> lrx.alice(2e-2, rank=8, leading=2).projection.projector.leading
    2
    """
    options = {"leading": 0.3125 if leading is None else leading, "b": b3}
    slots = {
        "projector": projector_of(projectors.switching, rank, projector, **options),
        "inner": inner.adam(b1=b1, b2=b2, eps=eps, convention="hf", bias_correction=False),
        "refresh_schedule": refresh_schedules.every(period=refresh_every, phase=refresh_every - 1),
        "residual": residuals.compensated(scale=compensation, b=b1, limiter=limiter),
        "plain": inner.adam(),
        "scale": scale,
    }
    return recipe(learning_rate, weight_decay, "before", common, **slots)
