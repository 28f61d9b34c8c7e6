"""Factors on the step of one leaf that follow from its view: its fan-in, its fan-out, its path.

They are frozen objects and not functions, because `optax.inject_hyperparams` and schedules call
functions with the step's count. A number stands for itself wherever a scale may.

>>> import jax.numpy as jnp
>>> import lowrank_jax as lrx
>>> view = lrx.resolution.resolve(jnp.ones((4, 16)), rank=2).projected[0]
>>> fan_ratio().of(view), rms(0.2).of(view)
(2.0, 0.8)
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re

import jax

from lowrank_jax.checks import check_number, is_number
from lowrank_jax.matrices import ResolvedView
from lowrank_jax.reprs import Short
from lowrank_jax.typing import Scalar


class Scale(Short):
    """Base of the scales: one verb."""

    def of(self, view: ResolvedView) -> Scalar:
        """The factor of the leaf whose view this is."""
        raise TypeError(f"{type(self).__name__} does not implement of")


@dataclasses.dataclass(frozen=True)
class FanRatio(Scale):
    """`max(least, fan_out / fan_in) ^ power`: steps of one spectral norm change outputs alike.

    A step `U` of spectral norm 1 moves outputs `x U` of inputs with entries about 1 by entries of
    `sqrt(fan_in / fan_out)`, which a power of one half undoes (arXiv 2310.17813).

    Args:
      power: one half.
      least: of the ratio: 0 in microsoft/dion ("spectral_norm"), 1 in Muon's own code.
    """

    power: float = 0.5
    least: float = 0.0

    def __post_init__(self):
        check_factor("fan_ratio: power", self.power)
        check_factor("fan_ratio: least", self.least)
        check_number("fan_ratio: least", self.least, at_least=0)

    def of(self, view):
        return max(self.least, view.fan_out / view.fan_in) ** self.power


@dataclasses.dataclass(frozen=True)
class Rms(Scale):
    """`value sqrt(max(fan_in, fan_out))`: an orthonormal step gets the root mean square `value`.

    Args:
      value: .2 is that of AdamW's steps (arXiv 2502.16982; "rms_norm" in microsoft/dion), so that
        rates and decays of AdamW serve.
    """

    value: float = 0.2

    def __post_init__(self):
        check_factor("rms: value", self.value)

    def of(self, view):
        return self.value * math.sqrt(max(view.fan_in, view.fan_out))


@dataclasses.dataclass(frozen=True)
class ByPath(Scale):
    """One factor by path: of the first pattern that matches the whole path; 1 where none does.

    Args:
      rules: `((pattern, number or scale), ...)`.

    >>> import jax.numpy as jnp
    >>> import lowrank_jax as lrx
    >>> report = lrx.resolution.resolve({"up": {"kernel": jnp.ones((4, 8))}}, rank=2)
    >>> by_path(((".*/up/.*", 2.0), ("up/.*", 3.0))).of(report.projected[0])
    3.0
    """

    rules: tuple[tuple[str, Scalar | Scale], ...]

    def __post_init__(self):
        for pattern, value in self.rules:
            check_factor(f"by_path: {pattern!r}", value, or_scale=True)

    def of(self, view):
        for pattern, value in self.rules:
            if re.fullmatch(pattern, view.path):
                return factor(value, view)
        return 1.0


def check_factor(field: str, value: object, *, or_scale: bool = False) -> None:
    """ValueError for what is neither a finite number, nor a scale where that may stand too.

    >>> check_factor("rms: value", "0.2")
    Traceback (most recent call last):
        ...
    ValueError: rms: value='0.2' must be a finite number
    """
    otherwise = "one of lrx.scales" if or_scale else ""
    if or_scale and isinstance(value, Scale):
        return
    if not (is_number(value) or isinstance(value, jax.Array)):
        raise ValueError(
            f"{field}={value!r} must be a finite number" + (otherwise and f", or {otherwise}")
        )
    check_number(field, value, otherwise=otherwise)


def factor(scale: Scalar | Scale, view: ResolvedView | None) -> Scalar:
    """A number itself, or what a scale makes of the view.

    Raises:
      ValueError: for a scale where there is no view, as of plain leaves.
    """
    if not isinstance(scale, Scale):
        return scale
    if view is None:
        raise ValueError(
            f"scale={scale!r} reads the view of a matrix, and plain leaves have none; give them an "
            "inner transformation of their own, plain=lrx.inner.adam()"
        )
    return scale.of(view)


fan_ratio = FanRatio
rms = Rms
by_path = ByPath

__all__ = ["Scale", "by_path", "fan_ratio", "rms"]
__dir__ = functools.partial(sorted, __all__)
