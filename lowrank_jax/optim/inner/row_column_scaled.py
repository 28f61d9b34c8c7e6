"""SGD whose rows and columns are scaled: the inner transformation of RACS."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lowrank_jax import sharding
from lowrank_jax.checks import check_integer, check_number, check_static
from lowrank_jax.optim import scales
from lowrank_jax.optim.inner.adam import average
from lowrank_jax.optim.inner.base import Inner
from lowrank_jax.optim.limiter import limited
from lowrank_jax.reprs import show
from lowrank_jax.typing import Scalar


class RowColumnScaledState(NamedTuple):
    """State of `row_column_scaled`: `rows (..., m)`, `columns (..., n)`, and the norm `(...)` of the
    last step."""

    rows: jax.Array
    columns: jax.Array
    norm: jax.Array

    def __repr__(self) -> str:
        return show(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowColumnScaled(Inner):
    """Gradients with rows and columns divided by roots of two vectors, whose outer product is the
    nearest to `G²` (RACS).

    From `q = 1`, `iterations` times `s = G²ᵀq / |q|²`, `q = G² s / |s|²`, which are power
    iterations on the squares; then

        q_t <- b q_t + (1 - b) q,  s_t <- b s_t + (1 - b) s
        direction = diag(q_t)^-1/2 G diag(s_t)^-1/2,  its norm limited

    A row or column that never had a gradient stays where it is.

    Args:
      b: decay of both vectors, .9; there is no bias correction.
      iterations: 5.
      limiter: largest growth of the norm in a step, 1.01, or None.
      scale: factor on the direction, a number or one of `lrx.scales`; RACS' alpha.

    Raises:
      ValueError: for a decay outside [0, 1), iterations below 1, a limiter below 1; at `init` for a
        leaf that is no matrix.

    >>> import jax.numpy as jnp
    >>> inner = RowColumnScaled(b=0.0)
    >>> g = jnp.outer(jnp.array([1.0, -2.0]), jnp.array([3.0, 4.0]))
    >>> direction, scale, state = inner.update(g, inner.init(g))
    >>> print(direction.round(3))
    [[ 1.  1.]
     [-1. -1.]]
    """

    b: Scalar = 0.9
    iterations: int = 5
    limiter: Scalar | None = 1.01
    scale: Scalar | scales.Scale = 1.0
    batched = True

    def __post_init__(self):
        name = "row_column_scaled"
        check_number(f"{name}: b", self.b, at_least=0, below=1)
        check_static(f"{name}: iterations", self.iterations)
        check_integer(f"{name}: iterations", self.iterations, at_least=1)
        check_number(f"{name}: limiter", self.limiter, at_least=1, otherwise="None for no limit")
        scales.check_factor(f"{name}: scale", self.scale, or_scale=True)

    def init(self, tree, view=None):
        if tree.ndim < 2:
            raise ValueError(
                f"row_column_scaled: a leaf of shape {tuple(tree.shape)} is no matrix; give plain "
                "leaves another inner transformation, plain=lrx.inner.adam()"
            )
        *batch, m, n = tree.shape
        spec = sharding.unsharded_spec(sharding.explicit_spec(tree))

        def zeros(*shape):
            own = None if spec is None else (*spec[: len(batch)], *[None] * len(shape))
            return sharding.zeros((*batch, *shape), jnp.float32, own)

        return RowColumnScaledState(zeros(m), zeros(n), zeros())

    def update(self, grads, state, *, view=None, params=None, **extra):
        del params, extra
        own = sharding.explicit_spec(grads)
        g = sharding.reshard(grads.astype(jnp.float32), sharding.unsharded_spec(own))
        q, s = fixed_point(g, self.iterations)
        rows, columns = average(state.rows, q, self.b), average(state.columns, s, self.b)
        scaled = g * _inverse_root(rows)[..., :, None] * _inverse_root(columns)[..., None, :]
        norm = state.norm
        if self.limiter is not None:
            scaled, norm = limited(scaled, norm, self.limiter)
        factor = scales.factor(self.scale, view)
        scale = jnp.full(state.norm.shape, factor, jnp.float32)
        direction = sharding.reshard(scaled, own)
        return direction, scale, RowColumnScaledState(rows, columns, norm)


def _inverse_root(x: jax.Array) -> jax.Array:
    """`x^-1/2`, and 0 of 0."""
    return jnp.where(x > 0, jax.lax.rsqrt(jnp.where(x > 0, x, 1)), 0)


def fixed_point(g: jax.Array, iterations: int) -> tuple[jax.Array, jax.Array]:
    """`q (..., m)` and `s (..., n)`, whose outer product is near `g² (..., m, n)`."""
    # of the squares' size, so that fourth powers do not underflow
    squares = jnp.square(g)
    size = jnp.max(squares, axis=(-2, -1), keepdims=True)
    squares = squares / jnp.where(size > 0, size, 1)

    def energy(x):
        total = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
        return jnp.where(total > 0, total, 1)

    q = jnp.ones_like(squares[..., 0])
    for _ in range(iterations):
        s = jnp.einsum("...mn,...m->...n", squares, q) / energy(q)
        q = jnp.einsum("...mn,...n->...m", squares, s) / energy(s)
    return q, s * size[..., 0]


row_column_scaled = RowColumnScaled
