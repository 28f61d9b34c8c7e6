"""Q-GaLore."""

from typing import Any, Unpack

import jax.numpy as jnp
import optax

from lowrank_jax.optim import inner
from lowrank_jax.projection import projectors, refresh_schedules
from lowrank_jax.projection.optimizers.recipe import CommonOptions, named, projector_of, recipe
from lowrank_jax.projection.transformation import ProjectionTransformation
from lowrank_jax.typing import Rank, Scalar


@named
def q_galore(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: Rank | None = None,
    refresh_every: Scalar = 200,
    threshold: Scalar = 0.4,
    queue: int | None = None,
    factor: Scalar = 2,
    scale: Scalar = 0.25,
    b1: Scalar = 0.9,
    b2: Scalar = 0.95,
    eps: Scalar = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    projector: Any = None,
    **common: Unpack[CommonOptions],
) -> ProjectionTransformation:
    """Q-GaLore (Zhang et al., 2024): GaLore with everything in few bits, whose subspaces move less
    often in layers where they stay.

    The step is GaLore's, `W <- W - lr scale P Adam(PᵀG)` and then decay, with P in 4 bits and
    Adam's moments in 8. At a refresh of a layer whose last `queue` cosines `|u_newᵀ u_old|` of the
    first singular vectors have a mean of at least `threshold`, `T <- floor(factor T)`.

    State of a leaf that shrinks s, keeps k: `s ceil(r / 2)` bytes of basis and 8 for each 256 of a
    row, `2 r k` bytes of moments and 4 for each 256 of a row (of fewer than 4096 entries `8 r k`),
    and `12 + 4 queue` of the schedule.

    The paper (https://arxiv.org/abs/2407.08296) also keeps weights in int8 and rounds them
    stochastically: give `lrx.fused(tx, rounding="stochastic")` parameters that are
    `lrx.linalg.quantize_blocks(w, "linear")`. Where we differ from its code (VITA-Group/Q-GaLore):
    an offset of a block is a float32, since its integer zero point between 0 and 15 loses a block
    without a zero in its range; blocks are runs of a row; int8 weights have a scale and no offset;
    the cosine is signless, see `lrx.refresh_schedules.lazy`.

    Args:
      learning_rate: number or schedule; .015 for 60M and 130M, .01 for 1B and .004 for 7B in the
        scripts.
      rank, scale, weight_decay: GaLore's, see `galore`.
      refresh_every: the first T.
      threshold, queue, factor: of the lazy schedule; .4, 5 (None) and 2 in the official code.
      b1, b2, eps: of Adam in PyTorch's convention, which is that of the 8-bit one; the scripts' .95
        for b2, where the code's default is .999.
      projector: in place of `svd(rank=rank, dtype=jnp.int4)`.
      **common: see `galore`.

    Returns:
      An optax transformation.

    >>> import jax, jax.numpy as jnp
    >>> import lowrank_jax as lrx
    >>> w = jax.random.normal(jax.random.key(0), (128, 256))
    >>> params = {"kernel": lrx.linalg.quantize_blocks(w, "linear")}
    >>> fused = lrx.fused(lrx.q_galore(1e-2, rank=32), rounding="stochastic")
    >>> state = fused.init(params)
    >>> params, state = jax.jit(fused.step)(params, {"kernel": w}, state)
    >>> basis = state.projection.matrices["kernel"].basis
    >>> params["kernel"].codes.dtype.name, basis.shape, basis.codes.shape
    ('int8', (128, 32), (128, 16))
    """
    adam = inner.adam(b1=b1, b2=b2, eps=eps)
    slots = {
        "projector": projector_of(projectors.svd, rank, projector, dtype=jnp.int4),
        "inner": inner.stored8(inner=adam),
        "refresh_schedule": refresh_schedules.lazy(
            period=refresh_every,
            threshold=threshold,
            queue=5 if queue is None else queue,
            factor=factor,
        ),
        "scale": scale,
    }
    return recipe(learning_rate, weight_decay, "after", common, **slots)
