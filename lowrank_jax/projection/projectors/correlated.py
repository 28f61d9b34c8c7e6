"""A basis that descends on what it loses of the gradient and on its distance from the momentum."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from lowrank_jax import linalg
from lowrank_jax.checks import check_integer, check_number
from lowrank_jax.optim.limiter import TINY
from lowrank_jax.projection.projectors.base import StoredProjector
from lowrank_jax.projection.projectors.random import normal
from lowrank_jax.typing import Scalar


def loss(columns: jax.Array, momentum: jax.Array, target: jax.Array) -> jax.Array:
    """`mean((P PᵀX - X)²) (1 - mean_j cos(P m, X)_j)`, summed over the matrices of a stack.

    Args:
      columns: P `(batch..., s, r)`.
      momentum: m `(batch..., r, k)`.
      target: X `(batch..., s, k)`, of which j numbers the columns.
    """
    low = jnp.einsum("...sr,...sk->...rk", columns, target)
    error = jnp.einsum("...sr,...rk->...sk", columns, low) - target
    lost = jnp.mean(jnp.square(error), axis=(-2, -1))

    def length(x):
        # at zero the root has no derivative
        return jnp.sqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-2), TINY**2))

    whole = jnp.einsum("...sr,...rk->...sk", columns, momentum)
    cosines = jnp.sum(whole * target, axis=-2) / (length(whole) * length(target))
    return jnp.sum(lost * (1 - jnp.mean(cosines, axis=-1)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Correlated(StoredProjector):
    """One gradient step a refresh towards a basis that keeps the gradient and agrees with the
    momentum, and now and then a cheap SVD (COAP).

        P <- P - step_size D min(1, 1 / |D|),  D the gradient by P of
             mean((P PᵀG - G)²) (1 - mean_j cos(P m, G)_j)

    with the first moment m in the old basis and columns j, one for each index of the kept
    dimension. Every `recalibrate_every` refreshes instead, and first with Gaussian Q_0 in place of P,

        P <- the left singular vectors of G Q,  Q = qr(GᵀP)

    P is not orthonormalised in between.

    Args:
      step_size: .1 in the official code; as the mean makes D small, it moves little.
      recalibrate_every: in refreshes.
    """

    step_size: Scalar = 0.1
    recalibrate_every: Scalar = 5
    reads: ClassVar[frozenset[str]] = frozenset({"target", "momentum", "refreshes", "key"})
    orthonormal: ClassVar[bool] = False
    of_range: ClassVar[bool] = True
    decomposes: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        check_number("correlated: step_size", self.step_size, at_least=0)
        check_integer("correlated: recalibrate_every", self.recalibrate_every, at_least=1)

    def start(self, view, inputs):
        first = normal(inputs.key, (view.shrunk, view.rank))
        return self.store(view, recalibrated(first, inputs.target)), ()

    def refresh(self, view, basis, memory, inputs):
        columns, target = self.columns(view, basis), inputs.target

        def descend():
            step = jax.grad(loss)(columns, inputs.momentum, target)
            size = jnp.sqrt(jnp.sum(jnp.square(step), axis=(-2, -1), keepdims=True))
            return columns - self.step_size * step / jnp.maximum(size, 1)

        def recalibrate():
            return recalibrated(columns, target)

        due = inputs.refreshes % self.recalibrate_every == 0
        return self.store(view, jax.lax.cond(due, recalibrate, descend)), memory


def recalibrated(columns: jax.Array, target: jax.Array) -> jax.Array:
    """The left singular vectors `(..., s, r)` of `G Q`, `Q = qr(Gᵀ P)`."""
    seen = jnp.einsum("...sk,...sr->...kr", target, columns)
    left, _, _ = linalg.truncated_svd(target @ linalg.orthonormalize(seen), columns.shape[-1])
    return left


correlated = Correlated
