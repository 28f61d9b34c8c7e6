"""Bases drawn at random: Gaussian (regenerated from its key), orthonormal (stored), structured
(regenerated)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp

from lowrank_jax import linalg, sharding
from lowrank_jax.projection.batches import count, each
from lowrank_jax.projection.projectors.base import BasisProjector, StoredProjector
from lowrank_jax.typing import DTypeLike


def per_matrix(function: Callable, keys: jax.Array) -> jax.Array:
    """`function(key)` for each key of an array of keys, batch axes in front."""
    return each(function, keys.shape)(keys)


def normal(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal matrices, one for each key."""
    return per_matrix(lambda key: jax.random.normal(key, shape, jnp.float32), keys)


def structured(keys: jax.Array, s: int, r: int) -> jax.Array:
    """Orthonormal matrices `(s, r)`: r random columns of a DCT with random signs on its rows, one
    for each key."""

    def draw_signs(key):
        return jax.random.rademacher(jax.random.fold_in(key, 0), (s, 1), jnp.float32)

    def draw_indices(key):
        return linalg.random_rows(jax.random.fold_in(key, 1), s, r)

    # (..., s, 1) and (..., r)
    signs = per_matrix(draw_signs, keys)
    indices = per_matrix(draw_indices, keys)
    return signs * linalg.dct_columns(indices, s, 3)


KINDS = ("gaussian", "orthonormal", "structured")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Random(BasisProjector):
    """A random basis, drawn anew at every refresh.

    * "gaussian": entries `N(0, 1) / sqrt(r)`, not orthonormal (APOLLO, Flora);
    * "orthonormal": QR of a Gaussian matrix, uniform over subspaces (GoLore, FRUGAL `random`);
    * "structured": r random columns of a DCT with random signs on its rows, orthonormal and as
      cheap as `dct`.

    Args:
      kind: one of the above.
      stored: keep `P (s, r)` as state, or regenerate it from its key (8 bytes) at every use. By
        default only "orthonormal" is stored, since a QR costs about three times a projection.
      dtype: of a stored basis.

    >>> Random(rank=4, kind="orthonormal").kind
    'orthonormal'
    """

    kind: str = "gaussian"
    stored: bool | None = None
    dtype: DTypeLike = jnp.float32
    reads: ClassVar[frozenset[str]] = frozenset({"key"})

    def __post_init__(self):
        super().__post_init__()
        if self.kind not in KINDS:
            raise ValueError(f"random: kind={self.kind!r} must be one of {KINDS}")
        if self.stored is None:
            object.__setattr__(self, "stored", self.kind == "orthonormal")

    @property
    def orthonormal(self):
        return self.kind != "gaussian"

    @property
    def _store(self) -> StoredProjector:
        return StoredProjector(dtype=jnp.dtype(self.dtype))

    def structure(self):
        return self._store if self.stored else Random(kind=self.kind, stored=False)

    def _draw(self, view, keys):
        s, r = view.shrunk, view.rank
        if self.kind == "structured":
            return structured(keys, s, r)
        gaussian = normal(keys, (s, r))
        if self.kind == "orthonormal":
            return linalg.orthonormalize(gaussian)
        # E P Pᵀ = I
        return gaussian / jnp.sqrt(jnp.float32(r))

    def init(self, view, keys):
        if self.stored:
            return self._store.store(view, self._draw(view, keys)), ()
        # the words of the key stand in the place of the basis
        data = jax.random.key_data(keys)
        spec = None if view.spec is None else (*view.spec[:-2], None)
        return sharding.reshard(data, spec), ()

    def refresh(self, view, basis, memory, inputs):
        return self.init(view, inputs.key)

    def columns(self, view, basis):
        if self.stored:
            return self._store.columns(view, basis)
        return self._draw(view, jax.random.wrap_key_data(basis))

    def basis_bytes(self, view):
        if not self.stored:
            return 8 * count(view)
        return self._store.basis_bytes(view)


random = Random
