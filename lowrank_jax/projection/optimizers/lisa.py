"""LISA."""

from typing import Any, Unpack

import optax

from lowrank_jax.optim import inner
from lowrank_jax.projection import projectors, refresh_schedules, samplers
from lowrank_jax.projection.optimizers.recipe import CommonOptions, named, recipe
from lowrank_jax.projection.transformation import ProjectionTransformation
from lowrank_jax.typing import Scalar


@named
def lisa(
    learning_rate: optax.ScalarOrSchedule,
    *,
    active: int = 2,
    period: Scalar = 20,
    layers: str = samplers.LAYERS,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    projector: projectors.Projector | None = None,
    **common: Unpack[CommonOptions],
) -> ProjectionTransformation:
    """LISA (Pan et al., NeurIPS 2024, https://arxiv.org/abs/2403.17919): AdamW on a few layers at a
    time.

    Every `period` steps `active` of the L layers are drawn at random without replacement. Their
    matrices move by Adam, which starts afresh at each draw; the matrices of the other layers do not
    move, do not decay and keep no state. Embedding, head and the vectors of all layers are always
    on. State of a matrix `s x k` of the layers: `2 active s k` words, `active / L` of Adam's.

    Args:
      learning_rate: a number or a schedule.
      active: gamma, 2 in the paper.
      period: K, 20 in the scripts.
      layers: pattern of the paths of leaves of one layer, see `lrx.samplers`.
      b1, b2, eps: of Adam, as in torch.
      weight_decay: before the step, of what is active.
      projector: which subspace of the active layers, such as `lrx.projectors.svd(rank=128)`; its
        refresh schedule counts from the draw. None for whole matrices.
      **common: `mask` of `apply_learning_rate`; the other options of `scale_by_projection`.

    The released code kept the states of inactive layers; here they are gone, as in the paper's
    account of memory. It also freezes the norms of inactive layers. Gradients come from the caller,
    and under jit those of inactive layers are computed too: what is saved is state.

    >>> import jax, jax.numpy as jnp
    >>> import lowrank_jax as lrx
    >>> tx = lrx.lisa(1e-2, active=1, views=lrx.Views(stacked=("layers/.*",)))
    >>> params = {"layers": {"kernel": jnp.ones((6, 4, 8))}}
    >>> state = tx.init(params)
    >>> state.projection.matrices["layers"]["kernel"].inner.mu.shape
    (1, 4, 8)
    >>> updates, state = jax.jit(tx.update)(params, state, params)
    >>> int(jnp.sum(jnp.any(updates["layers"]["kernel"] != 0, axis=(1, 2))))  # layers that move
    1
    """
    slots: dict[str, Any] = {
        "projector": projectors.identity() if projector is None else projector,
        "inner": inner.adam(b1=b1, b2=b2, eps=eps),
        "refresh_schedule": refresh_schedules.every(period=200),
        "sampler": samplers.lisa(active=active, period=period, layers=layers),
    }
    return recipe(learning_rate, weight_decay, "before", common, **slots)
