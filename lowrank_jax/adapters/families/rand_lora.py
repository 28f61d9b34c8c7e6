"""RandLoRA: a full-rank update out of random low-rank ones that only diagonals mix (Albert et al.,
ICLR 2025, arXiv:2502.00987).

LoRA cannot leave its rank. RandLoRA adds N = ceil(p / r) products of frozen random matrices of rank
r, as many as a matrix whose shorter side is p needs for full rank, and trains how much of each
component is taken (lambda) and of each entry of the shorter side (gamma). With q the longer side,

    delta = s sum_t lambda_t small_t largeᵀ_t      for n <= m, and its transpose's form for n > m
    small_t = bank_a[k] ⊙ gamma[j] (p,)            t = k N + j,  k < r,  j < N
    large_t = bank_b[:q, t // r, t % r] (q,)

bank_a (r, p_max) and bank_b (q_max, N_max, r) are shared by all sites of a group, which take their
first entries. `lambda` (r, N) starts at 0, so that the delta does, and `gamma` (N, p) at
1 / max(N, p).

The paper pairs component k of base j on both sides. Its code and PEFT flatten the two banks in
different orders, k before j and j before k, which is what the indices above say; both are the same
in distribution, and a checkpoint is of one of them: this one. The bases are PEFT's, draw by draw.

The factors have r N, about p, components: as many operations and numbers as another dense layer
for each site, formed again in the backward pass rather than kept.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax.adapters.base import (
    Adapter,
    Arrays,
    Factors,
    Group,
    Op,
    Site,
    check_positive,
    check_rate,
    dropout,
)
from lowrank_jax.adapters.positions import torch_uint32
from lowrank_jax.checks import check_number, is_integer

KEY_IMPLEMENTATION = "threefry2x32"  # part of what a stored key means
BASES = ("uniform", "sparse", "very_sparse")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandLora(Adapter):
    """RandLoRA.

    Args:
      rank: r of one base (32: PEFT). A smaller one trains more numbers. It is no rank of the delta,
        so the matrices of one stack have the same, and `padded` leaves it.
      alpha: of s (640: PEFT, 20 r; the paper's code takes 2 r, with `basis_normalized`).
      basis_normalized: `s = alpha / (r sqrt(N))`, as the paper's code; else `alpha / r`, as PEFT.
      bases: "uniform"; "sparse", entries -1, 0, 1 with probabilities 1/6, 2/3, 1/6; "very_sparse",
        -1 and 1 with probability 1 / (2 sqrt(p_max)) each, as PEFT's code (its documentation says
        twice that). All are divided by their standard deviation.
      seed: of the bases (0: PEFT).
      stored: keep the bases, `r p_max + q_max r N_max` numbers once in a group; else make them anew
        at each use, from a key of two numbers: not those of PEFT then, and "uniform" alone.
      dropout: rate, on the input of the branch.

    Trains `r N + N p` numbers.

    >>> import jax, jax.numpy as jnp
    >>> import lowrank_jax as lrx
    >>> params = {"q": {"kernel": jnp.ones((64, 96))}, "v": {"kernel": jnp.ones((96, 64))}}
    >>> adaptation = lrx.adapt(params, lrx.adapters.rand_lora(rank=16), jax.random.key(0))
    >>> {name: leaf.shape for name, leaf in adaptation.train["sites"]["q/kernel"].items()}
    {'lambda': (16, 4), 'gamma': (4, 64)}
    >>> adaptation.trained
    640
    """

    rank: int = 32
    alpha: float = 640.0
    basis_normalized: bool = False
    bases: str = "uniform"
    seed: int = 0
    stored: bool = True
    dropout: float = 0.0

    reads_bank: ClassVar[bool] = True
    in_arrays: ClassVar[tuple[str, ...]] = ("alpha", "basis_normalized", "bases", "seed")

    def __post_init__(self):
        check_positive("rank", self.rank)
        check_number("alpha", self.alpha)
        check_rate(self.dropout)
        if self.bases not in BASES:
            raise ValueError(f"bases={self.bases!r} must be one of {BASES}")
        if not is_integer(self.seed) or not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed!r} must be an integer from 0 to 2^32 - 1")
        if self.bases != "uniform" and not self.stored:
            raise ValueError(
                f"bases={self.bases!r} are drawn once; set stored=True, or bases='uniform'"
            )

    def axes(self, site):
        shorter = "rows" if site.n <= site.m else "cols"
        return {"lambda": (None, None), "gamma": (None, shorter)}

    def scaling(self, site):
        scale = self.alpha / self.rank
        return scale / math.sqrt(self.count_bases(site)) if self.basis_normalized else scale

    def count_bases(self, site: Site) -> int:
        """N, how many bases of rank r span the shorter side."""
        return -(-min(site.n, site.m) // self.rank)

    def init_shared(self, key, group: Group):
        del key
        if not self.stored:
            seed = jax.random.key(self.seed, impl=KEY_IMPLEMENTATION)
            return {}, {"key": jax.random.key_data(seed)}, {}
        ranks = [site.rank for _, _, site in group.matrices] or [self.rank]
        shorter, longer = sorted(group.bank)
        # of several ranks the largest, and as many bases as the smallest needs
        shape = (max(ranks), -(-shorter // min(ranks)), shorter, longer)
        bank_a, bank_b = torch_banks(self.bases, self.seed, *shape)
        return {}, {"bank_a": jnp.asarray(bank_a), "bank_b": jnp.asarray(bank_b)}, {}

    def init_site(self, key, site, kernel, given):
        del key, kernel, given
        count, shorter = self.count_bases(site), min(site.n, site.m)
        gamma = jnp.full((count, shorter), 1 / max(count, shorter))
        return {"lambda": jnp.zeros((self.rank, count)), "gamma": gamma}, {}

    def banks(self, site: Site, p: Arrays) -> tuple[jax.Array, jax.Array]:
        """`(r, p)` and `(q, N, r)`, the part of the bases that a site takes."""
        shared, count = p["shared"], self.count_bases(site)
        shorter, longer = sorted((site.n, site.m))
        if "key" not in shared:
            bank_a, bank_b = shared["bank_a"], shared["bank_b"]
            return bank_a[: self.rank, :shorter], bank_b[:longer, :count, : self.rank]
        key = jax.random.wrap_key_data(shared["key"], impl=KEY_IMPLEMENTATION)
        key_a, key_b = jax.random.split(key)
        shorter_max, longer_max = sorted(site.bank)

        bank_a = _vectors(key_a, jnp.arange(self.rank), shorter_max)
        # base j, component k has the number j 2^16 + k
        numbers = (jnp.arange(count)[:, None] << 16) + jnp.arange(self.rank)
        bank_b = _vectors(key_b, numbers.reshape(-1), longer_max)
        # (N r, q) -> (q, N, r)
        bank_b = bank_b[:, :longer].T.reshape(longer, count, self.rank)
        return bank_a[:, :shorter], bank_b

    def factors(self, site: Site, p: Arrays) -> Factors:
        bank_a, bank_b = self.banks(site, p)
        components = self.rank * self.count_bases(site)
        # (r, 1, p) ⊙ (1, N, p): component t = k N + j
        small = (bank_a[:, None, :] * p["gamma"][None]).reshape(components, -1)
        # (q, N, r): component t = j r + k
        large = bank_b.reshape(-1, components)
        scale = p["scale"] * p["lambda"].reshape(components)
        if site.n <= site.m:
            return Factors(small.T, scale, large.T, None)
        return Factors(large, scale, small, None)

    def wrap(self, op: Op, site: Site, p: Arrays, key: jax.Array | None = None) -> Op:
        @jax.checkpoint  # the factors are as large as the kernel
        def thin(x, p):
            return op.thin(x, self.checked_factors(site, p))

        return op.plus(
            lambda x: thin(dropout(x, self.dropout, key), p), lambda: self.delta(site, p)
        )

    def count(self, site):
        count = self.count_bases(site)
        return count * (self.rank + min(site.n, site.m))


def _vectors(key: jax.Array, numbers: jax.Array, size: int) -> jax.Array:
    """`(vectors, size)` of variance 1, uniform, a key of its own for each number: smaller sites see
    the same ones."""
    own = jax.vmap(lambda number: jax.random.fold_in(key, number))(numbers)
    bound = math.sqrt(3.0)

    def draw(key):
        return jax.random.uniform(key, (size,), minval=-bound, maxval=bound)

    return jax.vmap(draw)(own)


def torch_banks(
    bases: str, seed: int, rank: int, count: int, shorter: int, longer: int
) -> tuple[np.ndarray, np.ndarray]:
    """The bases that PEFT draws by a seed, float32: `bank_a (r, p)` and `bank_b (q, N, r)`.

    One generator draws bank_a, then bank_b: base after base where they are uniform (in bfloat16,
    which PEFT takes where the machine has it, as all CPUs do), in the order of the array where they
    are sparse.

    >>> bank_a, bank_b = torch_banks("uniform", 0, rank=2, count=3, shorter=6, longer=8)
    >>> bank_a.shape, bank_b.shape
    ((2, 6), (8, 3, 2))
    """
    first = rank * shorter  # bank_a's part of the draws
    draws = torch_uint32(seed, first + longer * count * rank)
    if bases == "uniform":
        bank_a = _uniform_bfloat16(draws[:first], 1 / math.sqrt(shorter))
        bank_b = _uniform_bfloat16(draws[first:], 1 / math.sqrt(rank))
        # (N, q, r) as drawn, (q, N, r) as stored
        bank_b = np.moveaxis(bank_b.reshape(count, longer, rank), 0, 1)
        dtype = jnp.dtype(jnp.bfloat16)
    else:
        share = 1 / 6 if bases == "sparse" else 1 / (2 * math.sqrt(shorter))
        # torch.rand in float32 keeps 24 of 32 bits
        unit = ((draws & 0xFFFFFF) / 2.0**24).astype(np.float32)
        # -1, 0 and 1 by where a number falls
        low, high = np.float32(share), np.float32(1 - share)
        signs = (unit > high).astype(np.float32) - (unit < low).astype(np.float32)
        bank_a, bank_b = signs[:first], signs[first:]
        bank_b = bank_b.reshape(longer, count, rank)
        dtype = np.dtype(np.float32)
    bank_a = _standardized(bank_a.reshape(rank, shorter), dtype)
    return bank_a, _standardized(bank_b, dtype)


def _uniform_bfloat16(draws: np.ndarray, bound: float) -> np.ndarray:
    """torch's `uniform_(-bound, bound)` of a bfloat16 tensor: 24 of 32 bits, rounded at the end.

    What is rounded up to the excluded bound becomes the other one.
    """
    bfloat16 = jnp.dtype(jnp.bfloat16)
    limit = np.float32(bound)
    unit = ((draws & 0xFFFFFF) / 2.0**24).astype(np.float32)
    values = (unit * (2 * limit) - limit).astype(bfloat16)
    return np.where(values >= limit.astype(bfloat16), -limit.astype(bfloat16), values)


def _standardized(bank: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """A bank over its standard deviation, both in `dtype` as torch rounds them, then float32."""
    deviation = np.std(bank.astype(np.float64), ddof=1).astype(dtype)
    quotient = bank.astype(np.float32) / deviation.astype(np.float32)
    return quotient.astype(dtype).astype(np.float32)


rand_lora = RandLora
