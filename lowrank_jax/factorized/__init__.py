"""Weights that are low-rank, or low-rank plus sparse, from the start."""

import functools

from lowrank_jax.factorized.kernels import LowRankKernel, SparseLowRankKernel

__all__ = ["LowRankKernel", "SparseLowRankKernel"]
__dir__ = functools.partial(sorted, __all__)
