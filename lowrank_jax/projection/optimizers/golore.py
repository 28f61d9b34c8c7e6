"""GoLore."""

from typing import Any, Unpack

import optax

from lowrank_jax.optim import inner
from lowrank_jax.projection import projectors, refresh_schedules, transports
from lowrank_jax.projection.optimizers.recipe import CommonOptions, named, projector_of, recipe
from lowrank_jax.projection.transformation import ProjectionTransformation
from lowrank_jax.typing import Rank, Scalar


def _svd_then_random(rank: Rank, at: Any) -> projectors.Projector:
    random = projectors.random(rank=rank, kind="orthonormal")
    return projectors.switch(at=at, first=projectors.svd(rank=rank), then=random)


@named
def golore(
    learning_rate: optax.ScalarOrSchedule,
    *,
    random_from: Any,
    rank: Rank | None = None,
    refresh_every: Scalar = 200,
    scale: Scalar = 0.25,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-6,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    **common: Unpack[CommonOptions],
) -> ProjectionTransformation:
    """GoLore (He et al., 2024): GaLore's subspaces first, random ones once noise dominates the
    gradient.

    With P the leading singular vectors of G at refreshes before step `random_from`, and an
    orthonormal basis of a uniformly random subspace at those from then on,

        M <- P_newᵀ P_old M                     at a refresh, V stays
        W <- W - lr scale P Adam(PᵀG)

    then decay. State of a leaf that shrinks s, keeps k: GaLore's `s r` basis and `2 r k` moments,
    float32.

    The paper (https://arxiv.org/abs/2410.11289) shows that subspaces of singular vectors follow the
    noise of a gradient near a solution, so that GaLore need not converge with small batches, and
    that random ones do. It moves the momentum to the new basis and keeps it there, which is what
    happens here. The official code (pkumelon/Golore) uses the moved momentum for the update of the
    refresh step alone: neither it nor the gradient of that step reaches what is stored.
    `lrx.transports.keep()` moves nothing, as GaLore.

    Args:
      learning_rate: number or schedule.
      random_from: the step of the switch, in accepted steps; the papers' GoLore@20% has its random
        subspaces in the last fifth of a run. There is no default, since the length is the run's.
      rank, refresh_every, scale, b1, b2, eps, weight_decay: GaLore's, see `galore`.
      **common: see `galore`. In place of both subspaces give `lrx.galore` a projector of your own,
        such as `lrx.projectors.switch(at=, first=, then=)`.

    >>> import lowrank_jax as lrx
    >>> tx = lrx.golore(1e-2, rank=8, random_from=8000)
    >>> tx.projection.projector.at, tx.projection.projector.then.kind
    (8000, 'orthonormal')
    """
    slots = {
        "projector": projector_of(_svd_then_random, rank, None, at=random_from),
        "inner": inner.adam(b1=b1, b2=b2, eps=eps, convention="hf"),
        "refresh_schedule": refresh_schedules.every(period=refresh_every),
        "transport": transports.rotate(second=False),
        "scale": scale,
    }
    return recipe(learning_rate, weight_decay, "after", common, **slots)
