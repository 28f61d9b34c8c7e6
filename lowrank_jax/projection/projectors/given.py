"""A basis that the user gives."""

from __future__ import annotations

import dataclasses
import re
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from lowrank_jax.projection.projectors.base import StoredProjector
from lowrank_jax.projection.transports import SameBasis


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Given(StoredProjector):
    """A fixed matrix `(s, r)` or `(batch..., s, r)`, or one by path as `((pattern, matrix), ...)`.

    >>> import numpy as np
    >>> Given(matrix=np.eye(4, 2)).rank_for("w", 4)
    2
    """

    matrix: Any = None
    moves: ClassVar[bool] = False
    orthonormal: ClassVar[bool] = False

    def __post_init__(self):
        if self.matrix is None:
            raise ValueError(
                "given: matrix=None; pass the basis as an array (s, r), or ((pattern, array), ...)"
            )

    def _matrix(self, path: str) -> np.ndarray:
        rules = self.matrix if isinstance(self.matrix, tuple) else ((".*", self.matrix),)
        for pattern, matrix in rules:
            if re.fullmatch(pattern, path):
                return matrix
        raise ValueError(f"given: no pattern matches {path!r}; add ('.*', matrix) as the last rule")

    def rank_for(self, path, shrunk):
        shape = np.shape(self._matrix(path))
        if shape[-2] != shrunk:
            raise ValueError(
                f"given: matrix of shape {shape} cannot shrink dimension {shrunk} of {path!r}"
            )
        return shape[-1]

    def init(self, view, keys):
        matrix = jnp.asarray(self._matrix(view.path), jnp.float32)
        stack = jnp.array(jnp.broadcast_to(matrix, (*view.batch, view.shrunk, view.rank)))
        return self.store(view, stack), ()

    def overlap(self, view, old, new):
        return SameBasis()


given = Given
