"""Leading eigenvectors of a tracked covariance, and random directions beside them."""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp

from lowrank_jax import linalg, sharding
from lowrank_jax.checks import check_number, check_static, is_integer, is_zero
from lowrank_jax.optim.inner.adam import average
from lowrank_jax.projection.batches import count
from lowrank_jax.projection.projectors.base import StoredProjector
from lowrank_jax.projection.projectors.random import normal
from lowrank_jax.projection.projectors.svd import singular_vectors
from lowrank_jax.typing import Scalar


@dataclasses.dataclass(frozen=True, kw_only=True)
class Switching(StoredProjector):
    """Some leading eigenvectors of the gradients' tracked covariance, completed by random directions
    (Alice).

    The covariance of low-rank gradients is averaged at every step, `C <- b C + (1 - b) R Rᵀ`, and at
    a refresh, with the old basis U and without any matrix s x s,

        A = b U C Uᵀ + (1 - b) G Gᵀ,  Q = qr(A U),  Q E of the eigenvectors E of QᵀA Q
        U <- [the `leading` first columns of Q E, a random basis of as many of the others' directions]

    so that directions that the covariance cannot see are tried too. First, the leading singular
    vectors of G stand in for Q E. Memory: C, `r²` float32, or nothing where b is 0.

    Args:
      leading: how many columns follow the covariance, an integer, or a fraction of the rank.
      b: decay of the covariance, .999; 0 for none ("Alice-0").
    """

    leading: int | float = 0.3125
    b: Scalar = 0.999
    reads: ClassVar[frozenset[str]] = frozenset({"target", "key"})
    of_range: ClassVar[bool] = True
    of_rows: ClassVar[bool] = True  # both read G Gᵀ alone
    decomposes: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        check_static("switching: leading", self.leading)
        is_fraction = isinstance(self.leading, float) and 0 < self.leading <= 1
        if not (is_fraction or (is_integer(self.leading) and self.leading >= 1)):
            raise ValueError(
                f"switching: leading={self.leading!r} must be a positive integer, or a fraction in "
                "(0, 1] of the rank"
            )
        check_number("switching: b", self.b, at_least=0, below=1)

    @property
    def remembers(self):
        return not is_zero(self.b)

    @property
    def sees(self):
        return frozenset({"low"} if self.remembers else ())

    def check(self, view):
        super().check(view)
        if is_integer(self.leading) and self.leading > view.rank:
            raise ValueError(
                f"switching: leading={self.leading} exceeds {view.rank}, the rank of {view.path!r}; "
                "give fewer, or a fraction of the rank"
            )

    def _zeros(self, view):
        if not self.remembers:
            return ()
        spec = sharding.unsharded_spec(view.spec)
        return sharding.zeros((*view.batch, view.rank, view.rank), jnp.float32, spec)

    def init(self, view, keys):
        basis, _ = super().init(view, keys)
        return basis, self._zeros(view)

    def start(self, view, inputs):
        left, _ = singular_vectors(view, inputs.target)
        return self.store(view, self._completed(view, left, inputs.key)), self._zeros(view)

    def refresh(self, view, basis, memory, inputs):
        u, g = self.columns(view, basis), inputs.target
        tracked = 0.0 if not self.remembers else self.b * (u @ memory)  # b U C

        def times(x):
            """`A x`."""
            seen = jnp.einsum("...sr,...sq->...rq", u, x)
            kept = tracked @ seen if self.remembers else 0.0
            low = jnp.einsum("...sk,...sq->...kq", g, x)
            return kept + (1 - self.b) * jnp.einsum("...sk,...kq->...sq", g, low)

        image = times(u)
        size = jnp.max(jnp.abs(image), axis=(-2, -1), keepdims=True)
        q = linalg.orthonormalize(image / jnp.where(size > 0, size, 1))
        # eigenvectors of QᵀA Q by descending eigenvalue
        core = jnp.einsum("...sr,...sq->...rq", q, times(q))
        _, ascending = linalg.eigh(core)
        vectors = q @ jnp.flip(ascending, axis=-1)
        return self.store(view, self._completed(view, vectors, inputs.key)), memory

    def _completed(self, view, vectors: jax.Array, key: jax.Array) -> jax.Array:
        """The leading columns of `vectors (..., s, r)`, and random ones of their complement."""
        chosen = self.leading if is_integer(self.leading) else round(self.leading * view.rank)
        leading = linalg.canonical_signs(vectors[..., : max(1, int(chosen))])
        wanted = view.rank - leading.shape[-1]
        if wanted == 0:
            return leading
        drawn = normal(key, (view.shrunk, wanted))
        for _ in range(2):  # once more, for what the first pass left by rounding
            seen = jnp.einsum("...sl,...sq->...lq", leading, drawn)
            drawn = linalg.orthonormalize(drawn - leading @ seen)
        return jnp.concatenate([leading, drawn], axis=-1)

    def seen(self, view, basis, memory, low, target):
        if not self.remembers:
            return memory
        # a sum over the kept dimension, which may be divided
        place = sharding.unsharded_spec(view.spec)
        gram = sharding.with_out_sharding(
            functools.partial(jnp.einsum, "...rk,...qk->...rq"), place
        )
        return average(memory, gram(low, low), self.b)

    def memory_bytes(self, view):
        return 4 * count(view) * view.rank**2 if self.remembers else 0


switching = Switching
