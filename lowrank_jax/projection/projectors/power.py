"""Power iteration from the basis so far."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from lowrank_jax import linalg
from lowrank_jax.checks import check_number
from lowrank_jax.projection.projectors.base import StoredProjector, mixed
from lowrank_jax.projection.projectors.random import structured
from lowrank_jax.projection.projectors.svd import singular_vectors


@dataclasses.dataclass(frozen=True, kw_only=True)
class Power(StoredProjector):
    """Block power iteration, warm from the last basis: `P <- qr(B Bᵀ P)`.

    `B` is the gradient, or LDAdam's mix `mix up(m̂) + (1 - mix) G` of the debiased first moment and
    the gradient. Signs follow the warm start, so that moments kept across a refresh stay aligned.

    Args:
      iterations: power steps at a refresh.
      first: the first refresh: "svd" takes singular vectors (LDAdam); "range" iterates from the
        structured random basis that `init` makes, with no SVD anywhere in the program.
      mix: LDAdam's rho, or None to use the gradient alone.
    """

    iterations: int = 1
    first: str = "range"
    mix: float | None = None
    of_range: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        if self.first not in ("svd", "range"):
            raise ValueError(f"power: first={self.first!r} must be 'svd' or 'range'")
        if self.iterations < 1:
            raise ValueError(f"power: iterations={self.iterations} must be at least 1")
        check_number("power: mix", self.mix, at_least=0, otherwise="None for the gradient alone")

    @property
    def reads(self):
        return frozenset({"target"} if self.mix is None else {"target", "momentum"})

    @property
    def starts(self):
        return self.first == "svd"

    @property
    def decomposes(self):
        return self.starts

    @property
    def of_rows(self):
        return self.mix is None  # the first moment, mixed with the gradient, has no such columns

    def init(self, view, keys):
        return self.store(view, structured(keys, view.shrunk, view.rank)), ()

    def start(self, view, inputs):
        if not self.starts:
            return super().start(view, inputs)
        return self.store(view, singular_vectors(view, inputs.target)[0]), ()

    def refresh(self, view, basis, memory, inputs):
        columns, target = self.columns(view, basis), inputs.target
        if self.mix is not None:
            target = mixed(columns, inputs.momentum, target, self.mix)
        for _ in range(self.iterations):
            columns = linalg.power_step(target, columns)
        return self.store(view, columns), memory


power = Power
