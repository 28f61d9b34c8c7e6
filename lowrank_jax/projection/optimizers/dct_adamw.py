"""DCT-AdamW."""

from typing import Any

import optax

from lowrank_jax.optim import inner
from lowrank_jax.projection import projectors, residuals, transports
from lowrank_jax.projection import refresh_schedules as clocks
from lowrank_jax.projection.optimizers.recipe import _projector, _recipe
from lowrank_jax.projection.transformation import ProjectionTransformation


def dct_adamw(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: Any = None,
    refresh_every: Any = 1,
    kind: int = 3,
    norm: str = "l1",
    rotate: bool = True,
    error_feedback: bool = False,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    **common: Any,
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
      b1, b2, eps, weight_decay: AdamW's, decay before the step.
      **common: see `galore`.

    The official in-place rotation gives wrong values for some shapes; here it is an index gather.

    >>> import lowrank_jax as lrx
    >>> lrx.dct_adamw(1e-3, rank=0.25).projection.projector
    Dct(rank=0.25, norm='l1', kind=3, products='xla')
    """
    phase = refresh_every - 1
    slots = {
        "projector": _projector(projectors.dct, rank, None, kind=kind, norm=norm),
        "inner": inner.adam(b1=b1, b2=b2, eps=eps),
        "own_clock": clocks.every(period=refresh_every, phase=phase),
        "transport": transports.rotate() if rotate else transports.keep(),
        "residual": residuals.error_feedback() if error_feedback else residuals.discard(),
    }
    return _recipe(learning_rate, weight_decay, "pre", **(slots | common))
