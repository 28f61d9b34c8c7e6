"""GaLore."""

from typing import Any, Unpack

import optax

from lowrank_jax.optim import inner
from lowrank_jax.projection import projectors, refresh_schedules
from lowrank_jax.projection.optimizers.recipe import CommonOptions, named, projector_of, recipe
from lowrank_jax.projection.transformation import ProjectionTransformation
from lowrank_jax.typing import Rank, Scalar

_GALORE_SIDES = {
    "std": ("paper", "rows"),
    "reverse_std": ("larger", "cols"),
    "left": ("cols", "cols"),
    "right": ("rows", "rows"),
    "full": ("paper", "rows"),
}


@named
def galore(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: Rank | None = None,
    refresh_every: Scalar = 200,
    scale: Scalar = 0.25,
    proj_type: str = "std",
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-6,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    projector: Any = None,
    **common: Unpack[CommonOptions],
) -> ProjectionTransformation:
    """GaLore (Zhao et al., ICML 2024): Adam on `R = PᵀG`, with P the leading singular vectors of G
    every T steps.

    `W <- W - lr scale up(N)`, then `W <- (1 - lr wd) W`; Adam in its "hf" convention, moments kept
    at a refresh. State of a leaf that shrinks s, keeps k: `s r` basis and `2 r k` moments, float32.

    Args:
      learning_rate: number or schedule; the paper tunes {.01, .005, .001, 5e-4, 1e-4} and uses .01
        up to 1B.
      rank: integer, fraction, or by path. Paper: 128/256/256/512/1024 for 60M/130M/350M/1B/7B.
      refresh_every: T, 200 in the paper and scripts (the official command line defaults to 50).
      scale: the paper's alpha, .25 for pre-training in paper and scripts.
      proj_type: as in the official code: "std" shrinks the smaller dimension (of squares the
        inputs), "reverse_std" the larger, "left" the outputs and "right" the inputs of a layer,
        "full" both (state r x r).
      b1, b2, eps: of Adam. The paper says eps 1e-8, its code 1e-6; we follow the code.
      weight_decay: after the step, as in the official code.
      projector: in place of `svd(rank=rank)`, for instance `lrx.projectors.power(rank=128)`. One
        that reads a thin product (`alternating`, `randomized(iterations=0)`) or a key (`random`)
        moves after the update, not before it as in the paper, so that projected backprop takes no
        full gradient; give a `refresh_schedule` for another choice.
      **common: `mask` of `apply_learning_rate`; the other options of `scale_by_projection`.

    GaLore's 8-bit recipe is `inner=lrx.inner.stored8()` (its scripts' Adam in 8 bits), its Adafactor
    `inner=lrx.inner.adafactor()`, and its layer-wise one `lrx.layerwise_step` with either of them, where
    plain leaves of a stack have Adam, `plain=lrx.inner.adam()`.

    The official code infers the side from the low-rank tensor's shape when it projects back and
    fails for "reverse_std" at large ranks; here the side is fixed at `init`.

    >>> import jax, jax.numpy as jnp
    >>> import lowrank_jax as lrx
    >>> tx = lrx.galore(1e-2, rank=4)
    >>> params = {"kernel": jnp.ones((8, 16))}
    >>> state = tx.init(params)
    >>> updates, state = jax.jit(tx.update)(params, state, params)
    >>> state.projection.matrices["kernel"]
    MatrixState('kernel', rank=4, shrinks=rows, basis=[(8, 4)], 644 bytes)
    >>> eight_bits = lrx.galore(1e-2, rank=4, inner=lrx.inner.stored8(minimum=0)).init(params)
    >>> factored = lrx.galore(1e-2, rank=4, inner=lrx.inner.adafactor()).init(params)
    >>> [
    ...     x.projection.matrices["kernel"].inner.nu for x in (eight_bits, factored)
    ... ]  # doctest: +ELLIPSIS
    [QuantizedBlocks(codes=uint8[4,16], ...), RowsAndColumns(rows=..., columns=...)]
    >>> lrx.galore(
    ...     1e-2, projector=lrx.projectors.alternating(rank=4)
    ... ).projection.refresh_schedule.when
    'after'
    """
    if proj_type not in _GALORE_SIDES:
        raise ValueError(f"galore: proj_type={proj_type!r} must be one of {tuple(_GALORE_SIDES)}")
    side, tie = _GALORE_SIDES[proj_type]
    default = projectors.svd_two_sided if proj_type == "full" else projectors.svd
    slots = {
        "projector": projector_of(default, rank, projector),
        "inner": inner.adam(b1=b1, b2=b2, eps=eps, convention="hf"),
        "refresh_schedule": refresh_schedules.every(period=refresh_every),
        "scale": scale,
        "side": side,
        "tie": tie,
    }
    return recipe(learning_rate, weight_decay, "after", common, **slots)
