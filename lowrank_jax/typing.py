"""Names for what annotations mean, where Python's types say too little."""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
from jax.typing import ArrayLike as _ArrayLike
from jax.typing import DTypeLike as _DTypeLike

Scalar: TypeAlias = jax.Array | float | int
"""A number, or an array of shape (), traced or not: hyper-parameters that may be injected, and flags of a step."""

Pytree: TypeAlias = Any
"""Any nesting of containers with arrays at the leaves: parameters, gradients, states."""

Key: TypeAlias = jax.Array
"""A typed random key, or an array of keys with batch axes."""

Kernel: TypeAlias = Any
"""A weight as a product meets it: an array, or a node that stands in its place (tapped, adapted, quantised)."""

Shape: TypeAlias = tuple[int, ...]
"""Sizes of axes."""

Spec: TypeAlias = tuple[Any, ...]
"""Partition entries, one for each axis: None, the name of a mesh axis, or a tuple of names."""

DTypeLike: TypeAlias = _DTypeLike
"""What `jnp.dtype` takes: a dtype, a scalar type, or a name."""

ArrayLike: TypeAlias = _ArrayLike
"""What `jnp.asarray` takes: an array of JAX or NumPy, or a number."""

Rank: TypeAlias = int | float | tuple[tuple[str, int | float], ...]
"""An integer, a fraction of the shrunk dimension, or either by path: `((pattern, rank), ...)`."""

Rate: TypeAlias = Scalar | Callable[[Any], Any]
"""A number, or an optax schedule from the 0-based step to one: learning rates and decays."""
