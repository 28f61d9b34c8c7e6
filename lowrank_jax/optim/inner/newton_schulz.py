"""Momentum whose singular values are moved to one: the inner transformation of Muon."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lowrank_jax import linalg, sharding
from lowrank_jax.checks import check_integer, check_number, check_static
from lowrank_jax.optim import scales
from lowrank_jax.optim.inner.base import Inner, size_of
from lowrank_jax.optim.inner.moments import register_moments
from lowrank_jax.reprs import show
from lowrank_jax.typing import Pytree, Scalar

MUON = (3.4445, -4.7750, 2.0315)


class NewtonSchulzState(NamedTuple):
    """State of `newton_schulz`: the momentum, shaped like the low-rank object."""

    mu: Pytree

    def __repr__(self) -> str:
        return show(self)


register_moments(NewtonSchulzState, {"mu": "first"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class NewtonSchulz(Inner):
    """The nearest matrix with orthonormal rows or columns to the momentum, nearly (Muon).

    `m <- momentum m + g`, `x = g + momentum m` (`nesterov`) or `m`, and with `x = u s vᵀ` the
    direction is `u p(s) vᵀ`, where `steps` Newton-Schulz steps p move all singular values into about
    [0.7, 1.2]: `linalg.newton_schulz`. Every leaf must be a matrix or a stack of them, so plain
    leaves need another inner transformation.

    Args:
      momentum, nesterov: .95 and on in Muon's code (Jordan et al. 2024).
      steps, coefficients: of the iteration, 5 and (3.4445, -4.7750, 2.0315) there.
      eps: added to the norm that the iteration divides by; 1e-7 there, 1e-8 in microsoft/dion.
      compute_dtype: of the iteration and its input: float32 (None), or bfloat16 as on GPUs in both
        codes.
      scale: factor on the direction, a number or one of `lrx.scales`: `fan_ratio()`, `rms(0.2)`.
      mu_dtype: of the stored momentum.

    Raises:
      ValueError: for a momentum outside [0, 1), a negative eps, steps below 1; at `init` for a leaf
        that is no matrix.

    >>> import jax.numpy as jnp
    >>> inner = NewtonSchulz(steps=20, coefficients=(1.5, -0.5, 0.0))
    >>> g = jnp.diag(jnp.array([4.0, -2.0]))
    >>> direction, scale, state = inner.update(g, inner.init(g))
    >>> print(direction.round(3) + 0, scale)
    [[ 1.  0.]
     [ 0. -1.]] 1.0
    """

    momentum: Scalar = 0.95
    nesterov: bool = True
    steps: int = 5
    coefficients: tuple[float, float, float] = MUON
    eps: float = 1e-7
    compute_dtype: jnp.dtype | str | None = None
    scale: Scalar | scales.Scale = 1.0
    mu_dtype: jnp.dtype = jnp.float32
    splits = True
    guards = True
    batched = True

    def __post_init__(self):
        check_number("newton_schulz: momentum", self.momentum, at_least=0, below=1)
        check_number("newton_schulz: eps", self.eps, at_least=0)
        scales.check_factor("newton_schulz: scale", self.scale, or_scale=True)
        check_static("newton_schulz: steps", self.steps)
        check_integer("newton_schulz: steps", self.steps, at_least=1)

    def init(self, tree, view=None):
        leaves = jax.tree.leaves(tree)
        if leaves:
            scales.factor(self.scale, view)  # which reads a view, or not
        for leaf in leaves:
            if leaf.ndim < 2:
                raise ValueError(
                    f"newton_schulz: a leaf of shape {tuple(leaf.shape)} is no matrix; give plain "
                    "leaves another inner transformation, plain=lrx.inner.adam()"
                )
        return NewtonSchulzState(jax.tree.map(lambda x: jnp.zeros_like(x, self.mu_dtype), tree))

    def update(self, grads, state, *, view=None, params=None, ok=None, **extra):
        del params, extra

        def moved(m, g):
            old = m.astype(jnp.float32)
            new = self.momentum * old + g.astype(jnp.float32)
            return new if ok is None else jnp.where(ok, new, old)

        def direction(m, g):
            ahead = g.astype(jnp.float32) + self.momentum * m if self.nesterov else m
            return self.orthogonal(ahead)

        mu = jax.tree.map(moved, state.mu, grads)
        directions = jax.tree.map(direction, mu, grads)
        mu = jax.tree.map(lambda m: m.astype(self.mu_dtype), mu)
        factor = scales.factor(self.scale, view) if jax.tree.leaves(grads) else 1.0
        batch = () if view is None else view.batch
        return directions, jnp.full(batch, factor, jnp.float32), NewtonSchulzState(mu)

    def orthogonal(self, x: jax.Array) -> jax.Array:
        """`u p(s) vᵀ` of matrices `x (..., m, n)`, laid out as they are."""
        own = sharding.explicit_spec(x)
        # a Gram matrix adds up over a whole dimension
        unsharded = sharding.reshard(x, sharding.unsharded_spec(own))
        made = linalg.newton_schulz(
            unsharded, self.steps, self.coefficients, self.eps, self.compute_dtype
        )
        return sharding.reshard(made, own)

    def state_bytes(self, shapes):
        """Formula: each element once in `mu_dtype`."""
        return jnp.dtype(self.mu_dtype).itemsize * sum(size_of(shape) for shape in shapes)

    def decays(self):
        return {"first": self.momentum}
