"""MiSS, and Bone: one small matrix in place of two factors (Kang et al. 2024, arXiv:2409.15371).

With r rows of the kernel a shard, and i mod r the place of input i in its shard:

    "miss":  K'[i] = K[i] + D[i mod r],            D (r, m):       y = x K + (sum over shards of x) D
    "mini":  the same with D = [D₀, D₀, ...],      D₀ (r, mini_rank)
    "bat":   K'_ij = K_ij + E_j K_ij + E_j,        E_j = block_jᵀ (r, r), for the r x r blocks i, j of the kernel (Bone)

All start at 0, and nothing is scaled. The product of "miss" and "mini" adds the shards of x, n
additions, then costs one thin product; the backward pass keeps r numbers of a token, not n. A last
short shard is padded with zeros. On embeddings, convolutions and tied outputs the first factor is
the matrix of ones at `(i, i mod r)`. "bat" forms the kernel at each use and again in the backward
pass.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from lowrank_jax.adapters.base import (
    Adapter,
    Arrays,
    Factors,
    Op,
    Site,
    check_positive,
    check_rate,
    dropout,
    product,
)

MODES = ("miss", "mini", "bat")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Miss(Adapter):
    """MiSS.

    Args:
      rank: r, the size of a shard (64: PEFT). The matrices of one stack have the same.
      mode: "miss" (PEFT's default), "mini" or "bat" (Bone), which takes shapes that r divides.
      mini_rank: of "mini", the width of D₀; it divides m.
      dropout: rate, on the input of the branch; not with "bat", which has none.

    Trains `r m` numbers; "mini" `r mini_rank`.

    >>> import jax, jax.numpy as jnp
    >>> import lowrank_jax as lrx
    >>> miss, kernel = lrx.adapters.miss(rank=2), jnp.zeros((5, 3))
    >>> p = miss.start(jax.random.key(0), kernel) | {
    ...     "block": jnp.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    ... }
    >>> miss.effective(miss.site(kernel.shape), kernel, p).tolist()
    [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [1.0, 2.0, 3.0]]
    """

    whole_matrix: ClassVar[bool] = True

    rank: int = 64
    mode: str = "miss"
    mini_rank: int | None = None
    dropout: float = 0.0

    def __post_init__(self):
        check_positive("rank", self.rank)
        check_rate(self.dropout)
        if self.mode not in MODES:
            raise ValueError(f"mode={self.mode!r} must be one of {MODES}")
        if (self.mini_rank is not None) != (self.mode == "mini"):
            raise ValueError(
                f"mini_rank={self.mini_rank} belongs to mode='mini', and only there; "
                f"mode={self.mode!r}"
            )
        if self.mini_rank is not None:
            check_positive("mini_rank", self.mini_rank)
        if self.mode == "bat" and self.dropout:
            raise ValueError(
                f"dropout={self.dropout}: mode='bat' has no branch of its own; leave it 0"
            )

    def axes(self, site):
        del site
        return {
            "block": {"miss": (None, "cols"), "mini": (None, None), "bat": ("cols", None, None)}[
                self.mode
            ]
        }

    def validate(self, site):
        if self.mode == "bat" and (site.n % self.rank or site.m % self.rank):
            raise ValueError(
                f"{site.path!r}: rank={self.rank} does not divide its {site.n} x {site.m} kernel "
                "into square blocks; choose a common divisor, or mode='miss'"
            )
        if self.mini_rank is not None and site.m % self.mini_rank:
            raise ValueError(
                f"{site.path!r}: mini_rank={self.mini_rank} does not divide its {site.m} outputs"
            )

    def largest_rank(self, site):
        """A shard has at most all rows."""
        return site.n

    def block_shape(self, site: Site) -> tuple[int, ...]:
        """The shape of what trains."""
        r = self.rank
        return {"miss": (r, site.m), "mini": (r, self.mini_rank or 0), "bat": (site.m // r, r, r)}[
            self.mode
        ]

    def init_site(self, key, site, kernel, given):
        del key, kernel, given
        return {"block": jnp.zeros(self.block_shape(site))}, {}

    def factors(self, site: Site, p: Arrays) -> Factors | None:
        if self.mode == "bat":
            return None
        ones = jax.nn.one_hot(jnp.arange(site.n) % self.rank, self.rank)
        return Factors(
            ones, jnp.broadcast_to(p["scale"], (self.rank,)), self._tiled(p["block"], site), None
        )

    def _tiled(self, block: jax.Array, site: Site) -> jax.Array:
        """Along the outputs, as often as "mini" wants."""
        return block if self.mini_rank is None else jnp.tile(block, site.m // self.mini_rank)

    def delta(self, site, p):
        if self.mode == "bat":
            return super().delta(site, p)
        # row i is row i mod r of the block
        block = p["scale"] * self._tiled(p["block"], site)
        shards = -(-site.n // self.rank)
        return jnp.tile(block, (shards, 1))[: site.n]

    def effective(self, site, kernel, p):
        if self.mode != "bat":
            return kernel + self.delta(site, p)
        # K_ij (i, row, j, column) and block_j = E_jᵀ
        blocks, e = self._blocks(kernel), p["scale"] * p["block"]
        # E_j K_ij + E_j
        rotated = jnp.einsum("jba,ibjc->iajc", e, blocks)
        change = rotated + jnp.moveaxis(e, 2, 0)
        return kernel + change.reshape(kernel.shape)

    def remove(self, site, kernel, p):
        if self.mode != "bat":
            return kernel - self.delta(site, p)
        # K_ij = (I + E_j)^-1 (K'_ij - E_j)
        e = p["scale"] * p["block"]
        rest = self._blocks(kernel) - jnp.moveaxis(e, 2, 0)
        # one system for each j, (j, i, row, column)
        rest = jnp.transpose(rest, (2, 0, 1, 3))
        mixing = jnp.eye(self.rank) + jnp.swapaxes(e, 1, 2)
        blocks = jnp.linalg.solve(mixing[:, None], rest)
        return jnp.transpose(blocks, (1, 2, 0, 3)).reshape(kernel.shape)

    def _blocks(self, kernel: jax.Array) -> jax.Array:
        """`(i, row, j, column)` of the r x r blocks i, j."""
        n, m = kernel.shape
        return kernel.reshape(n // self.rank, self.rank, m // self.rank, self.rank)

    def wrap(self, op: Op, site: Site, p: Arrays, key: jax.Array | None = None) -> Op:
        if self.mode == "bat" or op.input != "features":
            return super().wrap(op, site, p, key)

        def forward(x):
            x = dropout(x, self.dropout, key)
            # (..., shards, r), the last one filled with zeros
            padding = [(0, 0)] * (x.ndim - 1) + [(0, -site.n % self.rank)]
            padded = jnp.pad(x, padding)
            shards = padded.reshape(*x.shape[:-1], -1, self.rank)
            # the sum over shards (..., r) is all that the backward pass keeps
            wide = jnp.promote_types(x.dtype, jnp.float32)
            low = jnp.sum(shards, -2, dtype=wide) * p["scale"]
            y = product(low.astype(x.dtype), p["block"])
            return self._tiled(y, site)

        return op.plus(forward, lambda: self.delta(site, p))


miss = Miss
