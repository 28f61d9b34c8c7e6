"""Models of Flax linen that hold their adapters.

A model that exists, of linen or of anything else, stays as it is: `lrx.adapted(function)` takes what
`lrx.attach` puts in the kernels' places. `WithAdapter` is for authors who want adapters to be
parameters of their model; `insert` and `extract` bring those of an adaptation in and out.
"""

import functools

from lowrank_jax import deprecations
from lowrank_jax.linen.wrapper import WithAdapter, extract, insert

__all__ = ["WithAdapter", "extract", "insert"]
__getattr__ = deprecations.names(__name__)
__dir__ = functools.partial(sorted, __all__)
