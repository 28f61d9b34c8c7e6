"""Short texts for `repr`: what an object is, without the numbers in its arrays.

Classes derive from `Short`, and so do all that derive from them; NamedTuples, which derive from
nothing, say `__repr__ = reprs.show` in their body.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

# Longer texts of single values are cut, and longer ones of objects within objects left out.
WIDTH, NESTED = 60, 120


class Short:
    """A base whose classes show their fields in short; also those of dataclasses that derive from it.

    >>> @dataclasses.dataclass(frozen=True)
    ... class Decay(Short):
    ...     rate: float
    ...     power: float = 1.0
    ...     weights: jax.Array | None = None
    >>> Decay(0.1), Decay(0.1, weights=jax.numpy.ones((2, 3)))
    (Decay(rate=0.1), Decay(rate=0.1, weights=float32[2,3]))
    """

    def __init_subclass__(cls, **options: Any):
        super().__init_subclass__(**options)
        # `dataclass` writes a __repr__ of its own where the class itself has none
        if "__repr__" not in vars(cls):
            cls.__repr__ = show  # type: ignore[method-assign]


def show(instance: Any) -> str:
    """`Class(field=..., ...)` of a dataclass or a NamedTuple, without fields that are as by
    default."""
    parts = [
        f"{name}={short(value)}"
        for name, value, default in _fields(instance)
        if not _is_same(value, default)
    ]
    return f"{type(instance).__name__}({', '.join(parts)})"


def short(value: Any) -> str:
    """One value in short: arrays as types and shapes, trees of arrays as counts.

    >>> short(jax.numpy.ones((2, 3))), short({"a": jax.numpy.ones(3)}), short(jax.numpy.float32)
    ('float32[2,3]', '{1 array, 3 numbers}', 'float32')
    """
    if _is_array(value):
        shape = ",".join(map(str, value.shape))
        return f"{np.dtype(value.dtype).name if _is_plain(value) else value.dtype}[{shape}]"
    if isinstance(value, type):
        return value.__name__
    if isinstance(value, functools.partial):
        return short(value.func)
    if callable(value) and hasattr(value, "__name__"):
        return value.__name__
    if isinstance(value, Short) or hasattr(value, "_fields"):
        text = repr(value)
        return text if len(text) <= NESTED else f"{type(value).__name__}(...)"
    arrays = [leaf for leaf in jax.tree.leaves(value) if _is_array(leaf)]
    if arrays:
        count = sum(leaf.size for leaf in arrays)
        plural = "s" if len(arrays) > 1 else ""
        return f"{{{len(arrays)} array{plural}, {count:,} numbers}}"
    text = repr(value)
    return text if len(text) <= WIDTH else f"{text[: WIDTH - 3]}..."


def _fields(instance: Any) -> list[tuple[str, Any, Any]]:
    """Names, values and defaults."""
    missing = dataclasses.MISSING
    if dataclasses.is_dataclass(instance):
        return [
            (field.name, getattr(instance, field.name), field.default)
            for field in dataclasses.fields(instance)
            if field.repr
        ]
    defaults = getattr(instance, "_field_defaults", {})
    names = getattr(instance, "_fields", ())
    return [(name, getattr(instance, name), defaults.get(name, missing)) for name in names]


def _is_same(value: Any, default: Any) -> bool:
    if value is default:
        return True
    plain = (bool, int, float, str, tuple)
    return isinstance(value, plain) and type(value) is type(default) and value == default


def _is_array(value: Any) -> bool:
    return isinstance(value, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)


def _is_plain(value: Any) -> bool:
    return not jax.dtypes.issubdtype(value.dtype, jax.dtypes.extended)
