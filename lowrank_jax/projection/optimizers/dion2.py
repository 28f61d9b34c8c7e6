"""Dion2."""

from typing import Any, Unpack

import jax.numpy as jnp
import optax

from lowrank_jax import linalg
from lowrank_jax.optim import inner, scales
from lowrank_jax.projection import projectors, refresh_schedules, targets
from lowrank_jax.projection.optimizers.recipe import CommonOptions, named, projector_of, recipe
from lowrank_jax.projection.transformation import ProjectionTransformation
from lowrank_jax.typing import Rank, Scalar

SPECTRAL = scales.fan_ratio()  # sqrt(fan_out / fan_in)


@named
def dion2(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: Rank | None = None,
    momentum: Scalar = 0.95,
    select: str = "l1",
    steps: int | None = None,
    scale: Scalar | scales.Scale = SPECTRAL,
    compute_dtype: jnp.dtype | str | None = None,
    weight_decay: optax.ScalarOrSchedule = 0.01,
    b1: Scalar = 0.9,
    b2: Scalar = 0.95,
    eps: Scalar = 1e-8,
    projector: Any = None,
    **common: Unpack[CommonOptions],
) -> ProjectionTransformation:
    """Dion2 (Ahn, Amsel and Langford 2025): Muon on the quarter of rows or columns on which a
    momentum is largest; the others wait, and lose nothing.

    With W `(m, n)` of m outputs: `K = M + G`, S the `ceil(rank m)` rows of largest l1 norm (columns
    where m > n), `M <- K` with `M[S] <- momentum K[S]`, and

        W[S] <- (1 - lr wd) W[S] - lr sqrt(m / n) p(K[S])

    where p makes its matrix nearly orthonormal by the five polynomials of Polar Express, in the
    place of Muon's; the other rows decay alone. State of a matrix: momentum `m n` float32 and the
    indices of S, int32; of the other leaves AdamW's.

    Paper: https://arxiv.org/abs/2512.16928; code: microsoft/dion, whose "local" selection on a
    sharded matrix takes the largest rows of each device. Here it is that of the whole matrix, its
    "global".

    Args:
      learning_rate: number or schedule; .01 in the code.
      rank: how many rows; fractions, of the smaller side, round up. .25 (None).
      momentum: what selected rows keep, .95.
      select: "l1", "l2" or "random"; a random choice does nearly as well in the paper.
      steps: of the iteration, 5 (None).
      scale: `lrx.scales.fan_ratio()`, which is `sqrt(m / n)`, or `rms(0.2)`.
      compute_dtype: of the iteration; "bfloat16" in the code, float32 here (None).
      weight_decay: before the step, .01.
      b1, b2, eps: of AdamW on the leaves that are no matrices.
      projector: in place of the selection.
      **common: see `galore`.

    >>> import lowrank_jax as lrx
    >>> lrx.dion2(1e-2, rank=0.5).projection.projector
    Columns(rank=0.5, select='l1', round_up=True)
    """
    rank = 0.25 if rank is None and projector is None else rank
    slots = {
        "projector": projector_of(
            projectors.columns, rank, projector, select=select, round_up=True
        ),
        "inner": polar(steps, compute_dtype),
        "refresh_schedule": refresh_schedules.every_step(),
        "target": targets.momentum(mu=momentum),
        "plain": inner.adam(b1=b1, b2=b2, eps=eps),
        "scale": scale,
        "tie": "cols",
    }
    return recipe(learning_rate, weight_decay, "before", common, **slots)


def polar(steps: int | None, compute_dtype: Any) -> inner.Inner:
    """Nearly orthonormal directions by Polar Express, as microsoft/dion makes them."""
    return inner.orthogonal(
        steps=inner.Orthogonal.steps if steps is None else steps,
        coefficients=linalg.POLAR_EXPRESS,
        margin=1.02,
        eps=1e-8,
        compute_dtype=compute_dtype,
    )
