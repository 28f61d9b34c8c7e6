"""Projectors: which subspace. See `base` for the interface; each is a frozen dataclass of pure
functions."""

import functools

from lowrank_jax.projection.projectors.alternating import alternating
from lowrank_jax.projection.projectors.alternating_two_sided import alternating_two_sided
from lowrank_jax.projection.projectors.base import Projector, StoredProjector
from lowrank_jax.projection.projectors.columns import columns
from lowrank_jax.projection.projectors.correlated import correlated
from lowrank_jax.projection.projectors.dct import dct, dct2, dct3
from lowrank_jax.projection.projectors.given import given
from lowrank_jax.projection.projectors.grassmann import grassmann
from lowrank_jax.projection.projectors.hadamard import hadamard
from lowrank_jax.projection.projectors.identity import identity
from lowrank_jax.projection.projectors.online_pca import online_pca
from lowrank_jax.projection.projectors.power import power
from lowrank_jax.projection.projectors.random import random
from lowrank_jax.projection.projectors.randomized import randomized
from lowrank_jax.projection.projectors.randomized_two_sided import randomized_two_sided
from lowrank_jax.projection.projectors.ranked import ranked
from lowrank_jax.projection.projectors.svd import svd, svd_two_sided
from lowrank_jax.projection.projectors.switch import switch
from lowrank_jax.projection.projectors.switching import switching
from lowrank_jax.projection.projectors.tucker import tucker
from lowrank_jax.projection.state import RefreshInputs

__all__ = [
    "Projector",
    "RefreshInputs",
    "StoredProjector",
    "alternating",
    "alternating_two_sided",
    "columns",
    "correlated",
    "dct",
    "dct2",
    "dct3",
    "given",
    "grassmann",
    "hadamard",
    "identity",
    "online_pca",
    "power",
    "random",
    "randomized",
    "randomized_two_sided",
    "ranked",
    "svd",
    "svd_two_sided",
    "switch",
    "switching",
    "tucker",
]
__dir__ = functools.partial(sorted, __all__)
