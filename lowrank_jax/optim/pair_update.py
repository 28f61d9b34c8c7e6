"""One update of a tree of factor pairs, of which every optimizer on pairs is a choice; `pairs` has
the algebra.

For a and then for b, unless they alternate:

    g <- ∇a (b̂ b̂ᵀ + damping I)⁻¹        likewise (âᵀâ + damping I)⁻¹ ∇b; LoRA+ leaves the gradient
                                          as it is
    m <- m T                            momentum moves to the new row space of b̂: T = b̂_old b̂ᵀ
                                        (b̂ b̂ᵀ + damping I)⁻¹
    u  = inner(g)                       Adam, or momentum alone
    a <- a - lr (u + weight_decay a)

A step whose gradients, updates or moments are not finite changes nothing but a counter, and the
schedule waits. So does one whose gradients, as they are or preconditioned, have a norm above 2^40:
factors and momentum that it made would overflow in the products of the steps after it.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_jax import sharding
from lowrank_jax.checks import check_floating, check_integer, check_number, is_zero
from lowrank_jax.optim import inner as inner_lib
from lowrank_jax.optim import pairs, surgery
from lowrank_jax.optim.guard import all_finite, select
from lowrank_jax.optim.learning_rate import at_step, decayed_step, selected_for_decay
from lowrank_jax.optim.pairs import OTHER, SIDES, FactorLeaves
from lowrank_jax.reprs import Short, show
from lowrank_jax.trees import as_float32, pure
from lowrank_jax.typing import Pytree, Rate, Scalar

FORMAT_VERSION = 1


class PairsState(NamedTuple):
    """State of an optimizer on pairs; every tree in it is like the parameters, with
    `optax.MaskedNode` elsewhere.

    Attributes:
      format_version: int32 (), the layout of this state; raised when it changes.
      step: int32 (), accepted steps, which drive schedule and alternation.
      skipped: int32 (), steps that were not finite.
      a, b: state of the inner transformation of the factors a, and of the factors b, each with a
        count of its own.
      plain: state of the inner transformation of the other leaves.
      bases: float32 `â` and `b̂` by which the partner's momentum was preconditioned last; () where
        momentum stays.

    >>> import jax.numpy as jnp
    >>> from lowrank_jax.optim.pair_optimizers import altlora
    >>> state = altlora(1e-3, scale=2.0).init(
    ...     {"q": {"a": jnp.ones((4, 2)), "b": jnp.zeros((2, 6))}}
    ... )
    >>> state.a.mu["q"]["a"].shape, state.bases["q"]["b"].shape, int(state.skipped)
    ((4, 2), (2, 6), 0)
    """

    format_version: jax.Array
    step: jax.Array
    skipped: jax.Array
    a: Pytree
    b: Pytree
    plain: Pytree
    bases: Pytree

    def __repr__(self) -> str:
        return show(self)


# the bases say by what momentum was preconditioned, whatever becomes of it
surgery.register_fields(PairsState, {"bases": "kept"})


class MomentumState(NamedTuple):
    """State of `Momentum`: int32 count, and the average shaped like the parameters."""

    count: Any
    mu: Pytree

    def __repr__(self) -> str:
        return show(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Momentum(inner_lib.Inner):
    """`m <- b1 m + (1 - b1) g`: Adam's first moment alone, its bias correction `1 / (1 - b1^t)` in
    the scale."""

    b1: Scalar = 0.9
    splits = True

    def __post_init__(self):
        inner_lib.Adam(b1=self.b1)  # which checks b1

    def init(self, tree, view=None):
        mu = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), tree)
        return MomentumState(jnp.zeros((), jnp.int32), mu)

    def update(self, grads, state, *, view=None, params=None, **extra):
        del view, params, extra
        count = optax.safe_increment(state.count)
        mu = _average(state.mu, grads, self.b1)
        return mu, 1 / inner_lib.debias(self.b1, count), MomentumState(count, mu)

    def decays(self) -> dict[str, Scalar]:
        return {"first": self.b1}


def _average(old: Pytree, new: Pytree, decay: Scalar) -> Pytree:
    return jax.tree.map(lambda m, g: decay * m + (1 - decay) * g, old, new)


inner_lib.register_moments(MomentumState, {"mu": "first"}, "count")

_CORRECTIONS = ("none", "first", "both")
_TRANSPORTS = (None, "kept", "step")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairOptimizer(Short):
    """The choices that make a method; validated, and pure functions of it. The named optimizers
    fill it.

    Attributes:
      method: name, for messages.
      learning_rate: number or schedule of the accepted steps.
      inner: inner transformation of the factors, one state for all a and one for all b.
      plain: inner transformation of the leaves that are no factor.
      bias_correction: of the factors' moments: "none", "first" (momentum alone) or "both" (Adam's).
      damping: of the preconditioner; None for none.
      scale: of the pairs, see `pairs.scale_of`.
      transport: None; "kept", momentum moves to the new space and stays there; "step", it moves for
        the step alone.
      alternate: steps on a factor before its partner's turn; None for both at every step.
      sequential: of two factors in one step, b is preconditioned by the a that this step made, not
        by the old one.
      ratio, ratios: learning rate of b over that of a; `((pattern, factor of the learning rate),
        ...)` by path, first.
      weight_decay, decay, mask: of the weights, "before" or "after" the step, see
        `lrx.apply_learning_rate`. A factor that waits for its turn does not decay.
      guard: skip, and count, steps that are not finite.
    """

    method: str
    learning_rate: Rate
    inner: Any
    plain: Any = None
    bias_correction: str = "both"
    damping: Scalar | None = None
    scale: Pytree = 1.0
    transport: str | None = None
    alternate: Scalar | None = None
    sequential: bool = False
    ratio: Scalar = 1.0
    ratios: tuple[tuple[str, Scalar], ...] = ()
    weight_decay: Rate = 0.0
    decay: str = "before"
    mask: Pytree = None
    guard: bool = True

    def __post_init__(self):
        choices = {
            "bias_correction": _CORRECTIONS,
            "transport": _TRANSPORTS,
            "decay": ("before", "after"),
        }
        if isinstance(self.inner, Momentum):
            choices["bias_correction"] = _CORRECTIONS[:2]
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{self.method}: {name}={getattr(self, name)!r} must be one of {allowed}"
                )
        for name in ("damping", "weight_decay", "ratio"):
            check_number(f"{self.method}: {name}", getattr(self, name), at_least=0)
        for name in ("learning_rate", "scale"):
            check_number(f"{self.method}: {name}", getattr(self, name))
        for pattern, ratio in self.ratios:
            check_number(f"{self.method}: ratios: {pattern!r}", ratio, at_least=0)
        check_integer(
            f"{self.method}: alternate",
            self.alternate,
            at_least=1,
            otherwise="None for both factors",
        )
        plain = self.inner if self.plain is None else self.plain
        object.__setattr__(self, "inner", inner_lib.as_inner(self.inner))
        object.__setattr__(self, "plain", inner_lib.as_inner(plain))

    def init(self, params: Pytree) -> PairsState:
        with sharding.mesh_of(params):
            return sharding.replicate_rest(self._init(params))

    def _init(self, params: Pytree) -> PairsState:
        check_floating(params, self.method)
        factors = pairs.find_factors(params, self.method, both=self.damping is not None)
        self._rates(factors)
        tree, bases = _Tree(params), ()
        leaves = [as_float32(leaf) for leaf in tree.leaves]
        if self.transport is not None:
            # any bases will do, since a momentum of zero moves to zero
            owners = [i for side in SIDES for i in factors.of(side)]
            bases = tree.of({i: jnp.zeros_like(leaves[i]) for i in owners})
        groups = [tree.of({i: leaves[i] for i in factors.of(side)}) for side in (*SIDES, None)]
        return PairsState(
            format_version=jnp.asarray(FORMAT_VERSION, jnp.int32),
            step=jnp.zeros((), jnp.int32),
            skipped=jnp.zeros((), jnp.int32),
            a=self.inner.init(groups[0]),
            b=self.inner.init(groups[1]),
            plain=self.plain.init_group(groups[2]),
            bases=bases,
        )

    def update(
        self,
        updates: Pytree,
        state: PairsState,
        params: Pytree = None,
        *,
        scale: Pytree = None,
        **extra: Pytree,
    ) -> tuple[Pytree, PairsState]:
        """`(updates, state)`; the extra argument `scale` stands in for the optimizer's own, for
        ranks that change."""
        if params is None and (self.damping is not None or not is_zero(self.weight_decay)):
            raise ValueError(f"{self.method}: needs params; call update(grads, state, params)")
        check_floating(updates, f"{self.method}: gradients")
        scale = self.scale if scale is None else scale
        with sharding.mesh_of((updates, params)):
            return self._update(_Step(self, updates, state, params, scale, extra), state)

    def _update(self, step: _Step, state: PairsState) -> tuple[Pytree, PairsState]:
        new = state._replace(step=state.step + 1, plain=step.plain(state.plain))

        # a, and then b, which a sequential method preconditions by the new a
        for number, side in enumerate(SIDES):
            inner_state = getattr(state, side)
            turn = functools.partial(step.turn, side, inner_state)
            if self.alternate is None:
                step.accept(side, turn())
            else:
                turns = jnp.asarray(self.alternate).astype(jnp.int32)
                is_on = (state.step // turns) % 2 == number
                rest = functools.partial(step.rest, side, inner_state)
                step.accept(side, jax.lax.cond(is_on, *sharding.alike(turn, rest)))
            new = new._replace(**{side: step.inner[side]})

        if self.transport is not None:
            new = new._replace(bases=step.tree.of(step.bases))
        given = list(step.updates.values())
        if self.guard:
            given, new = _guarded(step, given, new, state)
        by_leaf = dict(zip(step.updates, given, strict=True))
        return step.tree.like(by_leaf), new

    def _rates(self, factors: FactorLeaves) -> list[Scalar]:
        """The factor of each leaf's learning rate."""
        rates: list[Scalar] = []
        used: set[str] = set()
        for path, side in zip(factors.paths, factors.sides, strict=True):
            default = self.ratio if side == "b" else 1.0
            matching = [rule for rule in self.ratios if re.fullmatch(rule[0], path)]
            # the first match wins
            pattern, rate = matching[0] if matching else (None, default)
            rates.append(rate)
            if pattern is not None:
                used.add(pattern)
        for pattern, _ in self.ratios if factors.paths else ():  # all may be masked
            if pattern not in used:
                raise ValueError(
                    f"{self.method}: ratios: {pattern!r} is the first match of no leaf in "
                    f"{factors.paths}"
                )
        return rates


