"""The projector interface: which subspace, as a basis that is plain state and pure functions on it.

    init(view, keys) -> (basis, memory)            valid before any refresh; every leaf has the
                                                   batch axes in front
    start(view, inputs) -> (basis, memory)         a first basis from data, at step 0 or where a
                                                   layer becomes active
    refresh(view, basis, memory, inputs) -> (basis, memory)   may look at what `reads` names
    seen(view, basis, memory, low, target) -> memory          after every accepted step
    down(view, basis, x (..., s, k)) -> low (..., r, k)
    up(view, basis, low) -> (..., s, k)
    rest(view, basis, target, low) -> (..., s, k)  what the basis does not see of the target
    rounding(view, target) -> (..., 1, k)          below what size an entry of the rest is rounding
    thin(view, basis, x (..., n), axis) -> (..., n or r)   inputs ("rows") or cotangents ("cols") of
                                                           a product, so that
                                                   thin(X)ᵀ thin(dY) is the low-rank object of the
                                                   gradient XᵀdY
    sketch_basis(view, basis, memory, inputs) -> (batch..., k, q)   of projectors that read a "sketch",
                                                   or a pair of it and (batch..., s, q') for both
                                                   sides
    overlap(view, old, new) -> change              what transports apply to moments
    measure(view, basis, x) -> (...)               captured energy, between 0 and 1
    served(view, basis) -> bool (batch..., r)      of projectors that mask: which vectors serve

The basis is what a projection needs, and what taps carry; what a projector remembers beside it for
its next refresh (a momentum of the basis, a warm start, a covariance) is its memory, `()` for most.
A basis or a memory that an optimizer moves keeps that optimizer's state in the memory:
`lrx.inner.as_inner(tx).init_stack(matrices, view)` makes one for each matrix of the leaf, with the
batch axes in front, and `update_stack` moves it (`online_pca` does so).

`contract` asks all of this at `init`: what a verb reads must be declared, and what it returns must
be of these shapes.

Everything that fixes shapes lives in the frozen dataclass. Batch axes are handled by every function
itself, never by vmap, so that conditions on scalars stay conditions.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp

from lowrank_jax import linalg, sharding
from lowrank_jax.checks import is_integer, is_number
from lowrank_jax.matrices import ResolvedView
from lowrank_jax.projection.batches import count
from lowrank_jax.projection.state import RefreshInputs, Sketch
from lowrank_jax.projection.transports import Change, DenseChange, IndexChange
from lowrank_jax.reprs import Short
from lowrank_jax.rows import over_rows
from lowrank_jax.trees import bytes_of, is_quantized
from lowrank_jax.typing import DTypeLike, Key, Pytree, Rank, Scalar

BasisAndMemory = tuple[Pytree, Pytree]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Projector(Short):
    """Base of the projectors.

    Args:
      rank: r as an integer, as a fraction of the shrunk dimension (a float in (0, 1]), or by path
        as `((pattern, rank), ...)` or a dict, where the first pattern that matches the whole path
        wins.

    A class also says which fields of `RefreshInputs` its refresh reads (`reads`) and which of "low"
    and "target" its `seen` does (`sees`), whether it moves the basis (`moves`), whether a refresh
    decomposes a matrix as an SVD does (`decomposes`), which takes minutes of compilation on TPUs,
    whether the first basis is made by `start` before the first update even where refreshes come
    after it (`starts_before`; the first refresh is then that of the second step),
    whether bases are orthonormal, whether they lie in the range of a gradient (`of_range`), so that
    r is at most k, whether a refresh depends on `G Gᵀ` or norms of rows alone (`of_rows`): it
    then may get a gradient with columns of zeros beside its own, which on a mesh make k divisible,
    whether vectors of a basis may be zero, so that moments in their places are kept zero (`masks`),
    and whether the layers of a stack differ by their numbers (`of_layers`).

    Raises:
      ValueError: for a rank that is traced, not positive, or larger than the shrunk dimension; it
        names the leaf.
    """

    rank: Rank = 1.0
    reads: ClassVar[frozenset[str]] = frozenset()
    sees: ClassVar[frozenset[str]] = frozenset()
    moves: ClassVar[bool] = True
    decomposes: ClassVar[bool] = False
    starts_before: ClassVar[bool] = False
    orthonormal: ClassVar[bool] = True
    of_rows: ClassVar[bool] = False
    of_range: ClassVar[bool] = False
    masks: ClassVar[bool] = False
    of_layers: ClassVar[bool] = False

    def __post_init__(self):
        if isinstance(self.rank, Mapping):
            object.__setattr__(self, "rank", tuple(self.rank.items()))
        rules = self.rank if isinstance(self.rank, tuple) else (("", self.rank),)
        for _, rank in rules:
            check_rank(rank)

    def _round(self, size: float) -> int:
        return round(size)

    def rank_at(self, path: str) -> Scalar:
        """The rank as it is given for a leaf: an integer or a fraction."""
        if not isinstance(self.rank, tuple):
            return self.rank
        matching = [value for pattern, value in self.rank if re.fullmatch(pattern, path)]
        if not matching:
            raise ValueError(
                f"rank: no pattern matches {path!r}; add ('.*', rank) as the last rule"
            )
        return matching[0]

    def rank_for(self, path: str, shrunk: int, kept: int) -> int:
        """r for a leaf whose matrices are `(shrunk, kept)`. Fractions are of `shrunk` and round half
        to even, as FRUGAL's code does; coordinate selections round down."""
        rank = self.rank_at(path)
        if is_integer(rank):
            rank = int(rank)
        else:
            rank = max(1, self._round(float(rank) * shrunk))
        if rank > shrunk:
            raise ValueError(
                f"rank={rank} exceeds {shrunk}, the shrunk dimension of {path!r}; use at most "
                f"{shrunk}"
            )
        return rank

    def check(self, view: ResolvedView) -> None:
        """Refuses a rank that no gradient of this leaf has."""
        if self.of_range and view.rank > view.kept:
            raise ValueError(
                f"rank={view.rank} exceeds {view.kept}, the kept dimension of {view.path!r}, and so the "
                f"rank of its gradients, whose range {type(self).__name__} spans; use at most "
                f"{view.kept}, or side='paper'"
            )

    def init(self, view: ResolvedView, keys: Key) -> BasisAndMemory:
        raise TypeError(f"{type(self).__name__} does not implement init")

    @property
    def starts(self) -> bool:
        """Whether `start` is another computation than `refresh`, so that a program holds both."""
        return type(self).start is not Projector.start

    @property
    def remembers(self) -> bool:
        """Whether `seen` does something."""
        return type(self).seen is not Projector.seen

    def start(self, view: ResolvedView, inputs: RefreshInputs) -> BasisAndMemory:
        """A first basis from data; by default a refresh of what `init` draws."""
        return self.refresh(view, *self.init(view, jnp.asarray(inputs.key)), inputs)

    def refresh(
        self, view: ResolvedView, basis: Pytree, memory: Pytree, inputs: RefreshInputs
    ) -> BasisAndMemory:
        return basis, memory

    def seen(
        self,
        view: ResolvedView,
        basis: Pytree,
        memory: Pytree,
        low: jax.Array,
        target: jax.Array | None,
    ) -> Pytree:
        """The memory after the projection of an accepted step; `target` is None unless `sees` names
        it."""
        return memory

    def down(self, view: ResolvedView, basis: Pytree, x: jax.Array) -> jax.Array:
        raise TypeError(f"{type(self).__name__} does not implement down")

    def up(self, view: ResolvedView, basis: Pytree, low: jax.Array) -> jax.Array:
        raise TypeError(f"{type(self).__name__} does not implement up")

    def rest(
        self, view: ResolvedView, basis: Pytree, target: jax.Array, low: jax.Array
    ) -> jax.Array:
        """What the basis does not see of the target `(..., s, k)`: `target - up(low)`.

        Projectors onto coordinates say it without a difference. One of two equal numbers is rarely
        zero inside a program: XLA contracts a multiplication that made the target into the
        subtraction, and rounds them differently.
        """
        return target - self.up(view, basis, low)

    def rounding(self, view: ResolvedView, target: jax.Array) -> jax.Array:
        """Size below which an entry of `rest` is rounding and has no sign, `(..., 1, k)`; 0 for
        coordinates.

        `up(down(x))` mixes the entries of a column, so its error follows the column's norm: at most
        8 units in the last place were measured, for shrunk dimensions from 32 to 1024 and products
        in float32.
        """
        energy = jnp.sum(jnp.square(target), axis=-2, keepdims=True)
        unit = float(jnp.finfo(jnp.float32).eps)
        return 16 * unit * jnp.sqrt(energy)

    def thin(self, view: ResolvedView, basis: Pytree, x: jax.Array, axis: str) -> jax.Array:
        """What a product keeps of its inputs (`axis="rows"`) or of its cotangents ("cols"), for one
        matrix."""
        raise TypeError(
            f"{type(self).__name__} cannot project inside a product; use jax.value_and_grad"
        )

    def sketch_basis(
        self, view: ResolvedView, basis: Pytree, memory: Pytree, inputs: RefreshInputs
    ) -> Sketch:
        raise TypeError(f"{type(self).__name__} reads no sketch")

    def structure(self) -> Projector:
        """What a basis of this projector means: enough for `down`, `up` and `thin`, and without any
        number."""
        raise TypeError(f"{type(self).__name__} does not implement structure")

    def overlap(self, view: ResolvedView, old: Pytree, new: Pytree) -> Change:
        raise TypeError(f"{type(self).__name__} does not implement overlap")

    def served(self, view: ResolvedView, basis: Pytree) -> jax.Array:
        """Which vectors of the basis serve, bool `(batch..., r)`, of a projector that `masks`."""
        raise TypeError(f"{type(self).__name__} does not implement served")

    def low_shape(self, view: ResolvedView) -> tuple[int, ...]:
        """Shape of the low-rank object of one matrix, without batch axes."""
        return (view.rank, view.kept)

    def low_spec(self, view: ResolvedView):
        """Partition entries of the low-rank object on an explicit mesh."""
        return sharding.low_spec(view.spec)

    def basis_bytes(self, view: ResolvedView) -> int:
        """Formula of the stored basis, in bytes, over all matrices of the leaf."""
        raise TypeError(f"{type(self).__name__} does not implement basis_bytes")

    def memory_bytes(self, view: ResolvedView) -> int:
        """Bytes of the memory over all matrices of the leaf: what `init` makes."""
        alone = dataclasses.replace(view, spec=None)
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), view.batch))
        _, memory = jax.eval_shape(lambda keys: self.init(alone, keys), keys)
        return bytes_of(memory)

    def measure(self, view: ResolvedView, basis: Pytree, x: jax.Array) -> jax.Array:
        """Captured energy `|PᵀX|² / |X|²` of each matrix, for orthonormal bases (0 where X is
        zero)."""
        energy = jnp.sum(jnp.square(x), axis=(-2, -1))
        low = self.down(view, basis, x)
        # |PᵀX|² of each matrix, (batch...)
        captured = jnp.sum(jnp.square(low), axis=(-2, -1))
        positive = jnp.where(energy > 0, energy, 1)
        return jnp.where(energy > 0, captured / positive, 0)


