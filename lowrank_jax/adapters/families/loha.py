"""LoHa: a Hadamard product of two low-rank matrices (FedPara, Hyeon-Woo et al. 2022,
arXiv:2108.06098; LyCORIS).

    delta = s (a1 b1) ⊙ (a2 b2),   a1, a2 (n, r), b1, b2 (r, m),   s = alpha / r

The rank reaches r². a1 is uniform in ±1 / sqrt(n), b1 and b2 in ±1 / sqrt(r), a2 = 0: PEFT's start
(kaiming_uniform with a = sqrt(5) of torch's `w1_b`, `w1_a`, `w2_a`; LyCORIS draws normals). The
dense n x m matrix is formed at each use and again in the backward pass. `hira` multiplies the
kernel instead of a second pair, with half of the numbers.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from lowrank_jax.adapters.base import Adapter, check_positive
from lowrank_jax.checks import check_number


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loha(Adapter):
    """LoHa.

    Args:
      rank: r (8: PEFT).
      alpha: of `s = alpha / r` (8: PEFT).

    Trains `2 r (n + m)` numbers.

    >>> import jax, jax.numpy as jnp
    >>> import lowrank_jax as lrx
    >>> loha, kernel = lrx.adapters.loha(rank=2), jnp.ones((4, 6))
    >>> p = loha.start(jax.random.key(0), kernel)
    >>> loha.apply(jnp.ones((3, 4)), kernel, p).tolist()[0]
    [4.0, 4.0, 4.0, 4.0, 4.0, 4.0]
    """

    rank: int = 8
    alpha: float = 8.0

    ranked: ClassVar[bool] = True

    def __post_init__(self):
        check_positive("rank", self.rank)
        check_number("alpha", self.alpha)

    def axes(self, site):
        del site
        return {
            "a1": ("rows", "rank"),
            "b1": ("rank", "cols"),
            "a2": ("rows", "rank"),
            "b2": ("rank", "cols"),
        }

    def scaling(self, site):
        return self.alpha / site.rank

    def init_site(self, key, site, kernel, given):
        del kernel
        # a matrix's own rank, without its padding
        own = jnp.maximum(jnp.sum(given["scale"] != 0), 1)
        keys = jax.random.split(key, 3)

        def uniform(key, shape, size):
            return jax.random.uniform(key, shape, minval=-1.0) / jnp.sqrt(size)

        return {
            "a1": uniform(keys[0], (site.n, site.rank), site.n),
            "b1": uniform(keys[1], (site.rank, site.m), own),
            "a2": jnp.zeros((site.n, site.rank)),
            "b2": uniform(keys[2], (site.rank, site.m), own),
        }, {}

    def delta(self, site, p):
        del site
        # s (a1 b1) and a2 b2, (n, m) each; ranks that `scale` masks count in neither
        is_own = p["scale"] != 0
        first = (p["a1"] * p["scale"]) @ p["b1"]
        second = (p["a2"] * is_own) @ p["b2"]
        return first * second


loha = Loha
