"""FourierFT: a few trained coefficients of the spectrum of the delta (Gao et al. 2024,
arXiv:2405.03003).

    delta = alpha Re(ifft2(S)),   S (n, m) = 0 but for spectrum (k,) at k fixed positions (rows,
                                  cols)

The dense n x m matrix is formed at each use and again in the backward pass. The positions are those
of PEFT: the first k of `torch.randperm(n m)` by a seed, the same for all kernels of one shape,
counted through the torch weight `(m, n)`. They are data, so that others can be put in their place.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from lowrank_jax.adapters.base import Adapter, check_positive
from lowrank_jax.adapters.positions import torch_permutation
from lowrank_jax.checks import check_number


@dataclasses.dataclass(frozen=True, kw_only=True)
class FourierFT(Adapter):
    """FourierFT.

    Args:
      frequencies: k (1000: PEFT and the paper).
      alpha: what PEFT calls `scaling` (150: PEFT; the paper takes 300 for LLaMA and ViT).
      init: "zeros", or "normal": PEFT's and the authors' default, whose delta is large, changes the
        model before the first step and learned nothing in PEFT's own benchmark. Hence "zeros" here;
        every coefficient has a gradient.
      seed: of the positions (777: PEFT).

    Trains k numbers.

    >>> import jax, jax.numpy as jnp
    >>> import lowrank_jax as lrx
    >>> fourierft, kernel = lrx.adapters.fourierft(frequencies=5), jnp.ones((4, 6))
    >>> p = fourierft.start(jax.random.key(0), kernel)
    >>> (
    ...     p["spectrum"].shape,
    ...     p["rows"].shape,
    ...     bool(jnp.all(p["rows"] < 4)),
    ...     bool(jnp.all(p["cols"] < 6)),
    ... )
    ((5,), (5,), True, True)
    """

    frequencies: int = 1000
    alpha: float = 150.0
    init: str = "zeros"
    seed: int = 777

    def __post_init__(self):
        check_positive("frequencies", self.frequencies)
        check_number("alpha", self.alpha)
        if self.init not in ("zeros", "normal"):
            raise ValueError(f"init={self.init!r} must be 'zeros' or 'normal' (PEFT's default)")

    def axes(self, site):
        del site
        return {
            "spectrum": (None,),
            "rows": (None,),
            "cols": (None,),
        }

    def validate(self, site):
        if self.frequencies > site.n * site.m:
            raise ValueError(
                f"{site.path!r}: frequencies={self.frequencies} exceeds the {site.n * site.m} "
                f"entries of a {site.n} x {site.m} spectrum; choose fewer"
            )

    def scaling(self, site):
        del site
        return self.alpha

    def init_site(self, key, site, kernel, given):
        del kernel, given
        size = (self.frequencies,)
        spectrum = jnp.zeros(size) if self.init == "zeros" else jax.random.normal(key, size)
        flat = torch_permutation(site.n * site.m, self.frequencies, self.seed)
        # a flat position counts through torch's weight (m, n)
        rows = jnp.asarray(flat % site.n, jnp.int32)
        cols = jnp.asarray(flat // site.n, jnp.int32)
        return {"spectrum": spectrum}, {"rows": rows, "cols": cols}

    def delta(self, site, p):
        # S (n, m): the trained coefficients at their positions, 0 elsewhere
        coefficients = p["spectrum"] * p["scale"]
        spectrum = jnp.zeros((site.n, site.m)).at[p["rows"], p["cols"]].set(coefficients)
        wave = jnp.fft.ifft2(_rows_first(spectrum))
        return _rows_first(wave.real)


def _rows_first(x: jax.Array) -> jax.Array:
    """`x (n, m)`, its rows one after the other in memory.

    XLA's FFT on CPUs refuses columns first, which it would take over from LAPACK or from a mesh's
    blocks beside it.
    """
    return with_layout_constraint(x, Layout(major_to_minor=(0, 1)))


fourierft = FourierFT
