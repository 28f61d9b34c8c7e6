"""Which matrix is this? Every parameter leaf seen as a stack of `(rows, cols)` matrices.

A leaf is `(batch..., rows, cols)` after a transpose and a reshape. The convention is Flax's:
`y = x @ W` with `W: (d_in, d_out)`, so rows are inputs and columns outputs (papers and PyTorch
write the transpose).

* `MatrixView` names the axes of one leaf. Layers of scanned models, heads, experts and convolution
  windows are batch axes, or are folded into rows or columns.
* `ResolvedView` adds the rank and the shrunk side of one leaf and orients its matrices
  `(batch..., s, k)` with the shrunk dimension `s` first, so that every basis is `P (s, r)` and
  every low-rank object `PᵀX (r, k)`.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from lowrank_jax import sharding
from lowrank_jax.reprs import Short
from lowrank_jax.typing import Kernel
from lowrank_jax.typing import Shape as Shape


@dataclasses.dataclass(frozen=True, kw_only=True)
class MatrixView(Short):
    """Names the axes of a leaf: which are batch, which fold into rows, which into columns.

    Args:
      rows: axes folded, in this order, into the rows (inputs).
      cols: axes folded, in this order, into the columns (outputs).
      batch: axes kept in front; every index along them is a matrix of its own.

    Raises:
      ValueError: if an axis is negative or named twice, or rows or cols is empty.

    >>> import jax.numpy as jnp
    >>> query = MatrixView(rows=(0,), cols=(1, 2))  # attention kernel (d, heads, head_dim)
    >>> query.to_matrices(jnp.ones((16, 4, 8))).shape
    (16, 32)
    >>> experts = MatrixView(batch=(0,), rows=(1,), cols=(2,))
    >>> experts.to_matrices(jnp.ones((3, 16, 8))).shape
    (3, 16, 8)
    """

    rows: tuple[int, ...] = (0,)
    cols: tuple[int, ...] = (1,)
    batch: tuple[int, ...] = ()

    def __post_init__(self):
        axes = self.batch + self.rows + self.cols
        if not self.rows or not self.cols:
            raise ValueError(
                f"rows={self.rows} and cols={self.cols} must each name at least one axis"
            )
        if len(set(axes)) != len(axes) or min(axes) < 0:
            raise ValueError(
                f"batch={self.batch}, rows={self.rows}, cols={self.cols} must name distinct axes "
                ">= 0"
            )

    @property
    def permutation(self) -> tuple[int, ...]:
        return self.batch + self.rows + self.cols

    def stacked(self) -> MatrixView:
        """The same view of a leaf that has one more leading (layer) axis."""
        kinds = self.batch, self.rows, self.cols
        batch, rows, cols = (tuple(axis + 1 for axis in axes) for axes in kinds)
        return MatrixView(batch=(0, *batch), rows=rows, cols=cols)

    def matrix_shape(self, shape: Shape) -> Shape:
        """`(batch..., rows, cols)` of a leaf of this shape; ValueError if the axes do not cover
        it."""
        if sorted(self.permutation) != list(range(len(shape))):
            raise ValueError(
                f"a view of axes batch={self.batch}, rows={self.rows}, cols={self.cols} does not "
                f"cover a leaf of shape {tuple(shape)}: name each of its {len(shape)} axes once"
            )
        batch = tuple(shape[axis] for axis in self.batch)
        rows, cols = (math.prod(shape[axis] for axis in axes) for axes in (self.rows, self.cols))
        return (*batch, rows, cols)

    def to_matrices(self, x: jax.Array) -> jax.Array:
        """The leaf as `(batch..., rows, cols)`."""
        shape = self.matrix_shape(x.shape)
        if self.permutation != tuple(range(x.ndim)):
            x = jnp.transpose(x, self.permutation)
        return x if x.shape == shape else sharding.reshape(x, shape, first=len(self.batch))

    def from_matrices(self, x: jax.Array, shape: Shape) -> jax.Array:
        """The inverse of `to_matrices` for a leaf of the given shape."""
        permuted = tuple(shape[axis] for axis in self.permutation)
        if x.shape != permuted:
            x = sharding.reshape(x, permuted, first=len(self.batch))
        axes = range(len(shape))
        if self.permutation == tuple(axes):
            return x
        inverse = tuple(self.permutation.index(axis) for axis in axes)
        return jnp.transpose(x, inverse)


DENSE = MatrixView()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResolvedView(Short):
    """One leaf, with everything that fixes the shapes of its optimizer state.

    Attributes:
      path: "/"-joined path of the leaf.
      shape: its shape.
      view: which axes are batch, rows and columns.
      rank: r, the size of the low-rank object's first axis.
      side: which dimension is shrunk, "rows" or "cols".
      batch: the shape of the batch axes.
      spec: PartitionSpec of the oriented matrices on an explicit mesh, else None.

    >>> import jax.numpy as jnp
    >>> import lowrank_jax as lrx
    >>> view = lrx.resolution.resolve(jnp.ones((16, 4)), rank=2).projected[0]
    >>> view.side, view.oriented, view.orient(jnp.ones((16, 4))).shape
    ('cols', (4, 16), (4, 16))
    """

    path: str
    shape: Shape
    view: MatrixView
    rank: int
    side: str
    batch: Shape
    spec: tuple | None = None

    @property
    def shrunk(self) -> int:
        """s, the size of the dimension that the basis shrinks to r."""
        *_, rows, cols = self.view.matrix_shape(self.shape)
        return rows if self.side == "rows" else cols

    def size_of(self, side: str) -> int:
        """The size of "rows" or "cols"."""
        return self.view.matrix_shape(self.shape)[-2 if side == "rows" else -1]

    @property
    def kept(self) -> int:
        """k, the size of the dimension that is kept."""
        *_, rows, cols = self.view.matrix_shape(self.shape)
        return cols if self.side == "rows" else rows

    @property
    def rows_shape(self) -> Shape:
        """Sizes of the axes that fold into rows: (heads, head_dim) of an attention's output."""
        return tuple(self.shape[axis] for axis in self.view.rows)

    @property
    def cols_shape(self) -> Shape:
        """Sizes of the axes that fold into columns: (heads, head_dim) of a query."""
        return tuple(self.shape[axis] for axis in self.view.cols)

    @property
    def fan_in(self) -> int:
        """Number of rows: the inputs of `y = x @ W`."""
        return math.prod(self.rows_shape)

    @property
    def fan_out(self) -> int:
        """Number of columns: its outputs."""
        return math.prod(self.cols_shape)

    @property
    def matrix(self) -> ResolvedView:
        """The view of one of the matrices, without batch axes."""
        if not self.batch:
            return self
        # axes of the leaf, counted again without its batch axes
        own = sorted(self.view.rows + self.view.cols)
        places = {axis: place for place, axis in enumerate(own)}
        rows = tuple(places[axis] for axis in self.view.rows)
        cols = tuple(places[axis] for axis in self.view.cols)
        shape = tuple(self.shape[axis] for axis in places)
        spec = None if self.spec is None else self.spec[-2:]
        view = MatrixView(rows=rows, cols=cols)
        return dataclasses.replace(self, view=view, shape=shape, batch=(), spec=spec)

    @property
    def oriented(self) -> Shape:
        """`(batch..., s, k)`."""
        return (*self.batch, self.shrunk, self.kept)

    def orient(self, x: jax.Array) -> jax.Array:
        """The leaf as `(batch..., s, k)`."""
        x = self.view.to_matrices(x)
        return x if self.side == "rows" else jnp.swapaxes(x, -1, -2)

    def restore(self, x: jax.Array) -> jax.Array:
        """The inverse of `orient`."""
        if self.side == "cols":
            x = jnp.swapaxes(x, -1, -2)
        return self.view.from_matrices(x, self.shape)

    @property
    def layered(self) -> bool:
        """Whether the first axis of the leaf is a batch axis, so that `layer` can take it one by
        one."""
        return bool(self.view.batch) and self.view.batch[0] == 0

    def layer(self) -> ResolvedView:
        """The view of one index along the first axis of a layered leaf."""
        kinds = self.view.batch[1:], self.view.rows, self.view.cols
        batch, rows, cols = (tuple(axis - 1 for axis in axes) for axes in kinds)
        view = MatrixView(batch=batch, rows=rows, cols=cols)
        spec = None if self.spec is None else self.spec[1:]
        shape, batch = self.shape[1:], self.batch[1:]
        return dataclasses.replace(self, view=view, shape=shape, batch=batch, spec=spec)

    def lying(self, leaf: Kernel) -> ResolvedView:
        """The view with the partition entries that the type of the leaf has on an explicit mesh,
        None elsewhere."""
        own = sharding.explicit_spec(leaf)
        spec = None
        if own is not None:
            view = self.view
            *batch, rows, cols = sharding.fold_spec(own, view.batch, view.rows, view.cols)
            # oriented: the shrunk dimension comes first
            ordered = (rows, cols) if self.side == "rows" else (cols, rows)
            spec = (*batch, *ordered)
        return dataclasses.replace(self, spec=spec)

    def structure(self) -> ResolvedView:
        """The view without the mesh: what is stored in a state's static metadata."""
        return dataclasses.replace(self, spec=None)
