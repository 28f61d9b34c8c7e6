"""Adam in both conventions of its epsilon, with its bias correction apart from its direction."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_jax.checks import check_number, is_number
from lowrank_jax.matrices import ResolvedView
from lowrank_jax.optim.inner.base import Inner, size_of
from lowrank_jax.optim.inner.moments import register_moments
from lowrank_jax.reprs import show
from lowrank_jax.typing import Pytree, Scalar


def debias(decay: Scalar, count: jax.Array) -> jax.Array:
    """`1 - decay^count` in float32.

    Rounding the decay first would cancel: of 0.9999 half the digits of `1 - decay` go.
    """
    if is_number(decay):
        log: Scalar = math.log(decay) if decay > 0 else -math.inf
    else:
        log = jnp.log(decay)
    return -jnp.expm1(count.astype(jnp.float32) * log)


def average(old: jax.Array, new: jax.Array, decay: Scalar) -> jax.Array:
    """`decay old + (1 - decay) new` in float32."""
    return decay * old.astype(jnp.float32) + (1 - decay) * new


class AdamState(NamedTuple):
    """State of `adam`: int32 count, first and second moments shaped like the low-rank object."""

    count: Any
    mu: Pytree
    nu: Pytree

    def __repr__(self) -> str:
        return show(self)


register_moments(AdamState, {"mu": "first", "nu": "second"}, "count")


_EPSILON = ("torch", "hf")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adam(Inner):
    """Adam, with its bias correction apart from its direction.

    `m <- b1 m + (1 - b1) g`, `v <- b2 v + (1 - b2) g²`, `scale = sqrt(1 - b2^t) / (1 - b1^t)`, and

    * `convention="torch"`: `direction = m / (sqrt(v) + eps sqrt(1 - b2^t))`, so that
      `scale * direction` is `m̂ / (sqrt(v̂) + eps)` (torch, optax; FRUGAL, LDAdam, DCT-AdamW; eps
      1e-8);
    * `convention="hf"`: `direction = m / (sqrt(v) + eps)` (GaLore, Fira, APOLLO; eps 1e-6).

    Args:
      b1, b2, eps: decay rates and the epsilon of the convention.
      bias_correction: without it the scale is 1 and the epsilon as written (Alice).
      mu_dtype, nu_dtype: dtypes of the stored moments; the arithmetic is float32.

    Raises:
      ValueError: for a decay rate outside [0, 1), a negative eps or an unknown convention.

    >>> import jax.numpy as jnp
    >>> adam = Adam(eps=0.0)
    >>> direction, scale, state = adam.update(jnp.array([3.0, -4.0]), adam.init(jnp.zeros(2)))
    >>> print(scale * direction)
    [ 1. -1.]
    """

    b1: Scalar = 0.9
    b2: Scalar = 0.999
    eps: Scalar = 1e-8
    convention: str = "torch"
    bias_correction: bool = True
    mu_dtype: jnp.dtype = jnp.float32
    nu_dtype: jnp.dtype = jnp.float32
    splits = True
    guards = True
    elementwise = True
    trees = True

    def __post_init__(self):
        for name in ("b1", "b2"):
            check_number(f"adam: {name}", getattr(self, name), at_least=0, below=1)
        check_number("adam: eps", self.eps, at_least=0)
        if self.convention not in _EPSILON:
            raise ValueError(f"adam: convention={self.convention!r} must be one of {_EPSILON}")

    def init(self, tree, view=None):
        mu = jax.tree.map(lambda x: jnp.zeros_like(x, self.mu_dtype), tree)
        nu = jax.tree.map(lambda x: self.second_like(x, view), tree)
        return AdamState(jnp.zeros((), jnp.int32), mu, nu)

    def update(self, grads, state, *, view=None, params=None, ok=None, **extra):
        del params, extra

        def moved(old, new, decay):
            value = average(old, new, decay)
            return value if ok is None else jnp.where(ok, value, old.astype(jnp.float32))

        # m <- b1 m + (1 - b1) g
        def first(m, g):
            return moved(m, g.astype(jnp.float32), self.b1)

        # v <- b2 v + (1 - b2) g²
        def second(v, g):
            return moved(v, self.squares(g, view), self.b2)

        count = optax.safe_increment(state.count)
        mu = jax.tree.map(first, state.mu, grads)
        nu = jax.tree.map(second, state.nu, grads)

        # the bias correction is in the scale, and for "torch" in the epsilon
        eps, scale = self.corrections(count)

        def divided(m, v):
            return m / (jnp.sqrt(self.spread(v, m, view)) + eps)

        direction = jax.tree.map(divided, mu, nu)

        # rounded after the direction was made of them
        mu = jax.tree.map(lambda m: m.astype(self.mu_dtype), mu)
        nu = jax.tree.map(lambda v: v.astype(self.nu_dtype), nu)
        kept = count if ok is None else jnp.where(ok, count, state.count)
        return direction, scale, AdamState(kept, mu, nu)

    def second_like(self, x: jax.Array, view: ResolvedView | None) -> jax.Array:
        """A second moment of zeros for an array of gradients."""
        del view
        return jnp.zeros_like(x, self.nu_dtype)

    def squares(self, g: jax.Array, view: ResolvedView | None) -> jax.Array:
        """What the second moment averages, float32."""
        del view
        return jnp.square(g.astype(jnp.float32))

    def spread(self, v: jax.Array, like: jax.Array, view: ResolvedView | None) -> jax.Array:
        """The second moment of each entry of `like`."""
        del like, view
        return v

    def corrections(self, count: jax.Array) -> tuple[Scalar, jax.Array]:
        """`(eps, scale)` of the update that makes the count this one."""
        if not self.bias_correction:
            return self.eps, jnp.ones(count.shape, jnp.float32)
        correction = jnp.sqrt(debias(self.b2, count))
        eps = self.eps * (correction if self.convention == "torch" else 1)
        return eps, correction / debias(self.b1, count)

    def state_bytes(self, shapes):
        """Formula: 4 bytes of count, and each element once in `mu_dtype` and once in `nu_dtype`."""
        of_moments = jnp.dtype(self.mu_dtype).itemsize + jnp.dtype(self.nu_dtype).itemsize
        elements = sum(size_of(shape) for shape in shapes)
        return 4 + of_moments * elements

    def decays(self):
        return {"first": self.b1, "second": self.b2}

    def as_adam(self):
        return self if type(self) is Adam else None
