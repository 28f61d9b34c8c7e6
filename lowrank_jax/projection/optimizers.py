"""Named optimizers: frozen recipes with their papers' defaults and no logic of their own."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import optax

from lowrank_jax import sharding
from lowrank_jax.checks import check_number, is_zero
from lowrank_jax.projection import clocks, inner, projectors, residuals, transports
from lowrank_jax.projection.learning_rate import LearningRateState, apply_learning_rate
from lowrank_jax.projection.state import ProjectionState
from lowrank_jax.projection.transformation import Projection, ProjectionTransformation


class RecipeState(NamedTuple):
    """State of a named optimizer; no field has the name of a hyper-parameter, which
    `optax.tree_get` looks up."""

    projection: ProjectionState
    schedule: LearningRateState


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """A projection, a learning rate and a decay rule; `optax()` is its optax form.

    Attributes:
      projection: the slots of the projection transformation.
      learning_rate, weight_decay, when, mask: see `apply_learning_rate`.

    >>> import lowrank_jax as lrx
    >>> recipe = lrx.galore(1e-2, rank=8).recipe
    >>> recipe.when, recipe.projection.scale
    ('post', 0.25)
    """

    projection: Projection
    learning_rate: Any
    weight_decay: Any = 0.0
    when: str = "pre"
    mask: Any = None

    def optax(self) -> ProjectionTransformation:
        """`scale_by_projection`, then `apply_learning_rate`, which a skipped step leaves untouched
        too."""
        final = apply_learning_rate(
            self.learning_rate, self.weight_decay, when=self.when, mask=self.mask
        )

        def init(params):
            with sharding.mesh_of(params):
                return RecipeState(
                    self.projection.init(params), sharding.settled(final.init(params))
                )

        def update(updates, state, params=None, **extra):
            updates, projection = self.projection.update(updates, state.projection, params, **extra)
            accepted = projection.skipped == state.projection.skipped
            updates, rate = final.update(updates, state.schedule, params, accepted=accepted)
            return updates, RecipeState(projection, rate)

        transformation = ProjectionTransformation(init, update)
        transformation.projection = self.projection
        transformation.recipe = self
        return transformation


def _recipe(
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: Any,
    when: str,
    *,
    own_clock: clocks.Clock,
    mask: Any = None,
    common: dict | None = None,
    **slots: Any,
):
    """The optax form of a recipe; `own_clock` serves where the user gave no `clock`."""
    if common is not None:  # optax.inject_hyperparams hands `**common` on as one keyword
        slots = {"own_clock": own_clock, "mask": mask} | slots | common
        return _recipe(learning_rate, weight_decay, when, **slots)
    if "clock" not in slots:
        slots["clock"] = _sparing(
            own_clock, slots["projector"], slots.get("residual", residuals.discard())
        )
    return Recipe(
        projection=Projection(**slots),
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        when=when,
        mask=mask,
    ).optax()


def _sparing(clock: clocks.Clock, projector: Any, residual: Any) -> clocks.Clock:
    """The clock, after the update where projected backprop then never takes a full gradient (see
    `lrx.plan`).

    That is where a refresh reads a thin product of the gradient or none of it, and nothing else
    reads all of it.
    """
    reads_gradient = not projector.moves or "grad" in projector.needs or residual.sees_gradient
    return clock if reads_gradient else dataclasses.replace(clock, when="after")


def _projector(default: Callable, rank: Any, projector: Any, **options: Any) -> Any:
    """`projector`, or the method's own at this rank; ValueError unless exactly one of the two is
    given."""
    if projector is not None:
        if rank is not None:
            raise ValueError(
                f"rank={rank} and projector={projector} both fix the rank; give one of them"
            )
        return projector
    if rank is None:
        raise ValueError(
            "rank=None: give rank as an integer, a fraction, or by path, or give a projector"
        )
    return default(rank=rank, **options)


_GALORE_SIDES = {
    "std": ("paper", "rows"),
    "reverse_std": ("larger", "cols"),
    "left": ("cols", "cols"),
    "right": ("rows", "rows"),
    "full": ("paper", "rows"),
}


def galore(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: Any = None,
    refresh_every: Any = 200,
    scale: Any = 0.25,
    proj_type: str = "std",
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-6,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    projector: Any = None,
    **common: Any,
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
        full gradient; give a `clock` for another choice.
      **common: `mask` of `apply_learning_rate`; `views`, `plain`, `clip_norm`, `guard`, `seed`,
        `clock`, `transport`, `residual` of `scale_by_projection`.

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
    >>> lrx.galore(1e-2, projector=lrx.projectors.alternating(rank=4)).projection.clock.when
    'after'
    """
    if proj_type not in _GALORE_SIDES:
        raise ValueError(f"galore: proj_type={proj_type!r} must be one of {tuple(_GALORE_SIDES)}")
    side, tie = _GALORE_SIDES[proj_type]
    default = projectors.svd_two_sided if proj_type == "full" else projectors.svd
    slots = {
        "projector": _projector(default, rank, projector),
        "inner": inner.adam(b1=b1, b2=b2, eps=eps, convention="hf"),
        "own_clock": clocks.every(period=refresh_every),
        "scale": scale,
        "side": side,
        "tie": tie,
    }
    return _recipe(learning_rate, weight_decay, "post", **(slots | common))


