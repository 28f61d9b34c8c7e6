"""Functions of one matrix on stacks of them."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from lowrank_jax.matrices import ResolvedView
from lowrank_jax.typing import Shape


def count(view: ResolvedView) -> int:
    """Number of matrices in a leaf."""
    total = 1
    for size in view.batch:
        total *= size
    return total


def each(function: Callable, batch: Shape) -> Callable:
    """`function` of one matrix, vmapped over the batch axes."""
    for _ in batch:
        function = jax.vmap(function)
    return function


def layer_numbers(view: ResolvedView) -> jax.Array:
    """`0 .. L-1` in the shape of the batch axes; () for a single matrix."""
    return jnp.arange(count(view), dtype=jnp.int32).reshape(view.batch)
