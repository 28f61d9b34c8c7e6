"""What becomes of the part of the gradient that the basis does not see.

A residual rule is a combiner: it sees the gradient, the low-rank gradient, and the inner direction
with its scale, and decides whether `up` is called at all. All functions take batched arrays:
gradient `(batch..., s, k)`, low-rank `(batch..., r, k)`, scale `(batch...)`.

`target(state, grad)` gives what is projected and what a refresh may add to; `moved` is the hook at
a refresh; `combine` gives the oriented update. `follows_basis` says that `moved` does something,
`sees_gradient` that `combine` reads the full gradient, `splits` that it needs the direction without
its bias correction, which only inner transformations that keep the two apart can give.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_jax import sharding
from lowrank_jax.checks import check_number
from lowrank_jax.optim import inner as inner_lib

TINY = 1e-8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Residual:
    """Base of the residual rules: no state, projects the gradient."""

    sees_gradient = False
    splits = False
    follows_basis = False

    def init(self, view) -> Any:
        return ()

    def check(self, inner: Any, state: Any, view: Any, low_shape: tuple[int, ...]) -> None:
        """Refuses inner transformations and low-rank shapes that the rule cannot work with."""
        if self.splits and not inner.splits:
            raise ValueError(
                f"residual {type(self).__name__} needs the inner direction without bias "
                f"correction, which {type(inner).__name__} cannot give; use lrx.inner.adam(...)"
            )

    def target(self, state, grad):
        return grad, state

    def moved(self, projector, view, old, new, inner, before, after, state):
        return state

    def combine(self, projector, view, basis, state, grad, low, direction, scale):
        raise TypeError(f"{type(self).__name__} does not combine")

    def state_bytes(self, view) -> int:
        return 0


def _times(scale: jax.Array, x: jax.Array) -> jax.Array:
    return scale[..., None, None] * x


@dataclasses.dataclass(frozen=True, kw_only=True)
class Discard(Residual):
    """`up(u)`: the rest of the gradient is dropped (GaLore)."""

    def combine(self, projector, view, basis, state, grad, low, direction, scale):
        return projector.up(view, basis, _times(scale, direction)), state


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sign(Residual):
    """`up(u) + scale sign(G - up(g))`: signSGD on the rest (FRUGAL; scale 1 for pre-training, .1
    for fine-tuning).

    The rest is the projector's own (`Projector.rest`): exactly zero where a coordinate basis sees
    the gradient. What lies below the rounding of the two products has no sign either, as at full
    rank, or where a gradient lies in the subspace whole.
    """

    scale: Any = 1.0
    sees_gradient = True

    def __post_init__(self):
        check_number(f"{type(self).__name__.lower()}: scale", self.scale)

    def combine(self, projector, view, basis, state, grad, low, direction, scale):
        rest = self._rule(projector.rest(view, basis, grad, low), projector.rounding(view, grad))
        return projector.up(view, basis, _times(scale, direction)) + self.scale * rest, state

    def _rule(self, rest, rounding):
        return jnp.where(jnp.abs(rest) > rounding, jnp.sign(rest), 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sgd(Sign):
    """`up(u) + scale (G - up(g))`: plain SGD on the rest (FRUGAL's `sgd`)."""

    def _rule(self, rest, rounding):
        del rounding
        return rest


@dataclasses.dataclass(frozen=True, kw_only=True)
class ErrorFeedback(Residual):
    """Projects `K = G + E` and keeps `E <- K - up(g)`, so that `sum up(g_t) + E_T = sum G_t`
    (DCT-AdamW).

    Args:
      dtype: of the stored error, `(batch..., s, k)` elements.
    """

    dtype: Any = jnp.float32
    sees_gradient = True

    def init(self, view):
        return sharding.zeros(view.oriented, self.dtype, view.spec)

    def target(self, state, grad):
        return grad + state.astype(jnp.float32), jnp.zeros_like(state)

    def combine(self, projector, view, basis, state, grad, low, direction, scale):
        error = projector.rest(view, basis, grad, low) + state.astype(jnp.float32)
        return projector.up(view, basis, _times(scale, direction)), error.astype(self.dtype)

    def state_bytes(self, view):
        return _size(view.oriented) * jnp.dtype(self.dtype).itemsize


@dataclasses.dataclass(frozen=True, kw_only=True)
class LDAdamErrorFeedback(ErrorFeedback):
    """LDAdam's generalised error feedback: what the transport loses of the momentum comes back too.

    `E <- K - up(g) + b1 / (1 - b1) [up_old(m) - up_new(C m)]`, the last term at refreshes only.
    """

    follows_basis = True

    def check(self, inner, state, view, low_shape):
        super().check(inner, state, view, low_shape)
        inner_lib.first_moment(inner, state)

    def moved(self, projector, view, old, new, inner, before, after, state):
        first, m_old = inner_lib.first_moment(inner, before)
        _, m_new = inner_lib.first_moment(inner, after)
        lost = projector.up(view, old, m_old.astype(jnp.float32)) - projector.up(
            view, new, m_new.astype(jnp.float32)
        )
        return (state + first.decay / (1 - first.decay) * lost).astype(state.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GradientRescale(Residual):
    """The gradient itself, rescaled by what the inner transformation did in the subspace; no
    back-projection (APOLLO).

    With the uncorrected direction `N` and the low-rank gradient `R`, `f = |N| / (|R| + 1e-8)` for
    each index of the kept dimension ("channel") or one for the matrix ("tensor"), `S = scale G f`.
    The norm-growth limiter then shrinks `S` so that `|S| <= limiter |S_previous|`, and the update
    is `S` times the inner scale.

    Args:
      axis: "channel" or "tensor".
      scale: factor on `S`. APOLLO writes it as the square root of its `scale` option (1; Mini:
        sqrt(128)).
      limiter: largest growth of the norm in a step, or None. 1.01 in Fira and APOLLO.

    A previous norm of zero does not limit, so that one zero gradient at the start does not silence
    a matrix.
    """

    axis: str = "channel"
    scale: Any = 1.0
    limiter: Any = 1.01
    sees_gradient = True
    splits = True

    def __post_init__(self):
        if self.axis not in ("channel", "tensor"):
            raise ValueError(f"gradient_rescale: axis={self.axis!r} must be 'channel' or 'tensor'")
        check_number("gradient_rescale: scale", self.scale, at_least=0)
        check_number(
            "gradient_rescale: limiter", self.limiter, at_least=1, otherwise="None for no limit"
        )

    def init(self, view):
        return () if self.limiter is None else jnp.zeros(view.batch, jnp.float32)

    def check(self, inner, state, view, low_shape):
        super().check(inner, state, view, low_shape)
        if self.axis == "channel" and low_shape[-1] != view.kept:
            raise ValueError(
                f"gradient_rescale: axis='channel' needs a projector that keeps the {view.kept} "
                f"channels of {view.path!r}, not one onto {low_shape}; use axis='tensor' or a "
                "one-sided projector"
            )

    def combine(self, projector, view, basis, state, grad, low, direction, scale):
        axes = (-2,) if self.axis == "channel" else (-2, -1)
        factor = _norm(direction, axes) / (_norm(low, axes) + TINY)
        update = self.scale * grad * factor
        if self.limiter is not None:
            norm = _norm(update, (-2, -1))[..., 0, 0]
            growth = jnp.maximum(norm / (state + TINY), self.limiter) / self.limiter
            growth = jnp.where(state > 0, growth, 1.0)
            # a norm that overflows limits nothing that comes later
            limited = norm / growth
            update, state = (
                update / growth[..., None, None],
                jnp.where(jnp.isfinite(limited), limited, state),
            )
        return _times(scale, update), state

    def state_bytes(self, view):
        return 0 if self.limiter is None else 4 * _size(view.batch)


def _norm(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    return jnp.sqrt(jnp.sum(jnp.square(x), axis=axes, keepdims=True))


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for dimension in shape:
        size *= dimension
    return size


discard = Discard
sign = Sign
sgd = Sgd
error_feedback = ErrorFeedback
ldadam_error_feedback = LDAdamErrorFeedback
gradient_rescale = GradientRescale
