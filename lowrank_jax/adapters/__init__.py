"""Adapters: re-parameterisations of a frozen weight, each a frozen description of pure functions.

>>> import jax, jax.numpy as jnp
>>> import lowrank_jax as lrx
>>> params = {"dense": {"kernel": jnp.ones((8, 16))}}
>>> adaptation = lrx.adapt(params, lrx.adapters.lora(rank=4), jax.random.key(0))
>>> adaptation.trained
96
"""

import functools

from lowrank_jax import deprecations
from lowrank_jax.adapters.adaptation import Adaptation
from lowrank_jax.adapters.base import Adapter, Factors, Group, Site, Transition, matrix_op
from lowrank_jax.adapters.combination import combine
from lowrank_jax.adapters.conversion import Conversion, absorb
from lowrank_jax.adapters.families.dora import dora
from lowrank_jax.adapters.families.dylora import dylora
from lowrank_jax.adapters.families.fourierft import fourierft
from lowrank_jax.adapters.families.hira import hira
from lowrank_jax.adapters.families.loha import loha
from lowrank_jax.adapters.families.lora import lora
from lowrank_jax.adapters.families.miss import miss
from lowrank_jax.adapters.families.oft import oft
from lowrank_jax.adapters.families.rand_lora import rand_lora
from lowrank_jax.adapters.families.shira import shira
from lowrank_jax.adapters.families.uni_lora import uni_lora
from lowrank_jax.adapters.families.vera import vera
from lowrank_jax.adapters.federated import fed_svd
from lowrank_jax.adapters.hosts import AdaptedKernel, Bound, attend, conv, embed
from lowrank_jax.adapters.named import (
    at_rank,
    candidate_ids,
    candidates,
    hot_swap,
    padded,
    weighted,
)
from lowrank_jax.adapters.partition import join, partition
from lowrank_jax.adapters.partition_specs import partition_specs, shardings
from lowrank_jax.adapters.rules import ALL_LINEAR, Layout
from lowrank_jax.adapters.starts.drawn import gaussian, kaiming, orthogonal
from lowrank_jax.adapters.starts.olora import olora
from lowrank_jax.adapters.starts.pissa import pissa
from lowrank_jax.adapters.transitions import transition
from lowrank_jax.adapters.tree import unmerge
from lowrank_jax.functions.rules import rule
from lowrank_jax.kernel_node import Op
from lowrank_jax.optim.pair_optimizers import precondition_pairs

__all__ = [
    "ALL_LINEAR",
    "Adaptation",
    "AdaptedKernel",
    "Adapter",
    "Bound",
    "Conversion",
    "Factors",
    "Group",
    "Layout",
    "Op",
    "Site",
    "Transition",
    "absorb",
    "at_rank",
    "attend",
    "candidate_ids",
    "candidates",
    "combine",
    "conv",
    "dora",
    "dylora",
    "embed",
    "fed_svd",
    "fourierft",
    "gaussian",
    "hira",
    "hot_swap",
    "join",
    "kaiming",
    "loha",
    "lora",
    "matrix_op",
    "miss",
    "oft",
    "olora",
    "orthogonal",
    "padded",
    "partition",
    "partition_specs",
    "pissa",
    "precondition_pairs",
    "rand_lora",
    "rule",
    "shardings",
    "shira",
    "transition",
    "uni_lora",
    "unmerge",
    "vera",
    "weighted",
]

__getattr__ = deprecations.names(__name__)
__dir__ = functools.partial(sorted, __all__)
