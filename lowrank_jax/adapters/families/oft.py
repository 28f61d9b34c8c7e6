"""OFT: an orthogonal map of the inputs, block by block (Qiu et al. 2023, arXiv:2306.07280).

    y = (x R) K,   R = blockdiag(R_1, ..., R_{n/β}),   R_i of a skew-symmetric Q_i (β x β)

Exact: the Cayley transform `R = (I - Q)(I + Q)^-1`. PEFT's default is a Neumann series of five
terms, `I + 2 Q + 2 Q² + 2 Q³ + Q⁴`, which approximates `(I + Q)(I - Q)^-1`: the transpose of the
exact map. A checkpoint belongs to one of the two, so `cayley` is part of it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax import linalg, sharding
from lowrank_jax.adapters.base import Adapter, Arrays, Op, Site, check_positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class Oft(Adapter):
    """OFT.

    Args:
      block: β; it must divide the input dimension n (32: PEFT).
      cayley: "exact", or "neumann", PEFT's five-term series, which is not quite orthogonal.

    Trains `n (β - 1) / 2` numbers: of each block the upper triangle, row by row. `scale` multiplies
    Q, so a weight of 0 is the identity.

    >>> import jax, jax.numpy as jnp
    >>> import lowrank_jax as lrx
    >>> oft = lrx.adapters.oft(block=4)
    >>> oft.start(jax.random.key(0), jnp.ones((8, 6)))["skew"].shape
    (2, 6)
    """

    whole_matrix: ClassVar[bool] = True

    block: int = 32
    cayley: str = "exact"

    def __post_init__(self):
        check_positive("block", self.block)
        if self.block < 2:
            raise ValueError(
                f"block={self.block} must be at least 2: a block of one input has nothing to rotate"
            )
        if self.cayley not in ("exact", "neumann"):
            raise ValueError(f"cayley={self.cayley!r} must be 'exact' or 'neumann'")

    def axes(self, site):
        del site
        return {"skew": ("rows", None)}

    def validate(self, site):
        if site.n % self.block:
            raise ValueError(
                f"{site.path!r}: block={self.block} does not divide its {site.n} inputs; choose a "
                "divisor"
            )

    def init_site(self, key, site, kernel, given):
        del key, kernel, given
        return {"skew": jnp.zeros((site.n // self.block, self.block * (self.block - 1) // 2))}, {}

    def rotation(self, p: Arrays) -> jax.Array:
        """`R (n / β, β, β)`, float32; `x R` rotates the inputs of each block."""
        rows, cols = np.triu_indices(self.block, 1)
        blocks = p["skew"].shape[0]
        # the upper triangle of each block, (n / β, β, β), and minus it below: Q is skew
        upper = jnp.zeros((blocks, self.block, self.block))
        upper = upper.at[:, rows, cols].set(p["skew"] * p["scale"])
        q = upper - jnp.swapaxes(upper, 1, 2)
        if self.cayley == "exact":
            return linalg.cayley(q)
        # five terms of the Neumann series of (I + Q)(I - Q)^-1
        square = q @ q
        return jnp.eye(self.block) + 2 * q + 2 * square + 2 * square @ q + square @ square

    def effective(self, site, kernel, p):
        return self._by_blocks(functools.partial(jnp.einsum, "gij,gjm->gim"), kernel, p)

    def remove(self, site, kernel, p):
        return self._by_blocks(linalg.solve, kernel, p)

    def _by_blocks(self, function: Callable, kernel: jax.Array, p: Arrays) -> jax.Array:
        """`function(R, blocks of rows)`, which is placed as the kernel is."""

        def turned(kernel, skew, scale):
            blocks = kernel.reshape(-1, self.block, kernel.shape[-1])
            return function(self.rotation({"skew": skew, "scale": scale}), blocks).reshape(
                kernel.shape
            )

        return sharding.with_out_sharding(turned, sharding.explicit_spec(kernel))(
            kernel, p["skew"], p["scale"]
        )

    def wrap(self, op: Op, site: Site, p: Arrays, key: jax.Array | None = None) -> Op:
        kernel = lambda: self.effective(site, op.kernel(), p)  # noqa: E731
        if op.input != "features":
            return op.replaced(kernel)

        def turned(x, skew, scale):
            rotation = self.rotation({"skew": skew, "scale": scale}).astype(x.dtype)
            parts = x.reshape(*x.shape[:-1], -1, self.block)
            return jnp.einsum("...gi,gij->...gj", parts, rotation).reshape(x.shape)

        def rotated(x):
            place = sharding.with_out_sharding(turned, sharding.explicit_spec(x))
            return place(x, p["skew"], p["scale"])

        # adapters before this one see the rotated input
        inner_aux = op.aux
        aux = None if inner_aux is None else lambda x: inner_aux(rotated(x))
        return dataclasses.replace(
            op, own=lambda x: op(rotated(x)), kernel=kernel, plain=False, aux=aux
        )


oft = Oft
