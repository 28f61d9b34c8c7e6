"""VeRA: two frozen random matrices for all sites, two trained vectors for each (Kopiczko et al.,
arXiv:2310.11454).

    delta = scale bank_a[:n] diag(lambda_d) bank_b[:, :m] diag(lambda_b)

bank_a (n_max, r) is uniform in ±sqrt(6 / n_max), bank_b (r, m_max) in ±sqrt(6 / r) (kaiming_uniform
with a = 0 of the largest n and m of the group); lambda_d starts at 0.1 and lambda_b at 0, so that
the delta does. As in PEFT, a site takes the first rows of bank_a and the first columns of bank_b,
and there is no alpha.

The banks are data, r (n_max + m_max) numbers once in a group, or regenerated at each use from a key
of two numbers. Stored banks are PEFT's own for the same seed (`projection_prng_key`), so that its
files need not hold them.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax.adapters.base import (
    Adapter,
    Arrays,
    Factors,
    Group,
    Site,
    check_positive,
    check_rate,
)
from lowrank_jax.adapters.positions import torch_uint32
from lowrank_jax.checks import check_number

KEY_IMPLEMENTATION = "threefry2x32"  # part of what a stored key means


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vera(Adapter):
    """VeRA.

    Args:
      rank: r (256: PEFT; the paper takes 256 to 1024).
      initial: what lambda_d starts from (0.1: PEFT; the paper advises at most 0.1).
      seed: of the banks (0: PEFT).
      stored: keep the banks; else make them anew at each use, which costs `r (n + m)` random
        numbers a use.
      dropout: rate, on the input of the low-rank branch.

    Trains `r + m` numbers.

    >>> import jax, jax.numpy as jnp
    >>> import lowrank_jax as lrx
    >>> params = {"q": {"kernel": jnp.ones((8, 6))}, "v": {"kernel": jnp.ones((6, 4))}}
    >>> adaptation = lrx.adapt(params, lrx.adapters.vera(rank=5), jax.random.key(0))
    >>> (
    ...     {name: bank.shape for name, bank in adaptation.frozen["shared"]["vera"].items()},
    ...     adaptation.trained,
    ... )
    ({'bank_a': (8, 5), 'bank_b': (5, 6)}, 20)
    """

    rank: int = 256
    initial: float = 0.1
    seed: int = 0
    stored: bool = True
    dropout: float = 0.0

    optional: ClassVar[tuple[str, ...]] = ("bank_a", "bank_b")  # regenerated, there are none
    ranked: ClassVar[bool] = True
    reads_bank: ClassVar[bool] = True

    def __post_init__(self):
        check_positive("rank", self.rank)
        check_rate(self.dropout)
        check_number("initial", self.initial)
        if self.initial == 0:
            raise ValueError(
                "initial=0 leaves both vectors 0, and every gradient; choose another number, such "
                "as 0.1"
            )

    def axes(self, site):
        del site
        return {
            "lambda_d": ("rank",),
            "lambda_b": ("cols",),
            "bank_a": (None, "rank"),
            "bank_b": ("rank", None),
        }

    def largest_rank(self, site):
        """Each rank is one random matrix with one weight, and n m of them are linearly
        independent."""
        return site.n * site.m

    def init_shared(self, key, group: Group):
        del key
        n, m = group.bank
        rank = max(site.rank for site in group.sites.values())
        # torch has its bounds in float32
        bounds = np.sqrt([6 / n, 6 / rank]).astype(np.float32).astype(np.float64)
        if not self.stored:
            key = jax.random.key(self.seed, impl=KEY_IMPLEMENTATION)
            data = jax.random.key_data(key)
            return {}, {"key": data, "bounds": jnp.asarray(bounds, jnp.float32)}, {}
        # torch's uniform_ keeps 24 of 32 bits and rounds once
        words = torch_uint32(self.seed, rank * (n + m))
        unit = (words & 0xFFFFFF) / 2.0**24
        # vera_A (r, n) is drawn before vera_B (m, r)
        first = rank * n
        parts = unit[:first].reshape(rank, n), unit[first:].reshape(m, rank)
        pairs = zip(bounds, parts, strict=True)
        a, b = ((2 * bound * x - bound).astype(np.float32).T for bound, x in pairs)
        return {}, {"bank_a": jnp.asarray(a), "bank_b": jnp.asarray(b)}, {}

    def init_site(self, key, site, kernel, given):
        del key, kernel, given
        return {
            "lambda_d": jnp.full((site.rank,), self.initial),
            "lambda_b": jnp.zeros((site.m,)),
        }, {}

    def banks(self, site: Site, p: Arrays) -> tuple[jax.Array, jax.Array]:
        """`(n, r)` and `(r, m)`, the part of the banks that a site takes."""
        shared = p["shared"]
        if "key" not in shared:
            return shared["bank_a"][: site.n, : site.rank], shared["bank_b"][: site.rank, : site.m]
        keys = jax.random.split(jax.random.wrap_key_data(shared["key"], impl=KEY_IMPLEMENTATION))

        def rows(number):
            # a key for each of the r rows, so that a site of a smaller rank sees the same numbers
            draw = lambda i: jax.random.uniform(  # noqa: E731
                jax.random.fold_in(keys[number], i), (site.bank[number],), minval=-1.0
            )
            return shared["bounds"][number] * jax.vmap(draw)(jnp.arange(site.rank))

        return rows(0)[:, : site.n].T, rows(1)[:, : site.m]

    def factors(self, site: Site, p: Arrays) -> Factors:
        a, b = self.banks(site, p)
        # one weight for each random direction, one for each output
        scale = p["scale"] * p["lambda_d"]
        return Factors(a, scale, b * p["lambda_b"], np.arange(site.rank))

    def count(self, site):
        return site.rank + site.m


vera = Vera
