"""Pallas kernels, each with a reference in jnp, a program for TPUs and one for NVIDIA GPUs.

A kernel is here because its program moves fewer bytes than XLA's own fusions, or as many with fewer
operations; `experiments/results/kernels.json` has both counts, and those of kernels that were tried
and deleted or not written. No device has timed them, so every option that takes one is off by
default.
"""

from lowrank_jax import deprecations
from lowrank_jax.kernels._dct import dct_scores
from lowrank_jax.kernels._lora_linear import lora_linear
from lowrank_jax.kernels._low_rank_adam import low_rank_adam
from lowrank_jax.kernels._nf4 import nf4_linear
from lowrank_jax.kernels._platform import CHIPS, IMPLEMENTATIONS

__all__ = ["CHIPS", "IMPLEMENTATIONS", "dct_scores", "lora_linear", "low_rank_adam", "nf4_linear"]

__getattr__ = deprecations.names(__name__)
