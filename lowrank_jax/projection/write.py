"""How the forms that own the parameters write them: in float32, decayed, and rounded once."""

from __future__ import annotations

import dataclasses
import zlib
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_jax import linalg
from lowrank_jax.optim.guard import select
from lowrank_jax.optim.learning_rate import at_step, decayed_step
from lowrank_jax.projection.optimizers.recipe import Recipe
from lowrank_jax.trees import dequantized, is_quantized
from lowrank_jax.typing import Kernel, Scalar


@dataclasses.dataclass(frozen=True)
class Write:
    """`param <- param + change`, in float32 and rounded once."""

    rounding: str
    rate: Scalar
    weight_decay: Scalar
    decay: str
    accepted: Any
    key: jax.Array
    path: str

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        rounding: str,
        rate: Scalar,
        decays: bool,
        accepted: Any,
        step: Scalar,
        path: str,
    ) -> Write:
        """The writer of one leaf; its random numbers follow from the seed, the step and the
        path."""
        key = jax.random.fold_in(
            jax.random.key(jnp.asarray(recipe.projection.seed, jnp.int32)), step
        )
        key = jax.random.fold_in(key, zlib.crc32(path.encode()))
        weight_decay = at_step(recipe.weight_decay, step) if decays else 0
        return cls(rounding, rate, weight_decay, recipe.decay, accepted, key, path)

    def __call__(self, param: Kernel, update: jax.Array, layer: Any) -> Any:
        old = dequantized(param).astype(jnp.float32)
        value = old + decayed_step(
            update, old, self.rate, self.weight_decay, self.decay, self.accepted
        )
        key = jax.random.fold_in(self.key, layer) if self.rounding == "stochastic" else None
        if is_quantized(param) and param.writable:
            if key is not None and not param.rounds_stochastically:
                kind = type(param).__name__ + (
                    f"(code={param.code!r})" if hasattr(param, "code") else ""
                )
                raise ValueError(
                    f"leaf {self.path!r}: rounding='stochastic' cannot write {kind}, which rounds "
                    "to the nearest value alone; give rounding='nearest', or store the leaf by "
                    "lrx.linalg.quantize_blocks(w, code='linear')"
                )
            return select(self.accepted, param.requantize(value, key), param)
        if key is None or param.dtype == jnp.float32:
            return value.astype(param.dtype)
        return linalg.stochastic_round(value, param.dtype, key)
