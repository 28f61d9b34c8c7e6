"""How the two factors of LoRA start."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax

from lowrank_jax.adapters.base import (
    Site,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Init:
    """How the two factors start. `offset` says that the start is not zero and is subtracted."""

    reads_kernel: ClassVar[bool] = False
    offset: ClassVar[bool] = False

    def validate(self, site: Site) -> None:
        """ValueError, naming path, value and remedy, where a site does not fit."""

    def __call__(
        self, key: jax.Array, site: Site, kernel: jax.Array | None, scale: jax.Array
    ) -> tuple[Any, Any]:
        """`(a (n, r), b (r, m))`; entries beyond a matrix's own rank are masked by `scale`, not
        here."""
        raise NotImplementedError
