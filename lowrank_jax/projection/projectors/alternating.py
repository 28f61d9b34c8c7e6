"""Power iteration that alternates between the two sides, one thin product a refresh."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from lowrank_jax import linalg
from lowrank_jax.projection.projectors.base import StoredProjector
from lowrank_jax.projection.projectors.random import normal, structured
from lowrank_jax.projection.projectors.randomized import range_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Alternating(StoredProjector):
    """Alternating-side power iteration: `P <- qr(G Q)`, `Q = qr(m̂ᵀ)` with the debiased first
    moment `m̂ ~ PᵀG`.

    The first moment is the other half of a power step, averaged over steps, so that a refresh needs
    one thin product of the gradient, which projected backprop delivers; at the first refresh Q is
    Gaussian. Signs follow the old basis.
    """

    of_range: ClassVar[bool] = True
    reads: ClassVar[frozenset[str]] = frozenset({"sketch", "momentum", "step", "key"})

    def init(self, view, keys):
        return self.store(view, structured(keys, view.shrunk, view.rank)), ()

    def sketch_basis(self, view, basis, memory, inputs):
        gaussian = normal(inputs.key, (view.kept, view.rank))
        momentum = jnp.swapaxes(inputs.momentum, -1, -2)
        size = jnp.max(jnp.abs(momentum), axis=(-2, -1), keepdims=True)
        warm = linalg.orthonormalize(momentum / jnp.where(size > 0, size, 1))
        return jnp.where(inputs.step == 0, gaussian, warm)

    def refresh(self, view, basis, memory, inputs):
        new, old = range_of(inputs.sketch), self.columns(view, basis)
        signs = jnp.where(jnp.sum(new * old, axis=-2, keepdims=True) < 0, -1.0, 1.0)
        return self.store(view, new * signs), memory


alternating = Alternating
