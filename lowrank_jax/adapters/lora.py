"""LoRA and what differs from it only in how it starts or which factor trains.

    delta = s a b,   a (n, r), b (r, m),   s = alpha / r (LoRA) or alpha / sqrt(r) (rsLoRA)

Hu et al. 2021 (arXiv:2106.09685), Kalajdzievski 2023 (arXiv:2312.03732). Initialisers are objects
of their own: an ordinary start (`kaiming`, `gaussian`, `orthogonal`) has delta 0; one from the
kernel (`pissa`, `milora`, `olora`) does too, by frozen factors `a0`, `b0` that are subtracted.
Their offset stays data beside the kernel, exact in low precision, until `lrx.absorb` writes it into
the kernel as the papers do.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax import kernels, linalg, sharding
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
from lowrank_jax.checks import check_number


@dataclasses.dataclass(frozen=True, kw_only=True)
class Init:
    """How the two factors start. `offset` says that the start is not zero and is subtracted."""

    reads_kernel: ClassVar[bool] = False
    offset: ClassVar[bool] = False

    def validate(self, site: Site) -> None:
        """ValueError, naming path, value and remedy, where a site does not fit."""

    def __call__(
        self, key: jax.Array, site: Site, kernel: jax.Array | None, scale: jax.Array
    ) -> tuple[Any, Any]:
        """`(a (n, r), b (r, m))`; entries beyond a matrix's own rank are masked by `scale`, not
        here."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kaiming(Init):
    """`a` uniform in ±1 / sqrt(n), b = 0: the start of Hu et al.'s code (kaiming_uniform with a =
    sqrt(5)) and of PEFT.

    Of an embedding `a` is 0 and b standard normal, as in both.
    """

    def __call__(self, key, site, kernel, scale):
        if site.lookup:
            return jnp.zeros((site.n, site.rank)), jax.random.normal(key, (site.rank, site.m))
        bound = 1 / math.sqrt(site.n)
        return jax.random.uniform(key, (site.n, site.rank), minval=-bound, maxval=bound), jnp.zeros(
            (site.rank, site.m)
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gaussian(Init):
    """`a` normal with standard deviation 1 / r, b = 0: PEFT's "gaussian". r is the matrix's own
    rank.

    Embeddings start as in `Kaiming`.
    """

    def __call__(self, key, site, kernel, scale):
        if site.lookup:
            return Kaiming()(key, site, kernel, scale)
        own = jnp.maximum(jnp.sum(scale != 0), 1)
        return jax.random.normal(key, (site.n, site.rank)) / own, jnp.zeros((site.rank, site.m))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Orthogonal(Init):
    """Neither factor is 0, their product is: alternate rows of one orthogonal r x r matrix, as
    PEFT's "orthogonal".

    `a = (G_n Q_odd) / 10`, `b = (G_m Q_even)ᵀ / 10` with standard normal `G (., r / 2)`. r must be
    even.
    """

    def validate(self, site):
        if site.rank % 2:
            raise ValueError(f"{site.path!r}: rank={site.rank} must be even for init='orthogonal'")

    def __call__(self, key, site, kernel, scale):
        keys, own = jax.random.split(key, 3), scale != 0
        # of a rank smaller than the stack's a smaller matrix, beside which the padding is the
        # identity
        square = jnp.where(
            own[:, None] & own,
            jax.random.normal(keys[0], (site.rank, site.rank)),
            jnp.eye(site.rank),
        )
        q = linalg.qr_orthonormal(square)
        half = site.rank // 2
        a = jax.random.normal(keys[1], (site.n, half)) @ q[1::2]
        b = jax.random.normal(keys[2], (site.m, half)) @ q[0::2]
        return a / 10, b.T / 10


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


INITS: dict[str, Init] = {
    "kaiming": Kaiming(),
    "gaussian": Gaussian(),
    "orthogonal": Orthogonal(),
    "pissa": Pissa(),
    "milora": Pissa(part="smallest"),
    "olora": Olora(),
}


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
      products: "xla", or "kernel": `lrx.kernels.thin_linear` makes both products of a dense host in
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
    products: str = "xla"

    ranked: ClassVar[bool] = True
    axes: ClassVar[dict[str, tuple[str | None, ...]]] = {
        "a": ("rows", "rank"),
        "b": ("rank", "cols"),
        "a0": ("rows", "rank"),
        "b0": ("rank", "cols"),
    }

    def __post_init__(self):
        check_positive("rank", self.rank)
        check_number("alpha", self.alpha)
        check_rate(self.dropout)
        if self.trains not in ("both", "a", "b"):
            raise ValueError(f"trains={self.trains!r} must be 'both', 'a' or 'b'")
        if self.products not in ("xla", "kernel"):
            raise ValueError(f"products={self.products!r} must be 'xla' or 'kernel'")
        if self.products == "kernel" and self.dropout:
            raise ValueError(
                f"products='kernel' reads one x, and dropout={self.dropout} makes two; set "
                "dropout=0 or products='xla'"
            )
        if not isinstance(self.init, Init) and self.init not in INITS:
            raise ValueError(f"init={self.init!r} must be one of {tuple(INITS)} or an Init object")

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

    def scaling(self, rank):
        return self.alpha / (math.sqrt(rank) if self.rank_stabilized else rank)

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
        a, b = jnp.concatenate([p["a"], p["a0"]], axis=1), jnp.concatenate([p["b"], p["b0"]])
        ranks = np.arange(p["scale"].size)
        return Factors(
            a, jnp.concatenate([p["scale"], -p["scale"]]), b, np.concatenate([ranks, ranks])
        )

    def pair(self, p: Arrays) -> Factors:
        """The factors that train, without an offset."""
        return Factors(p["a"], p["scale"], p["b"], np.arange(p["scale"].size))

    def offset(self, p: Arrays) -> Factors:
        """The factors of the start, whose product is subtracted."""
        return Factors(p["a0"], p["scale"], p["b0"], np.arange(p["scale"].size))

    def wrap(self, op: Op, site: Site, p: Arrays, key: jax.Array | None = None) -> Op:
        if self.products == "kernel" and op.plain and not sharding.explicit_trace():

            def both(x):
                a, scale, b, _ = self.checked_factors(site, p)
                spec = sharding.matrix_spec(site.path, site.view)
                return kernels.thin_linear(x, op.kernel(), a * scale, b, spec=spec)

            return dataclasses.replace(op.plus(both, lambda: self.delta(site, p)), product=both)

        def forward(x):
            if key is None or self.dropout == 0:
                return op.thin(x, self.checked_factors(site, p))
            y = op.thin(dropout(x, self.dropout, key), self.pair(p))
            return y if "a0" not in p else y - op.thin(x, self.offset(p))  # the kernel's own part

        return op.plus(forward, lambda: self.delta(site, p))

    def count(self, site):
        rows = site.n if self.trains != "b" else 0
        return site.rank * (rows + (site.m if self.trains != "a" else 0))


lora = Lora
kaiming = Kaiming
gaussian = Gaussian
orthogonal = Orthogonal
pissa = Pissa
olora = Olora
