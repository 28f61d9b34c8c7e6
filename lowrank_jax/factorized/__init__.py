"""Weights that are low-rank, or low-rank plus sparse, from the start."""

from lowrank_jax.factorized.kernels import LowRankKernel, SparseLowRankKernel

__all__ = ["LowRankKernel", "SparseLowRankKernel"]
