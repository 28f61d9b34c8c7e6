"""LDAdam."""

from typing import Any, Unpack

import optax

from lowrank_jax.optim import inner
from lowrank_jax.projection import projectors, refresh_schedules, targets, transports
from lowrank_jax.projection.optimizers.recipe import CommonOptions, named, recipe
from lowrank_jax.projection.transformation import ProjectionTransformation
from lowrank_jax.typing import Rank, Scalar


@named
def ldadam(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: Rank = 16,
    mix: Any = 0.908,
    error_feedback: bool = True,
    scale: Scalar = 1.0,
    b1: Scalar = 0.908,
    b2: Scalar = 0.99,
    eps: Scalar = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    first: str = "svd",
    projector: Any = None,
    **common: Unpack[CommonOptions],
) -> ProjectionTransformation:
    """LDAdam (ICLR 2025): a new subspace at every step, moments transported, errors fed back.

    With `K = G + E`: `P = qr(B Bᵀ P_old)`, `B = mix up_old(m̂) + (1 - mix) K`; the moments move by
    LDAdam's rule; `E <- K - up(g) + b1 / (1 - b1) [up_old(m) - up(C m)]`; AdamW on `g = PᵀK`. State
    of a leaf that shrinks s, keeps k: `s r` basis, `2 r k` moments and `s k` error, which the
    official code hides in the gradient buffer.

    Args:
      learning_rate: number or schedule; official default 1e-3.
      rank: integer (16), fraction, or by path.
      mix: rho, .908.
      error_feedback: on by default.
      scale: factor on the step inside the subspace, 1.
      b1, b2, eps, weight_decay: (.908, .99), 1e-8; decay before the step.
      first: the basis of the first step, "svd" as in the official code or "range" (no SVD in the
        program).
      projector: in place of the power iteration.
      **common: see `galore`.

    Squares shrink the outputs here, and the inputs in GaLore, as in the official codes.

    >>> import lowrank_jax as lrx
    >>> lrx.ldadam(1e-3, rank=8).projection.refresh_schedule
    EveryStep()
    """
    if projector is None:
        projector = projectors.power(rank=rank, first=first, mix=mix)
    slots = {
        "scale": scale,
        "projector": projector,
        "inner": inner.adam(b1=b1, b2=b2, eps=eps),
        "refresh_schedule": refresh_schedules.every_step(),
        "transport": transports.ldadam(),
        "target": targets.ldadam_error_feedback() if error_feedback else targets.gradient(),
        "tie": "cols",
    }
    return recipe(learning_rate, weight_decay, "before", common, **slots)
