"""The best vectors of a fixed orthonormal transform: r indices, from which they are regenerated at every use."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from lowrank_jax import linalg
from lowrank_jax.projection.projectors.base import BasisProjector, IndexProjector


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformProjector(IndexProjector, BasisProjector):
    """The r vectors of an orthonormal transform on which the gradient is largest.

    Args:
      norm: the score of a transformed row, "l1" (DCT-AdamW's default) or "l2" (which minimises the
        projection error).
    """

    norm: str = "l1"
    reads: ClassVar[frozenset[str]] = frozenset({"target"})
    of_rows: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        if self.norm not in ("l1", "l2"):
            raise ValueError(f"{type(self).__name__}: norm={self.norm!r} must be 'l1' or 'l2'")

    def _transform(self, view, x):
        raise TypeError(f"{type(self).__name__} does not implement _transform")

    def refresh(self, view, basis, memory, inputs):
        return linalg.top_rows(self._transform(view, inputs.target), view.rank, self.norm), memory
