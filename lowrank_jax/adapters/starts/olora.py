"""A start from the kernel's QR factorisation: OLoRA."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from lowrank_jax.adapters.starts.base import Init


@dataclasses.dataclass(frozen=True, kw_only=True)
class Olora(Init):
    """The first r columns of the QR factorisation: PEFT's "olora" (Büyükakyüz 2024,
    arXiv:2406.01775).

    The paper factors the torch weight `W = Kᵀ = Q R`: `b0 = Q[:, :r]ᵀ`, `a0 = R[:r]ᵀ`; what is
    subtracted is `s a0 b0`, with factors not divided by s, as in PEFT.
    """

    reads_kernel: ClassVar[bool] = True
    offset: ClassVar[bool] = True

    def __call__(self, key, site, kernel, scale):
        q, r = jnp.linalg.qr(kernel.T)
        return r[: site.rank].T, q[:, : site.rank].T


olora = Olora
