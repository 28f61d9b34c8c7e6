"""BAdam."""

from typing import Any, Unpack

import optax

from lowrank_jax.optim import inner
from lowrank_jax.projection import projectors, refresh_schedules, samplers
from lowrank_jax.projection.optimizers.recipe import CommonOptions, named, recipe
from lowrank_jax.projection.transformation import ProjectionTransformation
from lowrank_jax.typing import Scalar


@named
def badam(
    learning_rate: optax.ScalarOrSchedule,
    *,
    period: Scalar = 50,
    order: str = "descending",
    phase: Scalar = 0,
    layers: str = samplers.LAYERS,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    projector: projectors.Projector | None = None,
    **common: Unpack[CommonOptions],
) -> ProjectionTransformation:
    """BAdam (Luo et al., NeurIPS 2024, https://arxiv.org/abs/2404.02827): Adam on one layer after
    the other.

    The layers are blocks, and take turns of `period` steps. Adam starts afresh with each turn; the
    matrices of other layers do not move, do not decay and keep no state. State of a matrix `s x k`
    of the layers: `2 s k` words, `1 / L` of Adam's.

    Args:
      learning_rate: a number or a schedule.
      period: K, 100 in the paper, 50 in its code.
      order: "ascending", "descending" (the code's default) or "random".
      phase: 1 for the official code, whose first turn is one step shorter.
      layers: pattern of the paths of leaves of one layer, see `lrx.samplers`.
      b1, b2, eps: of Adam, as in torch.
      weight_decay: before the step, of what is active.
      projector: which subspace of the active layer; its refresh schedule counts from the start of
        the turn. None for whole matrices.
      **common: `mask` of `apply_learning_rate`; the other options of `scale_by_projection`.

    The official code leaves embedding and head out, and the norms of inactive layers too; here they
    are always on, and `optax.partition` with `optax.set_to_zero()` freezes them. It keeps a float32
    copy of the active block, which a float32 parameter does not need. Gradients come from the
    caller, and under jit those of inactive layers are computed too: what is saved is state.

    >>> import jax, jax.numpy as jnp
    >>> import lowrank_jax as lrx
    >>> tx = lrx.badam(1e-2, period=2, views=lrx.Views(stacked=("layers/.*",)))
    >>> params = {"layers": {"kernel": jnp.ones((6, 4, 8))}}
    >>> state, moved = tx.init(params), []
    >>> for _ in range(4):
    ...     updates, state = tx.update(params, state, params)
    ...     moved += [int(jnp.argmax(jnp.any(updates["layers"]["kernel"] != 0, axis=(1, 2))))]
    >>> moved
    [5, 5, 4, 4]
    """
    slots: dict[str, Any] = {
        "projector": projectors.identity() if projector is None else projector,
        "inner": inner.adam(b1=b1, b2=b2, eps=eps),
        "refresh_schedule": refresh_schedules.every(period=200),
        "sampler": samplers.badam(period=period, order=order, phase=phase, layers=layers),
    }
    return recipe(learning_rate, weight_decay, "before", common, **slots)
