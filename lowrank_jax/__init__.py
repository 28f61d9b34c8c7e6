"""lowrank_jax: low-rank training in JAX, as small pure functions.

>>> import jax.numpy as jnp, optax
>>> import lowrank_jax as lrx
>>> params = {"dense": {"kernel": jnp.ones((32, 64)), "bias": jnp.zeros(64)}}
>>> tx = optax.chain(optax.clip_by_global_norm(1.0), lrx.galore(1e-2, rank=8))
>>> state = tx.init(params)
>>> updates, state = tx.update(params, state, params)

What is public is here: verbs and types, named optimizers, and rooms (modules). `WORKSPACE.md` has
the list.
"""

import functools

from lowrank_jax import (
    adapters,
    deprecations,
    factorized,
    functions,
    linalg,
    linen,
    memory,
    projection,
    resolution,
)
from lowrank_jax.adapters.conversion import to_lora
from lowrank_jax.adapters.tree import adapt, attach, effective, merge
from lowrank_jax.functions.adapted import adapted, tapped
from lowrank_jax.functions.products import dot_general, einsum, matmul
from lowrank_jax.kernel_node import KernelNode
from lowrank_jax.matrices import MatrixView
from lowrank_jax.optim import inner, scales, surgery
from lowrank_jax.optim.learning_rate import apply_learning_rate
from lowrank_jax.optim.pair_optimizers import altlora, altlora_plus, lora_plus, scaled_adamw
from lowrank_jax.projection import (
    projectors,
    rank_schedules,
    refresh_schedules,
    residuals,
    samplers,
    targets,
    transports,
)
from lowrank_jax.projection.fused import fused
from lowrank_jax.projection.layerwise import layerwise_step
from lowrank_jax.projection.optimizers.alice import alice
from lowrank_jax.projection.optimizers.apollo import apollo, apollo_mini
from lowrank_jax.projection.optimizers.badam import badam
from lowrank_jax.projection.optimizers.coap import coap
from lowrank_jax.projection.optimizers.conda import conda
from lowrank_jax.projection.optimizers.dct_adamw import dct_adamw
from lowrank_jax.projection.optimizers.dion import dion
from lowrank_jax.projection.optimizers.dion2 import dion2
from lowrank_jax.projection.optimizers.dion3 import dion3
from lowrank_jax.projection.optimizers.fira import fira
from lowrank_jax.projection.optimizers.flora import flora
from lowrank_jax.projection.optimizers.frugal import frugal
from lowrank_jax.projection.optimizers.galore import galore
from lowrank_jax.projection.optimizers.golore import golore
from lowrank_jax.projection.optimizers.ldadam import ldadam
from lowrank_jax.projection.optimizers.lisa import lisa
from lowrank_jax.projection.optimizers.lotus import lotus
from lowrank_jax.projection.optimizers.mofasgd import mofasgd
from lowrank_jax.projection.optimizers.muon import muon
from lowrank_jax.projection.optimizers.natural_galore import natural_galore
from lowrank_jax.projection.optimizers.normuon import normuon
from lowrank_jax.projection.optimizers.online_subspace_descent import online_subspace_descent
from lowrank_jax.projection.optimizers.owlore import owlore
from lowrank_jax.projection.optimizers.q_galore import q_galore
from lowrank_jax.projection.optimizers.racs import racs
from lowrank_jax.projection.optimizers.rso import rso
from lowrank_jax.projection.optimizers.soap import soap
from lowrank_jax.projection.optimizers.subtrack import subtrack
from lowrank_jax.projection.optimizers.tensor_galore import tensor_galore
from lowrank_jax.projection.optimizers.trion import trion
from lowrank_jax.projection.optimizers.tsr_adam import tsr_adam
from lowrank_jax.projection.partition_specs import state_shardings
from lowrank_jax.projection.taps import check_taps, projected_value_and_grad, taps
from lowrank_jax.projection.training import train_step
from lowrank_jax.projection.transformation import explain, scale_by_projection
from lowrank_jax.resolution import Views
from lowrank_jax.sharding import meshes
from lowrank_jax.version import __version__

# nnx and interop, which import flax.nnx and read other people's files, come at their first use
LAZY = ("interop", "nnx")

__all__ = [
    "KernelNode",
    "MatrixView",
    "Views",
    "__version__",
    "adapt",
    "adapted",
    "adapters",
    "alice",
    "altlora",
    "altlora_plus",
    "apollo",
    "apollo_mini",
    "apply_learning_rate",
    "attach",
    "badam",
    "check_taps",
    "coap",
    "conda",
    "dct_adamw",
    "dion",
    "dion2",
    "dion3",
    "dot_general",
    "effective",
    "einsum",
    "explain",
    "factorized",
    "fira",
    "flora",
    "frugal",
    "functions",
    "fused",
    "galore",
    "golore",
    "inner",
    "interop",
    "layerwise_step",
    "ldadam",
    "linalg",
    "linen",
    "lisa",
    "lora_plus",
    "lotus",
    "matmul",
    "memory",
    "merge",
    "meshes",
    "mofasgd",
    "muon",
    "natural_galore",
    "nnx",
    "normuon",
    "online_subspace_descent",
    "owlore",
    "projected_value_and_grad",
    "projection",
    "projectors",
    "q_galore",
    "racs",
    "rank_schedules",
    "refresh_schedules",
    "residuals",
    "resolution",
    "rso",
    "samplers",
    "scale_by_projection",
    "scaled_adamw",
    "scales",
    "soap",
    "state_shardings",
    "subtrack",
    "surgery",
    "tapped",
    "taps",
    "targets",
    "tensor_galore",
    "to_lora",
    "train_step",
    "transports",
    "trion",
    "tsr_adam",
]

__getattr__ = deprecations.names(__name__, lazy=LAZY)
__dir__ = functools.partial(sorted, __all__)