def dct_adamw(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: Any = None,
    refresh_every: Any = 1,
    kind: int = 3,
    norm: str = "l1",
    rotate: bool = True,
    error_feedback: bool = False,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    **common: Any,
) -> ProjectionTransformation:
    """DCT-AdamW (arXiv 2505.17967, ICLR 2026): AdamW on the r DCT vectors on which the gradient is
    largest.

    `W <- (1 - lr wd) W - lr up(N)`, Adam in its "torch" convention. The basis is r integers: no
    SVD, no stored matrix. State of a leaf that shrinks s, keeps k: `r` int32 and `2 r k` moments;
    error feedback adds `s k`.

    Args:
      learning_rate: number or schedule.
      rank: integer, fraction, or by path.
      refresh_every: T; as in the official code the steps 0, T-1, 2T-1, ... refresh. Its default is
        1.
      kind: 3 ("dct3", the official matmul path) or 2 ("dct2", its Makhoul path): different bases.
      norm: "l1" (official default) or "l2" (which minimises the projection error).
      rotate: a slot keeps its moments if its index survives and starts at zero otherwise. The
        official default is False: there slot j is reused for whatever index lands in it, in an
        order that depends on the backend; with False our indices are sorted, so that slots at least
        keep their order.
      error_feedback: project gradient plus the part that was dropped before (official default
        False).
      b1, b2, eps, weight_decay: AdamW's, decay before the step.
      **common: see `galore`.

    The official in-place rotation gives wrong values for some shapes; here it is an index gather.

    >>> import lowrank_jax as lrx
    >>> lrx.dct_adamw(1e-3, rank=0.25).projection.projector
    Dct(rank=0.25, norm='l1', kind=3, products='xla')
    """
    phase = refresh_every - 1
    slots = {
        "projector": _projector(projectors.dct, rank, None, kind=kind, norm=norm),
        "inner": inner.adam(b1=b1, b2=b2, eps=eps),
        "own_clock": clocks.every(period=refresh_every, phase=phase),
        "transport": transports.rotate() if rotate else transports.keep(),
        "residual": residuals.error_feedback() if error_feedback else residuals.discard(),
    }
    return _recipe(learning_rate, weight_decay, "pre", **(slots | common))


