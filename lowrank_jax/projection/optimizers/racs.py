"""RACS."""

from typing import Any, Unpack

import optax

from lowrank_jax.optim import inner, scales
from lowrank_jax.projection import projectors, refresh_schedules
from lowrank_jax.projection.optimizers.recipe import CommonOptions, named, recipe
from lowrank_jax.projection.transformation import ProjectionTransformation
from lowrank_jax.typing import Scalar


@named
def racs(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b: Scalar = 0.9,
    iterations: int | None = None,
    limiter: Scalar | None = 1.01,
    scale: Scalar | scales.Scale = 0.05,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    **common: Unpack[CommonOptions],
) -> ProjectionTransformation:
    """RACS (Gong et al., 2025): SGD with one scale for each row and one for each column, for almost
    no memory.

    With `q sᵀ` near `G²` and averages of both vectors,

        W <- W - lr scale diag(q)^-1/2 G diag(s)^-1/2

    whose norm grows by no more than `limiter` in a step, after decay; see
    `lrx.inner.row_column_scaled`. State of m x n: `m + n + 1` float32; of the leaves that are no
    matrices AdamW's.

    Paper: https://arxiv.org/abs/2502.07752, Algorithm 1. There is no official code; a public one
    (kozistr/pytorch_optimizer) takes means of squares over rows and columns in the place of the
    fixed point.

    Args:
      learning_rate: number or schedule; .02 in the paper.
      b: decay of both vectors, .9.
      iterations: of the fixed point, 5 (None).
      limiter: 1.01, or None.
      scale: the paper's alpha, .05 (1B: .02).
      weight_decay: before the step; the paper has none.
      b1, b2, eps: of AdamW on the other leaves.
      **common: see `galore`.

    Returns:
      An optax transformation.

    >>> import lowrank_jax as lrx
    >>> lrx.racs(2e-2, iterations=3).projection.inner.iterations
    3
    """
    slots: dict[str, Any] = {
        "projector": projectors.identity(),
        "inner": inner.row_column_scaled(
            b=b,
            iterations=5 if iterations is None else iterations,
            limiter=limiter,
            scale=scale,
        ),
        "plain": inner.adam(b1=b1, b2=b2, eps=eps),
        "refresh_schedule": refresh_schedules.never(),
    }
    return recipe(learning_rate, weight_decay, "before", common, **slots)
