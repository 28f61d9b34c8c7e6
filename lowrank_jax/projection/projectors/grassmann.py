"""A basis that follows the gradient along geodesics of the Grassmann manifold."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import optax

from lowrank_jax import linalg
from lowrank_jax.checks import check_number
from lowrank_jax.optim.learning_rate import at_step
from lowrank_jax.projection.projectors.base import StoredProjector
from lowrank_jax.projection.projectors.svd import singular_vectors


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grassmann(StoredProjector):
    """One step of steepest descent a refresh on `|G - P PᵀG|²`, along a geodesic and of rank one
    (SubTrack++).

    With `A = PᵀG` the derivative by P is `D = -2 (G - P A) Aᵀ`, of which `sigma u vᵀ` is the
    leading singular triple, and

        P <- P + (P v (cos(step_size sigma) - 1) - u sin(step_size sigma)) vᵀ

    which stays orthonormal: it turns one direction `P v` of the subspace towards what the subspace
    misses most. The first basis is made of the first gradient's singular vectors. A gradient that
    lies in the subspace leaves it as it is.

    Args:
      step_size: number, or schedule of the step. The angle grows with `|G|²`, so that it has the
        unit of an inverse square of gradients.
    """

    step_size: optax.ScalarOrSchedule = 10.0
    reads: ClassVar[frozenset[str]] = frozenset({"target", "step"})
    of_range: ClassVar[bool] = True
    of_rows: ClassVar[bool] = True  # D depends on G Gᵀ alone
    decomposes: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        check_number("grassmann: step_size", self.step_size, at_least=0, otherwise="a schedule")

    def start(self, view, inputs):
        left, _ = singular_vectors(view, inputs.target)
        return self.store(view, left), ()

    def refresh(self, view, basis, memory, inputs):
        columns, target = self.columns(view, basis), inputs.target
        u, sigma, v = steepest(columns, target)
        angle = at_step(self.step_size, inputs.step) * sigma[..., None, None]
        # along the geodesic P v turns towards -u, (..., s, 1)
        turned = columns @ v * (jnp.cos(angle) - 1) - u * jnp.sin(angle)
        moved = columns + turned * jnp.swapaxes(v, -1, -2)
        # one Newton step towards orthonormal columns takes off what rounding adds up to
        gram = jnp.einsum("...sr,...sq->...rq", moved, moved)
        return self.store(view, 1.5 * moved - 0.5 * moved @ gram), memory


def steepest(columns: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The leading triple `u (..., s, 1)`, `sigma (...)`, `v (..., r, 1)` of the derivative by P.

    Where no more than rounding is outside of the subspace, sigma is zero.
    """

    def outside(x):
        return x - columns @ jnp.einsum("...sr,...sq->...rq", columns, x)

    # -2 (I - P Pᵀ) G Aᵀ, (..., s, r)
    low = jnp.einsum("...sr,...sk->...rk", columns, target)
    product = jnp.einsum("...sk,...rk->...sr", target, low)
    u, sigma, vt = linalg.truncated_svd(-2 * outside(product), 1)
    # u was made of a difference: what of it lies in the subspace is rounding
    u = outside(u)
    u = u / jnp.maximum(jnp.linalg.norm(u, axis=-2, keepdims=True), 1e-30)
    size = jnp.linalg.norm(product, axis=(-2, -1))
    noise = 32 * float(jnp.finfo(jnp.float32).eps) * size
    return u, jnp.where(sigma[..., 0] > noise, sigma[..., 0], 0), jnp.swapaxes(vt, -1, -2)


grassmann = Grassmann
