"""The best vectors of the Hadamard transform."""

from __future__ import annotations

import dataclasses

from lowrank_jax import linalg
from lowrank_jax.projection.projectors.transform import TransformProjector


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hadamard(TransformProjector):
    """The r best vectors of the Sylvester-Hadamard basis; the shrunk dimension must be a power of
    two."""

    def rank_for(self, path, shrunk, kept):
        if shrunk & (shrunk - 1):
            raise ValueError(
                f"hadamard: the shrunk dimension {shrunk} of {path!r} is not a power of two; use "
                "dct"
            )
        return super().rank_for(path, shrunk, kept)

    def _transform(self, view, x):
        return linalg.hadamard_transform(x, axis=-2)

    def structure(self):
        return Hadamard()

    def columns(self, view, basis):
        return linalg.hadamard_columns(basis, view.shrunk)


hadamard = Hadamard
