"""Muon."""

from typing import Any, Unpack

import jax.numpy as jnp
import optax

from lowrank_jax.optim import inner, scales
from lowrank_jax.projection import projectors, refresh_schedules
from lowrank_jax.projection.optimizers.recipe import CommonOptions, named, recipe
from lowrank_jax.projection.transformation import ProjectionTransformation
from lowrank_jax.typing import Scalar

SPECTRAL = scales.fan_ratio()


@named
def muon(
    learning_rate: optax.ScalarOrSchedule,
    *,
    momentum: Scalar = 0.95,
    nesterov: bool = True,
    steps: int | None = None,
    scale: Scalar | scales.Scale = SPECTRAL,
    compute_dtype: jnp.dtype | str | None = None,
    weight_decay: optax.ScalarOrSchedule = 0.1,
    b1: Scalar = 0.9,
    b2: Scalar = 0.95,
    eps: Scalar = 1e-8,
    **common: Unpack[CommonOptions],
) -> ProjectionTransformation:
    """Muon (Jordan et al. 2024): momentum made nearly orthonormal on matrices, AdamW on the rest.

    With `m <- momentum m + G`, `x = G + momentum m` and `x = u s vᵀ`, a matrix moves by `scale u p(s) vᵀ`, where
    five Newton-Schulz steps p bring all singular values near 1; see `lrx.inner.newton_schulz`.
    State of a matrix m x n: `m n` momentum, and nothing else; of the other leaves AdamW's.

    Args:
      learning_rate: number or schedule; 1e-3 in microsoft/dion's reference, with this scale and decay.
      momentum, nesterov: .95, on.
      steps: of the iteration, 5 (None).
      scale: `lrx.scales.fan_ratio()` (`sqrt(fan_out / fan_in)`, its "spectral_norm"),
        `fan_ratio(least=1.0)` as in Muon's own code (rate .02), or `rms(0.2)`, with which rates and
        decays of AdamW serve (arXiv 2502.16982, "rms_norm").
      compute_dtype: of the iteration; "bfloat16" in the official codes, float32 here (None).
      weight_decay: .1, before the step, by the rate without the scale.
      b1, b2, eps: of AdamW on the leaves that are no matrices, (.9, .95) and 1e-8 there; its rate
        is `plain_learning_rate`, 3e-4 in Muon's own code beside .02.
      **common: see `galore`. `views` says which leaves are matrices: embeddings and heads are not, as
        in the official codes.

    `optax.contrib.muon` averages where this sums, which the iteration does not see, and corrects
    the bias of both terms of Nesterov's step, which it does until `momentum^t` is small.

    >>> import lowrank_jax as lrx
    >>> lrx.muon(1e-3).projection.inner.scale
    FanRatio()
    """
    slots: dict[str, Any] = {
        "projector": projectors.identity(),
        "inner": inner.newton_schulz(
            momentum=momentum,
            nesterov=nesterov,
            steps=inner.NewtonSchulz.steps if steps is None else steps,
            eps=1e-8,
            compute_dtype=compute_dtype,
            scale=scale,
        ),
        "plain": inner.adam(b1=b1, b2=b2, eps=eps),
        "refresh_schedule": refresh_schedules.never(),
    }
    return recipe(learning_rate, weight_decay, "before", common, **slots)
