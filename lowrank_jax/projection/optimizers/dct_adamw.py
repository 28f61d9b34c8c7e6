"""DCT-AdamW."""

from typing import Unpack

import optax

from lowrank_jax.optim import inner
from lowrank_jax.projection import projectors, refresh_schedules, targets, transports
from lowrank_jax.projection.optimizers.recipe import CommonOptions, named, projector_of, recipe
from lowrank_jax.projection.transformation import ProjectionTransformation
from lowrank_jax.typing import Rank, Scalar


@named
def dct_adamw(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: Rank | None = None,
    refresh_every: Scalar = 1,
    kind: int = 3,
    norm: str = "l1",
    rotate: bool = True,
    error_feedback: bool = False,
    scale: Scalar = 1.0,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    **common: Unpack[CommonOptions],
) -> ProjectionTransformation:
    """DCT-AdamW (arXiv 2505.17967, ICLR 2026): AdamW on the r DCT vectors on which the gradient is
    largest.

    `W <- (1 - lr wd) W - lr up(N)`, Adam in its "torch" convention. The basis is r integers: no
    SVD, no stored matrix. State of a leaf that shrinks s, keeps k: `r` int32 and `2 r k` moments;
    error feedback adds `s k`.

    Args:
      learning_rate: number or schedule.
      rank: integer, fraction, or by path.
      refresh_every: T; as in the official code the steps 0, T-1, 2T-1, ... refresh. Its default is
        1.
      kind: 3 ("dct3", the official matmul path) or 2 ("dct2", its Makhoul path): different bases.
      norm: "l1" (official default) or "l2" (which minimises the projection error).
      rotate: a slot keeps its moments if its index survives and starts at zero otherwise. The
        official default is False: there slot j is reused for whatever index lands in it, in an
        order that depends on the backend; with False our indices are sorted, so that slots at least
        keep their order.
      error_feedback: project gradient plus the part that was dropped before (official default
        False).
      scale: factor on the step inside the subspace, 1.
      b1, b2, eps, weight_decay: AdamW's, decay before the step.
      **common: see `galore`.

    The official in-place rotation gives wrong values for some shapes; here it is an index gather.

    >>> import lowrank_jax as lrx
    >>> lrx.dct_adamw(1e-3, rank=0.25).projection.projector
    Dct(rank=0.25)
    """
    phase = refresh_every - 1
    slots = {
        "scale": scale,
        "projector": projector_of(projectors.dct, rank, None, kind=kind, norm=norm),
        "inner": inner.adam(b1=b1, b2=b2, eps=eps),
        "refresh_schedule": refresh_schedules.every(period=refresh_every, phase=phase),
        "transport": transports.rotate() if rotate else transports.keep(),
        "target": targets.error_feedback() if error_feedback else targets.gradient(),
    }
    return recipe(learning_rate, weight_decay, "before", common, **slots)
