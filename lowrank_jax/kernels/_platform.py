"""Which program of a kernel runs, and how much fast memory a chip has for its blocks."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import pallas as pl

from lowrank_jax import sharding
from lowrank_jax.kernels._divided import Division, Product, Program
from lowrank_jax.typing import Pytree, Shape

IMPLEMENTATIONS = ("reference", "tpu", "gpu")

# columns of a register of a TPU, and of what VMEM gives a row
LANES = 128


class Misfit(ValueError):
    """No tile of a kernel fits the chip, or the kernel does not take the shape there."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fast:
    """The memory next to the compute units.

    VMEM of a TensorCore; on a GPU the shared memory that one block may ask for.

    Attributes:
      platform: "tpu" or "gpu".
      bytes: its size.
    """

    platform: str
    bytes: int


# TPUs: jax's own table (pallas, `mosaic/tpu_info.py`). GPUs: CUDA programming guide, "maximum
# amount of shared memory per thread block" by compute capability (9.0; 8.0; 8.9).
CHIPS = {
    "v5e": Fast(platform="tpu", bytes=128 * 2**20),
    "v6e": Fast(platform="tpu", bytes=128 * 2**20),
    "v5p": Fast(platform="tpu", bytes=64 * 2**20),
    "h100": Fast(platform="gpu", bytes=227 * 2**10),
    "h200": Fast(platform="gpu", bytes=227 * 2**10),
    "a100": Fast(platform="gpu", bytes=163 * 2**10),
    "rtx4090": Fast(platform="gpu", bytes=99 * 2**10),
}
# What blocks may take: the rest is the compiler's own scratch and what a pipeline holds with them.
_SHARE = 0.75


def budget(platform: str, chip: str | None) -> int:
    """Bytes that the blocks of one program may take.

    Of no chip, and of a chip of another platform, those of this platform's smallest.

    Raises:
      ValueError: for a chip that is not in the table.

    >>> budget("tpu", "v5e") // 2**20, budget("tpu", None) // 2**20
    (96, 48)
    """
    own = _sizes(platform)
    if chip is not None and chip not in own:
        if chip not in CHIPS:
            raise ValueError(
                f"chip={chip!r} must be one of {tuple(CHIPS)}, or None for the smallest of its "
                "platform"
            )
        chip = None  # this platform's program is traced, another one's runs
    size = min(own.values()) if chip is None else own[chip]
    return int(_SHARE * size)


def vmem(chip: str | None) -> int:
    """Bytes of a TPU's VMEM; where no TPU is named, of the largest."""
    sizes = _sizes("tpu")
    return sizes.get(chip or "", max(sizes.values()))


def vmem_limit(chip: str | None) -> int:
    """Bytes that Mosaic may take for one program: a sixth more than its blocks, for scratch."""
    return budget("tpu", chip) * 7 // 6


def _sizes(platform: str) -> dict[str, int]:
    return {name: fast.bytes for name, fast in CHIPS.items() if fast.platform == platform}


def wide(size: int, to: int = LANES) -> int:
    """The least multiple of `to` that holds `size`.

    By default what a narrow array takes of the lanes of VMEM, which it fills in part.
    """
    return -(-size // to) * to


def chosen(implementation: str | None, division: Division | Product | None) -> str | None:
    """The implementation, for a program that may be divided over a mesh.

    It is the reference on an auto mesh of several devices where no division is known: the
    partitioner cannot divide a kernel.
    """
    unknown = implementation is None and division is None and sharding.divides()
    return "reference" if unknown else implementation


def in_chunks(size: int, chunk: int, part: Callable[[Any, int], None]) -> None:
    """`part(start, length)` over an axis of `size` entries, `chunk` of them at a time.

    A loop: Mosaic unrolls what stands inside one product, and compiles a large one for minutes.
    """
    full, rest = divmod(size, chunk)
    if full:

        @pl.loop(0, full)
        def _(step):
            # the start is named as a multiple, or Mosaic would not know that rows are aligned
            part(pl.multiple_of(step * chunk, chunk), chunk)

    if rest:
        part(full * chunk, rest)


def dispatch(
    implementation: str | None,
    interpret: bool,
    *operands: Pytree,
    division: Division | None = None,
    **programs: Program,
) -> Any:
    """`programs[implementation](*operands)`; None takes that of the platform, where it fits.

    The choice is made when the program is lowered, so that compiling for a device that is not there
    takes its branch. Inside `lrx.meshes.use` of several devices on an auto mesh each device runs
    the kernel on its own block by a `division`; without one, on other platforms, and where no tile
    fits unless the division says otherwise, the partitioner divides the reference.

    Raises:
      ValueError: for an unknown implementation, or `interpret` without the name of a kernel.
      Misfit: where the named kernel does not fit; without a name the reference runs there.
    """
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation={implementation!r} must be one of {IMPLEMENTATIONS}, or None"
        )
    if interpret and implementation in (None, "reference"):
        raise ValueError(
            f"interpret=True with implementation={implementation!r}: name the kernel to interpret, "
            "'tpu' or 'gpu'"
        )
    reference = programs["reference"]
    if chosen(implementation, division) == "reference":
        return reference(*operands)
    own = programs
    if division is not None:
        own = {name: division.of(program, name) for name, program in programs.items()}
    if implementation is not None:
        return own[implementation](*operands)
    fallback = reference
    if division is not None and division.falls_back:
        fallback = own["reference"]

    def if_it_fits(program: Program) -> Program:
        def run(*operands):
            # sizes are static, so a misfit shows while the branch is traced
            try:
                return program(*operands)
            except Misfit:
                return fallback(*operands)

        return run

    # all branches are traced; lowering keeps the one of the platform that is compiled for
    return jax.lax.platform_dependent(
        *operands,
        tpu=if_it_fits(own["tpu"]),
        cuda=if_it_fits(own["gpu"]),
        default=reference,
    )


def output(shape: Shape, x: jax.Array) -> jax.ShapeDtypeStruct:
    """What a kernel writes: of this shape, and else like x.

    In its dtype, and inside `jax.shard_map` varying over the mesh axes over which x varies.
    """
    varying = jax.typeof(x).manual_axis_type
    return jax.ShapeDtypeStruct(shape, x.dtype, manual_axis_type=varying)


def folded(program: Program) -> Program:
    """`program(x (N, n), ...)` for an x with any leading axes, which come back in its results.

    They are folded on each device: a mesh may divide several of them.
    """

    def run(x, *operands):
        *lead, n = x.shape
        results = program(x.reshape(-1, n), *operands)
        return jax.tree.map(lambda y: y.reshape(*lead, -1), results)

    return run


def largest(
    limit: int,
    costs: Callable[[int, int], int],
    rows: tuple[int, ...],
    cols: tuple[int, ...],
    what: str,
) -> tuple[int, int]:
    """The pair of most rows, then of most columns, whose `costs` stay within `limit` bytes.

    Raises:
      Misfit: where none fits.
    """
    pairs = itertools.product(rows, cols)
    fits = [pair for pair in pairs if costs(*pair) <= limit]
    if not fits:
        least = costs(min(rows), min(cols))
        raise Misfit(
            f"{what}: the smallest tile needs {least} bytes of fast memory and the chip lends "
            f"{limit}; implementation='reference' has no such bound, nor has a chip= with more"
        )
    return max(fits)
