"""Bases computed from the gradient by a decomposition, and the two trivial ones: identity and a
given matrix."""

from __future__ import annotations

import dataclasses
import re
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax import linalg, sharding
from lowrank_jax.checks import check_number
from lowrank_jax.matrices import ResolvedView
from lowrank_jax.projection.projectors.base import Projector, StoredProjector, thin_product
from lowrank_jax.projection.projectors.random import normal, structured
from lowrank_jax.projection.transports import DenseChange, SameBasis


@dataclasses.dataclass(frozen=True, kw_only=True)
class Identity(Projector):
    """`P = I`: the low-rank object is the gradient itself, and the projection optimizer is its
    inner one."""

    moves: ClassVar[bool] = False

    def rank_for(self, path, shrunk):
        return shrunk

    def structure(self):
        return Identity()

    def init(self, view, keys):
        return ()

    def thin(self, view, basis, x, axis):
        return x

    def down(self, view, basis, x):
        return x.astype(jnp.float32)

    def up(self, view, basis, low):
        return low

    def rest(self, view, basis, target, low):
        return jnp.zeros_like(target)

    def rounding(self, view, target):
        return jnp.zeros((), jnp.float32)

    def overlap(self, view, old, new):
        return SameBasis()

    def low_spec(self, view):
        return view.spec

    def basis_bytes(self, view):
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Given(StoredProjector):
    """A fixed matrix `(s, r)` or `(batch..., s, r)`, or one by path as `((pattern, matrix), ...)`.

    >>> import numpy as np
    >>> Given(matrix=np.eye(4, 2)).rank_for("w", 4)
    2
    """

    matrix: Any = None
    moves: ClassVar[bool] = False
    orthonormal: ClassVar[bool] = False

    def __post_init__(self):
        if self.matrix is None:
            raise ValueError(
                "given: matrix=None; pass the basis as an array (s, r), or ((pattern, array), ...)"
            )

    def _matrix(self, path: str) -> np.ndarray:
        rules = self.matrix if isinstance(self.matrix, tuple) else ((".*", self.matrix),)
        for pattern, matrix in rules:
            if re.fullmatch(pattern, path):
                return matrix
        raise ValueError(f"given: no pattern matches {path!r}; add ('.*', matrix) as the last rule")

    def rank_for(self, path, shrunk):
        shape = np.shape(self._matrix(path))
        if shape[-2] != shrunk:
            raise ValueError(
                f"given: matrix of shape {shape} cannot shrink dimension {shrunk} of {path!r}"
            )
        return shape[-1]

    def init(self, view, keys):
        matrix = jnp.asarray(self._matrix(view.path), jnp.float32)
        return self.store(
            view, jnp.array(jnp.broadcast_to(matrix, (*view.batch, view.shrunk, view.rank)))
        )

    def overlap(self, view, old, new):
        return SameBasis()


def singular_vectors(view: ResolvedView, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The leading `u (..., s, r)` and `v (..., k, r)`, with the signs that are canonical for u.

    A matrix that lies row by row in memory is factored as its transpose: LAPACK reads column by
    column, and XLA would otherwise copy every gradient on every step, due or not, to have it ready
    for the refresh.
    """
    if view.side == "cols":
        u, _, vt = linalg.truncated_svd(x, view.rank)
        return u, jnp.swapaxes(vt, -1, -2)
    v, _, ut = linalg.truncated_svd(jnp.swapaxes(x, -1, -2), view.rank)
    u = jnp.swapaxes(ut, -1, -2)
    signed = linalg.canonical_signs(u)
    return signed, v * jnp.sum(signed * u, axis=-2, keepdims=True).round()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Svd(StoredProjector):
    """The r leading singular vectors of the gradient, with canonical signs (GaLore).

    Exact and slow: on CPU an SVD costs some forty normal steps, on TPU minutes of compilation;
    `power`, `randomized` and `dct` are the fast alternatives.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"grad"})

    def refresh(self, view, basis, evidence):
        return self.store(view, singular_vectors(view, evidence.grad)[0])


