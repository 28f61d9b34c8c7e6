"""Numbers and dtypes that users give, checked at construction: one rule for every optimizer and
every adapter.

Only concrete numbers are checked, Python's and NumPy's. Traced ones (`optax.inject_hyperparams`
makes them of all numbers), arrays and schedules pass, and so does None.
"""

from __future__ import annotations

import difflib
import math
from numbers import Integral, Real
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax.trees import is_quantized, leaves_with_metadata
from lowrank_jax.typing import Pytree


def is_number(value: Any) -> bool:
    """Whether this is a concrete real number; booleans are none."""
    return isinstance(value, Real) and not isinstance(value, (bool, np.bool_))


def is_integer(value: Any) -> bool:
    """Whether this is a concrete integer, Python's or NumPy's; booleans are none.

    >>> import numpy as np
    >>> is_integer(8), is_integer(np.int64(8)), is_integer(8.0), is_integer(True)
    (True, True, False, False)
    """
    return isinstance(value, Integral) and is_number(value)


def as_python(value: Any) -> Any:
    """Python's number for one of NumPy's; anything else as it is. Documents are written from such
    numbers.

    >>> import numpy as np
    >>> as_python(np.int64(8)), as_python(np.float32(0.5)), as_python(None)
    (8, 0.5, None)
    """
    return value.item() if isinstance(value, np.generic) else value


def is_zero(value: Any) -> bool:
    """Whether this is a concrete number, and zero."""
    return is_number(value) and value == 0


def check_number(
    field: str,
    value: Any,
    *,
    at_least: float = -math.inf,
    above: float = -math.inf,
    below: float = math.inf,
    otherwise: str = "",
) -> None:
    """ValueError for a concrete number that is not finite, or out of range.

    Args:
      field: what to call it, with the method in front.
      value: the number, or anything that is not checked.
      at_least, above, below: the range.
      otherwise: what else the field may be, for the message.

    >>> check_number("galore: scale", 0.25, at_least=0)
    >>> check_number("galore: weight_decay", float("nan"), at_least=0)
    Traceback (most recent call last):
        ...
    ValueError: galore: weight_decay=nan must be a finite number of at least 0
    """
    if not is_number(value):
        return
    try:
        is_finite = math.isfinite(value)
    except OverflowError:  # an integer beyond the largest float
        is_finite = False
    if is_finite and value >= at_least and value > above and value < below:
        return
    bounds = [f"of at least {at_least}"] if at_least > -math.inf else []
    bounds += [f"above {above}"] if above > -math.inf else []
    bounds += [f"below {below}"] if below < math.inf else []
    range_ = " ".join(["a finite number", " and ".join(bounds)]).strip()
    other = otherwise and f", or {otherwise}"
    raise ValueError(f"{field}={value} must be {range_}{other}")


def check_integer(field: str, value: Any, *, at_least: int, otherwise: str = "") -> None:
    """ValueError for a concrete number that is no integer, or too small.

    >>> check_integer("every: period", 2.5, at_least=1)
    Traceback (most recent call last):
        ...
    ValueError: every: period=2.5 must be an integer of at least 1
    """
    if is_number(value) and not (is_integer(value) and value >= at_least):
        other = otherwise and f", or {otherwise}"
        raise ValueError(f"{field}={value} must be an integer of at least {at_least}{other}")


def check_static(field: str, value: Any) -> None:
    """ValueError for a traced number where shapes or the length of a program follow from it.

    >>> import jax
    >>> jax.jit(lambda n: check_static("newton_schulz: steps", n))(5)
    Traceback (most recent call last):
        ...
    ValueError: newton_schulz: steps is a traced array, and must be a Python number; under optax.inject_hyperparams ...
    """
    if isinstance(value, jax.Array):
        name = field.rpartition(" ")[2]
        raise ValueError(
            f"{field} is a traced array, and must be a Python number; under "
            f"optax.inject_hyperparams pass static_args=({name!r},)"
        )


def check_floating(tree: Pytree, who: str) -> None:
    """ValueError for leaves that are complex, integer or boolean: moments and updates here are real
    numbers.

    Quantised arrays stand for real ones. A complex gradient would lose its imaginary part, and an
    integer parameter would be moved by integers.

    >>> import jax.numpy as jnp
    >>> check_floating({"w": jnp.ones(2, jnp.complex64)}, "galore")
    Traceback (most recent call last):
        ...
    ValueError: galore: leaf 'w' is complex64, and only real floating-point leaves are optimized; train its real and ...
    """
    for path, leaf, _ in leaves_with_metadata(tree):
        dtype = getattr(leaf, "dtype", None)
        if dtype is None or is_quantized(leaf) or jnp.issubdtype(dtype, jnp.floating):
            continue
        remedy = "leave it out of the parameters, or give it another optimizer with optax.partition"
        if jnp.issubdtype(dtype, jnp.complexfloating):
            remedy = (
                "train its real and imaginary parts as two leaves, or "
                + remedy.partition(", or ")[2]
            )
        raise ValueError(
            f"{who}: leaf {path or '(bare array)'!r} is {dtype}, and only real floating-point "
            f"leaves are optimized; {remedy}"
        )


def no_match(field: str, pattern: str, paths: list[str]) -> ValueError:
    """The error of a pattern that matches nothing, with what it may have meant."""
    near = difflib.get_close_matches(pattern, paths, n=3, cutoff=0.4)
    hint = f" Did you mean {near}?" if near else ""
    return ValueError(
        f"{field}: {pattern!r} matches no leaf that it could apply to (patterns must match the "
        f"whole path, and the first rule wins).{hint} Paths here: {listed(paths)}"
    )


def listed(paths: list[str]) -> str:
    """The first paths of a tree, for an error."""
    return str(paths[:12]) + (" ..." if len(paths) > 12 else "")
