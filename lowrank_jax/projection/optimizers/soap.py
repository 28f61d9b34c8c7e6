"""SOAP."""

import dataclasses
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import optax

from lowrank_jax.checks import check_number, is_zero
from lowrank_jax.optim import inner
from lowrank_jax.optim.learning_rate import at_step
from lowrank_jax.projection import projectors, refresh_schedules
from lowrank_jax.projection.optimizers.recipe import CommonOptions, named, recipe
from lowrank_jax.projection.transformation import ProjectionTransformation
from lowrank_jax.typing import Scalar


@dataclasses.dataclass(frozen=True)
class AfterFirst:
    """A schedule that is zero at the first step, and from then on a number or another schedule."""

    value: optax.ScalarOrSchedule

    def __call__(self, step: jax.Array) -> jax.Array:
        return jnp.where(step == 0, 0.0, at_step(self.value, step))


@named
def soap(
    learning_rate: optax.ScalarOrSchedule,
    *,
    refresh_every: int = 10,
    max_precond_dim: int | None = None,
    normalize: bool = False,
    first: Any = "gradient",
    b1: Scalar = 0.95,
    b2: Scalar = 0.95,
    b3: Scalar | None = None,
    eps: Scalar = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.01,
    **common: Unpack[CommonOptions],
) -> ProjectionTransformation:
    """SOAP (arXiv 2409.11321): Adam in the slowly turning eigenbases of Shampoo's Gram matrices.

    Of a gradient `G (m, n)`: averages `L` of `G Gᵀ` and `R` of `GᵀG`, bases `Q_L`, `Q_R` of their
    eigenvectors, the first moment as it lies, the second one of `Q_LᵀG Q_R`; every `refresh_every` steps one
    power iteration and a QR turn the bases. The equations stand in `lrx.inner.soap`. State of a
    matrix m x n: `2 m n` moments and `2 d²` for each side `d <= max_precond_dim`.

    Args:
      learning_rate: number or schedule; official default 3e-3.
      refresh_every: steps between two turns of the bases, 10.
      max_precond_dim: a longer side has no basis, 10000 (None).
      normalize: the step has root mean square 1 before its bias correction; off.
      first: "gradient" (eigenvectors of the first gradient's Gram matrices, which are not
        determined where a matrix is not square), "identity", or bases, see `lrx.inner.soap`.
      b1, b2, eps: (.95, .95), 1e-8; AdamW on the other leaves has them too.
      b3: decay of the Gram matrices; None for b2.
      weight_decay: .01, after the step, and not at the first one, at which no matrix moves.
      **common: see `galore`. The official code steps all leaves alike, as `plain=lrx.inner.soap()`
        does here; by default embeddings, heads and vectors have AdamW.

    >>> import lowrank_jax as lrx
    >>> lrx.soap(3e-3, refresh_every=20).projection.inner.refresh_every
    20
    """
    check_number("soap: weight_decay", weight_decay, at_least=0)
    longest = inner.Soap.max_precond_dim if max_precond_dim is None else max_precond_dim
    slots: dict[str, Any] = {
        "projector": projectors.identity(),
        "inner": inner.soap(
            b1=b1,
            b2=b2,
            b3=b3,
            eps=eps,
            refresh_every=refresh_every,
            max_precond_dim=longest,
            normalize=normalize,
            first=first,
        ),
        "plain": inner.adam(b1=b1, b2=b2, eps=eps, convention="hf"),
        "refresh_schedule": refresh_schedules.never(),
    }
    decay = weight_decay if is_zero(weight_decay) else AfterFirst(weight_decay)
    return recipe(learning_rate, decay, "after", common, **slots)
