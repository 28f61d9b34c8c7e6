"""HiRA: a Hadamard product of the kernel with a low-rank matrix (Huang et al., ICLR 2025).

    K' = K ⊙ (1 + scale a b)

a and b start as LoRA's. The update has rank up to r rank(K); a dense n x m matrix is formed at each
use and again in the backward pass. The paper and PEFT have no alpha; `scale` is 1 but for weights
and padding.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from lowrank_jax.adapters.base import Adapter, check_positive
from lowrank_jax.adapters.starts.drawn import Kaiming


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hira(Adapter):
    """HiRA.

    Args:
      rank: r (32 in PEFT).

    Trains `r (n + m)` numbers.

    >>> import jax, jax.numpy as jnp
    >>> import lowrank_jax as lrx
    >>> hira, kernel = lrx.adapters.hira(rank=2), jnp.ones((4, 6))
    >>> p = hira.start(jax.random.key(0), kernel)
    >>> hira.apply(jnp.ones((3, 4)), kernel, p).shape
    (3, 6)
    """

    rank: int = 32
    ranked: ClassVar[bool] = True

    def __post_init__(self):
        check_positive("rank", self.rank)

    def axes(self, site):
        del site
        return {
            "a": ("rows", "rank"),
            "b": ("rank", "cols"),
        }

    def init_site(self, key, site, kernel, given):
        a, b = Kaiming()(key, site, kernel, given["scale"])
        return {"a": a, "b": b}, {}

    def effective(self, site, kernel, p):
        del site
        # 1 + scale a b, (n, m): what every entry of the kernel is multiplied by
        factor = 1 + (p["a"] * p["scale"]) @ p["b"]
        return kernel * factor

    def remove(self, site, kernel, p):
        factor = 1 + (p["a"] * p["scale"]) @ p["b"]
        # an entry that was multiplied by 0 is lost, and stays 0
        return kernel / jnp.where(factor == 0, 1.0, factor)


hira = Hira
