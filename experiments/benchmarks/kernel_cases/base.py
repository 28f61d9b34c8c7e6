"""One comparison: a user's program in jnp and the kernel's, on the same operands."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Both programs, to be compiled and counted.

    Attributes:
      labels: what tells this row from the kernel's others: matrix, part, dtype.
      operands: `jax.ShapeDtypeStruct`s.
      xla: the program without the kernel, the best that jnp and XLA have, not a straw man.
      pallas: the program with the kernel, its implementation named where that is possible.
      donate: which operands both programs may write over.
      reread: bytes that the grid of the TPU kernel reads again, which the HLO does not show.
      facts: further columns: tile, bytes of fast memory.
    """

    labels: Mapping[str, str]
    operands: tuple[Any, ...]
    xla: Callable[..., Any]
    pallas: Callable[..., Any]
    donate: tuple[int, ...] = ()
    reread: int = 0
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