def check_rank(rank: Scalar) -> None:
    """ValueError unless `rank` is a positive Python integer or a fraction in (0, 1]."""
    if isinstance(rank, jax.core.Tracer | jax.Array):
        raise ValueError(
            "rank is a traced array: it fixes shapes and must be a Python number. Under "
            "optax.inject_hyperparams pass static_args=('rank',), or give a projector such as "
            "lrx.projectors.svd(rank=8), which passes through"
        )
    if not is_number(rank):
        raise ValueError(
            f"rank={rank!r} must be an integer, a fraction in (0, 1], or ((pattern, rank), ...)"
        )
    if not (rank > 0 and (is_integer(rank) or rank <= 1)):
        raise ValueError(
            f"rank={rank} must be a positive integer, or a fraction in (0, 1] of the shrunk "
            "dimension"
        )


def thin_product(x: jax.Array, basis: jax.Array) -> jax.Array:
    """`x (..., s) @ basis (s, r)` in the dtype of x, summed in float32."""
    basis = basis.astype(x.dtype)
    low = over_rows(lambda x: jnp.matmul(x, basis, preferred_element_type=jnp.float32), x)
    return low.astype(x.dtype)


def mixed(columns: jax.Array, momentum: jax.Array, target: jax.Array, share: Scalar) -> jax.Array:
    """`share P m + (1 - share) G`, of a momentum in the basis `P (..., s, r)` and the target."""
    whole = jnp.einsum("...sr,...rk->...sk", columns, momentum)
    return share * whole + (1 - share) * target


