"""LoRA and what differs from it only in how it starts or which factor trains.

    delta = s a b,   a (n, r), b (r, m),   s = alpha / r (LoRA) or alpha / sqrt(r) (rsLoRA)

Hu et al. 2021 (arXiv:2106.09685), Kalajdzievski 2023 (arXiv:2312.03732). Initialisers are objects
of their own: an ordinary start (`kaiming`, `gaussian`, `orthogonal`) has delta 0; one from the
kernel (`pissa`, `milora`, `olora`) does too, by frozen factors `a0`, `b0` that are subtracted.
Their offset stays data beside the kernel, exact in low precision, until `lrx.adapters.absorb` writes it into
the kernel as the papers do.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax import deprecations, kernels, sharding
from lowrank_jax.adapters.base import (
    Adapter,
    Arrays,
    Factors,
    Op,
    Site,
    check_positive,
    check_rate,
    dropout,
)
from lowrank_jax.adapters.starts.base import Init
from lowrank_jax.adapters.starts.drawn import (
    Gaussian,
    Kaiming,
    Orthogonal,
)
from lowrank_jax.adapters.starts.olora import Olora
from lowrank_jax.adapters.starts.pissa import Pissa
from lowrank_jax.checks import check_number

INITS: dict[str, Init] = {
    "kaiming": Kaiming(),
    "gaussian": Gaussian(),
    "orthogonal": Orthogonal(),
    "pissa": Pissa(),
    "milora": Pissa(part="smallest"),
    "olora": Olora(),
}


@deprecations.options("lrx.adapters.lora")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Lora(Adapter):
    """LoRA: `y = x K + s (dropout(x) a) b`.

    Args:
      rank: r.
      alpha: of `s = alpha / r`. Defaults to 8, as PEFT's, whatever the rank.
      rank_stabilized: `s = alpha / sqrt(r)` (rsLoRA).
      dropout: rate, on the input of the low-rank branch (not of embeddings).
      init: an `Init`, or one of "kaiming" (PEFT's default), "gaussian", "orthogonal", "pissa",
        "milora", "olora".
      trains: "both" factors, or only "a" or "b": LoRA-FA (arXiv:2308.03303) trains "b".
      implementation: "xla", or "pallas": `lrx.kernels.lora_linear` makes both products of a dense host in
        one pass over x, on a TPU or GPU. It takes float32 and bfloat16, x and kernel alike; where
        the host's product has a precision, a result dtype or a function of its own, or other
        adapters stand before, XLA makes them; so it does on a mesh of explicit axes, and inside
        `lrx.meshes.use` of several devices where its `parameters` do not name the kernel. No device
        has timed it.

    Trains `r (n + m)` numbers; a frozen factor does not count.

    >>> import jax, jax.numpy as jnp
    >>> import lowrank_jax as lrx
    >>> params = {"dense": {"kernel": jnp.ones((8, 16))}}
    >>> adaptation = lrx.adapt(params, lrx.adapters.lora(rank=4, alpha=16), jax.random.key(0))
    >>> {name: leaf.shape for name, leaf in adaptation.train["sites"]["dense/kernel"].items()}
    {'a': (8, 4), 'b': (4, 16)}
    """

    rank: int
    alpha: float = 8.0
    rank_stabilized: bool = False
    dropout: float = 0.0
    init: Any = "kaiming"
    trains: str = "both"
    implementation: str = "xla"

    ranked: ClassVar[bool] = True
    optional: ClassVar[tuple[str, ...]] = ("a0", "b0")
    in_arrays: ClassVar[tuple[str, ...]] = ("rank", "alpha", "rank_stabilized", "init")

    def __post_init__(self):
        check_positive("rank", self.rank)
        check_number("alpha", self.alpha)
        check_rate(self.dropout)
        if self.trains not in ("both", "a", "b"):
            raise ValueError(f"trains={self.trains!r} must be 'both', 'a' or 'b'")
        if self.implementation not in ("xla", "pallas"):
            raise ValueError(f"implementation={self.implementation!r} must be 'xla' or 'pallas'")
        if self.implementation == "pallas" and self.dropout:
            raise ValueError(
                f"implementation='pallas' reads one x, and dropout={self.dropout} makes two; set "
                "dropout=0 or implementation='xla'"
            )
        if not isinstance(self.init, Init) and self.init not in INITS:
            raise ValueError(f"init={self.init!r} must be one of {tuple(INITS)} or an Init object")

    def axes(self, site):
        del site
        return {
            "a": ("rows", "rank"),
            "b": ("rank", "cols"),
            "a0": ("rows", "rank"),
            "b0": ("rank", "cols"),
        }

    @property
    def start_of(self) -> Init:
        """The initialiser."""
        return self.init if isinstance(self.init, Init) else INITS[self.init]

    @property
    def reads_kernel(self) -> bool:
        return self.start_of.reads_kernel

    def validate(self, site):
        limit = min(site.n, site.m)
        if self.start_of.reads_kernel and self.rank > limit:
            raise ValueError(
                f"{site.path!r}: rank={self.rank} exceeds the {limit} singular values of a "
                f"{site.n} x {site.m} kernel, from which init={self.init!r} starts; choose a "
                "smaller rank or init='kaiming'"
            )
        self.start_of.validate(site)

    def scaling(self, site):
        return self.alpha / (math.sqrt(site.rank) if self.rank_stabilized else site.rank)

    def init_site(self, key, site, kernel, given):
        dead = {"a": "b", "b": "a"}.get(self.trains)
        if isinstance(self.start_of, (Kaiming, Gaussian)) and dead == ("a" if site.lookup else "b"):
            raise ValueError(
                f"{site.path!r}: trains={self.trains!r} freezes {dead!r}, which starts at 0, so no "
                f"gradient would ever differ from 0; train {dead!r} or both, or choose an init "
                "that starts otherwise, such as 'pissa'"
            )
        a, b = self.start_of(key, site, kernel, given["scale"])
        factors = {"a": a.astype(jnp.float32), "b": b.astype(jnp.float32)}
        train = {name: factors.pop(name) for name in ("a", "b") if self.trains in ("both", name)}
        offset = (
            {"a0": a.astype(jnp.float32), "b0": b.astype(jnp.float32)}
            if self.start_of.offset
            else {}
        )
        return train, factors | offset

    def factors(self, site: Site, p: Arrays) -> Factors:
        if "a0" not in p:
            return self.pair(p)
        # s a b - s a0 b0 as one pair of 2 r components
        a = jnp.concatenate([p["a"], p["a0"]], axis=1)
        b = jnp.concatenate([p["b"], p["b0"]])
        scale = jnp.concatenate([p["scale"], -p["scale"]])
        ranks = np.arange(p["scale"].size)
        return Factors(a, scale, b, np.concatenate([ranks, ranks]))

    def pair(self, p: Arrays) -> Factors:
        """The factors that train, without an offset."""
        return Factors(p["a"], p["scale"], p["b"], np.arange(p["scale"].size))

    def offset(self, p: Arrays) -> Factors:
        """The factors of the start, whose product is subtracted."""
        return Factors(p["a0"], p["scale"], p["b0"], np.arange(p["scale"].size))

    def wrap(self, op: Op, site: Site, p: Arrays, key: jax.Array | None = None) -> Op:
        def delta():
            return self.delta(site, p)

        if self.implementation == "pallas" and op.plain and not sharding.explicit_trace():

            def both(x):
                # x W and x A B in one kernel
                a, scale, b, _ = self.checked_factors(site, p)
                spec = sharding.matrix_spec(site.path, site.view)
                return kernels.lora_linear(x, op.kernel(), a * scale, b, spec=spec)

            return dataclasses.replace(op.plus(both, delta), own=both)

        def forward(x):
            if key is None or self.dropout == 0:
                return op.thin(x, self.checked_factors(site, p))
            y = op.thin(dropout(x, self.dropout, key), self.pair(p))
            if "a0" not in p:
                return y
            # the offset is the kernel's own part, which sees the input as it is
            return y - op.thin(x, self.offset(p))

        return op.plus(forward, delta)

    def count(self, site):
        rows = site.n if self.trains != "b" else 0
        return site.rank * (rows + (site.m if self.trains != "a" else 0))


lora = Lora
