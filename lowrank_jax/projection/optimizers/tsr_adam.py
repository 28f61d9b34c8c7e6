"""TSR-Adam."""

from typing import Any, Unpack

import optax

from lowrank_jax.optim import inner
from lowrank_jax.projection import projectors, refresh_schedules
from lowrank_jax.projection.optimizers.recipe import CommonOptions, named, projector_of, recipe
from lowrank_jax.projection.transformation import ProjectionTransformation
from lowrank_jax.typing import Rank, Scalar


@named
def tsr_adam(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: Rank | None = None,
    refresh_every: Scalar = 100,
    scale: Scalar = 0.75,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-6,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    projector: Any = None,
    **common: Unpack[CommonOptions],
) -> ProjectionTransformation:
    """TSR-Adam (Dang et al., 2026): Adam on a core of the gradient that is small on both sides, so
    that data-parallel devices need exchange r x r numbers of a matrix.

    With U and V the leading r singular vectors of G, by a randomised SVD every T steps,

        C = UᵀG V                               (r, r), all that a step between refreshes sums up
        W <- W - lr scale U Adam(C) Vᵀ          moments kept at a refresh; then decay

    State of a leaf that shrinks s, keeps k: `(s + k) r` of bases and `2 r²` of moments, float32.

    Paper: https://arxiv.org/abs/2602.08007, by its abstract; the rule is that of its code
    (DKmiyan/TSR-Adam). The abstract has refreshes without a synchronised full gradient. Its code
    decomposes the gradient that PyTorch has summed up already, and so does this by default. With
    `projector=lrx.projectors.alternating_two_sided(rank=rank)` a refresh is two thin products, of
    which devices sum up `(s + k) r` numbers of a matrix, after the step.

    Args:
      learning_rate: number or schedule; .01 in all scripts.
      rank: integer, fraction, or by path, which gives embeddings one of their own where `views`
        project them; scripts: 256/384/384/512 for 60M/130M/350M/1B, embeddings 64/96/128/256.
      refresh_every: T, 100 in the scripts (50 at 1B). Embeddings move every 2 steps there; here all
        matrices move at once.
      scale: .75 in the scripts (.5 at 60M).
      b1, b2, eps: of Adam, in its "hf" convention, as in the code.
      weight_decay: after the step, as in the code.
      projector: in place of `randomized_two_sided(rank=rank)`, which has one power iteration and 5
        directions more than r, as in the code.
      **common: see `galore`.

    Returns:
      An optax transformation.

    >>> import jax.numpy as jnp
    >>> import lowrank_jax as lrx
    >>> state = lrx.tsr_adam(1e-2, rank=4).init({"kernel": jnp.ones((8, 16))})
    >>> state.projection.matrices["kernel"]
    MatrixState('kernel', rank=4, shrinks=rows, basis=[(8, 4), (16, 4)], 516 bytes)
    """
    slots = {
        "projector": projector_of(projectors.randomized_two_sided, rank, projector),
        "inner": inner.adam(b1=b1, b2=b2, eps=eps, convention="hf"),
        "refresh_schedule": refresh_schedules.every(period=refresh_every),
        "scale": scale,
    }
    return recipe(learning_rate, weight_decay, "after", common, **slots)
