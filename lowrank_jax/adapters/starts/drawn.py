"""Ordinary starts: factors drawn at random whose product is zero."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from lowrank_jax import linalg
from lowrank_jax.adapters.starts.base import Init


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kaiming(Init):
    """`a` uniform in ±1 / sqrt(n), b = 0: the start of Hu et al.'s code (kaiming_uniform with a =
    sqrt(5)) and of PEFT.

    Of an embedding `a` is 0 and b standard normal, as in both.
    """

    def __call__(self, key, site, kernel, scale):
        if site.lookup:
            return jnp.zeros((site.n, site.rank)), jax.random.normal(key, (site.rank, site.m))
        bound = 1 / math.sqrt(site.n)
        return jax.random.uniform(key, (site.n, site.rank), minval=-bound, maxval=bound), jnp.zeros(
            (site.rank, site.m)
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gaussian(Init):
    """`a` normal with standard deviation 1 / r, b = 0: PEFT's "gaussian". r is the matrix's own
    rank.

    Embeddings start as in `Kaiming`.
    """

    def __call__(self, key, site, kernel, scale):
        if site.lookup:
            return Kaiming()(key, site, kernel, scale)
        own = jnp.maximum(jnp.sum(scale != 0), 1)
        return jax.random.normal(key, (site.n, site.rank)) / own, jnp.zeros((site.rank, site.m))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Orthogonal(Init):
    """Neither factor is 0, their product is: alternate rows of one orthogonal r x r matrix, as
    PEFT's "orthogonal".

    `a = (G_n Q_odd) / 10`, `b = (G_m Q_even)ᵀ / 10` with standard normal `G (., r / 2)`. r must be
    even.
    """

    def validate(self, site):
        if site.rank % 2:
            raise ValueError(f"{site.path!r}: rank={site.rank} must be even for init='orthogonal'")

    def __call__(self, key, site, kernel, scale):
        keys, own = jax.random.split(key, 3), scale != 0
        # of a rank smaller than the stack's a smaller matrix, beside which the padding is the
        # identity
        square = jnp.where(
            own[:, None] & own,
            jax.random.normal(keys[0], (site.rank, site.rank)),
            jnp.eye(site.rank),
        )
        q = linalg.qr_orthonormal(square)
        half = site.rank // 2
        a = jax.random.normal(keys[1], (site.n, half)) @ q[1::2]
        b = jax.random.normal(keys[2], (site.m, half)) @ q[0::2]
        return a / 10, b.T / 10


kaiming = Kaiming


gaussian = Gaussian


orthogonal = Orthogonal
