"""SHiRA: a few entries of the kernel train, at fixed positions (Bhardwaj et al. 2024,
arXiv:2406.13175).

    K' = K + scale scatter(values at (rows, cols)),   p = r (n + m) positions, as many numbers as
                                                      LoRA of rank r

values = 0 at the start; there is no alpha. Positions are random, as PEFT's default, and data: masks
by magnitude, gradient or structure are other positions in their place. They are sorted through the
torch weight `(m, n)` row by row, as PEFT's are.

The product takes the kernel in at most 8 blocks of rows, so that neither the changed kernel nor its
gradient `xᵀ dy` is ever whole: a block of K' is scattered, multiplied and forgotten, made again in
the backward pass, and of a block of `xᵀ dy` the entries that train are gathered. That is the
arithmetic of training the kernel itself. A sparse product would count `2 T p` operations, but
gathers T numbers for each: on a CPU it was slower than the dense one at a density of 2 %. On
embeddings, convolutions and tied outputs K' is formed whole.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax import sharding
from lowrank_jax.adapters.base import Adapter, Arrays, Op, Site, check_positive
from lowrank_jax.adapters.positions import keyed_positions, torch_permutation

BLOCKS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shira(Adapter):
    """SHiRA.

    Args:
      rank: r of the number of entries `r (n + m)` (32: PEFT). The matrices of one stack have the
        same.
      seed: None draws the positions of each matrix from its key (PEFT's default is random, too). A
        number takes those that PEFT draws with it as `random_seed`, the same for all kernels of one
        shape.

    Trains `r (n + m)` numbers.

    >>> import jax, jax.numpy as jnp
    >>> import lowrank_jax as lrx
    >>> shira, kernel = lrx.adapters.shira(rank=1), jnp.ones((4, 6))
    >>> p = shira.start(jax.random.key(0), kernel) | {"values": jnp.ones(10)}
    >>> float(shira.effective(shira.site(kernel.shape), kernel, p).sum())
    34.0
    """

    rank: int = 32
    seed: int | None = None

    def __post_init__(self):
        check_positive("rank", self.rank)

    def axes(self, site):
        del site
        return {
            "values": (None,),
            "rows": (None,),
            "cols": (None,),
        }

    def largest_rank(self, site):
        """`r (n + m)` different entries."""
        return site.n * site.m // (site.n + site.m)

    def validate(self, site):
        if site.n * site.m >= 2**32:
            raise ValueError(
                f"{site.path!r}: its {site.n} x {site.m} kernel has 2^32 entries or more; leave it "
                "out"
            )

    def init_site(self, key, site, kernel, given):
        del kernel, given
        size, count = site.n * site.m, self.count(site)
        if self.seed is None:
            flat: Any = keyed_positions(key, size, count)
        else:
            flat = np.sort(torch_permutation(size, count, self.seed))
        positions = {"rows": flat % site.n, "cols": flat // site.n}
        return {"values": jnp.zeros(count)}, {
            name: jnp.asarray(x).astype(jnp.int32) for name, x in positions.items()
        }

    def delta(self, site, p):
        return jnp.zeros((site.n, site.m)).at[p["rows"], p["cols"]].add(p["values"] * p["scale"])

    def effective(self, site, kernel, p):
        del site

        def add(kernel, values, rows, cols):
            return kernel.at[rows, cols].add(values.astype(kernel.dtype))

        place = sharding.with_out_sharding(add, sharding.explicit_spec(kernel))
        return place(kernel, p["values"] * p["scale"], p["rows"], p["cols"])

    def remove(self, site, kernel, p):
        return kernel - self.delta(site, p)

    def wrap(self, op: Op, site: Site, p: Arrays, key: jax.Array | None = None) -> Op:
        kernel = lambda: self.effective(site, op.kernel(), p)  # noqa: E731
        if op.input != "features":
            return op.replaced(kernel)

        def product(x):
            matrix = op.kernel()
            place = sharding.with_out_sharding(
                functools.partial(_product, op.contract), sharding.product_spec(x, matrix)
            )
            values = p["values"] * p["scale"]
            return place(*sharding.varying_alike(x, matrix, values, p["rows"], p["cols"]))

        return dataclasses.replace(op, own=product, kernel=kernel, plain=False)

    def count(self, site):
        return self.rank * (site.n + site.m)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(
    contract: Callable, x: jax.Array, kernel: jax.Array, values: jax.Array, rows: Any, cols: Any
) -> jax.Array:
    """`contract(x, K')`, summed over blocks of rows."""
    starts, width = _blocks(kernel.shape[0])

    def add(y, start):
        part = jax.lax.dynamic_slice_in_dim(x, start, width, -1)
        return y + contract(part, _changed(kernel, values, rows, cols, start, width)), None

    dtype = jnp.promote_types(x.dtype, jnp.float32)
    y = jnp.zeros((*x.shape[:-1], kernel.shape[1]), dtype)
    total, _ = sharding.scan(add, y, starts)
    return total


def _blocks(n: int) -> tuple[jax.Array, int]:
    """Where the blocks of rows start, and their width."""
    count = max(count for count in range(1, BLOCKS + 1) if n % count == 0)
    return jnp.arange(0, n, n // count), n // count


def _changed(kernel, values, rows, cols, start, width) -> jax.Array:
    """The rows `start ... start + width` of K'."""
    part = jax.lax.dynamic_slice_in_dim(kernel, start, width)
    inside = _inside(rows, start, width)
    # entries of other blocks are out of bounds, and dropped
    return part.at[inside, cols].add(values.astype(part.dtype), mode="drop")


def _inside(rows, start, width) -> jax.Array:
    """Rows counted from `start`; those of other blocks become `width`, which is out of bounds."""
    own = rows - start
    return jnp.where((own >= 0) & (own < width), own, width)


def _forward(contract, x, kernel, values, rows, cols):
    return _product(contract, x, kernel, values, rows, cols), (x, kernel, values, rows, cols)


def _backward(contract, residuals, dy):
    x, kernel, values, rows, cols = residuals
    starts, width = _blocks(kernel.shape[0])
    wide = jnp.promote_types(x.dtype, jnp.float32)
    # all tokens in one axis
    flat = x.reshape(-1, x.shape[-1])
    dy = dy.reshape(-1, dy.shape[-1]).astype(x.dtype)

    def outer(x):
        # xᵀ dy, summed over tokens
        over_tokens = (((0,), (0,)), ((), ()))
        return jax.lax.dot_general(x, dy, over_tokens, preferred_element_type=wide)

    def block(carry, start):
        dx, dvalues = carry
        # dy K'ᵀ for these rows of K'
        changed = _changed(kernel, values, rows, cols, start, width)
        part = contract(dy, changed.T).astype(x.dtype)
        dx = jax.lax.dynamic_update_slice_in_dim(dx, part, start, 1)
        # of the block of xᵀ dy the entries that train
        own = jax.lax.dynamic_slice_in_dim(flat, start, width, 1)
        gradient = outer(own)
        inside = _inside(rows, start, width)
        found = gradient.at[inside, cols].get(mode="fill", fill_value=0)
        return (dx, dvalues + found.astype(dvalues.dtype)), None

    zeros = jnp.zeros_like(flat), jnp.zeros_like(values)
    (dx, dvalues), _ = jax.lax.scan(block, zeros, starts)
    # the kernel's gradient is dead code unless somebody asks for it
    dkernel = outer(flat).astype(kernel.dtype)
    # rows and columns are no numbers that train
    return dx.reshape(x.shape), dkernel, dvalues, None, None


_product.defvjp(_forward, _backward)
shira = Shira
