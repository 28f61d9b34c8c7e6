"""Adafactor: a second moment of one number for each row and one for each column."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_jax.checks import check_number
from lowrank_jax.optim.inner.adam import average
from lowrank_jax.optim.inner.base import Inner, shape_of, size_of
from lowrank_jax.optim.inner.moments import register_moments
from lowrank_jax.reprs import show
from lowrank_jax.typing import Pytree, Scalar


class RowsAndColumns(NamedTuple):
    """A factored second moment of `(..., m, n)`: means `(..., m)` of rows, `(..., n)` of columns."""

    rows: jax.Array
    columns: jax.Array


class AdafactorState(NamedTuple):
    """State of `adafactor`: int32 count; `mu` like the low-rank object, or `()` without a first moment;
    `nu` the second moment, `RowsAndColumns` of matrices and an array of vectors."""

    count: Any
    mu: Pytree
    nu: Pytree

    def __repr__(self) -> str:
        return show(self)


register_moments(AdafactorState, {"mu": "first", "nu": "factored"}, "count")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adafactor(Inner):
    """Adafactor (Shazeer and Stern, 2018): the square root of the second moment is an outer product,
    so that it costs next to nothing.

    With `b2_t = 1 - t^-power`, `r` and `c` the means of `G² + eps` over each row and column,

        r <- b2_t r + (1 - b2_t) r(G), c likewise
        U = G / sqrt(r c / mean(r)),  U <- U / max(1, rms(U) / clip)
        M <- b1 M + (1 - b1) U        the direction, or U without a first moment

    Leaves of less than two axes have a whole second moment. State of `(r, k)`: `r + k` float32, a
    count, and `r k` with a first moment.

    Paper: https://arxiv.org/abs/1804.04235. GaLore's Adafactor is this with a given rate (no
    relative step sizes and no scale by the parameter, as in its scripts). Its M averages updates
    that were multiplied by their learning rates, here they are multiplied afterwards, so that the
    two differ where the rate changes.

    Args:
      b1: decay of the first moment, or None for none (GaLore's scripts).
      power: of the second moment's decay, .8.
      eps: added to squares, 1e-30.
      clip: largest root mean square of U, 1, or None for no limit.

    Raises:
      ValueError: for b1 outside [0, 1), or a power, eps or clip that is not positive.

    >>> import jax.numpy as jnp
    >>> adafactor = Adafactor()
    >>> g = jnp.outer(jnp.array([1.0, -2.0]), jnp.array([3.0, 4.0]))
    >>> direction, scale, state = adafactor.update(g, adafactor.init(g))
    >>> print(direction.round(3), adafactor.state_bytes([(128, 1024)]))
    [[ 1.  1.]
     [-1. -1.]] 4612
    """

    b1: Scalar | None = None
    power: Scalar = 0.8
    eps: Scalar = 1e-30
    clip: Scalar | None = 1.0
    trees = True

    def __post_init__(self):
        check_number("adafactor: b1", self.b1, at_least=0, below=1, otherwise="None for no moment")
        for name in ("power", "eps"):
            check_number(f"adafactor: {name}", getattr(self, name), above=0)
        check_number("adafactor: clip", self.clip, above=0, otherwise="None for no limit")

    def init(self, tree, view=None):
        def second(x):
            squares = jnp.zeros_like(x, jnp.float32)
            return _factored(squares) if x.ndim > 1 else squares

        mu = () if self.b1 is None else jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), tree)
        return AdafactorState(jnp.zeros((), jnp.int32), mu, jax.tree.map(second, tree))

    def update(self, grads, state, *, view=None, params=None, **extra):
        del view, params, extra
        count = optax.safe_increment(state.count)
        # b2_t = 1 - t^-power, 0 at the first step
        decay = 1 - count.astype(jnp.float32) ** -self.power

        def second(g, nu):
            squares = jnp.square(g.astype(jnp.float32)) + self.eps
            new = _factored(squares) if g.ndim > 1 else squares
            return jax.tree.map(lambda old, new: average(old, new, decay), nu, new)

        def whitened(g, nu):
            u = g.astype(jnp.float32)
            if g.ndim > 1:
                # r / mean(r) first: products of two means underflow
                shares = nu.rows / jnp.mean(nu.rows, axis=-1, keepdims=True)
                u = u * jax.lax.rsqrt(shares)[..., :, None]
                u = u * jax.lax.rsqrt(nu.columns)[..., None, :]
            else:
                u = u * jax.lax.rsqrt(nu)
            if self.clip is None:
                return u
            size = jnp.sqrt(jnp.mean(jnp.square(u)))
            return u / jnp.maximum(1, size / self.clip)

        nu = jax.tree.map(second, grads, state.nu)
        direction, mu, b1 = jax.tree.map(whitened, grads, nu), state.mu, self.b1
        if b1 is not None:
            mu = jax.tree.map(lambda m, u: average(m, u, b1), mu, direction)
            direction = mu
        return direction, jnp.ones((), jnp.float32), AdafactorState(count, mu, nu)

    def state_bytes(self, shapes):
        """Formula: 4 bytes of count; 4 for each row and column of a matrix or entry of a vector, and
        for each entry of a first moment."""
        total = 4
        for shape in map(shape_of, shapes):
            size = size_of(shape)
            rows_and_columns = size // shape[-1] + size // shape[-2] if len(shape) > 1 else size
            total += 4 * rows_and_columns + (0 if self.b1 is None else 4 * size)
        return total

    def decays(self):
        return {} if self.b1 is None else {"first": self.b1}


def _factored(squares: jax.Array) -> RowsAndColumns:
    """Means over the rows and over the columns of `(..., m, n)`."""
    return RowsAndColumns(jnp.mean(squares, axis=-1), jnp.mean(squares, axis=-2))
