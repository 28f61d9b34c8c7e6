"""The best vectors of the DCT."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from lowrank_jax import deprecations, kernels, linalg
from lowrank_jax.checks import is_integer
from lowrank_jax.matrices import ResolvedView
from lowrank_jax.projection.projectors.transform import TransformProjector


@deprecations.options("lrx.projectors.dct")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Dct(TransformProjector):
    """The r best vectors of the orthonormal DCT (DCT-AdamW, Trion).

    Args:
      kind: 3, the columns of the DCT-II matrix (the official code's default path, "dct3"), or 2,
        its rows (its Makhoul path, "dct2"); or a pair, for matrices that shrink their inputs and
        for those that shrink their outputs (`(3, 2)` in the official code of Trion).
      implementation: "xla", or "pallas": a refresh takes its scores from `lrx.kernels.dct_scores`, on a
        TPU where the shrunk dimension is a multiple of 128 from 2048 on, with XLA's scores to
        rounding. Inside `lrx.meshes.use` of several devices each scores its own columns. Where an
        explicit mesh divides a matrix, XLA's product stays. No device has timed it.
    """

    kind: int | tuple[int, int] = 3
    implementation: str = "xla"

    def __post_init__(self):
        super().__post_init__()
        kinds = self.kind if isinstance(self.kind, tuple) else (self.kind, self.kind)
        if len(kinds) != 2 or not all(is_integer(kind) and kind in (2, 3) for kind in kinds):
            raise ValueError(
                f"dct: kind={self.kind!r} must be the number 2 or 3, or a pair of them "
                "(under optax.inject_hyperparams name it in static_args)"
            )
        if self.implementation not in ("xla", "pallas"):
            raise ValueError(
                f"dct: implementation={self.implementation!r} must be 'xla' or 'pallas'"
            )

    def kind_of(self, view: ResolvedView) -> int:
        """The kind of the vectors of a leaf, by its side."""
        if not isinstance(self.kind, tuple):
            return self.kind
        of_inputs, of_outputs = self.kind
        return of_inputs if view.side == "rows" else of_outputs

    def _transform(self, view, x):
        return linalg.dct(x, self.kind_of(view), axis=-2)

    def refresh(self, view, basis, memory, inputs):
        if self.implementation == "xla" or any(view.spec or ()):
            return super().refresh(view, basis, memory, inputs)
        x, axis = inputs.target, -2
        if view.side == "cols":  # a transpose of the leaf, which the kernel reads as the leaf lies
            x, axis = jnp.swapaxes(x, -2, -1), -1
        scores = kernels.dct_scores(x, self.kind_of(view), self.norm, axis)
        return linalg.top_scores(scores, view.rank), memory

    def structure(self):
        return Dct(kind=self.kind)

    def columns(self, view, basis):
        return linalg.dct_columns(basis, view.shrunk, self.kind_of(view))


def dct2(**options: Any) -> Dct:
    """`dct(kind=2)`."""
    return Dct(kind=2, **options)


def dct3(**options: Any) -> Dct:
    """`dct(kind=3)`."""
    return Dct(kind=3, **options)


dct = Dct
