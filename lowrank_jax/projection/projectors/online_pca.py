"""A basis that an optimizer of its own moves towards the principal components of the gradient."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lowrank_jax import sharding
from lowrank_jax.checks import check_integer, check_number
from lowrank_jax.matrices import ResolvedView
from lowrank_jax.optim import inner
from lowrank_jax.projection.batches import count
from lowrank_jax.projection.projectors.base import StoredProjector
from lowrank_jax.projection.projectors.random import structured
from lowrank_jax.projection.projectors.svd import singular_vectors
from lowrank_jax.typing import Pytree, Scalar

_OPTIMIZERS = {"adamw": inner.Adam(), "sgd": inner.from_optax(optax.identity())}


def pca_gradient(target: jax.Array, columns: jax.Array) -> jax.Array:
    """The gradient `(..., s, r)` of `|P Pᵀ Ĝ - Ĝ|²` with `Ĝ = G / |G|`, by P.

    With `X = Ĝ Ĝᵀ P` it is `2 (P PᵀX + X PᵀP - 2 X)`; of a gradient of zeros it is zero.
    """
    # |G|², by which G Gᵀ P becomes X, (..., s, r)
    energy = jnp.sum(jnp.square(target), axis=(-2, -1), keepdims=True)
    low = jnp.einsum("...sr,...sk->...rk", columns, target)
    unscaled = jnp.einsum("...sk,...rk->...sr", target, low)
    x = unscaled / jnp.where(energy > 0, energy, 1)
    # PᵀX and PᵀP, (..., r, r)
    seen = jnp.einsum("...sr,...sq->...rq", columns, x)
    gram = jnp.einsum("...sr,...sq->...rq", columns, columns)
    return 2 * (columns @ seen + x @ gram - 2 * x)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnlinePca(StoredProjector):
    """One optimizer step a refresh on `|P Pᵀ Ĝ - Ĝ|²`, `Ĝ = G / |G|` (Online Subspace Descent).

    `P <- (1 - lr wd) P - lr step`, `lr = (rate / peak_rate) / period` with the learning rate of the
    step. P is not orthonormalised again. Memory: the state of the basis optimizer, for "adamw" two
    moments `(s, r)` and a count of its own.

    Args:
      optimizer: "adamw", "sgd", or any optax transformation or `lrx.inner`, whose step is
        multiplied by lr.
      period: T, in steps.
      peak_rate: the learning rate at which lr is 1 / period; None for a constant lr.
      weight_decay: of the basis; None for .01 with "adamw" (torch's default) and 0 otherwise.
      first: "svd" for the singular vectors of the first gradient, before the first update; "random"
        for structured random ones, with no SVD in the program.
    """

    optimizer: Any = "adamw"
    period: Scalar = 200
    peak_rate: Scalar | None = None
    weight_decay: Scalar | None = None
    first: str = "svd"
    orthonormal = False
    of_rows = True  # the step depends on G Gᵀ alone

    def __post_init__(self):
        super().__post_init__()
        if self.first not in ("svd", "random"):
            raise ValueError(f"online_pca: first={self.first!r} must be 'svd' or 'random'")
        if isinstance(self.optimizer, str) and self.optimizer not in _OPTIMIZERS:
            raise ValueError(
                f"online_pca: optimizer={self.optimizer!r} must be one of {tuple(_OPTIMIZERS)}, or "
                "an optax transformation"
            )
        check_integer("online_pca: period", self.period, at_least=1)
        check_number("online_pca: peak_rate", self.peak_rate, above=0, otherwise="None for 1 / T")
        check_number(
            "online_pca: weight_decay", self.weight_decay, at_least=0, otherwise="None for its own"
        )

    @property
    def reads(self):
        return frozenset({"target"} if self.peak_rate is None else {"target", "learning_rate"})

    @property
    def starts(self):
        return self.first == "svd"

    @property
    def starts_before(self):
        return self.starts

    @property
    def decomposes(self):
        return self.starts or self._inner.decomposes

    @property
    def of_range(self):
        return self.starts

    @property
    def _inner(self) -> inner.Inner:
        is_named = isinstance(self.optimizer, str)
        optimizer = _OPTIMIZERS[self.optimizer] if is_named else self.optimizer
        return inner.as_inner(optimizer)

    @property
    def _decay(self) -> Scalar:
        own = 0.01 if self.optimizer == "adamw" else 0.0
        return own if self.weight_decay is None else self.weight_decay

    def _fresh(self, view: ResolvedView) -> Pytree:
        """The memory before the first step of the basis."""
        shape = (*view.batch, view.shrunk, view.rank)
        zeros = sharding.zeros(shape, jnp.float32, sharding.unsharded_spec(view.spec))
        return self._inner.init_stack(zeros, view)

    def init(self, view, keys):
        return self.store(view, structured(keys, view.shrunk, view.rank)), self._fresh(view)

    def start(self, view, inputs):
        if not self.starts:
            return super().start(view, inputs)
        left, _ = singular_vectors(view, inputs.target)
        return self.store(view, left), self._fresh(view)

    def refresh(self, view, basis, memory, inputs):
        columns = self.columns(view, basis)
        gradient = pca_gradient(inputs.target, columns)
        params = columns if self._inner.reads_params else None
        direction, scale, memory = self._inner.update_stack(gradient, memory, view, params)
        # lr = (rate / peak_rate) / period
        rate = 1 / jnp.asarray(self.period, jnp.float32)
        if self.peak_rate is not None:
            rate = rate * inputs.learning_rate / self.peak_rate
        step = jnp.asarray(scale)[..., None, None] * direction
        # P <- (1 - lr wd) P - lr step
        moved = (1 - rate * self._decay) * columns - rate * step
        return self.store(view, moved), memory

    def memory_bytes(self, view):
        return count(view) * self._inner.state_bytes([(view.shrunk, view.rank)])


online_pca = OnlinePca
