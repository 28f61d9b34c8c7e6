"""A kernel in a program for several devices: each runs it on its own block, inside one `shard_map`.

The partitioner of an auto mesh cannot divide a kernel, and a traced array does not say where it
lies there. What is known comes from `lrx.meshes.use(mesh, rules, parameters=...)`: the mesh axes of
parameters by their paths, and those of activations' rows by the rules. A `Division` says how
operands and results lie; where none can be made, because nothing is known or the mathematics is not
local, the reference runs, which the partitioner divides.

A product `x W` divides so, where x has its rows over the mesh axes R:

    W (n, m)    axes among R are gathered, as FSDP gathers them; N and M are what remains of each
                dimension's
    x, y        (R, N) and (R, M); where N is not empty the devices' partial products are added up,
                in the dtype of y
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, PartitionSpec

from lowrank_jax import sharding
from lowrank_jax.typing import Pytree, Shape, Spec

# a program of a kernel, whatever its operands: arrays in, arrays out
Program = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Division:
    """How one call is divided over a mesh.

    Attributes:
      mesh: of `lrx.meshes.use`.
      operands: a PartitionSpec for each operand; of a tree for all of its leaves.
      results: likewise.
      around: `(program, name of its implementation)` -> what each device runs, for instance a
        program that adds up the devices' results.
      falls_back: where the kernel does not fit, each device runs the reference on its own block;
        otherwise the partitioner divides it.
    """

    mesh: Mesh
    operands: tuple[PartitionSpec, ...]
    results: Pytree
    around: Callable[[Program, str], Program] | None = None
    falls_back: bool = False

    def of(self, program: Program, name: str) -> Program:
        """The program of implementation `name` on each device's own block."""
        own = program if self.around is None else self.around(program, name)
        # unchecked: nothing is differentiated through it, and a kernel does not say over which
        # axes its results vary
        return jax.shard_map(
            own,
            mesh=self.mesh,
            in_specs=self.operands,
            out_specs=self.results,
            check_vma=False,
        )


def mesh() -> Mesh | None:
    """The auto mesh of several devices that a call may be divided over, or None."""
    # inside somebody's own shard_map blocks are divided already
    manual = AxisType.Manual in jax.sharding.get_abstract_mesh().axis_types
    return sharding.current_mesh.get() if sharding.divides() and not manual else None


@dataclasses.dataclass(frozen=True)
class Product:
    """Mesh axes of a product `x (..., n) W (n, m)`.

    A backward pass, which is traced outside `lrx.meshes.use`, finds them here.

    Attributes:
      mesh: of `lrx.meshes.use`.
      rows: of each leading axis of x.
      n, m: of the contracted dimension and of the columns.
      gathers: whether W is divided over axes of the rows too, so that it is gathered for the
        product.
    """

    mesh: Mesh
    rows: tuple[tuple[str, ...], ...]
    n: tuple[str, ...]
    m: tuple[str, ...]
    gathers: bool

    @classmethod
    def of(cls, x: jax.Array, shape: Shape, spec: Spec | None) -> Product | None:
        """For `x (..., n)` and the partition entries of W; None where the reference must serve."""
        rows, own = sharding.current_rows.get(), mesh()
        if spec is None or rows is None or own is None:
            return None
        lead = tuple(sharding.dividing(entry, own) for entry in rows)
        while lead and not lead[-1]:
            lead = lead[:-1]
        if len(lead) >= x.ndim:
            return None
        if any(size % sharding.parts(axes, own) for size, axes in zip(x.shape, lead, strict=False)):
            return None
        # axes of the mesh that divide rows of x gather W; the others stay with W
        taken = {name for axes in lead for name in axes}
        entries = [sharding.dividing(entry, own) for entry in spec]
        n, m = (tuple(name for name in entry if name not in taken) for entry in entries)
        if shape[0] % sharding.parts(n, own) or shape[1] % sharding.parts(m, own):
            return None
        gathers = any(name in taken for entry in entries for name in entry)
        undivided = ((),) * (x.ndim - 1 - len(lead))
        return cls(own, lead + undivided, n, m, gathers)

    @property
    def transposed(self) -> Product:
        """Of the product with the transpose, `dy Wᵀ`."""
        return dataclasses.replace(self, n=self.m, m=self.n)

    def added(self, program: Program, name: str) -> Program:
        """`program` with the devices' partial products added up."""
        del name
        if not self.n:
            return program
        return lambda *operands: jax.lax.psum(program(*operands), self.n)

    def along(self, last: tuple[str, ...] = ()) -> PartitionSpec:
        """Of an array with the rows of x and one more axis."""
        return matrix(*self.rows, last)


def matrix(*axes: tuple[str, ...]) -> PartitionSpec:
    """The PartitionSpec of an array whose axes are divided over these mesh axes."""
    return PartitionSpec(*(own or None for own in axes))