@dataclasses.dataclass(frozen=True, kw_only=True)
class TwoSidedSvd(StoredProjector):
    """Both sides: `R = PᵀGQ (r, r)` with the leading left and right singular vectors (GaLore
    `full`)."""

    needs: ClassVar[frozenset[str]] = frozenset({"grad"})

    def structure(self):
        return TwoSidedSvd(dtype=jnp.dtype(self.dtype))

    def init(self, view, keys):
        right = jnp.broadcast_to(jnp.eye(view.kept, view.rank), (*view.batch, view.kept, view.rank))
        return super().init(view, keys), self.store(view, right)

    def refresh(self, view, basis, evidence):
        return tuple(self.store(view, side) for side in singular_vectors(view, evidence.grad))

    def thin(self, view, basis, x, axis):
        return thin_product(x, self.columns(view, basis[0 if axis == view.side else 1]))

    def down(self, view, basis, x):
        left, right = (self.columns(view, side) for side in basis)
        low = jnp.einsum("...sr,...sk->...rk", left, x.astype(jnp.float32))
        return sharding.reshard(jnp.einsum("...rk,...kq->...rq", low, right), self.low_spec(view))

    def up(self, view, basis, low):
        left, right = (self.columns(view, side) for side in basis)
        x = jnp.einsum("...sr,...rk->...sk", left, jnp.einsum("...rq,...kq->...rk", low, right))
        return sharding.reshard(x, view.spec)

    def rounding(self, view, target):
        # columns are mixed too, so the error follows the norm of the matrix
        return jnp.sqrt(jnp.sum(jnp.square(super().rounding(view, target)), axis=-1, keepdims=True))

    def overlap(self, view, old, new):
        old, new = ([self.columns(view, side) for side in basis] for basis in (old, new))
        left, right = (
            jnp.einsum("...sr,...sq->...rq", b, a) for a, b in zip(old, new, strict=True)
        )
        return DenseChange(left, right)

    def low_shape(self, view):
        return (view.rank, view.rank)

    def low_spec(self, view):
        return sharding.whole_spec(view.spec)

    def basis_bytes(self, view):
        return self.matrix_bytes(view, view.shrunk + view.kept)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Randomized(StoredProjector):
    """A randomized range finder: power iterations from a fresh Gaussian block, products and QR
    only.

    `P = qr((G Gᵀ)^iterations Ω)` with Gaussian `Ω (s, r)`: the range finder of Halko, Martinsson
    and Tropp (2011) with the sketch `G (GᵀΩ)`; without iterations `P = qr(GΩ)` with Gaussian
    `Ω (k, r)`, one product, which projected backprop delivers without the full gradient.

    Args:
      iterations: each sharpens the decay of the spectrum by the power two.
    """

    iterations: int = 1
    of_rows: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        if self.iterations < 0:
            raise ValueError(f"randomized: iterations={self.iterations} must not be negative")

    @property
    def needs(self):
        return frozenset({"grad" if self.iterations else "sketch", "key"})

    def init(self, view, keys):
        if self.iterations:
            return super().init(view, keys)
        return self.store(
            view, structured(keys, view.shrunk, view.rank)
        )  # of the steps before the first sketch

    def sketch_basis(self, view, evidence):
        return normal(evidence.key, (view.kept, view.rank))

    def refresh(self, view, basis, evidence):
        if not self.iterations:
            return self.store(view, range_of(evidence.sketch))
        moved = normal(evidence.key, (view.shrunk, view.rank))
        for _ in range(self.iterations):
            moved = linalg.power_step(evidence.grad, moved)
        return self.store(view, linalg.canonical_signs(moved))


def range_of(sketch: jax.Array) -> jax.Array:
    """Orthonormal basis of the columns, with canonical signs; the scale is divided out first, so
    nothing underflows."""
    size = jnp.max(jnp.abs(sketch), axis=(-2, -1), keepdims=True)
    scaled = sketch / jnp.where(size > 0, size, 1)
    return linalg.canonical_signs(linalg.orthonormalize(scaled))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Alternating(StoredProjector):
    """Alternating-side power iteration: `P <- qr(G Q)`, `Q = qr(m̂ᵀ)` with the debiased first
    moment `m̂ ~ PᵀG`.

    The first moment is the other half of a power step, averaged over steps, so that a refresh needs
    one thin product of the gradient, which projected backprop delivers; at the first refresh Q is
    Gaussian. Signs follow the old basis.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"sketch", "moments", "step", "key"})

    def init(self, view, keys):
        return self.store(view, structured(keys, view.shrunk, view.rank))

    def sketch_basis(self, view, evidence):
        gaussian = normal(evidence.key, (view.kept, view.rank))
        momentum = jnp.swapaxes(evidence.moments, -1, -2)
        size = jnp.max(jnp.abs(momentum), axis=(-2, -1), keepdims=True)
        warm = linalg.orthonormalize(momentum / jnp.where(size > 0, size, 1))
        return jnp.where(evidence.step == 0, gaussian, warm)

    def refresh(self, view, basis, evidence):
        new, old = range_of(evidence.sketch), self.columns(view, basis)
        signs = jnp.where(jnp.sum(new * old, axis=-2, keepdims=True) < 0, -1.0, 1.0)
        return self.store(view, new * signs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Power(StoredProjector):
    """Block power iteration, warm from the last basis: `P <- qr(B Bᵀ P)`.

    `B` is the gradient, or LDAdam's mix `mix up(m̂) + (1 - mix) G` of the debiased first moment and
    the gradient. Signs follow the warm start, so that moments kept across a refresh stay aligned.

    Args:
      iterations: power steps at a refresh.
      first: the first refresh: "svd" takes singular vectors (LDAdam); "range" iterates from the
        structured random basis that `init` makes, with no SVD anywhere in the program.
      mix: LDAdam's rho, or None to use the gradient alone.
    """

    iterations: int = 1
    first: str = "range"
    mix: float | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.first not in ("svd", "range"):
            raise ValueError(f"power: first={self.first!r} must be 'svd' or 'range'")
        if self.iterations < 1:
            raise ValueError(f"power: iterations={self.iterations} must be at least 1")
        check_number("power: mix", self.mix, at_least=0, otherwise="None for the gradient alone")

    @property
    def needs(self):
        return frozenset({"grad", "step"} if self.mix is None else {"grad", "moments", "step"})

    @property
    def of_rows(self):
        return self.mix is None  # the first moment, mixed with the gradient, has no such columns

    def init(self, view, keys):
        return self.store(view, structured(keys, view.shrunk, view.rank))

    def refresh(self, view, basis, evidence):
        def svd():
            return singular_vectors(view, evidence.grad)[0]

        def warm():
            return self._iterated(self.columns(view, basis), evidence)

        moved = jax.lax.cond(evidence.step == 0, svd, warm) if self.first == "svd" else warm()
        return self.store(view, moved)

    def _iterated(self, basis, evidence):
        target = evidence.grad
        if self.mix is not None:
            momentum = jnp.einsum("...sr,...rk->...sk", basis, evidence.moments)
            target = self.mix * momentum + (1 - self.mix) * target
        for _ in range(self.iterations):
            basis = linalg.power_step(target, basis)
        return basis


identity = Identity
given = Given
svd = Svd
svd_two_sided = TwoSidedSvd
randomized = Randomized
power = Power
alternating = Alternating
