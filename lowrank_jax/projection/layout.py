"""Where the low-rank state of a projected leaf is placed on an auto mesh: between its uses, and where it
is used.

Of a matrix `(s, k)` whose s is divided over the mesh axes A and k over B:

                                  spread               at use
    bases            (s, r)       s over A and B       s over A
    low-rank objects (r, k)       r over A, k over B   k over B

each as far as it divides; where A does not divide the rank, it divides k. A device so holds its
share of all state and works on it there; only what enters a product with a matrix's share is
gathered over A, for one layer at a time.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from lowrank_jax import sharding
from lowrank_jax.matrices import ResolvedView
from lowrank_jax.typing import Pytree


@dataclasses.dataclass(frozen=True)
class Layout:
    """Partition entries of the oriented matrices `(batch..., s, k)` of one leaf, and their mesh."""

    mesh: Any
    view: ResolvedView
    batch: tuple[Any, ...]
    s: Any
    k: Any

    @classmethod
    def of(cls, view: ResolvedView, mesh: Any, entries: Sequence[Any]) -> Layout:
        """From the partition entries of the leaf, one for each axis."""
        axes = view.view
        *batch, rows, cols = sharding.fold_spec(tuple(entries), axes.batch, axes.rows, axes.cols)
        return cls(
            mesh, view, tuple(batch), *((rows, cols) if view.side == "rows" else (cols, rows))
        )

    @property
    def low(self) -> PartitionSpec:
        """Of `(batch..., r, k)`, spread."""
        rank = self._divided(self.view.rank, self.s)
        return self._spec(rank, self._divided(self.view.kept, self.k, *(() if rank else (self.s,))))

    @property
    def low_at_use(self) -> PartitionSpec:
        return self._spec(None, self._divided(self.view.kept, self.k))

    @property
    def basis(self) -> PartitionSpec:
        """Of `(batch..., s, r)`, spread."""
        return self._spec(self._divided(self.view.shrunk, self.s, self.k), None)

    @property
    def basis_at_use(self) -> PartitionSpec:
        return self._spec(self._divided(self.view.shrunk, self.s), None)

    def _spec(self, first: Any, last: Any) -> PartitionSpec:
        return PartitionSpec(*self.batch, first, last)

    def _divided(self, size: int, *parts: Any) -> Any:
        """As many of these entries as divide `size`, the first ones first."""
        names: tuple[str, ...] = ()
        for part in parts:
            more = names + sharding.axis_names_of(part)
            if size % math.prod(self.mesh.shape[name] for name in more) == 0:
                names = more
        return names or None


def current(view: ResolvedView) -> Layout | None:
    """The layout of a leaf, or of a layer of it, inside `meshes.use(mesh, parameters=...)`; None
    elsewhere."""
    specs = sharding.current_partition_specs.get()
    if specs is None or view.path not in specs:
        return None
    entries = specs[view.path]
    if len(entries) < len(view.shape):
        raise ValueError(
            f"leaf {view.path!r} of shape {view.shape}: lrx.meshes.use(parameters=) has "
            f"{len(entries)} axes there; give it the parameters that this optimizer updates"
        )
    return Layout.of(view, sharding.current_mesh.get(), entries[len(entries) - len(view.shape) :])


def placed(view: ResolvedView, tree: Pytree, role: str) -> Any:
    """`tree` with its arrays of the role's shape laid out so; the tree itself where no layout is
    known.

    Args:
      role: "low", "low_at_use", "basis" or "basis_at_use".
    """
    own = current(view)
    if own is None:
        return tree
    ends = (view.shrunk, view.rank) if role.startswith("basis") else (view.rank, view.kept)
    place = NamedSharding(own.mesh, getattr(own, role))

    def put(x):
        fits = tuple(x.shape) == (*view.batch, *ends)
        return jax.lax.with_sharding_constraint(x, place) if fits else x

    return jax.tree.map(put, tree)


def rows(view: ResolvedView, x: jax.Array, *, pad: bool = False) -> jax.Array:
    """A gradient `x (batch..., s, k)` as a refresh reads it, see `sharding.unshard_rows`."""
    own = current(view)
    return sharding.unshard_rows(x, pad=pad, k=None if own is None else own.k)


def divided(view: ResolvedView, x: jax.Array, axis: int) -> jax.Array:
    """`x` divided along `axis`, -1 or -2, over the whole mesh, where a layout is known: Gram
    matrices do the rest."""
    if current(view) is None:
        return x
    return (
        sharding.unshard_rows(x)
        if axis == -1
        else jnp.swapaxes(sharding.unshard_rows(jnp.swapaxes(x, -1, -2)), -1, -2)
    )


def mixed(view: ResolvedView, tree: Pytree) -> Any:
    """`tree` with its low-rank arrays whole along the rank, which a transport mixes, and divided
    along k instead."""
    if current(view) is None:
        return tree
    return jax.tree.map(
        lambda x: sharding.unshard_rows(x) if x.shape[-2:] == (view.rank, view.kept) else x, tree
    )


def as_parameter(path: str, gradient: Any) -> Any:
    """A full gradient laid out as its parameter is, so that no device holds all of it."""
    specs = sharding.current_partition_specs.get()
    if (
        specs is None
        or path not in specs
        or not isinstance(gradient, jax.Array)
        or len(specs[path]) != gradient.ndim
    ):
        return gradient
    place = NamedSharding(sharding.current_mesh.get(), PartitionSpec(*specs[path]))
    return jax.lax.with_sharding_constraint(gradient, place)
