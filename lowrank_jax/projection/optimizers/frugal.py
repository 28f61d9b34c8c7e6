"""FRUGAL."""

from typing import Any, Unpack

import optax

from lowrank_jax.checks import check_number, is_zero
from lowrank_jax.optim import inner
from lowrank_jax.projection import projectors, refresh_schedules, residuals, transports
from lowrank_jax.projection.optimizers.recipe import CommonOptions, named, projector_of, recipe
from lowrank_jax.projection.transformation import ProjectionTransformation
from lowrank_jax.typing import Rank, Scalar

BASES = {"svd": projectors.svd, "columns": projectors.columns, "random": projectors.random}
"""The projector by the name that the official code gives its kind of basis."""


@named
def frugal(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: Rank = 0.25,
    refresh_every: Scalar = 200,
    projection: str = "svd",
    rule: str = "sign",
    active_scale: Scalar = 1.0,
    inactive_scale: Scalar = 1.0,
    reset: bool = True,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.01,
    projector: Any = None,
    **common: Unpack[CommonOptions],
) -> ProjectionTransformation:
    """FRUGAL (arXiv 2411.07837): AdamW in a subspace, stateless signSGD (or SGD) on everything left
    over.

    `W <- (1 - lr wd) W - lr s_p [up(N) + s_i sign(G - up(PᵀG))]`. State of a leaf that shrinks s,
    keeps k: the basis and `2 r k` moments.

    Args:
      learning_rate: number or schedule; the scripts use 1e-3.
      rank: the density rho as a fraction (default .25), an integer, or by path. `svd` and `random`
        round rho s half to even, `columns` rounds down, as the official code does. 0 gives rho = 0:
        no state, the rule on every matrix.
      refresh_every: T, 200.
      projection: "svd" (side as GaLore), "random" (orthonormal, as GaLore) or "columns" (random
        input features).
      rule: "sign", "sgd" or "discard" for the rest.
      active_scale, inactive_scale: s_p and s_i; official defaults 1 and, for pre-training, 1
        (fine-tuning .1).
      reset: moments and step count start again at a refresh (official default).
      b1, b2, eps, weight_decay: torch AdamW's; decay .01 is the class default, the pre-training
        scripts use 0.
      projector: in place of `projection`.
      **common: see `galore`; `inner=` replaces AdamW (the official code offers Lion and SGD).

    >>> import lowrank_jax as lrx
    >>> lrx.frugal(1e-3, rank=0.5, projection="columns").projection.residual
    Sign()
    """
    check_number("frugal: active_scale", active_scale)
    check_number("frugal: inactive_scale", inactive_scale)
    rest = active_scale * inactive_scale
    rules = {
        "sign": residuals.sign(scale=rest),
        "sgd": residuals.sgd(scale=rest),
        "discard": residuals.discard(),
    }
    if rule not in rules or projection not in BASES:
        raise ValueError(
            f"frugal: rule={rule!r}, projection={projection!r} must be in {[*rules]} and {[*BASES]}"
        )
    slots: dict[str, Any] = {
        "inner": inner.adam(b1=b1, b2=b2, eps=eps),
        "refresh_schedule": refresh_schedules.every(period=refresh_every),
        "transport": transports.reset() if reset else transports.keep(),
        "residual": rules[rule],
        "scale": active_scale,
        "side": "rows" if projection == "columns" else "paper",
    }
    if is_zero(rank):
        slots |= _of_rank_zero(rule, rest, slots["inner"])
        return recipe(learning_rate, weight_decay, "before", common, **slots)
    options = {"kind": "orthonormal"} if projection == "random" else {}
    rank_given = None if projector is not None else rank
    slots["projector"] = projector_of(BASES[projection], rank_given, projector, **options)
    return recipe(learning_rate, weight_decay, "before", common, **slots)


def _of_rank_zero(rule: str, rest: Scalar, adam: inner.Inner) -> dict[str, Any]:
    """The slots where the rule is all that matrices get; other leaves keep Adam."""
    rules = {
        "sign": optax.scale_by_sign,
        "sgd": optax.identity,
        "discard": optax.set_to_zero,
    }
    return {
        "projector": projectors.identity(),
        "plain": adam,
        "inner": inner.from_optax(rules[rule]()),
        "residual": residuals.discard(),
        "transport": transports.keep(),
        "scale": rest,
    }
