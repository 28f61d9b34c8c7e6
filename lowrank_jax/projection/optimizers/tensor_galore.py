"""Tensor-GaLore."""

from typing import Any, Unpack

import optax

from lowrank_jax.optim import inner
from lowrank_jax.projection import projectors, refresh_schedules
from lowrank_jax.projection.optimizers.recipe import CommonOptions, named, projector_of, recipe
from lowrank_jax.projection.transformation import ProjectionTransformation
from lowrank_jax.typing import Rank, Scalar


@named
def tensor_galore(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: Rank | None = None,
    refresh_every: Scalar = 50,
    scale: Scalar = 1.0,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-6,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    projector: Any = None,
    **common: Unpack[CommonOptions],
) -> ProjectionTransformation:
    """Tensor-GaLore (George et al., 2025): GaLore of tensors, such as kernels of convolutions, whose
    every axis has a small basis of its own.

    With `U_j (n_j, r_j)` the factors of a Tucker decomposition of G every T steps, and its core
    `R = G x_1 U_1ᵀ ... x_d U_dᵀ (r_1, ..., r_d)`,

        W <- W - lr scale Adam(R) x_1 U_1 ... x_d U_d       moments kept at a refresh; then decay

    State of a leaf of axes n_j: `sum n_j r_j` of bases and `2 prod r_j` of moments, float32. Which
    axes are one tensor a view says: those of rows and columns are, batch axes are tensors apart.

    Paper: https://arxiv.org/abs/2501.02379. The code (neuraloperator @93d3f06) never moves its
    factors: it makes them where there are none. Here they move every T steps, as in the paper. Of
    the decomposition it leaves tensorly's 100 iterations with a tolerance; here there are 10 and
    none, the number that it names and does not pass on. A fraction is there of all numbers, here of
    each axis. Complex weights are refused.

    Args:
      learning_rate: number or schedule.
      rank: of each axis, as far as it has so many: integer, fraction of the axis, or by path.
      refresh_every: T, 50 in the code's optimizer and its experiments.
      scale: 1 in the code.
      b1, b2, eps: of Adam, in its "hf" convention, as in the code.
      weight_decay: after the step, as in the code.
      projector: in place of `tucker(rank=rank)`.
      **common: see `galore`.

    Returns:
      An optax transformation.

    >>> import jax.numpy as jnp
    >>> import lowrank_jax as lrx
    >>> views = lrx.Views(rules=((".*conv/kernel", lrx.MatrixView(rows=(0, 1, 2), cols=(3,))),))
    >>> params = {"conv": {"kernel": jnp.ones((3, 3, 8, 16))}}
    >>> state = lrx.tensor_galore(1e-2, rank=4, views=views).init(params)
    >>> state.projection.matrices["conv"]["kernel"]
    MatrixState('conv/kernel', rank=4, shrinks=cols, basis=[(16, 4), (3, 3), (3, 3), (8, 4)], 1,612 bytes)
    """
    slots = {
        "projector": projector_of(projectors.tucker, rank, projector),
        "inner": inner.adam(b1=b1, b2=b2, eps=eps, convention="hf"),
        "refresh_schedule": refresh_schedules.every(period=refresh_every),
        "scale": scale,
    }
    return recipe(learning_rate, weight_decay, "after", common, **slots)
