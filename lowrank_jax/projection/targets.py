"""What is projected: the gradient, the gradient and what earlier steps lost of it, or a momentum.

A target makes of the gradient `G (batch..., s, k)` the matrix `K` that is projected, and keeps what
the projection loses of it:

    init(view) -> state
    take(state, G) -> (K, state)     state: what is left of it once K is taken
    moved(state, Moved) -> state     the basis moved, and moments with it (`follows_basis`)
    kept(state, Kept) -> state       what the next step finds, once `low = down(K)` is known

All arrays have the batch axes in front; no function is called inside a vmap.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lowrank_jax import sharding
from lowrank_jax.checks import check_number
from lowrank_jax.matrices import ResolvedView
from lowrank_jax.optim import inner as inner_lib
from lowrank_jax.reprs import Short, show
from lowrank_jax.trees import bytes_of
from lowrank_jax.typing import DTypeLike, Pytree, Scalar, Shape


class Moved(NamedTuple):
    """What happened at a refresh, for states that follow the basis.

    Attributes:
      view: of the leaf.
      lift_old, lift_new: `(r, k) -> (s, k)` by the old and the new basis.
      change: the overlap `P_newᵀ P_old`, see `transports`.
      before, after: `(batch..., r, k)` float32, the raw first moment in the old and the new basis;
        None where the inner transformation has none.
      decay: of the first moment, or None.
    """

    view: ResolvedView
    lift_old: Callable[[jax.Array], jax.Array]
    lift_new: Callable[[jax.Array], jax.Array]
    change: Any
    before: jax.Array | None
    after: jax.Array | None
    decay: Scalar | None

    def __repr__(self) -> str:
        return show(self)


class Kept(NamedTuple):
    """What a projection kept.

    Attributes:
      view: of the leaf.
      target: `K (batch..., s, k)`.
      low: `down(K) (batch..., r, k)`.
      lift: `(r, k) -> (s, k)` by the basis.
      rest: `() -> (batch..., s, k)`, what the basis does not see of K (`Projector.rest`).
    """

    view: ResolvedView
    target: jax.Array
    low: jax.Array
    lift: Callable[[jax.Array], jax.Array]
    rest: Callable[[], jax.Array]

    def __repr__(self) -> str:
        return show(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target(Short):
    """Base of the targets: the gradient, without a state.

    Attributes:
      reads_gradient: every step needs the full gradient, so that projected backprop takes it.
      follows_basis: `moved` does something.
      accumulates: the state is a sum of gradients. Clipping what is projected would scale it anew
        at every step, so `clip_norm` is refused.
    """

    reads_gradient = False
    follows_basis = False
    accumulates = False

    def check(self, inner: Any, state: Pytree, view: ResolvedView, low_shape: Shape) -> None:
        """Refuses inner transformations and low-rank shapes that it cannot work with."""

    def init(self, view: ResolvedView) -> Pytree:
        return ()

    def take(self, state: Pytree, gradient: jax.Array) -> tuple[jax.Array, Pytree]:
        return gradient, state

    def moved(self, state: Pytree, m: Moved) -> Pytree:
        return state

    def kept(self, state: Pytree, k: Kept) -> Pytree:
        return state

    def state_bytes(self, view: ResolvedView) -> int:
        """Bytes of the state of a leaf: what `init` makes."""
        alone = dataclasses.replace(view, spec=None)
        return bytes_of(jax.eval_shape(lambda: self.init(alone)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gradient(Target):
    """The gradient itself (GaLore, FRUGAL, APOLLO, Fira).

    >>> Gradient().take((), 1.0)
    (1.0, ())
    """


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stored(Target):
    """Base of targets that keep a matrix like the gradient.

    Args:
      dtype: of the stored matrix, `(batch..., s, k)` elements; the arithmetic is float32.
    """

    dtype: DTypeLike = jnp.float32
    reads_gradient = True

    def init(self, view):
        return sharding.zeros(view.oriented, self.dtype, view.spec)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ErrorFeedback(Stored):
    """Projects `K = G + E` and keeps `E <- K - up(g)`, so that `sum up(g_t) + E_T = sum G_t`
    (DCT-AdamW).

    Under `clip_norm` the step is made of `c K` in place of K, and the error too: what clipping takes
    away does not come back.

    Args:
      dtype: of the stored error, `(batch..., s, k)` elements.

    >>> import lowrank_jax as lrx
    >>> lrx.dct_adamw(1e-3, rank=4, error_feedback=True).projection.target.reads_gradient
    True
    """

    def take(self, state, gradient):
        return gradient + state.astype(jnp.float32), jnp.zeros_like(state)

    def kept(self, state, k):
        # what a refresh added to the emptied state stays in it
        error = k.rest() + state.astype(jnp.float32)
        return error.astype(self.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LDAdamErrorFeedback(ErrorFeedback):
    """LDAdam's generalised error feedback: what the transport loses of the momentum comes back too.

    `E <- K - up(g) + b1 / (1 - b1) [up_old(m) - up_new(C m)]`, the last term at refreshes only.
    """

    follows_basis = True

    def check(self, inner, state, view, low_shape):
        inner_lib.first_moment(inner, state)

    def moved(self, state, m):
        lost = m.lift_old(m.before) - m.lift_new(m.after)
        return (state + m.decay / (1 - m.decay) * lost).astype(state.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Momentum(Stored):
    """Projects a momentum, of which the projected part is partly taken out (Dion, Trion).

    `K = M + G`, and `M <- K - (1 - mu) up(down(K))`: along the basis the momentum decays by mu, and
    what the basis does not see waits in it undecayed.

    Args:
      mu: .95 in both papers.
      dtype: of the stored momentum, `(batch..., s, k)` elements.

    Raises:
      ValueError: for mu outside [0, 1).

    >>> Momentum(mu=0.9).accumulates
    True
    """

    mu: Any = 0.95
    accumulates = True

    def __post_init__(self):
        check_number("momentum: mu", self.mu, at_least=0, below=1)

    def take(self, state, gradient):
        return gradient + state.astype(jnp.float32), state

    def kept(self, state, k):
        # K - (1 - mu) up(low) = mu K + (1 - mu) rest
        return (self.mu * k.target + (1 - self.mu) * k.rest()).astype(self.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preconditioned(Target):
    """Projects what an inner transformation of its own makes of the whole gradient (Flora).

    `K = scale direction` of `inner` on `G (s, k)`, whose state lies beside the low-rank one: an inner
    transformation that keeps little, such as `lrx.inner.adafactor()`, is what this is for.

    Args:
      inner: of one matrix, without parameters or a view.

    >>> import lowrank_jax as lrx
    >>> Preconditioned(inner=lrx.inner.adafactor()).reads_gradient
    True
    """

    inner: inner_lib.Inner
    reads_gradient = True

    def __post_init__(self):
        object.__setattr__(self, "inner", inner_lib.as_inner(self.inner))
        if self.inner.reads_params or self.inner.batched:
            raise ValueError(
                f"preconditioned: inner={self.inner!r} must work on one matrix of gradients, without "
                "its parameter; take lrx.inner.adafactor() or lrx.inner.adam()"
            )

    def init(self, view):
        whole = sharding.zeros(view.oriented, jnp.float32, view.spec)
        return _each_matrix(self.inner.init, len(view.batch))(whole)

    def take(self, state, gradient):
        def one(g, state):
            direction, scale, state = self.inner.update(g, state)
            return scale * direction, state

        return _each_matrix(one, gradient.ndim - 2)(gradient, state)


def _each_matrix(function: Callable[..., Pytree], axes: int) -> Callable[..., Pytree]:
    """A function of one matrix, vmapped over axes in front."""
    for _ in range(axes):
        function = jax.vmap(function)
    return function


gradient = Gradient
error_feedback = ErrorFeedback
ldadam_error_feedback = LDAdamErrorFeedback
momentum = Momentum
preconditioned = Preconditioned

__all__ = [
    "Kept",
    "Moved",
    "Target",
    "error_feedback",
    "gradient",
    "ldadam_error_feedback",
    "momentum",
    "preconditioned",
]
__dir__ = functools.partial(sorted, __all__)
