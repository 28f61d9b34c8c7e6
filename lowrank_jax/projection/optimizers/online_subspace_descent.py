"""Online Subspace Descent."""

from typing import Any, Unpack

import optax

from lowrank_jax.optim import inner
from lowrank_jax.projection import projectors, refresh_schedules
from lowrank_jax.projection.optimizers.recipe import CommonOptions, named, projector_of, recipe
from lowrank_jax.projection.transformation import ProjectionTransformation
from lowrank_jax.typing import Rank, Scalar


@named
def online_subspace_descent(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: Rank | None = None,
    refresh_every: Scalar = 200,
    scale: Scalar = 0.25,
    basis_optimizer: Any = "adamw",
    peak_rate: Any = None,
    first: str = "svd",
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-6,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    projector: Any = None,
    **common: Unpack[CommonOptions],
) -> ProjectionTransformation:
    """Online Subspace Descent (Liang et al., NeurIPS 2024): GaLore whose basis learns at every step,
    without an SVD after the first.

        W   <- W - lr scale P Adam(PᵀG),  then decay
        P   <- P - (lr / peak_rate) / T optimizer(2 (P PᵀX + X PᵀP - 2 X)),  X = G GᵀP / |G|²

    The second line is a step on `|P PᵀĜ - Ĝ|²` with `Ĝ = G / |G|`; the update of a step uses the
    old P, the next step the new one, and the step whose SVD made the first P moves it no more. P is
    not orthonormalised again. The paper (https://arxiv.org/abs/2408.12857) adds a penalty on
    `PᵀP - I`, which its code leaves out; so do we.

    State of a leaf that shrinks s, keeps k, float32: `s r` basis, `2 r k` moments, and of "adamw" on
    the basis `2 s r` more and a count.

    Args:
      learning_rate: number or schedule; .01 in the scripts.
      rank: integer, fraction, or by path, as in GaLore.
      refresh_every: T, 200 in the scripts (7B: 500); the basis moves at every step by 1 / T.
      scale: of the step inside the subspace, .25 in the scripts.
      basis_optimizer: "adamw" with weight decay .01 as in the code, "sgd", or another, see
        `lrx.projectors.online_pca`.
      peak_rate: of a schedule, the learning rate at which the basis moves by 1 / T. Under
        `optax.inject_hyperparams` a schedule comes as numbers: give it there too.
      first: "svd" of the first gradient, or "random".
      b1, b2, eps, weight_decay: of Adam in the "hf" convention, decay after the step.
      projector: in place of `online_pca(...)`.
      **common: see `galore`.

    Raises:
      ValueError: for a schedule without `peak_rate`.

    >>> import lowrank_jax as lrx
    >>> tx = lrx.online_subspace_descent(1e-2, rank=8, basis_optimizer="sgd")
    >>> tx.projection.refresh_schedule
    EveryStep(when='after')
    """
    if callable(learning_rate) and peak_rate is None and projector is None:
        raise ValueError(
            "online_subspace_descent: learning_rate is a schedule, with which the basis moves too, "
            "relative to its peak; give peak_rate=, the schedule's largest value"
        )
    options = {"period": refresh_every, "peak_rate": peak_rate, "first": first}
    slots = {
        "projector": projector_of(
            projectors.online_pca, rank, projector, optimizer=basis_optimizer, **options
        ),
        "inner": inner.adam(b1=b1, b2=b2, eps=eps, convention="hf"),
        "refresh_schedule": refresh_schedules.every_step(when="after"),
        "scale": scale,
    }
    return recipe(learning_rate, weight_decay, "after", common, **slots)
