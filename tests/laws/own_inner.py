"""An inner transformation as a user would write it: its own state, its own storage, the view read."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lowrank_jax.optim.inner import Inner, register_moments


class SplitState(NamedTuple):
    """Momentum as the sum of two bfloat16 arrays; decoded it is one float32 array and None."""

    high: Any
    low: Any


register_moments(SplitState, {"high": "first"})


@dataclasses.dataclass(frozen=True)
class SplitMomentum(Inner):
    """`m <- b1 m + g + decay w`, over the root of the matrix's size; stored in 2 x 16 bits."""

    b1: float = 0.9
    decay: float = 0.01
    reads_params = True

    def init(self, tree, view=None):
        return self.encoded(SplitState(jnp.zeros_like(tree), None))

    def update(self, grads, state, *, view=None, params=None, **extra):
        moment = self.b1 * self.decoded(state).high + grads + self.decay * params
        scale = 1 / math.sqrt(view.fan_in * view.fan_out)
        return moment, scale, self.encoded(SplitState(moment, None))

    def decays(self):
        return {"first": self.b1}

    def decoded(self, state):
        return SplitState(state.high.astype(jnp.float32) + state.low.astype(jnp.float32), None)

    def encoded(self, state):
        # rounding is made explicit: inside a program XLA may keep what a cast would drop
        high = jax.lax.reduce_precision(state.high, exponent_bits=8, mantissa_bits=7)
        return SplitState(high.astype(jnp.bfloat16), (state.high - high).astype(jnp.bfloat16))

    def state_bytes(self, shapes):
        return 4 * sum(math.prod(shape) for shape in shapes)
