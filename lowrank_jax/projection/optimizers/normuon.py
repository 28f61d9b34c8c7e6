"""NorMuon."""

from typing import Any, Unpack

import jax.numpy as jnp
import optax

from lowrank_jax.optim import inner, scales
from lowrank_jax.projection import projectors, refresh_schedules, residuals
from lowrank_jax.projection.optimizers.recipe import CommonOptions, named, recipe
from lowrank_jax.projection.transformation import ProjectionTransformation
from lowrank_jax.typing import Scalar


@named
def normuon(
    learning_rate: optax.ScalarOrSchedule,
    *,
    momentum: Scalar = 0.95,
    nesterov: bool = False,
    neuron_decay: Scalar = 0.95,
    rms: Scalar | None = 0.2,
    scale: Scalar | scales.Scale = 1.0,
    steps: int | None = None,
    compute_dtype: jnp.dtype | str | None = None,
    weight_decay: optax.ScalarOrSchedule = 0.1,
    b1: Scalar = 0.9,
    b2: Scalar = 0.95,
    eps: Scalar = 1e-8,
    **common: Unpack[CommonOptions],
) -> ProjectionTransformation:
    """NorMuon (Li et al. 2025): Muon whose outputs, or neurons, move by like amounts: each has a
    second moment of the orthonormal update.

    With W `(m, n)` of m outputs, `M <- momentum M + G` and `O` Muon's direction of M,

        v_j <- neuron_decay v_j + (1 - neuron_decay) mean_i(O_ji²)
        D_ji = O_ji / (sqrt(v_j) + 1e-8)
        W <- (1 - lr wd) W - lr rms sqrt(m n) D / |D|

    see `lrx.residuals.neuron_normalized`. State of a matrix: `m n` momentum and m energies, float32;
    of the other leaves AdamW's.

    Paper: https://arxiv.org/abs/2510.05491, Algorithm 1, whose momentum is an average, which the
    iteration does not see. Both codes keep the norm of O, which is `rms=None`, and scale it by the
    shape: zichongli5/NorMuon by `lrx.scales.fan_ratio(least=1.0)`, with Nesterov's step, no decay
    and rate .02, microsoft/dion by `fan_ratio()`, with decay .01 and rate .01. The latter's cautious
    decay and its other iterations are left out.

    Args:
      learning_rate: number or schedule; with this rms, rates of AdamW serve.
      momentum, neuron_decay: .95 each in both codes.
      nesterov: off in the paper's algorithm and in microsoft/dion.
      rms: root mean square of the update, .2 in the paper, or None.
      scale: factor on the update, a number or one of `lrx.scales`.
      steps, compute_dtype: of the iteration, see `muon`.
      weight_decay: before the step; Muon's .1 here.
      b1, b2, eps: of AdamW on the leaves that are no matrices.
      **common: see `galore`.

    >>> import lowrank_jax as lrx
    >>> lrx.normuon(1e-3).projection.residual
    NeuronNormalized(rms=0.2)
    """
    slots: dict[str, Any] = {
        "projector": projectors.identity(),
        "inner": inner.newton_schulz(
            momentum=momentum,
            nesterov=nesterov,
            steps=inner.NewtonSchulz.steps if steps is None else steps,
            eps=1e-8,
            compute_dtype=compute_dtype,
        ),
        "residual": residuals.neuron_normalized(b=neuron_decay, rms=rms),
        "plain": inner.adam(b1=b1, b2=b2, eps=eps),
        "refresh_schedule": refresh_schedules.never(),
        "scale": scale,
    }
    return recipe(learning_rate, weight_decay, "before", common, **slots)
