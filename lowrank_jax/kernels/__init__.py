"""Pallas kernels, each with a reference in jnp, a program for TPUs and one for NVIDIA GPUs.

A kernel is here because its program moves fewer bytes than XLA's own fusions; `experiments/results/kernels.json` has
both counts, and those of kernels that were tried and deleted. No device has timed them, so every option that takes one
is off by default.
"""

from lowrank_jax.kernels._platform import CHIPS, IMPLEMENTATIONS
from lowrank_jax.kernels._thin import thin_linear

__all__ = ["CHIPS", "IMPLEMENTATIONS", "thin_linear"]
