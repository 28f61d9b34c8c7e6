"""Moments in blocks of 8 bits: storage around any inner transformation with registered moments."""

from __future__ import annotations

import dataclasses
import math

import jax

from lowrank_jax import linalg
from lowrank_jax.checks import is_integer
from lowrank_jax.optim.inner.adam import Adam
from lowrank_jax.optim.inner.base import Inner
from lowrank_jax.optim.inner.from_optax import as_inner

CODES = {"first": "signed", "second": "unsigned", "max": "unsigned"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stored8(Inner):
    """An inner transformation whose moments are stored in blocks of 8 bits, and computed in float32
    (8-bit Adam).

    First moments take the signed dynamic code, second and maximal ones the unsigned one; other
    leaves stay.

    Args:
      inner: what is stored, `lrx.inner.adam(...)` or another with registered moments.
      block: entries of a block along the last axis (256: bitsandbytes).
      minimum: moments of fewer entries stay as they are (4096: bitsandbytes).

    >>> import jax.numpy as jnp
    >>> state = Stored8(minimum=1).init(jnp.ones((4, 512)))
    >>> state.mu.codes.dtype.name, state.mu.scales.shape
    ('uint8', (4, 2))
    """

    inner: Inner = dataclasses.field(default_factory=Adam)
    block: int = 256
    minimum: int = 4096

    def __post_init__(self):
        object.__setattr__(self, "inner", as_inner(self.inner))
        if isinstance(self.inner, Stored8):
            raise ValueError("stored8: inner is stored in 8 bits already; wrap it once")
        for name, least in (("block", 1), ("minimum", 0)):
            value = getattr(self, name)
            if not is_integer(value) or value < least:
                raise ValueError(
                    f"stored8: {name}={value!r} must be an integer of at least {least}"
                )

    # what it says of itself is what `inner` says, but that `ok` is selected afterwards
    @property
    def splits(self) -> bool:
        return self.inner.splits

    @property
    def elementwise(self) -> bool:
        return self.inner.elementwise

    @property
    def trees(self) -> bool:
        return self.inner.trees

    @property
    def takes_extra(self) -> bool:
        return self.inner.takes_extra

    @property
    def reads_params(self) -> bool:
        return self.inner.reads_params

    @property
    def decomposes(self) -> bool:
        return self.inner.decomposes

    @property
    def batched(self) -> bool:
        return self.inner.batched

    def init(self, tree, view=None):
        return self.encoded(self.inner.init(tree, view))

    def update(self, grads, state, *, view=None, params=None, **extra):
        before = self.decoded(state)
        options = {"view": view, "params": params} | extra
        direction, scale, after = self.inner.update(grads, before, **options)

        def stored_like(old, new):
            return old.requantize(new) if self.stored(old) else new

        # the codes and blocks of each moment stay those of the old one
        stored = jax.tree.map(stored_like, state, after, is_leaf=self.stored)
        return direction, scale, stored

    def matrix_bytes(self, shape, view):
        low = jax.ShapeDtypeStruct(shape, "float32")
        state = jax.eval_shape(lambda x: self.init(x, view), low)
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))

    def decays(self):
        return self.inner.decays()

    def moments(self, state):
        return self.inner.moments(state)

    def stored(self, node):
        return isinstance(node, linalg.QuantizedBlocks)

    def encoded(self, state):
        """Moments as `linalg.QuantizedBlocks`, each in the code of its kind."""
        kinds = {moment.path: moment.kind for moment in self.moments(state)}

        def one(path, value):
            # of what is no moment there is no code
            code = CODES.get(kinds.get(tuple(path), ""))
            small = math.prod(value.shape[-2:]) < self.minimum
            if code is None or small:
                return value
            return linalg.quantize_blocks(value, code, self.block)

        return jax.tree_util.tree_map_with_path(one, state)

    def decoded(self, state):
        """The state of `inner`."""

        def one(node):
            return node.dequantize() if self.stored(node) else node

        return jax.tree.map(one, state, is_leaf=self.stored)

    def as_adam(self):
        return self.inner.as_adam()
