"""Natural gradients by the last few gradients: the inner stage of Natural GaLore."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lowrank_jax import linalg, sharding
from lowrank_jax.checks import check_integer, check_number, check_static
from lowrank_jax.optim.inner.adam import Adam
from lowrank_jax.optim.inner.base import Inner
from lowrank_jax.optim.inner.from_optax import as_inner
from lowrank_jax.reprs import show
from lowrank_jax.typing import Pytree, Scalar


class FisherPreconditionedState(NamedTuple):
    """State of `fisher_preconditioned`: int32 count `(batch...)`, the last gradients
    `(batch..., history, r, k)` in no order, and the state of what comes after."""

    count: Any
    history: jax.Array
    inner: Pytree

    def __repr__(self) -> str:
        return show(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FisherPreconditioned(Inner):
    """The gradient times the inverse of its own empirical Fisher matrix, before another inner
    transformation (Natural GaLore).

    With the last h gradients, this one among them, as columns of `F (r k, h)` and e the unit vector
    of its place,

        g <- (damping I + F Fᵀ)⁻¹ g = F (damping I + FᵀF)⁻¹ e

    The right side is Woodbury's identity for a g that is a column of F: a system of h x h, and no
    difference of large numbers. Where float32 cannot tell FᵀF from a singular matrix, the damping is
    `h eps tr(FᵀF)`. State of `(r, k)`: `h r k` float32, a count, and that of `inner`.

    Args:
      inner: what the natural gradient goes through.
      history: h, a Python integer.
      damping: lambda.

    Raises:
      ValueError: for a history below 1 or a damping that is not positive.

    >>> import jax.numpy as jnp
    >>> import optax
    >>> stage = FisherPreconditioned(inner=optax.identity(), history=2, damping=25.0)
    >>> g = jnp.array([[3.0, 4.0]])  # g / (25 + |g|²)
    >>> direction, scale, state = stage.update(g, stage.init(g))
    >>> print(direction.round(3))
    [[0.06 0.08]]
    """

    inner: Inner = dataclasses.field(default_factory=Adam)
    history: int = 20
    damping: Scalar = 1e-3
    batched = True
    decomposes = True

    def __post_init__(self):
        object.__setattr__(self, "inner", as_inner(self.inner))
        name = "fisher_preconditioned"
        check_static(f"{name}: history", self.history)
        check_integer(f"{name}: history", self.history, at_least=1)
        check_number(f"{name}: damping", self.damping, above=0)

    @property
    def splits(self) -> bool:
        return self.inner.splits

    @property
    def takes_extra(self) -> bool:
        return self.inner.takes_extra

    @property
    def reads_params(self) -> bool:
        return self.inner.reads_params

    def init(self, tree, view=None):
        *batch, r, k = tree.shape
        own = sharding.explicit_spec(tree)
        spec = None if own is None else (*own[:-2], None, *own[-2:])
        history = sharding.zeros((*batch, self.history, r, k), jnp.float32, spec)
        after = self.inner.init(tree) if view is None else self.inner.init_stack(tree, view)
        return FisherPreconditionedState(jnp.zeros(tuple(batch), jnp.int32), history, after)

    def update(self, grads, state, *, view=None, params=None, **extra):
        # the oldest gradient gives way; places that are empty are zeros, which count for nothing
        place = jnp.arange(self.history) == (state.count % self.history)[..., None]
        g = grads.astype(jnp.float32)[..., None, :, :]
        history = jnp.where(place[..., None, None], g, state.history)
        own = sharding.explicit_spec(grads)
        natural = sharding.with_out_sharding(self._natural, own)(history, place)
        if view is None:
            direction, scale, after = self.inner.update(
                natural, state.inner, params=params, **extra
            )
        else:
            direction, scale, after = self.inner.update_stack(
                natural, state.inner, view, params, extra=extra
            )
        return direction, scale, FisherPreconditionedState(state.count + 1, history, after)

    def _natural(self, history: jax.Array, place: jax.Array) -> jax.Array:
        """`F (damping I + FᵀF)⁻¹ e (..., r, k)`, of columns `(..., h, r, k)` and a unit vector."""
        gram = jnp.einsum("...hrk,...irk->...hi", history, history)
        energy = jnp.trace(gram, axis1=-2, axis2=-1)
        least = self.history * jnp.finfo(jnp.float32).eps * energy
        damping = jnp.maximum(self.damping, least)[..., None, None] * jnp.eye(self.history)
        shares = linalg.solve(gram + damping, place[..., None].astype(jnp.float32))
        return jnp.einsum("...h,...hrk->...rk", shares[..., 0], history)

    def decays(self):
        return self.inner.decays()


fisher_preconditioned = FisherPreconditioned
