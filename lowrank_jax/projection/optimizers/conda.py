"""Conda."""

from typing import Any, Unpack

import optax

from lowrank_jax.optim import inner
from lowrank_jax.projection import projectors, refresh_schedules, transports
from lowrank_jax.projection.optimizers.recipe import CommonOptions, named, recipe
from lowrank_jax.projection.transformation import ProjectionTransformation
from lowrank_jax.typing import Scalar


@named
def conda(
    learning_rate: optax.ScalarOrSchedule,
    *,
    refresh_every: Scalar = 2000,
    scale: Scalar = 0.25,
    b1: Scalar = 0.9,
    b2: Scalar = 0.99,
    eps: Scalar = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    projector: Any = None,
    **common: Unpack[CommonOptions],
) -> ProjectionTransformation:
    """Conda (Wang et al., 2025): Adam in all singular directions of its own momentum, so that each of
    them is normalised by itself.

    With `M <- b1 M + (1 - b1) G` and, every T steps, P all left singular vectors of M (the side that
    is shrunk, s x s),

        V <- b2 V + (1 - b2) (PᵀG)²
        W <- W - lr scale c P (PᵀM / (sqrt(V) + eps))

    with Adam's bias correction c, then decay. Nothing is dropped: P is square, so `PᵀM` is kept in
    the place of M and turned exactly at a refresh, while V stays. State of a leaf that shrinks s,
    keeps k, float32: `s²` basis and `2 s k` moments.

    Where gradients have had fewer than s directions, the rest of P is any orthonormal completion, and
    Adam treats what comes there later as that completion has it: two platforms may then differ.

    Paper: https://arxiv.org/abs/2509.24218; its code (jie040109/Conda) does the same, with M as the
    gradients lie.

    Args:
      learning_rate: number or schedule; .01 in the scripts for LLaMA.
      refresh_every: T, 2000 in the scripts.
      scale: .25 in the scripts.
      b1, b2, eps, weight_decay: of Adam in the "hf" convention, (.9, .99) and 1e-8 as there; decay
        after the step.
      projector: in place of `svd(rank=1.0, momentum=b1)`; one of a smaller rank drops directions.
      **common: see `galore`.

    Returns:
      An optax transformation.

    >>> import lowrank_jax as lrx
    >>> lrx.conda(1e-2).projection.projector.momentum
    0.9
    """
    if projector is None:
        projector = projectors.svd(rank=1.0, momentum=b1)
    slots = {
        "projector": projector,
        "inner": inner.adam(b1=b1, b2=b2, eps=eps, convention="hf"),
        "refresh_schedule": refresh_schedules.every(period=refresh_every),
        "transport": transports.rotate(second=False),
        "scale": scale,
    }
    return recipe(learning_rate, weight_decay, "after", common, **slots)
