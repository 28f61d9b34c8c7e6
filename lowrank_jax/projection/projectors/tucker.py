"""A factor for each axis of a leaf: the Tucker decomposition of the gradient."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from lowrank_jax import linalg, sharding
from lowrank_jax.checks import check_integer, is_integer
from lowrank_jax.matrices import ResolvedView
from lowrank_jax.projection.projectors.svd import TwoSidedSvd
from lowrank_jax.projection.transports import Change
from lowrank_jax.rows import over_rows
from lowrank_jax.typing import Shape

Factors = Sequence[jax.Array]


def times(x: jax.Array, factors: Factors) -> jax.Array:
    """`x (batch..., n_1, ..., n_d)` with each axis j multiplied by `(batch..., n_j, r_j)`."""
    lead = x.ndim - len(factors)
    for factor in factors:
        # each axis in turn goes to the end, after which all stand as they did
        x = jnp.moveaxis(x, lead, -1)
        others = x.shape[lead:-1]
        low = x.reshape(*x.shape[:lead], -1, x.shape[-1]) @ factor
        x = low.reshape(*x.shape[:lead], *others, factor.shape[-1])
    return x


def turned(factors: Factors) -> list[jax.Array]:
    """The factors transposed."""
    return [jnp.swapaxes(factor, -1, -2) for factor in factors]


@dataclasses.dataclass(frozen=True)
class TuckerChange(Change):
    """Overlap of two Tucker bases: `C_j = new_jᵀ old_j (batch..., r_j, r_j)` for each axis."""

    factors: tuple[jax.Array, ...]

    def apply(self, low: jax.Array) -> jax.Array:
        core = low.shape[: low.ndim - 2] + tuple(c.shape[-1] for c in self.factors)
        return times(low.reshape(core), turned(self.factors)).reshape(low.shape)

    def apply_squared(self, low: jax.Array) -> jax.Array:
        return TuckerChange(tuple(map(jnp.square, self.factors))).apply(low)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tucker(TwoSidedSvd):
    """The gradient as the tensor that its leaf is, with a basis for each axis (Tensor-GaLore).

    Of the axes that a view folds into rows and columns, each has its own factor
    `U_j (n_j, r_j)`, so that the low-rank object is the core `G x_1 U_1ᵀ ... x_d U_dᵀ`, folded
    again into a matrix. At a refresh U_j are the leading left singular vectors of the unfolding of
    G along axis j (HOSVD), and then, `iterations` times, of G with all other axes in their factors
    (HOOI), axis by axis. Signs are canonical. Of a matrix of two axes it is `svd_two_sided`.

    Args:
      rank: of each axis, as far as it has so many (or its unfolding so many columns): an integer,
        or a fraction of the axis; or by path. So the window of a 3 x 3 convolution stays whole for
        ranks from 3 on.
      iterations: of HOOI.

    >>> import lowrank_jax as lrx
    >>> views = lrx.Views(rules=(("kernel", lrx.MatrixView(rows=(0, 1, 2), cols=(3,))),))
    >>> tx = lrx.scale_by_projection(tucker(rank=4), views=views)
    >>> tx.init({"kernel": jnp.ones((3, 3, 8, 16))}).matrices["kernel"]
    MatrixState('kernel', rank=4, shrinks=cols, basis=[(16, 4), (3, 3), (3, 3), (8, 4)], 1,612 bytes)
    """

    iterations: int = 10
    of_range = False

    def __post_init__(self):
        super().__post_init__()
        check_integer("tucker: iterations", self.iterations, at_least=0)

    def structure(self):
        return Tucker(rank=self.rank, dtype=jnp.dtype(self.dtype), iterations=0)

    def rank_for(self, path, shrunk, kept):
        rank = self.rank_at(path)
        return min(int(rank), shrunk) if is_integer(rank) else super().rank_for(path, shrunk, kept)

    def _sizes(self, view: ResolvedView) -> tuple[Shape, Shape]:
        """Sizes of the axes of the shrunk side, and of the kept one."""
        sides = (view.rows_shape, view.cols_shape)
        return sides if view.side == "rows" else sides[::-1]

    def _ranks(self, view: ResolvedView) -> tuple[Shape, Shape]:
        """The ranks of these axes."""
        rank, (shrunk, kept) = self.rank_at(view.path), self._sizes(view)
        whole = math.prod(shrunk) * math.prod(kept)

        def of(size: int) -> int:
            wanted = int(rank) if is_integer(rank) else max(1, round(float(rank) * size))
            return min(wanted, size, whole // size)

        return tuple(map(of, shrunk)), tuple(map(of, kept))

    def _order(self, view: ResolvedView) -> list[int]:
        """The places of the axes, shrunk side first, in the order in which the leaf has them."""
        sides = (view.view.rows, view.view.cols)
        axes = sum(sides if view.side == "rows" else sides[::-1], ())
        return sorted(range(len(axes)), key=axes.__getitem__)

    def _tensor(self, view: ResolvedView, x: jax.Array) -> jax.Array:
        """`x (batch..., s, k)` with the axes of both sides apart, in float32."""
        shrunk, kept = self._sizes(view)
        x = sharding.reshard(x.astype(jnp.float32), sharding.unsharded_spec(view.spec))
        return x.reshape(*x.shape[: len(view.batch)], *shrunk, *kept)

    def _factors(self, view: ResolvedView, basis: Factors) -> list[jax.Array]:
        return [self.columns(view, factor) for factor in basis]

    def init(self, view, keys):
        sizes, ranks = sum(self._sizes(view), ()), sum(self._ranks(view), ())
        made = [jnp.eye(size, rank) for size, rank in zip(sizes, ranks, strict=True)]
        return tuple(
            self.store(view, jnp.broadcast_to(eye, (*view.batch, *eye.shape))) for eye in made
        ), ()

    def refresh(self, view, basis, memory, inputs):
        tensor, ranks = self._tensor(view, inputs.target), sum(self._ranks(view), ())
        lead = len(view.batch)

        def leading(x: jax.Array, axis: int) -> jax.Array:
            # the unfolding along an axis, (batch..., n_j, all others)
            first = jnp.moveaxis(x, lead + axis, lead)
            unfolded = first.reshape(*first.shape[: lead + 1], -1)
            return linalg.truncated_svd(unfolded, ranks[axis])[0]

        def improved(_, factors):
            found = list(factors)
            for axis in self._order(view):
                eye = jnp.eye(tensor.shape[lead + axis])
                others = [eye if j == axis else factor for j, factor in enumerate(found)]
                found[axis] = leading(times(tensor, others), axis)
            return tuple(found)

        factors = tuple(leading(tensor, axis) for axis in range(len(ranks)))
        if self.iterations:
            factors = jax.lax.fori_loop(0, self.iterations, improved, factors)
        return tuple(self.store(view, factor) for factor in factors), memory

    def thin(self, view, basis, x, axis):
        shrunk, kept = self._sizes(view)
        own, sizes = (basis[: len(shrunk)], shrunk)
        if axis != view.side:
            own, sizes = (basis[len(shrunk) :], kept)
        factors = self._factors(view, own)

        def one(x):
            core = times(x.astype(jnp.float32).reshape(*x.shape[:-1], *sizes), factors)
            return core.reshape(*x.shape[:-1], -1)

        return over_rows(one, x).astype(x.dtype)

    def down(self, view, basis, x):
        core = times(self._tensor(view, x), self._factors(view, basis))
        shape = (*core.shape[: len(view.batch)], *self.low_shape(view))
        return sharding.reshard(core.reshape(shape), self.low_spec(view))

    def up(self, view, basis, low):
        lead = low.shape[: len(view.batch)]
        core = low.astype(jnp.float32).reshape(*lead, *sum(self._ranks(view), ()))
        whole = times(core, turned(self._factors(view, basis)))
        return sharding.reshard(whole.reshape(*lead, view.shrunk, view.kept), view.spec)

    def overlap(self, view, old, new):
        # C_j = new_jᵀ old_j, (batch..., r_j, r_j)
        pairs = zip(self._factors(view, new), self._factors(view, old), strict=True)
        return TuckerChange(tuple(jnp.einsum("...nr,...nq->...rq", a, b) for a, b in pairs))

    def low_shape(self, view):
        shrunk, kept = self._ranks(view)
        return (math.prod(shrunk), math.prod(kept))

    def basis_bytes(self, view):
        sizes, ranks = sum(self._sizes(view), ()), sum(self._ranks(view), ())
        of_axes = [dataclasses.replace(view, rank=rank) for rank in ranks]
        return sum(self.matrix_bytes(own, n) for own, n in zip(of_axes, sizes, strict=True))


tucker = Tucker
