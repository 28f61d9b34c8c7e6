"""Starts from the kernel's singular triplets: PiSSA and MiLoRA."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from lowrank_jax import linalg
from lowrank_jax.adapters.starts.base import Init


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pissa(Init):
    """The r largest singular triplets, split evenly: `a0 = U sqrt(S / s)`, `b0 = sqrt(S / s) Vᵀ` of
    `K = U S Vᵀ`.

    Meng et al. 2024 (arXiv:2404.02948); `s a0 b0` is the best rank-r part of K. MiLoRA
    (arXiv:2406.09044) takes the smallest triplets.

    Args:
      iterations: of randomized SVD by subspace iteration; None is an exact SVD. The paper's fast
        variant uses 2 to 16.
      part: "largest" (PiSSA) or "smallest" (MiLoRA, exact only).
    """

    iterations: int | None = None
    part: str = "largest"
    reads_kernel: ClassVar[bool] = True
    offset: ClassVar[bool] = True

    def __post_init__(self):
        if self.part not in ("largest", "smallest"):
            raise ValueError(f"part={self.part!r} must be 'largest' (PiSSA) or 'smallest' (MiLoRA)")
        if self.iterations is not None and self.part == "smallest":
            raise ValueError("part='smallest' needs the exact SVD; leave iterations=None")

    def __call__(self, key, site, kernel, scale):
        if self.iterations is not None:
            u, s, vt = linalg.randomized_svd(
                kernel, site.rank, key, power_iterations=self.iterations
            )
        elif self.part == "largest":
            u, s, vt = linalg.truncated_svd(kernel, site.rank)
        else:
            # the smallest first: of a rank smaller than the stack's `scale` masks the last
            u, s, vt = jnp.linalg.svd(kernel, full_matrices=False)
            u, s, vt = u[:, ::-1][:, : site.rank], s[::-1][: site.rank], vt[::-1][: site.rank]
        root = jnp.sqrt(s / jnp.where(scale > 0, scale, 1.0))
        return u * root, root[:, None] * vt


pissa = Pissa
