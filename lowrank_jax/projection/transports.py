"""What becomes of the moments when the basis moves.

A transport maps a decoded inner state from the old basis to the new one. `change` is the overlap
`C = P_newᵀ P_old`, as a dense matrix or as an index map, with `apply(low) = C low`,
`apply_squared(low) = (C∘C) low`, and `cosines (batch..., r) = |C_ii|`, how much of each old vector
the new one in its place keeps.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from lowrank_jax.optim import inner as inner_lib
from lowrank_jax.optim.inner import Inner
from lowrank_jax.reprs import Short
from lowrank_jax.typing import Pytree


class Change:
    """Base of the overlaps `C = P_newᵀ P_old` of two bases."""

    def apply(self, low: jax.Array) -> jax.Array:
        """`C low (batch..., r, k)`."""
        raise TypeError(f"{type(self).__name__} does not implement apply")

    def apply_squared(self, low: jax.Array) -> jax.Array:
        """`(C∘C) low`."""
        raise TypeError(f"{type(self).__name__} does not implement apply_squared")

    @property
    def cosines(self) -> jax.Array:
        """`|C_ii| (batch..., r)`, how much of each old vector the new one in its place keeps."""
        raise TypeError(
            f"{type(self).__name__} has no cosines: its vectors stand in no order; take a projector "
            "whose basis is a matrix of ordered vectors, such as lrx.projectors.svd"
        )


@dataclasses.dataclass(frozen=True)
class DenseChange(Change):
    """Overlap of two bases as a matrix `C (batch..., r, r)`; two-sided bases have a second one on
    the right."""

    left: jax.Array
    right: jax.Array | None = None

    def apply(self, low: jax.Array) -> jax.Array:
        # C low, and C low Dᵀ of two sides
        low = jnp.einsum("...ij,...jk->...ik", self.left, low)
        if self.right is None:
            return low
        return jnp.einsum("...ik,...lk->...il", low, self.right)

    @property
    def cosines(self) -> jax.Array:
        return jnp.abs(jnp.diagonal(self.left, axis1=-2, axis2=-1))

    def apply_squared(self, low: jax.Array) -> jax.Array:
        right = None if self.right is None else jnp.square(self.right)
        return DenseChange(jnp.square(self.left), right).apply(low)


@dataclasses.dataclass(frozen=True)
class IndexChange(Change):
    """Overlap of two sets of indices: slot j takes the old slot `source[j]`, or zero where
    `found[j]` is False."""

    source: jax.Array
    found: jax.Array

    @classmethod
    def between(cls, old: jax.Array, new: jax.Array) -> IndexChange:
        """From sorted indices `(batch..., r)`."""
        # (batch..., new slots, old slots)
        same = new[..., :, None] == old[..., None, :]
        return cls(jnp.argmax(same, axis=-1), jnp.any(same, axis=-1))

    def apply(self, low: jax.Array) -> jax.Array:
        is_found = self.found[..., None]
        taken = jnp.take_along_axis(low, self.source[..., None], axis=-2)
        return jnp.where(is_found, taken, 0)

    apply_squared = apply


@dataclasses.dataclass(frozen=True)
class SameBasis(Change):
    """The overlap of a basis that cannot move."""

    def apply(self, low: jax.Array) -> jax.Array:
        return low

    apply_squared = apply


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transport(Short):
    """Base of the transports.

    Attributes:
      moves: `move` does something, so that a refresh makes the overlap of both bases.
    """

    moves = True

    def check(self, inner: Inner, state: Pytree) -> None:
        """Refuses inner transformations whose (decoded) state it cannot move."""

    def move(self, inner: Inner, state: Pytree, fresh: Pytree, change: Change) -> Pytree:
        """The state in the new basis.

        Args:
          inner: the inner transformation, which knows its moments.
          state: decoded, one for each matrix, batch axes in front.
          fresh: the state of `inner.init`.
          change: the overlap of both bases.
        """
        raise TypeError(f"{type(self).__name__} does not implement move")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Keep(Transport):
    """Moments stay as they are, in slots that now mean other directions (GaLore, Fira, APOLLO)."""

    moves = False

    def move(self, inner, state, fresh, change):
        return state


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reset(Transport):
    """Moments start again from `inner.init` (FRUGAL).

    Args:
      count: whether counts start again too, so that bias correction restarts. With False only
        registered moments are zeroed.
    """

    count: bool = True

    def check(self, inner, state):
        if not self.count:
            check_registered("transport reset(count=False)", inner, state)

    def move(self, inner, state, fresh, change):
        if self.count:
            return fresh
        return inner_lib.map_moments(inner, state, lambda moment, value: jnp.zeros_like(value))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rotate(Transport):
    """First moments by `C m`, second ones by `|C v|` (DCT-AdamW). On index bases a slot keeps its
    moments if its index survives, and a new index starts at zero.

    Args:
      second: with False second moments stay as they are (GoLore).
    """

    second: bool = True

    def check(self, inner, state):
        check_registered("transport rotate", inner, state)

    def move(self, inner, state, fresh, change):
        def rotate(moment, value):
            if moment.kind != "first" and not self.second:
                return value
            # C m, or C v, whose entries may be negative
            rotated = change.apply(value.astype(jnp.float32))
            return rotated if moment.kind == "first" else jnp.abs(rotated)

        return inner_lib.map_moments(inner, state, rotate)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LDAdam(Transport):
    """LDAdam's rule: the second moment is rotated as the variance of a rotated random variable.

    With `t` steps seen, `m̂ = m / (1 - b1^t)` and `v̂ = v / (1 - b2^t)`,
    `v <- (1 - b2^t) |(C∘C)(v̂ - m̂²) + (C m̂)²|`, then `m <- C m`.
    """

    def check(self, inner, state):
        check_registered("transport ldadam", inner, state)
        inner_lib.first_moment(inner, state)
        seconds = [moment for moment in inner.moments(state) if moment.kind == "second"]
        if len(seconds) != 1 or seconds[0].decay is None or seconds[0].count is None:
            raise ValueError(
                "transport ldadam needs one second moment with a known decay and count; "
                f"{type(inner).__name__} has {len(seconds)}: use lrx.inner.adam"
            )

    def move(self, inner, state, fresh, change):
        first, m = inner_lib.first_moment(inner, state)
        m = m.astype(jnp.float32)

        def moved(moment, value):
            if moment.kind == "first":
                return change.apply(m)
            seen = moment.count[..., None, None]
            t = jnp.maximum(seen, 1)
            # m̂ and v̂ - m̂²: mean and variance as the moments estimate them
            mean = m / inner_lib.debias(first.decay, t)
            correction = inner_lib.debias(moment.decay, t)
            variance = value.astype(jnp.float32) / correction - jnp.square(mean)
            # and those of the rotated variable, as if its entries were independent
            moved_variance = change.apply_squared(variance)
            moved_mean = change.apply(mean)
            second = correction * jnp.abs(moved_variance + jnp.square(moved_mean))
            # before the first step there is nothing to move
            return jnp.where(seen > 0, second, value)

        return inner_lib.map_moments(inner, state, moved)


def check_registered(
    name: str,
    inner: Inner,
    state: Pytree,
    remedy: str = "transports.keep() or reset(), or lrx.inner.register_moments",
) -> None:
    """ValueError if the state has a non-scalar leaf that the moments protocol does not know."""
    known = {moment.path: moment.kind for moment in inner.moments(state)}
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        kind = known.get(tuple(path))
        if leaf.ndim and kind in (None, "factored", "other"):
            raise ValueError(
                f"{name} does not know how to move {jax.tree_util.keystr(path)} "
                f"({kind or 'unregistered'}) of {type(inner).__name__}; use {remedy}"
            )


keep = Keep
reset = Reset
rotate = Rotate
ldadam = LDAdam

__all__ = ["Transport", "keep", "ldadam", "reset", "rotate"]
__dir__ = functools.partial(sorted, __all__)
