"""Trion."""

from typing import Any, Unpack

import jax.numpy as jnp
import optax

from lowrank_jax.optim import inner, scales
from lowrank_jax.projection import projectors, refresh_schedules, targets
from lowrank_jax.projection.optimizers.recipe import CommonOptions, named, projector_of, recipe
from lowrank_jax.projection.transformation import ProjectionTransformation
from lowrank_jax.typing import Rank, Scalar

KJ = scales.fan_ratio(least=1.0)  # sqrt(max(1, fan_out / fan_in))


@named
def trion(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: Rank | None = None,
    momentum: Scalar = 0.95,
    kind: int | tuple[int, int] = (3, 2),
    norm: str = "l1",
    steps: int | None = None,
    scale: Scalar | scales.Scale = KJ,
    compute_dtype: jnp.dtype | str | None = None,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    b1: Scalar = 0.9,
    b2: Scalar = 0.95,
    eps: Scalar = 1e-10,
    projector: Any = None,
    **common: Unpack[CommonOptions],
) -> ProjectionTransformation:
    """Trion (arXiv 2505.17967, ICLR 2026): Muon on the r DCT vectors on which a momentum is largest.

    With the shrunk side in front: `K = M + G`, P the r columns of the DCT on which `|PᵀK|` is
    largest, `R = PᵀK`, `M <- K - (1 - momentum) P R`, `O = NS(R)` by five Newton-Schulz steps, and
    `W <- (1 - lr wd) W - lr scale P O`. What P does not see stays in M undecayed. State of a leaf
    that shrinks s, keeps k: momentum `s k` float32 and `r` int32.

    Args:
      learning_rate: number or schedule; .02 in the official code.
      rank: integer, fraction of the smaller dimension, or by path.
      momentum: mu, .95.
      kind: of the DCT, see `lrx.projectors.dct`. As in the official code, leaves that shrink their
        inputs take the columns of the DCT-II matrix (3) and leaves that shrink their outputs its
        rows (2), so that a weight and its transpose are stepped differently. One number for both
        makes them alike: 3 is DCT-AdamW's.
      norm: "l1" in the official code; "l2" minimises what is not seen.
      steps: of the iteration, 5 (None).
      scale: `lrx.scales.fan_ratio(least=1.0)` (the paper's, "kj"), `rms(0.2)` ("kimi"),
        `fan_ratio()` ("dion") or 1.
      compute_dtype: of the iteration; "bfloat16" in the official code, float32 here (None).
      weight_decay: before the step, 0.
      b1, b2, eps: of AdamW on the leaves that are not projected, (.9, .95) and 1e-10; its rate is
        `plain_learning_rate`, 3e-4 in the official code beside .02.
      projector: in place of the DCT.
      **common: see `galore`.

    The code as released does not run (undefined names); the rule is that of its matmul path.

    >>> import lowrank_jax as lrx
    >>> lrx.trion(0.02, rank=8, plain_learning_rate=3e-4).projection.projector
    Dct(rank=8, kind=(3, 2))
    """
    slots = {
        "projector": projector_of(projectors.dct, rank, projector, kind=kind, norm=norm),
        "inner": inner.orthogonal(
            steps=inner.Orthogonal.steps if steps is None else steps, compute_dtype=compute_dtype
        ),
        "refresh_schedule": refresh_schedules.every_step(),
        "target": targets.momentum(mu=momentum),
        "plain": inner.adam(b1=b1, b2=b2, eps=eps),
        "scale": scale,
    }
    return recipe(learning_rate, weight_decay, "before", common, **slots)
