"""Projectors: which subspace. See `base` for the interface; each is a frozen dataclass of pure
functions."""

from lowrank_jax.projection.projectors.base import Projector
from lowrank_jax.projection.projectors.decomposed import (
    alternating,
    given,
    identity,
    power,
    randomized,
    svd,
    svd_two_sided,
)
from lowrank_jax.projection.projectors.random import random
from lowrank_jax.projection.projectors.selected import columns, dct, dct2, dct3, hadamard

__all__ = [
    "Projector",
    "alternating",
    "columns",
    "dct",
    "dct2",
    "dct3",
    "given",
    "hadamard",
    "identity",
    "power",
    "random",
    "randomized",
    "svd",
    "svd_two_sided",
]
