"""Dion3."""

from typing import Any, Unpack

import jax.numpy as jnp
import optax

from lowrank_jax.optim import inner, scales
from lowrank_jax.projection import projectors, refresh_schedules, residuals, targets
from lowrank_jax.projection.optimizers.dion2 import polar
from lowrank_jax.projection.optimizers.recipe import CommonOptions, named, projector_of, recipe
from lowrank_jax.projection.transformation import ProjectionTransformation
from lowrank_jax.typing import Rank, Scalar

SPECTRAL = scales.fan_ratio()  # sqrt(fan_out / fan_in)


@named
def dion3(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: Rank | None = None,
    momentum: Scalar = 0.95,
    neuron_decay: Scalar = 0.95,
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
    """Dion3, also NorDion2 (microsoft/dion): Dion2 on outputs alone, those that move made to move by
    like amounts, as in NorMuon.

    With W `(m, n)` of m outputs: `K = M + G`, S the `ceil(rank m)` rows of largest l1 norm, whatever
    the shape, `M <- K` with `M[S] <- momentum K[S]`, `O = p(K[S])` as in `dion2`, and for j in S

        v_j <- neuron_decay v_j + (1 - neuron_decay) mean_i(O_ji²),  D_ji = O_ji / (sqrt(v_j) + 1e-8)
        W[S] <- (1 - lr wd) W[S] - lr sqrt(m / n) |O| D / |D|

    Energies of outputs that are not selected stay as they are, and these outputs decay alone; see
    `lrx.residuals.neuron_normalized`. State of a matrix: momentum `m n` and m energies, float32, and
    the indices of S, int32; of the other leaves AdamW's.

    There is no paper of its own: it joins https://arxiv.org/abs/2512.16928 and
    https://arxiv.org/abs/2510.05491, and the rule is the code's (microsoft/dion). As for `dion2`,
    selection is that of the whole matrix, the code's "global".

    Args:
      learning_rate: number or schedule; .01 in the code.
      rank: how many outputs; fractions round up. .25 (None).
      momentum, neuron_decay: .95 each.
      select, steps, scale, compute_dtype, weight_decay, b1, b2, eps: see `dion2`.
      projector: in place of the selection.
      **common: see `galore`.

    >>> import lowrank_jax as lrx
    >>> lrx.dion3(1e-2).projection.side
    'cols'
    """
    rank = 0.25 if rank is None and projector is None else rank
    own = {"select": select, "round_up": True}
    slots = {
        "projector": projector_of(projectors.columns, rank, projector, **own),
        "inner": polar(steps, compute_dtype),
        "refresh_schedule": refresh_schedules.every_step(),
        "target": targets.momentum(mu=momentum),
        "residual": residuals.neuron_normalized(b=neuron_decay),
        "plain": inner.adam(b1=b1, b2=b2, eps=eps),
        "scale": scale,
        "side": "cols",
    }
    return recipe(learning_rate, weight_decay, "before", common, **slots)
