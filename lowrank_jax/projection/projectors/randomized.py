"""The range of a sketch of the gradient."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from lowrank_jax import linalg
from lowrank_jax.projection.projectors.base import StoredProjector
from lowrank_jax.projection.projectors.random import normal, structured


@dataclasses.dataclass(frozen=True, kw_only=True)
class Randomized(StoredProjector):
    """A randomized range finder: power iterations from a fresh Gaussian block, products and QR
    only.

    `P = qr((G Gᵀ)^iterations Ω)` with Gaussian `Ω (s, r)`: the range finder of Halko, Martinsson
    and Tropp (2011) with the sketch `G (GᵀΩ)`; without iterations `P = qr(GΩ)` with Gaussian
    `Ω (k, r)`, one product, which projected backprop delivers without the full gradient.

    Args:
      iterations: each sharpens the decay of the spectrum by the power two.
    """

    iterations: int = 1
    of_range: ClassVar[bool] = True
    of_rows: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        if self.iterations < 0:
            raise ValueError(f"randomized: iterations={self.iterations} must not be negative")

    @property
    def reads(self):
        return frozenset({"target" if self.iterations else "sketch", "key"})

    def init(self, view, keys):
        if self.iterations:
            return super().init(view, keys)
        # of the steps before the first sketch
        return self.store(view, structured(keys, view.shrunk, view.rank)), ()

    def sketch_basis(self, view, basis, memory, inputs):
        return normal(inputs.key, (view.kept, view.rank))

    def refresh(self, view, basis, memory, inputs):
        if not self.iterations:
            return self.store(view, range_of(inputs.sketch)), memory
        moved = normal(inputs.key, (view.shrunk, view.rank))
        for _ in range(self.iterations):
            moved = linalg.power_step(inputs.target, moved)
        return self.store(view, linalg.canonical_signs(moved)), memory


def range_of(sketch: jax.Array) -> jax.Array:
    """Orthonormal basis of the columns, with canonical signs; the scale is divided out first, so
    nothing underflows."""
    size = jnp.max(jnp.abs(sketch), axis=(-2, -1), keepdims=True)
    scaled = sketch / jnp.where(size > 0, size, 1)
    return linalg.canonical_signs(linalg.orthonormalize(scaled))


randomized = Randomized
