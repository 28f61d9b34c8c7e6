"""Which program of a kernel runs, and how much fast memory a chip has for its blocks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from lowrank_jax import sharding
from lowrank_jax.kernels._divided import Division

IMPLEMENTATIONS = ("reference", "tpu", "gpu")


class Misfit(ValueError):
    """No tile of a kernel fits the chip, or the kernel does not take the shape there."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fast:
    """The memory next to the compute units: VMEM of a TensorCore, shared memory that one block may
    ask for.

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
# The compiler's own scratch and what a pipeline holds beside its blocks. Without a chip the
# smallest of a platform.
_SHARE = 0.75


def budget(platform: str, chip: str | None) -> int:
    """Bytes that the blocks of one program may take; of a chip of another platform, those of this
    platform's smallest.

    Raises:
      ValueError: for a chip that is not in the table.

    >>> budget("tpu", "v5e") // 2**20, budget("tpu", None) // 2**20
    (96, 48)
    """
    own = {name: fast.bytes for name, fast in CHIPS.items() if fast.platform == platform}
    if chip is not None and chip not in own:
        if chip not in CHIPS:
            raise ValueError(
                f"chip={chip!r} must be one of {tuple(CHIPS)}, or None for the smallest of its "
                "platform"
            )
        chip = None  # this platform's program is traced, another one's runs
    return int(_SHARE * (min(own.values()) if chip is None else own[chip]))


def vmem(chip: str | None) -> int:
    """Bytes of a TPU's VMEM; where no TPU is named, of the largest."""
    sizes = {name: fast.bytes for name, fast in CHIPS.items() if fast.platform == "tpu"}
    return sizes.get(chip or "", max(sizes.values()))


def settled(implementation: str | None, division: Any) -> str | None:
    """The implementation, which is the reference on an auto mesh of several devices where no
    division is known.

    The partitioner cannot divide a kernel.
    """
    return (
        "reference"
        if implementation is None and division is None and sharding.divides()
        else implementation
    )


def dispatch(
    implementation: str | None,
    interpret: bool,
    *operands: Any,
    division: Division | None = None,
    **programs: Callable[..., Any],
) -> tuple[Any, ...]:
    """`programs[implementation](*operands)`; None takes the one of the platform that is compiled
    for, if it fits there.

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
    if settled(implementation, division) == "reference":
        return reference(*operands)
    own = (
        programs
        if division is None
        else {name: division.of(program, name) for name, program in programs.items()}
    )
    if implementation is not None:
        return own[implementation](*operands)
    fallback = own["reference"] if division is not None and division.falls_back else reference

    def if_it_fits(program):
        def run(*operands):
            try:
                return program(*operands)
            except Misfit:
                return fallback(*operands)

        return run

    return jax.lax.platform_dependent(
        *operands, tpu=if_it_fits(own["tpu"]), cuda=if_it_fits(own["gpu"]), default=reference
    )


def output(shape: tuple[int, ...], x: jax.Array) -> jax.ShapeDtypeStruct:
    """What a kernel writes: of this shape, in the dtype of x, varying where x does inside
    `jax.shard_map`."""
    return jax.ShapeDtypeStruct(shape, x.dtype, manual_axis_type=jax.typeof(x).manual_axis_type)


def folded(program: Callable[..., Any]) -> Callable[..., Any]:
    """`program(x (N, n), ...)` for an x with any leading axes, which come back in its results.

    They are folded on each device: a mesh may divide several of them.
    """

    def run(x, *operands):
        found = program(x.reshape(-1, x.shape[-1]), *operands)
        return jax.tree.map(lambda y: y.reshape(*x.shape[:-1], -1), found)

    return run


def largest(
    limit: int,
    costs: Callable[[int, int], int],
    rows: tuple[int, ...],
    cols: tuple[int, ...],
    what: str,
):
    """The pair of most rows, then of most columns, of which `costs(rows, cols)` stays within
    `limit` bytes.

    Raises:
      Misfit: where none fits.
    """
    fits = [(r, c) for r in rows for c in cols if costs(r, c) <= limit]
    if not fits:
        least = costs(min(rows), min(cols))
        raise Misfit(
            f"{what}: the smallest tile needs {least} bytes of fast memory and the chip lends "
            f"{limit}; implementation='reference' has no such bound, nor has a chip= with more"
        )
    return max(fits)
