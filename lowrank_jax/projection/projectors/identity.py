"""No subspace: the whole gradient."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from lowrank_jax.projection.projectors.base import Projector
from lowrank_jax.projection.transports import SameBasis
from lowrank_jax.typing import Rank


@dataclasses.dataclass(frozen=True, kw_only=True)
class Identity(Projector):
    """`P = I`: the low-rank object is the gradient itself, and the projection optimizer is its
    inner one."""

    rank: Rank = dataclasses.field(default=1.0, init=False, repr=False)  # all of it
    moves: ClassVar[bool] = False

    def rank_for(self, path, shrunk, kept):
        return shrunk

    def structure(self):
        return Identity()

    def init(self, view, keys):
        return (), ()

    def thin(self, view, basis, x, axis):
        return x

    def down(self, view, basis, x):
        return x.astype(jnp.float32)

    def up(self, view, basis, low):
        return low

    def rest(self, view, basis, target, low):
        return jnp.zeros_like(target)

    def rounding(self, view, target):
        return jnp.zeros((), jnp.float32)

    def overlap(self, view, old, new):
        return SameBasis()

    def low_spec(self, view):
        return view.spec

    def basis_bytes(self, view):
        return 0


identity = Identity
