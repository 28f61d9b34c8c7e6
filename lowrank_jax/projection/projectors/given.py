"""A basis that the user gives."""

from __future__ import annotations

import dataclasses
import re
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax.matrices import ResolvedView
from lowrank_jax.projection.projectors.base import StoredProjector
from lowrank_jax.projection.transports import SameBasis
from lowrank_jax.typing import Pytree, Rank


def matrix_of(field: str, matrices: Pytree, path: str) -> Any:
    """The matrix of a leaf: the one that was given, or of the first pattern that matches the whole
    path."""
    rules = matrices if isinstance(matrices, tuple) else ((".*", matrices),)
    for pattern, matrix in rules:
        if re.fullmatch(pattern, path):
            return matrix
    raise ValueError(f"{field}: no pattern matches {path!r}; add ('.*', matrix) as the last rule")


def stack_of(field: str, matrices: Pytree, view: ResolvedView, rows: int) -> jax.Array:
    """The matrices `(batch..., rows, r)` of a leaf, float32: its own, or one for all of them."""
    given = jnp.asarray(matrix_of(field, matrices, view.path), jnp.float32)
    shape = (*view.batch, rows, view.rank)
    if given.shape not in (shape, shape[-2:]):
        raise ValueError(
            f"{field}: a matrix of shape {given.shape} is not for {view.path!r}; give {shape[-2:]}"
            + (f", or {shape}" if view.batch else "")
        )
    return jnp.array(jnp.broadcast_to(given, shape))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Given(StoredProjector):
    """A fixed matrix `(s, r)` or `(batch..., s, r)`, or one by path as `((pattern, matrix), ...)`.

    >>> import numpy as np
    >>> Given(matrix=np.eye(4, 2)).rank_for("w", 4, 6)
    2
    """

    matrix: Any = None
    rank: Rank = dataclasses.field(default=1.0, init=False, repr=False)  # the matrix says it
    moves: ClassVar[bool] = False
    orthonormal: ClassVar[bool] = False

    def __post_init__(self):
        if self.matrix is None:
            raise ValueError(
                "given: matrix=None; pass the basis as an array (s, r), or ((pattern, array), ...)"
            )

    def rank_for(self, path, shrunk, kept):
        shape = np.shape(matrix_of("given", self.matrix, path))
        if shape[-2] != shrunk:
            raise ValueError(
                f"given: matrix of shape {shape} cannot shrink dimension {shrunk} of {path!r}"
            )
        return shape[-1]

    def init(self, view, keys):
        return self.store(view, stack_of("given", self.matrix, view, view.shrunk)), ()

    def overlap(self, view, old, new):
        return SameBasis()


given = Given