def frugal(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: Any = 0.25,
    refresh_every: Any = 200,
    projection: str = "svd",
    rule: str = "sign",
    active_scale: Any = 1.0,
    inactive_scale: Any = 1.0,
    reset: bool = True,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.01,
    projector: Any = None,
    **common: Any,
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
    Sign(scale=1.0)
    """
    check_number("frugal: active_scale", active_scale)
    check_number("frugal: inactive_scale", inactive_scale)
    rest = active_scale * inactive_scale
    rules = {
        "sign": residuals.sign(scale=rest),
        "sgd": residuals.sgd(scale=rest),
        "discard": residuals.discard(),
    }
    bases = {"svd": projectors.svd, "columns": projectors.columns, "random": projectors.random}
    if rule not in rules or projection not in bases:
        raise ValueError(
            f"frugal: rule={rule!r}, projection={projection!r} must be in {[*rules]} and {[*bases]}"
        )
    slots = {
        "inner": inner.adam(b1=b1, b2=b2, eps=eps),
        "own_clock": clocks.every(period=refresh_every),
        "transport": transports.reset() if reset else transports.keep(),
        "residual": rules[rule],
        "scale": active_scale,
        "side": "rows" if projection == "columns" else "paper",
    }
    if is_zero(rank):
        stateless = {
            "sign": optax.scale_by_sign(),
            "sgd": optax.identity(),
            "discard": optax.set_to_zero(),
        }[rule]
        slots |= {
            "projector": projectors.identity(),
            "plain": slots["inner"],
            "inner": inner.from_optax(stateless),
            "residual": residuals.discard(),
            "transport": transports.keep(),
            "scale": rest,
        }
        return _recipe(learning_rate, weight_decay, "pre", **(slots | common))
    options = {"kind": "orthonormal"} if projection == "random" else {}
    slots["projector"] = _projector(
        bases[projection], None if projector is not None else rank, projector, **options
    )
    return _recipe(learning_rate, weight_decay, "pre", **(slots | common))


def ldadam(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: Any = 16,
    mix: Any = 0.908,
    error_feedback: bool = True,
    b1: Any = 0.908,
    b2: Any = 0.99,
    eps: Any = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    first: str = "svd",
    projector: Any = None,
    **common: Any,
) -> ProjectionTransformation:
    """LDAdam (ICLR 2025): a new subspace at every step, moments transported, errors fed back.

    With `K = G + E`: `P = qr(B Bᵀ P_old)`, `B = mix up_old(m̂) + (1 - mix) K`; the moments move by
    LDAdam's rule; `E <- K - up(g) + b1 / (1 - b1) [up_old(m) - up(C m)]`; AdamW on `g = PᵀK`. State
    of a leaf that shrinks s, keeps k: `s r` basis, `2 r k` moments and `s k` error, which the
    official code hides in the gradient buffer.

    Args:
      learning_rate: number or schedule; official default 1e-3.
      rank: integer (16), fraction, or by path.
      mix: rho, .908.
      error_feedback: on by default.
      b1, b2, eps, weight_decay: (.908, .99), 1e-8; decay before the step.
      first: the basis of the first step, "svd" as in the official code or "range" (no SVD in the
        program).
      projector: in place of the power iteration.
      **common: see `galore`.

    Squares shrink the outputs here, and the inputs in GaLore, as in the official codes.

    >>> import lowrank_jax as lrx
    >>> lrx.ldadam(1e-3, rank=8).projection.clock
    EveryStep(when='before')
    """
    if projector is None:
        projector = projectors.power(rank=rank, first=first, mix=mix)
    slots = {
        "projector": projector,
        "inner": inner.adam(b1=b1, b2=b2, eps=eps),
        "own_clock": clocks.every_step(),
        "transport": transports.ldadam(),
        "residual": residuals.ldadam_error_feedback() if error_feedback else residuals.discard(),
        "tie": "cols",
    }
    return _recipe(learning_rate, weight_decay, "pre", **(slots | common))


def apollo(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: Any = None,
    refresh_every: Any = 200,
    scale: Any = 1.0,
    axis: str = "channel",
    limiter: Any = 1.01,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-6,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    projector: Any = None,
    **common: Any,
) -> ProjectionTransformation:
    """APOLLO (Zhu et al., MLSys 2025): a low-rank Adam only estimates how far to go along the raw
    gradient.

    `R = PᵀG` with Gaussian P, N Adam's uncorrected direction on R,
    `S = sqrt(scale) G |N| / (|R| + 1e-8)` for each channel, norm growth limited,
    `W <- W - lr c_t S`, then decay. State of a leaf that keeps k: `2 r k` moments, one norm and an
    8-byte key (the official code stores P).

    Args:
      learning_rate: number or schedule; .01 in the paper.
      rank: a quarter of the width in the paper (an eighth for its half-rank variant).
      refresh_every: T, 200.
      scale: 1; the update carries its square root. APOLLO-Mini: 128.
      axis: "channel", or "tensor" for one factor a matrix (Mini).
      limiter: 1.01, or None.
      b1, b2, eps, weight_decay: Adam's in the "hf" convention, decay after the step.
      projector: in place of `random(kind="gaussian")`, for instance `lrx.projectors.svd(rank=128)`.
      **common: see `galore`.

    P is not orthonormal, as in the paper. Defaults are facts from the official code, whose licence
    (CC-BY-NC) allows no more; nothing else of it is used.

    >>> import lowrank_jax as lrx
    >>> lrx.apollo(1e-2, rank=1, axis="tensor", scale=4.0).projection.residual
    GradientRescale(axis='tensor', scale=2.0, limiter=1.01)
    """
    check_number("apollo: scale", scale, at_least=0)
    slots = {
        "projector": _projector(projectors.random, rank, projector),
        "inner": inner.adam(b1=b1, b2=b2, eps=eps, convention="hf"),
        "own_clock": clocks.every(period=refresh_every),
        "residual": residuals.gradient_rescale(axis=axis, scale=scale**0.5, limiter=limiter),
    }
    return _recipe(learning_rate, weight_decay, "post", **(slots | common))


def apollo_mini(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: Any = 1,
    scale: Any = 128.0,
    axis: str = "tensor",
    **common: Any,
):
    """APOLLO-Mini: `apollo` at rank 1 with one factor for each matrix and scale 128 (paper; lr .01,
    .02 is better).

    >>> import lowrank_jax as lrx
    >>> lrx.apollo_mini(1e-2).projection.projector
    Random(rank=1, kind='gaussian', stored=False, dtype=<class 'jax.numpy.float32'>)
    """
    common |= common.pop("common", {})  # see _recipe
    return apollo(learning_rate, rank=rank, scale=scale, axis=axis, **common)
