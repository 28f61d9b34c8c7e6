"""Uni-LoRA: one trained vector for the factors of all sites (Li et al. 2025, arXiv:2506.00799).

    a = (θ / sqrt(c))[ia],   b = (θ / sqrt(c))[ib],   delta = a b

Every entry of every factor reads one of the d entries of θ; c counts the uses of each, so that the
map from θ to all D = Σ r (n + m) entries is an isometry. There is no alpha. θ starts uniform in
±0.02: the delta is small but not 0.

The indices are PEFT's: 0 .. d-1, each repeated D // d times, D % d distinct ones drawn without
replacement, all shuffled, by NumPy's default generator; then cut site after site in the order of
the adaptation, `aᵀ (r, n)` before `bᵀ (m, r)`, row by row. So the order is part of a checkpoint;
the authors' own code draws from an unseeded generator.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax.adapters.base import Adapter, Arrays, Factors, Group, check_positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class UniLora(Adapter):
    """Uni-LoRA.

    Args:
      rank: r (4: PEFT and the authors).
      size: d, the length of θ. 23040 is the authors' for RoBERTa-large; with PEFT's default of 256
        the method hardly learns.
      seed: of the indices (42: PEFT).
      bound: θ starts uniform in ±bound.

    Trains d numbers in all.

    >>> import jax, jax.numpy as jnp
    >>> import lowrank_jax as lrx
    >>> params = {"q": {"kernel": jnp.ones((8, 8))}, "v": {"kernel": jnp.ones((8, 4))}}
    >>> adaptation = lrx.adapt(params, lrx.adapters.uni_lora(rank=2, size=16), jax.random.key(0))
    >>> adaptation.train["shared"]["unilora"]["theta"].shape, adaptation.trained
    ((16,), 16)
    """

    rank: int = 4
    size: int = 23040
    seed: int = 42
    bound: float = 0.02

    ranked: ClassVar[bool] = True

    def __post_init__(self):
        check_positive("rank", self.rank)
        check_positive("size", self.size)
        if not self.bound > 0:
            raise ValueError(
                f"bound={self.bound} must be positive: at 0 both factors and every gradient are 0"
            )

    def axes(self, site):
        del site
        return {
            "ia": ("rows", "rank"),
            "ib": ("rank", "cols"),
        }

    def init_shared(self, key, group: Group):
        total = sum(site.rank * (site.n + site.m) for _, _, site in group.matrices)
        if total < self.size:
            raise ValueError(
                f"size={self.size} exceeds the {total} entries of all factors; choose a smaller "
                "size or more sites"
            )
        indices = draw_indices(self.size, total, self.seed)
        counts = np.bincount(indices, minlength=self.size)
        # what is left out, and the padding of smaller ranks, reads entry 0, which `scale` masks
        parts: dict[str, dict[str, np.ndarray]] = {}
        for path, site in group.sites.items():
            shapes = {"ia": (site.n, site.rank), "ib": (site.rank, site.m)}
            own = shapes.items()
            parts[path] = {name: np.zeros((site.count, *shape), np.int32) for name, shape in own}
        start = 0
        for path, number, site in group.matrices:
            rank = site.rank
            middle, end = start + rank * site.n, start + rank * (site.n + site.m)
            # torch's A (r, n), then its B (m, r), row by row
            ia = indices[start:middle].reshape(rank, site.n).T
            ib = indices[middle:end].reshape(site.m, rank).T
            parts[path]["ia"][number, :, :rank] = ia
            parts[path]["ib"][number, :rank] = ib
            start = end

        # (matrices, ...) -> (batch..., ...)
        frozen: dict[str, Arrays] = {}
        for path, filled in parts.items():
            lead = group.sites[path].lead
            stacks = filled.items()
            frozen[path] = {name: jnp.asarray(x.reshape(*lead, *x.shape[1:])) for name, x in stacks}
        theta = jax.random.uniform(key, (self.size,), minval=-self.bound, maxval=self.bound)
        return {"theta": theta}, {"norm": jnp.asarray(1 / np.sqrt(counts), jnp.float32)}, frozen

    def init_site(self, key, site, kernel, given):
        del key, site, kernel, given
        return {}, {}

    def factors(self, site, p) -> Factors:
        # θ / sqrt(uses), which every entry of both factors reads
        values = p["shared"]["theta"] * p["shared"]["norm"]
        a, b = (
            values.at[p[name]].get(out_sharding=jax.typeof(p[name]).sharding)
            for name in ("ia", "ib")
        )
        return Factors(a, p["scale"], b, np.arange(site.rank))

    def count(self, site):
        return 0

    def shared_count(self, group):
        return self.size


def draw_indices(size: int, total: int, seed: int) -> np.ndarray:
    """The indices of all `total` entries, one site after the other, as PEFT draws them.

    >>> sorted(draw_indices(3, 7, 42).tolist())[:4]
    [0, 0, 0, 1]
    """
    generator = np.random.default_rng(seed)
    indices = np.repeat(np.arange(size), total // size)
    rest = generator.choice(size, size=total % size, replace=False)
    indices = np.concatenate([indices, rest]).astype(np.int32)
    generator.shuffle(indices)
    return indices


uni_lora = UniLora
