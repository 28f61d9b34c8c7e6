"""DoRA: a direction by LoRA and a trained magnitude for each output (Liu et al. 2024,
arXiv:2402.09353).

    K' = (K + s a b) diag(magnitude / |K + s a b|),   |.| the norm of each column, magnitude = |K|
                                                      at the start

The norm is a constant of the backward pass, as in section 4.3 of the paper and in PEFT. It is found
without the dense delta, by one thin product with the kernel a step:

    |K + s a b|² = |K|² + 2 s Σ (Kᵀa ⊙ bᵀ) + s² Σ (bᵀ(aᵀa) ⊙ bᵀ)

Biases are not scaled. Convolutions take the norm over the window and input channels, embeddings
over the vocabulary.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from lowrank_jax import deprecations, sharding
from lowrank_jax.adapters.base import Arrays, Factors, Op, Site, dropout, product
from lowrank_jax.adapters.families.lora import Lora


@deprecations.options("lrx.adapters.dora")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Dora(Lora):
    """DoRA.

    Args: those of `lora`, except starts from the kernel, with an offset that would change the
    norm's meaning.

    Trains `r (n + m) + m` numbers. A matrix whose `scale` is all zero (a layer left out, a weight
    of 0) is the kernel as it was. With dropout the base term sees the dropped input too, as in
    PEFT.

    >>> import jax, jax.numpy as jnp
    >>> import lowrank_jax as lrx
    >>> kernel = jax.random.normal(jax.random.key(0), (8, 16))
    >>> dora = lrx.adapters.dora(rank=2)
    >>> p = dora.start(jax.random.key(1), kernel)
    >>> bool(jnp.allclose(dora.effective(dora.site(kernel.shape), kernel, p), kernel, atol=1e-6))
    True
    """

    reads_kernel: ClassVar[bool] = True
    whole_matrix: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        if self.start_of.offset:
            raise ValueError(
                f"init={self.init!r} subtracts an offset from the kernel; DoRA starts from "
                "'kaiming'"
            )

    def axes(self, site):
        return super().axes(site) | {"magnitude": ("cols",)}

    def init_site(self, key, site, kernel, given):
        train, frozen = super().init_site(key, site, kernel, given)
        return train | {"magnitude": jnp.linalg.norm(kernel, axis=0)}, frozen

    def factors(self, site: Site, p: Arrays) -> Factors | None:
        del site, p
        return None

    def gain(self, kernel: jax.Array, p: Arrays) -> jax.Array:
        """`magnitude / |K + s a b|` of each column, with a constant norm; 1 where the adapter is
        off."""
        held = jax.lax.stop_gradient
        kernel = held(kernel).astype(jnp.float32)
        a, b = held(p["a"]) * held(p["scale"]), held(p["b"])
        # |K|² of each column, (m,)
        own = jnp.sum(kernel * kernel, axis=0)
        # Σ (Kᵀa ⊙ bᵀ), the kernel against the delta: one thin product
        cross = jnp.sum(product(kernel.T, a) * b.T, axis=1)
        # Σ (bᵀ(aᵀa) ⊙ bᵀ), the delta against itself: products of r x r and r x m
        gram = product(a.T, a)
        square = jnp.sum(product(b.T, gram) * b.T, axis=1)
        # rounding may leave a small negative number where the columns nearly cancel
        norm = jnp.sqrt(jnp.maximum(own + 2 * cross + square, 1e-30))
        is_on = jnp.any(p["scale"] != 0)
        gain = jnp.where(is_on, p["magnitude"] / norm, 1.0)
        # whole on an explicit mesh, whose rows may use the axis along which the columns are sharded
        return sharding.reshard(gain, None if sharding.explicit_spec(gain) is None else (None,))

    def effective(self, site, kernel, p):
        del site
        direction = kernel + (p["a"] * p["scale"]) @ p["b"]
        return direction * self.gain(kernel, p)

    def wrap(self, op: Op, site: Site, p: Arrays, key: jax.Array | None = None) -> Op:
        found = self.pair(p)

        def product(x):
            gain = self.gain(op.kernel(), p)
            dropped = dropout(x, self.dropout, key)
            if op.input == "transposed":
                # the columns of K are inputs here: (x ⊙ gain) (K + delta)ᵀ
                scaled = (dropped * gain).astype(x.dtype)
                base = scaled if dropped is x else (x + dropped * (gain - 1)).astype(x.dtype)
                return op(base) + op.thin(scaled, found)
            y, thin = op(x), op.thin(dropped, found)
            if dropped is x:
                # gain ⊙ (x K + x delta)
                return gain * (y + sharding.match_sharding(thin, y))
            # PEFT's: x K + (gain - 1) ⊙ x' K + gain ⊙ x' delta, with x' the dropped input
            return y + (gain - 1) * op(dropped) + gain * sharding.match_sharding(thin, y)

        return dataclasses.replace(
            op, own=product, kernel=lambda: self.effective(site, op.kernel(), p), plain=False
        )

    def count(self, site):
        return super().count(site) + site.m


dora = Dora
