"""DyLoRA: LoRA that works at every rank up to r, because each step trains a random one (Valipour et
al., EACL 2023, arXiv:2210.07558).

LoRA has to be trained again for every rank that one wants to try. DyLoRA draws a rank b at each
step and uses, and trains, the first b components only, so that the information is sorted: whatever
rank is cut off afterwards, what remains was trained to stand alone.

    delta = s_b a[:, :b] b[:b],   b uniform in smallest, ..., r      while training, by a key
    delta = s_r a b                                                  without a key
    delta = s_b a[:, :b] b[:b]                                       after `lrx.adapters.at_rank`

The official code multiplies both factors by sqrt(r / b) under s = alpha / r: `s_b = alpha / b`, the
paper's. Others keep `s_b = alpha / r` (LyCORIS).
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from lowrank_jax.adapters.base import Arrays, Op, Site, check_positive
from lowrank_jax.adapters.families.lora import Lora
from lowrank_jax.adapters.starts.drawn import Gaussian, Kaiming


@dataclasses.dataclass(frozen=True, kw_only=True)
class DyLora(Lora):
    """DyLoRA.

    Args: those of `lora`, whose rank is the largest that is trained, except starts from the kernel;
      and
      smallest: the smallest rank that is drawn (1: the official code).
      scaled_by: "drawn", `s_b = alpha / b` (the official code), or "largest", `alpha / r` at every
        rank; with `rank_stabilized` the square root of it.
      updates: "first", the first b components train, or "last", the b-th alone, on the others as
        they are (the paper's frozen variant).
      draw: "step", one rank for all sites and layers of a step, as the official code, or "site", a
        rank of its own for each.

    Trains `r (n + m)` numbers. The drawn rank masks, so one compiled program serves all of them, at
    the cost of r. Components that a step leaves out have a gradient of 0: with momentum or weight
    decay an optimizer moves them nevertheless, as in the official code.

    >>> import jax, jax.numpy as jnp
    >>> import lowrank_jax as lrx
    >>> params, x = {"kernel": jnp.ones((8, 16))}, jnp.ones((2, 8))
    >>> adaptation = lrx.adapt(params, lrx.adapters.dylora(rank=4), jax.random.key(0))
    >>> step_key = jax.random.key(1)  # another one at each step
    >>> lrx.matmul(x, lrx.attach(params, adaptation, key=step_key)["kernel"]).shape
    (2, 16)
    >>> lrx.adapters.at_rank(adaptation, 3).train["sites"]["kernel"]["a"].shape
    (8, 3)
    """

    smallest: int = 1
    scaled_by: str = "drawn"
    updates: str = "first"
    draw: str = "step"

    stochastic: ClassVar[bool] = True
    nested: ClassVar[bool] = True
    # the other options change what is drawn, not arrays alone
    in_arrays: ClassVar[tuple[str, ...]] = ("rank", "alpha", "init")

    def __post_init__(self):
        super().__post_init__()
        check_positive("smallest", self.smallest)
        if self.smallest > self.rank:
            raise ValueError(f"smallest={self.smallest} exceeds rank={self.rank}, the largest")
        for field, known in (
            ("scaled_by", ("drawn", "largest")),
            ("updates", ("first", "last")),
            ("draw", ("step", "site")),
        ):
            if getattr(self, field) not in known:
                raise ValueError(f"{field}={getattr(self, field)!r} must be one of {known}")
        if not isinstance(self.start_of, (Kaiming, Gaussian)):
            raise ValueError(
                f"init={self.init!r}: its first components alone would change the model at the "
                "start; DyLoRA starts from 'kaiming' or 'gaussian'"
            )

    @property
    def common_draw(self) -> bool:
        return self.draw == "step"

    def truncated(self, rank: int) -> DyLora:
        changes: dict[str, float] = {"rank": rank, "smallest": min(self.smallest, rank)}
        if self.scaled_by == "largest":
            # alpha / r stays what it was
            share = rank / self.rank
            changes["alpha"] = self.alpha * (share**0.5 if self.rank_stabilized else share)
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    def drawn_rank(self, key: jax.Array, scale: jax.Array) -> jax.Array:
        """b, int32 (), uniform from `smallest` to the matrix's own rank, the last that `scale` (r,)
        does not mask."""
        largest = _own_rank(scale)
        choices = jnp.maximum(largest - self.smallest + 1, 1)
        number = jnp.floor(jax.random.uniform(key) * choices).astype(jnp.int32)
        return self.smallest + jnp.minimum(number, choices - 1)

    def first(self, p: Arrays, rank: jax.Array) -> Arrays:
        """The arrays of a matrix whose first `rank` components alone act."""
        components = jnp.arange(1, p["scale"].size + 1)
        scale = jnp.where(components <= rank, p["scale"], 0)
        if self.scaled_by == "drawn":
            # from alpha / r to alpha / b
            ratio = _own_rank(p["scale"]) / rank
            scale = scale * (jnp.sqrt(ratio) if self.rank_stabilized else ratio)
        p = p | {"scale": scale}
        if self.updates == "last":
            last = components == rank
            held = jax.lax.stop_gradient
            a = jnp.where(last, p["a"], held(p["a"]))
            b = jnp.where(last[:, None], p["b"], held(p["b"]))
            p = p | {"a": a, "b": b}
        return p

    def wrap(self, op: Op, site: Site, p: Arrays, key: jax.Array | None = None) -> Op:
        if key is None:
            return super().wrap(op, site, p)
        own, drawing = (key[0], key[1]) if self.common_draw else jax.random.split(key)
        rank = self.drawn_rank(drawing, p["scale"])
        return super().wrap(op, site, self.first(p, rank), own)


def _own_rank(scale: jax.Array) -> jax.Array:
    """The number of the last component that `scale` (r,) does not mask."""
    components = jnp.arange(1, scale.size + 1)
    return jnp.max(jnp.where(scale != 0, components, 0))


dylora = DyLora
