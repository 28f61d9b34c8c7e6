"""What every file of this package shares: the dtype rule, precise products and the argument
checks."""

from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax.typing import ArrayLike, DTypeLike

Array = jax.Array


def working_dtype(dtype: DTypeLike) -> Any:
    """float64 stays float64; every other real dtype is computed, and returned, in float32."""
    if jnp.issubdtype(dtype, jnp.complexfloating):
        raise TypeError(
            f"dtype {jnp.dtype(dtype).name} is complex; pass the real and imaginary parts "
            "separately"
        )
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def as_array(x: ArrayLike) -> Array:
    """x as a real array in the working dtype."""
    x = jnp.asarray(x)
    return x.astype(working_dtype(x.dtype))


def require_matrix(x: ArrayLike, name: str = "x") -> Array:
    """x as an array, refused by name unless it is a matrix or a stack of matrices."""
    x = jnp.asarray(x)
    if x.ndim < 2:
        raise ValueError(
            f"{name} has shape {x.shape}; give a matrix (rows, cols) or a stack (..., rows, cols)"
        )
    return x


def as_matrix(x: ArrayLike, name: str = "x") -> Array:
    """A matrix or stack (..., rows, cols) in the working dtype."""
    return as_array(require_matrix(x, name))


def is_integer(value: Any) -> bool:
    """Whether this is a concrete integer, Python's or NumPy's; booleans are none."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def check_rank(
    rank: Any, limit: int, name: str = "rank", what: str = "the smaller matrix dimension"
) -> int:
    """rank as an int in [1, limit]; it fixes shapes, so it must be static."""
    if not is_integer(rank):
        raise TypeError(
            f"{name}={rank!r} must be a Python int: it fixes shapes, so make it static under jit"
        )
    if not 1 <= rank <= limit:
        raise ValueError(f"{name}={rank} must lie in [1, {limit}], where {limit} is {what}")
    return int(rank)


def check_choice(name: str, value: Any, choices: Collection[Any]) -> None:
    """Refuse a value that is not among the choices, naming both."""
    if value not in choices:
        raise ValueError(
            f"{name}={value!r} is unknown; choose one of {', '.join(map(repr, choices))}"
        )


def check_axis(axis: int, ndim: int) -> int:
    """axis as a non-negative number."""
    if not -ndim <= axis < ndim:
        raise ValueError(
            f"axis={axis} is out of range for an array of {ndim} axes; choose one in [{-ndim}, "
            f"{ndim})"
        )
    return axis % ndim


def transpose(x: Array) -> Array:
    """The last two axes swapped."""
    return jnp.swapaxes(x, -1, -2)


def product(a: Array, b: Array) -> Array:
    """a @ b in full precision: the default of TPUs (bf16) and GPUs (TF32) would cost orthogonality
    three digits."""
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def divide(numerator: Array, denominator: Array) -> Array:
    """numerator / denominator, and 0 where the denominator is 0; gradients are finite there too."""
    zero = denominator == 0
    return jnp.where(zero, 0, numerator / jnp.where(zero, 1, denominator))
