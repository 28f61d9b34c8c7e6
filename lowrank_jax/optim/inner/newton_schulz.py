"""Momentum whose singular values are moved to one: the inner transformation of Muon."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from lowrank_jax import linalg, sharding
from lowrank_jax.checks import check_integer, check_number, check_static
from lowrank_jax.matrices import ResolvedView
from lowrank_jax.optim import scales
from lowrank_jax.optim.inner.base import Inner, size_of
from lowrank_jax.optim.inner.moments import register_moments
from lowrank_jax.reprs import show
from lowrank_jax.typing import Pytree, Scalar


class NewtonSchulzState(NamedTuple):
    """State of `newton_schulz`: the momentum, shaped like the low-rank object."""

    mu: Pytree

    def __repr__(self) -> str:
        return show(self)


register_moments(NewtonSchulzState, {"mu": "first"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Orthogonal(Inner):
    """The nearest matrix with orthonormal rows or columns to the gradient, nearly, without a state
    (Trion, whose target is a momentum already).

    With `x = u s vᵀ` the direction is `u p(s) vᵀ`, where `steps` Newton-Schulz steps p move all
    singular values into about [0.7, 1.2]: `linalg.newton_schulz`. Every leaf must be a matrix or a
    stack of them, so plain leaves need another inner transformation.

    Args:
      steps, coefficients: of the iteration, 5 and (3.4445, -4.7750, 2.0315) in Muon's code (Jordan
        et al. 2024). Triples are one a step: `lrx.linalg.POLAR_EXPRESS`.
      eps: added to the norm that the iteration divides by; 1e-7 there, 1e-8 in microsoft/dion.
      margin: factor on that norm before, 1; 1.02 with `POLAR_EXPRESS`.
      compute_dtype: of the iteration and its input: float32 (None), or bfloat16 as on GPUs in both
        codes.
      scale: factor on the direction, a number or one of `lrx.scales`: `fan_ratio()`, `rms(0.2)`.

    Raises:
      ValueError: for a negative eps, steps below 1; at `init` for a leaf that is no matrix.

    >>> import jax.numpy as jnp
    >>> inner = Orthogonal(steps=20, coefficients=(1.5, -0.5, 0.0))
    >>> g = jnp.diag(jnp.array([4.0, -2.0]))
    >>> direction, scale, state = inner.update(g, inner.init(g))
    >>> print(direction.round(3) + 0, scale)
    [[ 1.  0.]
     [ 0. -1.]] 1.0
    """

    steps: int = 5
    coefficients: tuple[float, float, float] | tuple[tuple[float, float, float], ...] = linalg.MUON
    eps: float = 1e-7
    margin: Scalar = 1.0
    compute_dtype: jnp.dtype | str | None = None
    scale: Scalar | scales.Scale = 1.0
    splits = True
    trees = True  # of matrices and stacks of them
    batched = True
    name: ClassVar[str] = "orthogonal"

    def __post_init__(self):
        check_number(f"{self.name}: eps", self.eps, at_least=0)
        check_number(f"{self.name}: margin", self.margin, above=0)
        scales.check_factor(f"{self.name}: scale", self.scale, or_scale=True)
        check_static(f"{self.name}: steps", self.steps)
        check_integer(f"{self.name}: steps", self.steps, at_least=1)

    def init(self, tree, view=None):
        leaves = jax.tree.leaves(tree)
        if leaves:
            scales.factor(self.scale, view)  # which reads a view, or not
        for leaf in leaves:
            if leaf.ndim < 2:
                raise ValueError(
                    f"{self.name}: a leaf of shape {tuple(leaf.shape)} is no matrix; give plain "
                    "leaves another inner transformation, plain=lrx.inner.adam()"
                )
        return ()

    def update(self, grads, state, *, view=None, params=None, **extra):
        del params, extra
        directions = jax.tree.map(lambda g: self.orthogonal(g.astype(jnp.float32)), grads)
        return directions, self.factors(grads, view), state

    def factors(self, grads: Pytree, view: ResolvedView | None) -> jax.Array:
        """`scale` of each matrix, `(batch...)`."""
        factor = scales.factor(self.scale, view) if jax.tree.leaves(grads) else 1.0
        # plain leaves share one number
        batch = () if view is None else view.batch
        return jnp.full(batch, factor, jnp.float32)

    def orthogonal(self, x: jax.Array) -> jax.Array:
        """`u p(s) vᵀ` of matrices `x (..., m, n)`, laid out as they are."""
        own = sharding.explicit_spec(x)
        # a Gram matrix adds up over a whole dimension
        unsharded = sharding.reshard(x, sharding.unsharded_spec(own))
        options = self.steps, self.coefficients, self.eps, self.compute_dtype
        made = linalg.newton_schulz(unsharded, *options, margin=self.margin)
        return sharding.reshard(made, own)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NewtonSchulz(Orthogonal):
    """The nearest matrix with orthonormal rows or columns to the momentum, nearly (Muon).

    `m <- momentum m + g`, and the direction is that of `Orthogonal`, whose other options it has, of
    `x = g + momentum m` (`nesterov`) or `m`.

    Args:
      momentum, nesterov: .95 and on in Muon's code (Jordan et al. 2024).
      mu_dtype: of the stored momentum.

    Raises:
      ValueError: for a momentum outside [0, 1), and as `Orthogonal`.

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
    mu_dtype: jnp.dtype = jnp.float32
    guards = True
    name: ClassVar[str] = "newton_schulz"

    def __post_init__(self):
        super().__post_init__()
        check_number("newton_schulz: momentum", self.momentum, at_least=0, below=1)

    def init(self, tree, view=None):
        super().init(tree, view)
        return NewtonSchulzState(jax.tree.map(lambda x: jnp.zeros_like(x, self.mu_dtype), tree))

    def update(self, grads, state, *, view=None, params=None, ok=None, **extra):
        del params, extra

        # m <- momentum m + g
        def moved(m, g):
            old = m.astype(jnp.float32)
            new = self.momentum * old + g.astype(jnp.float32)
            return new if ok is None else jnp.where(ok, new, old)

        def direction(m, g):
            # Nesterov's look ahead: what the next momentum would be of the same gradient
            ahead = g.astype(jnp.float32) + self.momentum * m if self.nesterov else m
            return self.orthogonal(ahead)

        mu = jax.tree.map(moved, state.mu, grads)
        directions = jax.tree.map(direction, mu, grads)
        # rounded after the directions were made of it
        mu = jax.tree.map(lambda m: m.astype(self.mu_dtype), mu)
        return directions, self.factors(grads, view), NewtonSchulzState(mu)

    def state_bytes(self, shapes):
        """Formula: each element once in `mu_dtype`."""
        elements = sum(size_of(shape) for shape in shapes)
        return jnp.dtype(self.mu_dtype).itemsize * elements

    def decays(self):
        return {"first": self.momentum}
