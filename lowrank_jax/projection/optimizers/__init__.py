"""Named optimizers: frozen recipes with their papers' defaults and no logic of their own, a paper a file."""

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
from lowrank_jax.projection.optimizers.recipe import Recipe, RecipeState
from lowrank_jax.projection.optimizers.rso import rso
from lowrank_jax.projection.optimizers.soap import soap
from lowrank_jax.projection.optimizers.subtrack import subtrack
from lowrank_jax.projection.optimizers.tensor_galore import tensor_galore
from lowrank_jax.projection.optimizers.trion import trion
from lowrank_jax.projection.optimizers.tsr_adam import tsr_adam

__all__ = [
    "Recipe",
    "RecipeState",
    "alice",
    "apollo",
    "apollo_mini",
    "badam",
    "coap",
    "conda",
    "dct_adamw",
    "dion",
    "dion2",
    "dion3",
    "fira",
    "flora",
    "frugal",
    "galore",
    "golore",
    "ldadam",
    "lisa",
    "lotus",
    "mofasgd",
    "muon",
    "natural_galore",
    "normuon",
    "online_subspace_descent",
    "owlore",
    "q_galore",
    "racs",
    "rso",
    "soap",
    "subtrack",
    "tensor_galore",
    "trion",
    "tsr_adam",
]
