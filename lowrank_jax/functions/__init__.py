"""Any JAX function, with kernels that may be more than arrays, and what a function says of its own
kernels."""

import functools

from lowrank_jax.functions.inference import uses, views_of

__all__ = ["uses", "views_of"]
__dir__ = functools.partial(sorted, __all__)
