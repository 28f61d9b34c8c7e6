"""What becomes of the part of the gradient that the basis does not see.

A residual rule is a combiner: it sees what is projected, its low-rank object, and the inner
direction with its scale, and decides whether `lift` is called at all. All functions take batched
arrays: target `(batch..., s, k)`, low-rank `(batch..., r, k)`, inner scale `(batch...)`.

    init(view) -> state
    combine(Combine) -> (update (batch..., s, k), state)
    moved(state, Moved) -> state          the basis moved (`follows_basis`)

What is projected is another slot, see `targets`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lowrank_jax import deprecations, sharding
from lowrank_jax.checks import check_number
from lowrank_jax.matrices import ResolvedView
from lowrank_jax.optim.inner.adam import average
from lowrank_jax.optim.limiter import TINY, limited, norms
from lowrank_jax.projection.targets import Moved
from lowrank_jax.reprs import Short, show
from lowrank_jax.trees import bytes_of
from lowrank_jax.typing import Pytree, Scalar, Shape


class Combine(NamedTuple):
    """What an update is made of.

    Attributes:
      view: of the leaf.
      lift: `(batch..., r, k) -> (batch..., s, k)` by the basis.
      rest: `() -> (batch..., s, k)`, what the basis does not see of the target.
      rounding: `() -> (batch..., 1, k)`, below what size an entry of the rest is rounding.
      target: `(batch..., s, k)` what is projected; None unless something `reads_target`.
      low: `(batch..., r, k)`, its projection.
      direction: `(batch..., r, k)` of the inner transformation; where that `splits` (and the rule
        asks for it), without bias correction.
      inner_scale: `(batch...)` or (), the inner scale: the bias correction, or 1.
      scale: a number, the method's own (GaLore's alpha), which is not multiplied in before.
      state: of the rule.
    """

    view: ResolvedView
    lift: Callable[[jax.Array], jax.Array]
    rest: Callable[[], jax.Array]
    rounding: Callable[[], jax.Array]
    target: jax.Array | None
    low: jax.Array
    direction: jax.Array
    inner_scale: jax.Array
    scale: Scalar
    state: Pytree

    def step(self) -> jax.Array:
        """`lift(scale inner_scale direction)`, the step inside the subspace."""
        return self.lift(times(self.inner_scale * self.scale, self.direction))

    def __repr__(self) -> str:
        return show(self)


def times(scale: jax.Array, x: jax.Array) -> jax.Array:
    """A number for each matrix `(batch...)` times the matrices."""
    return scale[..., None, None] * x


@dataclasses.dataclass(frozen=True, kw_only=True)
class Residual(Short):
    """Base of the residual rules, without a state.

    Attributes:
      reads_target: `combine` reads the target in full (itself or by `rest`), so that projected
        backprop takes full gradients.
      splits: it needs the direction without its bias correction, which only inner transformations
        that keep the two apart can give.
      follows_basis: `moved` does something.
      channels: one number for each index of the kept dimension is made of the low-rank object, which
        must have that dimension.
    """

    reads_target = False
    splits = False
    follows_basis = False
    channels = False

    def init(self, view: ResolvedView) -> Pytree:
        return ()

    def check(self, inner: Any, state: Pytree, view: ResolvedView, low_shape: Shape) -> None:
        """Refuses inner transformations and low-rank shapes that the rule cannot work with."""
        if self.splits and not inner.splits:
            raise ValueError(
                f"residual {type(self).__name__} needs the inner direction without bias "
                f"correction, which {type(inner).__name__} cannot give; use lrx.inner.adam(...)"
            )
        if self.channels and low_shape[-1] != view.kept:
            raise ValueError(
                f"residual {type(self).__name__}: axis='channel' needs a projector that keeps the "
                f"{view.kept} channels of {view.path!r}, not one onto {low_shape}; use "
                "axis='tensor' or a one-sided projector"
            )

    def combine(self, c: Combine) -> tuple[jax.Array, Pytree]:
        raise TypeError(f"{type(self).__name__} does not implement combine")

    def moved(self, state: Pytree, m: Moved) -> Pytree:
        return state

    def state_bytes(self, view: ResolvedView) -> int:
        """Bytes of the state of a leaf: what `init` makes."""
        alone = dataclasses.replace(view, spec=None)
        return bytes_of(jax.eval_shape(lambda: self.init(alone)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Discard(Residual):
    """`up(u)`: the rest of the gradient is dropped (GaLore)."""

    def combine(self, c):
        return c.step(), c.state


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sign(Residual):
    """`up(u) + scale sign(G - up(g))`: signSGD on the rest (FRUGAL; scale 1 for pre-training, .1
    for fine-tuning).

    The rest is the projector's own (`Projector.rest`): exactly zero where a coordinate basis sees
    the gradient. What lies below the rounding of the two products has no sign either, as at full
    rank, or where a gradient lies in the subspace whole.
    """

    scale: Scalar = 1.0
    reads_target = True

    def __post_init__(self):
        check_number(f"{type(self).__name__.lower()}: scale", self.scale)

    def combine(self, c):
        rest = self._rule(c)
        return c.step() + self.scale * rest, c.state

    def _rule(self, c):
        rest = c.rest()
        return jnp.where(jnp.abs(rest) > c.rounding(), jnp.sign(rest), 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sgd(Sign):
    """`up(u) + scale (G - up(g))`: plain SGD on the rest (FRUGAL's `sgd`).

    Args:
      scale: of the rest.
      rms: largest root mean square of the update of a matrix, subspace and rest together, which is
        shrunk to it (Flora); None for no limit.
    """

    rms: Scalar | None = None

    def __post_init__(self):
        super().__post_init__()
        check_number("sgd: rms", self.rms, above=0, otherwise="None for no limit")

    def combine(self, c):
        update, state = super().combine(c)
        if self.rms is None:
            return update, state
        size = norms(update, (-2, -1)) / math.sqrt(c.view.shrunk * c.view.kept)
        return update / jnp.maximum(1, size / self.rms), state

    def _rule(self, c):
        return c.rest()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rescaled(Residual):
    """Base of the rules that rescale the gradient, or a part of it, by what the inner
    transformation did in the subspace, and limit the growth of its norm.

    With the uncorrected direction `N` and the low-rank gradient `R`, `f = |N| / (|R| + 1e-8)`.

    Args:
      axis: "channel" for one f for each index of the kept dimension, or "tensor" for one for the
        matrix.
      limiter: largest growth of the norm in a step, or None. 1.01 in Fira and APOLLO; see
        `limiter.limited`.
    """

    axis: str = "channel"
    limiter: Scalar | None = 1.01
    reads_target = True
    splits = True
    _name = "rescaled"

    def __post_init__(self):
        if self.axis not in ("channel", "tensor"):
            raise ValueError(f"{self._name}: axis={self.axis!r} must be 'channel' or 'tensor'")
        check_number(
            f"{self._name}: limiter", self.limiter, at_least=1, otherwise="None for no limit"
        )

    @property
    def channels(self):
        return self.axis == "channel"

    def init(self, view):
        return () if self.limiter is None else jnp.zeros(view.batch, jnp.float32)

    def rescaled(self, c: Combine, x: jax.Array) -> tuple[jax.Array, Pytree]:
        """`f x (batch..., s, k)`, its growth limited, and the state."""
        axes = (-2,) if self.channels else (-2, -1)
        factor = norms(c.direction, axes) / (norms(c.low, axes) + TINY)
        if self.limiter is None:
            return x * factor, c.state
        return limited(x * factor, c.state, self.limiter)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GradientRescale(Rescaled):
    """The gradient itself, rescaled by what the inner transformation did in the subspace; no
    back-projection (APOLLO).

    With f as in `Rescaled`, `S = scale G f`. The norm-growth limiter then shrinks `S` so that
    `|S| <= limiter |S_previous|`, and the update is `S` times the inner scale.

    Args:
      axis, limiter: see `Rescaled`.
      scale: factor on `S`. APOLLO writes it as the square root of its `scale` option (1; Mini:
        sqrt(128)).
    """

    scale: Scalar = 1.0
    _name = "gradient_rescale"

    def __post_init__(self):
        super().__post_init__()
        check_number("gradient_rescale: scale", self.scale, at_least=0)

    def combine(self, c):
        update, state = self.rescaled(c, self.scale * c.target)
        return times(c.inner_scale * c.scale, update), state


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormScaled(Rescaled):
    """`up(u) + c S`: the rest, rescaled as the inner transformation rescaled the subspace (Fira).

    With f as in `Rescaled`, c the inner scale (bias correction) and alpha the method's `scale`,
    which is part of u and not of S, the rest is

        S = f (G - alpha P R)     form="code"
        S = f (G - P R)           form="paper"

    and its norm is limited as in APOLLO. Both are one at alpha = 1.

    Args:
      axis, limiter: see `Rescaled`.
      form: "code", in which a share 1 - alpha of the subspace part stays in the rest, or "paper".
    """

    form: str = "code"
    _name = "norm_scaled"

    def __post_init__(self):
        super().__post_init__()
        if self.form not in ("code", "paper"):
            raise ValueError(f"norm_scaled: form={self.form!r} must be 'code' or 'paper'")

    def combine(self, c):
        # G - alpha P R = (1 - alpha) G + alpha (G - P R), so that coordinates need no difference
        removed = c.scale if self.form == "code" else 1.0
        rest = (1 - removed) * c.target + removed * c.rest()
        update, state = self.rescaled(c, rest)
        return c.step() + times(c.inner_scale, update), state


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compensated(Residual):
    """`up(u) + scale C`: the rest, whose columns are divided by the roots of their average energy
    (Alice).

        p <- b p + (1 - b) 1ᵀ(G - up(g))²        one number for each index of the kept dimension
        C = sqrt(s - r) (G - up(g)) diag(p)^-1/2,  its norm limited

    What is no more than rounding counts as nothing.

    Args:
      scale: factor on C beside the method's own; alpha_c.
      b: decay of the energies, without bias correction.
      limiter: largest growth of the norm in a step, 1.01, or None.
    """

    scale: Scalar = 0.4
    b: Scalar = 0.9
    limiter: Scalar | None = 1.01
    reads_target = True
    channels = True

    def __post_init__(self):
        check_number("compensated: scale", self.scale)
        check_number("compensated: b", self.b, at_least=0, below=1)
        check_number(
            "compensated: limiter", self.limiter, at_least=1, otherwise="None for no limit"
        )

    def init(self, view):
        spec = None if view.spec is None else (*view.spec[:-2], view.spec[-1])
        energy = sharding.zeros((*view.batch, view.kept), jnp.float32, spec)
        return {"energy": energy, "norm": jnp.zeros(view.batch, jnp.float32)}

    def combine(self, c):
        rest = c.rest()
        rest = jnp.where(jnp.abs(rest) > c.rounding(), rest, 0)
        energy = average(c.state["energy"], jnp.sum(jnp.square(rest), axis=-2), self.b)
        root = jnp.sqrt(jnp.where(energy > 0, energy, 1))[..., None, :]
        compensation = math.sqrt(c.view.shrunk - c.view.rank) * rest / root
        norm = c.state["norm"]
        if self.limiter is not None:
            compensation, norm = limited(compensation, norm, self.limiter)
        state = {"energy": energy, "norm": norm}
        return c.step() + c.scale * self.scale * compensation, state


@dataclasses.dataclass(frozen=True, kw_only=True)
class NeuronNormalized(Residual):
    """`up(u)` with each output over the root of its average energy, the norm of the whole set
    afterwards (NorMuon); the rest is dropped.

    With `O = up(d)` and j an output that the basis reaches (all others keep their energy),

        v_j <- b v_j + (1 - b) mean_i(O_ij²),   D_ij = O_ij / (sqrt(v_j) + eps)
        U = |O| D / |D|                         rms None
        U = rms sqrt(s k) D / |D|               otherwise

    times the inner scale and the method's own. State: one float32 for each output.

    Args:
      b: decay of the energies, without bias correction.
      eps: added to their roots.
      rms: root mean square of the update, or None for the norm that it had before.

    Raises:
      ValueError: for a decay outside [0, 1), a negative eps, an rms that is not positive.
    """

    b: Scalar = 0.95
    eps: Scalar = 1e-8
    rms: Scalar | None = None

    def __post_init__(self):
        name = "neuron_normalized"
        check_number(f"{name}: b", self.b, at_least=0, below=1)
        check_number(f"{name}: eps", self.eps, at_least=0)
        check_number(f"{name}: rms", self.rms, above=0, otherwise="None for the norm it had")

    def init(self, view):
        # outputs are what is kept where inputs are shrunk
        place = -1 if view.side == "rows" else -2
        spec = None if view.spec is None else (*view.spec[:-2], view.spec[place])
        return sharding.zeros((*view.batch, view.size_of("cols")), jnp.float32, spec)

    def combine(self, c):
        inputs = -2 if c.view.side == "rows" else -1
        step = c.lift(c.direction)
        reached = jnp.any(c.lift(jnp.ones_like(c.direction)) != 0, axis=inputs)
        energy = average(c.state, jnp.mean(jnp.square(step), axis=inputs), self.b)
        energy = jnp.where(reached, energy, c.state)
        root = jnp.expand_dims(jnp.sqrt(energy) + self.eps, inputs)
        # outputs that never moved have no energy, and stay
        normalized = jnp.where(step == 0, 0, step / jnp.where(root > 0, root, 1))
        size = norms(step, (-2, -1))
        if self.rms is not None:
            size = jnp.full_like(size, self.rms * math.sqrt(c.view.shrunk * c.view.kept))
        found = norms(normalized, (-2, -1))
        update = normalized * (size / jnp.where(found > 0, found, 1))
        return times(c.inner_scale * c.scale, update), energy


compensated = Compensated
discard = Discard
sign = Sign
sgd = Sgd
gradient_rescale = GradientRescale
neuron_normalized = NeuronNormalized
norm_scaled = NormScaled
__getattr__ = deprecations.names("lowrank_jax.residuals")  # targets that were residual rules

__all__ = [
    "Combine",
    "Rescaled",
    "Residual",
    "compensated",
    "discard",
    "gradient_rescale",
    "limited",
    "neuron_normalized",
    "norm_scaled",
    "sgd",
    "sign",
]
__dir__ = functools.partial(sorted, __all__)