@dataclasses.dataclass(frozen=True, kw_only=True)
class BasisProjector(Projector):
    """Projectors whose basis is, or is regenerated as, a matrix `P (..., s, r)`."""

    def columns(self, view: ResolvedView, basis: Pytree) -> jax.Array:
        """The basis as a float32 matrix `(..., s, r)`."""
        return basis.astype(jnp.float32)

    def down(self, view, basis, x):
        x, columns = x.astype(jnp.float32), self.columns(view, basis)
        if view.side == "cols":
            # x is a transpose of the leaf. On CPU (k, r) then comes out twice as fast as (r, k),
            # and the barrier keeps XLA from rewriting one as the other.
            turned = jnp.einsum("...sk,...sr->...kr", x, columns)
            low = jnp.swapaxes(jax.lax.optimization_barrier(turned), -1, -2)
        else:
            # Pᵀ x
            low = jnp.einsum("...sr,...sk->...rk", columns, x)
        return sharding.reshard(low, sharding.low_spec(view.spec))

    def up(self, view, basis, low):
        columns = self.columns(view, basis)
        # P low
        x = jnp.einsum("...sr,...rk->...sk", columns, low.astype(jnp.float32))
        return sharding.reshard(x, view.spec)

    def thin(self, view, basis, x, axis):
        return x if axis != view.side else thin_product(x, self.columns(view, basis))

    def overlap(self, view, old, new):
        # C = P_newᵀ P_old, (..., r, r)
        new, old = self.columns(view, new), self.columns(view, old)
        return DenseChange(jnp.einsum("...sr,...sq->...rq", new, old))


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredProjector(BasisProjector):
    """Projectors that store `P (..., s, r)`.

    Args:
      dtype: of the stored basis, float32, bfloat16, or int8 or int4 (block-wise); it is computed in
        float32.
    """

    dtype: DTypeLike = jnp.float32

    def structure(self):
        return StoredProjector(dtype=jnp.dtype(self.dtype))

    def init(self, view, keys):
        eye = jnp.eye(view.shrunk, view.rank)
        shape = (*view.batch, view.shrunk, view.rank)
        return self.store(view, jnp.broadcast_to(eye, shape)), ()

    def store(self, view: ResolvedView, matrix: jax.Array) -> Pytree:
        """The basis as it is kept: in `dtype`, or as codes in blocks of 256 entries of a row, of
        int8 with a scale, of int4 with a step and an offset."""
        spec = sharding.unsharded_spec(view.spec)
        matrix = sharding.reshard(matrix, spec)
        stored: Pytree = matrix.astype(self.dtype)
        if jnp.dtype(self.dtype) == jnp.int8:
            stored = linalg.quantize_blocks(matrix, "linear")
        if jnp.dtype(self.dtype) == jnp.int4:
            stored = linalg.quantize_affine(matrix)
        return jax.tree.map(lambda x: sharding.reshard(x, spec), stored)

    def columns(self, view, basis):
        return basis.dequantize() if is_quantized(basis) else basis.astype(jnp.float32)

    def basis_bytes(self, view):
        return self.matrix_bytes(view, view.shrunk)

    def matrix_bytes(self, view: ResolvedView, rows: int) -> int:
        """Formula of a stored `(rows, r)`, over all matrices of the leaf; int8 adds 4 bytes for
        each block, and int4, two of which are a byte, 8."""
        r, dtype = view.rank, jnp.dtype(self.dtype)
        in_block = {jnp.dtype(jnp.int8): 4, jnp.dtype(jnp.int4): 8}.get(dtype, 0)
        in_row = -(-r // 2) if dtype == jnp.int4 else r * dtype.itemsize
        return count(view) * rows * (in_row + in_block * -(-r // 256))


@dataclasses.dataclass(frozen=True, kw_only=True)
class IndexProjector(Projector):
    """Projectors whose basis is a set of sorted int32 indices `(..., r)` into a fixed basis of the
    shrunk dimension."""

    def init(self, view, keys):
        indices = jnp.broadcast_to(jnp.arange(view.rank, dtype=jnp.int32), (*view.batch, view.rank))
        spec = None if view.spec is None else (*view.spec[:-2], None)
        return sharding.reshard(indices, spec), ()

    def overlap(self, view, old, new):
        return IndexChange.between(old, new)

    def basis_bytes(self, view):
        return 4 * count(view) * view.rank
