"""Any optax transformation as an inner one."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import optax

from lowrank_jax.optim.inner.base import Inner
from lowrank_jax.typing import Scalar


@dataclasses.dataclass(frozen=True)
class FromOptax(Inner):
    """Any optax transformation as an inner one: scale 1, state as optax made it.

    Args:
      transformation: gradient-only, or told `params=True`. It is initialised for each matrix and
        may not couple leaves.
      params: hand it the parameter, projected as the gradient is (`PᵀW`).
      decay: decay rates by kind of moment, for transports that need them, for instance
        `(("first", 0.9),)`.

    >>> import optax, jax.numpy as jnp
    >>> lion = FromOptax(optax.scale_by_lion())
    >>> direction, scale, state = lion.update(jnp.array([0.5, -2.0]), lion.init(jnp.zeros(2)))
    >>> print(direction, scale)
    [ 1. -1.] 1.0
    """

    transformation: optax.GradientTransformation
    params: bool = False
    decay: tuple[tuple[str, Scalar], ...] = ()
    trees = True
    takes_extra = True

    @property
    def reads_params(self) -> bool:
        return self.params

    def init(self, tree, view=None):
        return self.transformation.init(tree)

    def update(self, grads, state, *, view=None, params=None, **extra):
        update = optax.with_extra_args_support(self.transformation).update
        if params is None and self.params:
            raise ValueError(
                "inner: params=True needs params; call update(grads, state, params=params)"
            )
        try:
            direction, state = update(grads, state, params if self.params else None, **extra)
        except ValueError as error:
            if "params" in str(error) and not self.params:
                raise ValueError(
                    "inner: this optax transformation demands params; wrap it as "
                    "lrx.inner.from_optax(tx, params=True), which hands it the projected "
                    "parameter, or chain it outside scale_by_projection"
                ) from error
            raise
        return direction, jnp.ones((), jnp.float32), state

    def decays(self):
        return dict(self.decay)


def as_inner(inner: object) -> Inner:
    """`inner` itself, or an optax transformation wrapped."""
    if isinstance(inner, optax.GradientTransformation):
        return FromOptax(inner)
    if not isinstance(inner, Inner):
        raise ValueError(
            f"inner={inner!r} must be lrx.inner.adam(...), an lrx.inner.Inner of your own, or an "
            "optax GradientTransformation"
        )
    return inner
