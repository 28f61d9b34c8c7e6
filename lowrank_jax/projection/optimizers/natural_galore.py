"""Natural GaLore."""

from typing import Any, Unpack

import optax

from lowrank_jax.optim import inner
from lowrank_jax.projection.optimizers.galore import galore
from lowrank_jax.projection.optimizers.recipe import CommonOptions, named
from lowrank_jax.projection.transformation import ProjectionTransformation
from lowrank_jax.typing import Rank, Scalar


@named
def natural_galore(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: Rank | None = None,
    history: int | None = None,
    damping: Scalar = 1e-3,
    refresh_every: Scalar = 200,
    scale: Scalar = 0.25,
    proj_type: str = "std",
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-6,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    **common: Unpack[CommonOptions],
) -> ProjectionTransformation:
    """Natural GaLore (Das, 2024): GaLore on natural gradients, by the Fisher matrix of the last few
    low-rank gradients.

    With `R = PᵀG` as a vector and F the last h of them as columns, this one among them,

        W <- W - lr scale P Adam((damping I + F Fᵀ)⁻¹ R)

    then decay; see `lrx.inner.fisher_preconditioned`. Moments and history are kept at a refresh.
    State of a leaf that shrinks s, keeps k: GaLore's `s r` basis and `2 r k` moments, `h r k` of
    history, float32, and a count; with proj_type="full" `(s + k) r` and `(2 + h) r²`.

    Paper: https://arxiv.org/abs/2410.16029, whose projection is GaLore's. Its code
    (selfsupervised-ai/Natural-GaLore) projects both sides: proj_type="full". It inverts with
    Woodbury's identity, whose difference costs float32 three digits, and which here is written
    without one.

    Args:
      learning_rate: number or schedule.
      history: h, 20 (None).
      damping: lambda, 1e-3 in the code.
      rank, refresh_every, scale, proj_type, b1, b2, eps, weight_decay: GaLore's, see `galore`.
      **common: see `galore`; `plain` is AdamW where it is not given.

    Returns:
      An optax transformation.

    >>> import jax.numpy as jnp
    >>> import lowrank_jax as lrx
    >>> state = lrx.natural_galore(1e-2, rank=4, history=3).init({"kernel": jnp.ones((8, 16))})
    >>> state.projection.matrices["kernel"].inner.history.shape
    (3, 4, 16)
    """
    adam = inner.adam(b1=b1, b2=b2, eps=eps, convention="hf")
    stage: Any = inner.fisher_preconditioned(
        inner=adam, history=20 if history is None else history, damping=damping
    )
    given = {name: value for name, value in common.items() if value is not None}
    own: Any = {"inner": stage, "plain": adam} | given
    return galore(
        learning_rate,
        rank=rank,
        refresh_every=refresh_every,
        scale=scale,
        proj_type=proj_type,
        weight_decay=weight_decay,
        **own,
    )