def _guarded(
    step: _Step, given: list[jax.Array], new: PairsState, state: PairsState
) -> tuple[list[jax.Array], PairsState]:
    """Updates and state of an accepted step; zeros and the old state of one that is not finite."""
    floating = [x for x in jax.tree.leaves((given, new)) if jnp.issubdtype(x.dtype, jnp.floating)]
    finite = [jnp.all(jnp.isfinite(x)) for x in floating]
    # what was given, what preconditioning made of it, and what would be kept
    ok = all_finite(step.grads) & step.fine & jnp.all(jnp.asarray(finite, bool))
    given = [jnp.where(ok, x, jnp.zeros_like(x)) for x in given]
    new = select(ok, new, state)
    return given, new._replace(skipped=state.skipped + 1 - ok.astype(jnp.int32))


class _Tree:
    """Trees of the structure of another, from some of their leaves by number."""

    def __init__(self, tree: Pytree):
        self.leaves, self.structure = jax.tree.flatten(tree)

    def of(self, leaves: dict[int, jax.Array]) -> Pytree:
        """`optax.MaskedNode` elsewhere; without nnx Variables, as states are."""
        numbers = range(len(self.leaves))
        return pure(self.like({i: leaves.get(i, optax.MaskedNode()) for i in numbers}))

    def like(self, leaves: dict[int, jax.Array]) -> Pytree:
        ordered = [leaves[i] for i in range(len(self.leaves))]
        return jax.tree.unflatten(self.structure, ordered)


