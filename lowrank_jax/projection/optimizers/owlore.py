"""OwLore."""

from collections.abc import Sequence
from typing import Any, Unpack

import optax

from lowrank_jax.optim import inner
from lowrank_jax.projection import projectors, refresh_schedules, samplers
from lowrank_jax.projection.optimizers.recipe import CommonOptions, named, projector_of, recipe
from lowrank_jax.projection.transformation import ProjectionTransformation
from lowrank_jax.typing import Rank, Scalar


@named
def owlore(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: Rank | None = None,
    weights: Sequence[float] | None = None,
    active: int = 5,
    period: Scalar = 50,
    layers: str = samplers.LAYERS,
    refresh_every: Scalar = 100,
    scale: Scalar = 1.0,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-6,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    projector: Any = None,
    **common: Unpack[CommonOptions],
) -> ProjectionTransformation:
    """OwLore (Li et al., 2024, https://arxiv.org/abs/2405.18380): GaLore on a few layers at a time,
    those with many outliers more often.

    Every `period` steps `active` of the L layers are drawn without replacement, in proportion to
    their share of outliers D_l. Their matrices move by GaLore, whose basis and moments start afresh
    at each draw; the others do not move, do not decay and keep no state:

        P = U[:, :r] of the gradient G of an active layer,   R = PᵀG
        W <- W - lr scale P Adam(R),  then decay

    State of a matrix that shrinks s, keeps k: `active (s r + 2 r k)` words of all L layers.

    Args:
      learning_rate: number or schedule; 3e-4 in the scripts.
      rank: integer, fraction, or by path; 128 in the paper, 256 in the code.
      weights: a number a layer, `lrx.samplers.outlier_ratios` of a batch; the other choices of the
        scripts are numbers too: ones (None), their reverse, ascending or descending ones.
      active: gamma, 5 in the scripts.
      period: K, 50 in the scripts.
      layers: pattern of the paths of leaves of one layer, see `lrx.samplers`.
      refresh_every: T, 100 in the scripts, counted from the draw.
      scale: 1 in the scripts.
      b1, b2, eps, weight_decay: those of GaLore's AdamW.
      projector: in place of `svd(rank=rank)`.
      **common: see `galore`.

    The released code keeps the states of layers that are no longer active and counts T by layer, so
    that a layer's basis is renewed at every second of its turns and serves a stale one otherwise;
    here a draw makes a new one. The code ships the scores of one model and not what computes them;
    they follow the paper's definition.

    >>> import jax.numpy as jnp
    >>> import lowrank_jax as lrx
    >>> views = lrx.Views(stacked=("layers/.*",))
    >>> tx = lrx.owlore(1e-2, rank=2, active=1, weights=(0.0, 0.3, 0.1), views=views)
    >>> state = tx.init({"layers": {"kernel": jnp.ones((3, 4, 8))}})
    >>> state.projection.matrices["layers"]["kernel"].inner.mu.shape
    (1, 2, 8)
    """
    slots: dict[str, Any] = {
        "projector": projector_of(projectors.svd, rank, projector),
        "inner": inner.adam(b1=b1, b2=b2, eps=eps, convention="hf"),
        "refresh_schedule": refresh_schedules.every(period=refresh_every),
        "scale": scale,
        "sampler": samplers.lisa(active=active, period=period, layers=layers, weights=weights),
    }
    return recipe(learning_rate, weight_decay, "after", common, **slots)