class Turn(NamedTuple):
    """What a step makes of one side: updates by leaf, inner state, bases by leaf, and whether it
    may be accepted."""

    updates: dict[int, jax.Array]
    inner: Pytree
    bases: dict[int, jax.Array]
    fine: jax.Array


class _Step:
    """A mutable record of one update, so that `PairOptimizer._update` reads as the steps of the
    method.

    Attributes:
      leaves: parameters, with the updates made so far where the method is sequential.
      grads: float32.
      updates, inner: what was made so far, by leaf and by side.
      bases: by leaf.
      fine: whether what every side's inner transformation was given is within `LARGEST`.
    """

    def __init__(
        self,
        config: PairOptimizer,
        updates: Pytree,
        state: PairsState,
        params: Pytree,
        scale: Pytree,
        extra: dict[str, Pytree],
    ):
        self.config, self.extra = config, extra
        tree = updates if params is None else params
        self.tree = _Tree(tree)
        self.leaves = list(self.tree.leaves)
        self.grads = [leaf.astype(jnp.float32) for leaf in jax.tree.leaves(updates)]
        both = config.damping is not None
        self.factors = pairs.find_factors(tree, config.method, both=both)
        if len(self.grads) != len(self.leaves):
            raise ValueError(
                f"updates have {len(self.grads)} leaves, params {len(self.leaves)}: give one "
                "structure"
            )
        # each leaf's learning rate and decay
        rate = at_step(config.learning_rate, state.step)
        decay = at_step(config.weight_decay, state.step)
        self.rates = [rate * factor for factor in config._rates(self.factors)]
        decays = selected_for_decay(updates, params, config.weight_decay, config.mask)
        self.decays = [decay if flag else 0 for flag in jax.tree.leaves(decays)]
        # each pair's scale, which preconditioning alone reads
        self.scales = []
        if config.damping is not None:
            shapes = [self.leaves[pair.leaf["a"]].shape for pair in self.factors.pairs]
            found = zip(self.factors.pairs, shapes, strict=True)
            self.scales = [pairs.scale_of(scale, pair, shape) for pair, shape in found]
        owners = sorted(i for side in SIDES for i in self.factors.of(side))
        self.bases = dict(zip(owners, jax.tree.leaves(state.bases), strict=False))
        self.updates: dict[int, jax.Array] = {}
        self.inner: dict[str, Pytree] = {}
        self.fine: jax.Array = jnp.asarray(True)

    def _given(self, inner: inner_lib.Inner, own: list[int]) -> Pytree:
        return self.tree.of({i: self.leaves[i] for i in own}) if inner.reads_params else None

    def _moved(self, own: list[int], steps: list[jax.Array]) -> dict[int, jax.Array]:
        """The updates, in the parameters' dtypes."""
        made = {}
        for i, step in zip(own, steps, strict=True):
            leaf, rate, decay = self.leaves[i], self.rates[i], self.decays[i]
            change = decayed_step(step, leaf, rate, decay, self.config.decay, True)
            made[i] = change.astype(leaf.dtype)
        return made

    def plain(self, state: Pytree) -> Pytree:
        """Updates the leaves that are no factor; their new state."""
        inner, own = self.config.plain, self.factors.of(None)
        grads = self.tree.of({i: self.grads[i] for i in own})
        params = self._given(inner, own)
        direction, scale, state = inner.guarded(grads, state, params=params, **self.extra)
        steps = [scale * u for u in jax.tree.leaves(direction)]
        self.updates |= self._moved(own, steps)
        return state

    def turn(self, side: str, state: Pytree) -> Turn:
        """What the turn of one side makes."""
        config, own = self.config, self.factors.of(side)
        preconditioned, bases, changes = self._preconditioned(side)
        grads = self.tree.of(preconditioned)

        # m <- m T, into the space that the partner spans now
        carried = state
        if changes:
            move = functools.partial(pairs.times, side)
            carried = state._replace(mu=jax.tree.map(move, state.mu, self.tree.of(changes)))
        params = self._given(config.inner, own)
        direction, both, new = config.inner.update(grads, carried, params=params, **self.extra)
        if config.transport == "step":
            # the average that is kept never moved
            new = new._replace(mu=_average(state.mu, grads, config.inner.b1))

        correction: Scalar | None = {"none": 1.0, "both": both}.get(config.bias_correction)
        if correction is None:
            correction = 1 / inner_lib.debias(config.inner.b1, new.count)
        steps = [correction * u for u in jax.tree.leaves(direction)]
        updates = self._moved(own, steps)
        return Turn(updates, new, bases, all_finite(list(preconditioned.values())))

    def _preconditioned(
        self, side: str
    ) -> tuple[dict[int, jax.Array], dict[int, jax.Array], dict[int, jax.Array]]:
        """By leaf: gradients of one side, preconditioned; bases; what moves momentum, `(..., r, r)`."""
        config, other = self.config, OTHER[side]
        grads = {i: self.grads[i] for i in self.factors.of(side)}
        bases = dict(self.bases)
        changes: dict[int, jax.Array] = {}
        if config.damping is None:
            return grads, bases, changes
        found = self.factors.pairs
        others = pairs.partners(side, found, self.leaves, self.scales, config.damping)
        for pair, (basis, inverse) in zip(found, others, strict=True):
            i, j = pair.leaf[side], pair.leaf[other]
            # ∇a (b̂ b̂ᵀ + damping I)⁻¹, or (âᵀâ + damping I)⁻¹ ∇b
            grads[i] = pairs.times(side, self.grads[i], inverse)
            if config.transport is not None:
                # T = b̂_old b̂ᵀ (b̂ b̂ᵀ + damping I)⁻¹
                overlap = pairs.cross(other, bases[j], basis)
                changes[i] = pairs.times("a", overlap, inverse)
                bases[j] = basis
        return grads, bases, changes

    def rest(self, side: str, state: Pytree) -> Turn:
        """What `turn` returns for a side whose turn it is not."""
        updates = {i: jnp.zeros_like(self.leaves[i]) for i in self.factors.of(side)}
        return Turn(updates, state, dict(self.bases), jnp.asarray(True))

    def accept(self, side: str, made: Turn) -> None:
        updates, self.inner[side], self.bases, fine = made
        self.fine = self.fine & fine
        self.updates |= updates
        if self.config.sequential:
            for i, update in updates.items():
                self.leaves[i] = optax.apply_updates(self.leaves[i], update)
