"""lowrank_jax: low-rank training in JAX, as small pure functions.

>>> import jax.numpy as jnp, optax
>>> import lowrank_jax as lr
>>> params = {"dense": {"kernel": jnp.ones((32, 64)), "bias": jnp.zeros(64)}}
>>> tx = optax.chain(optax.clip_by_global_norm(1.0), lr.galore(1e-2, rank=8))
>>> state = tx.init(params)
>>> updates, state = tx.update(params, state, params)
"""

from lowrank_jax import linalg, memory
from lowrank_jax.matrices import MatrixView, ResolvedView
from lowrank_jax.projection import clocks, inner, projectors, residuals, transports
from lowrank_jax.projection.learning_rate import apply_learning_rate
from lowrank_jax.projection.optimizers import Recipe, apollo, apollo_mini, dct_adamw, frugal, galore, ldadam
from lowrank_jax.projection.placement import resolved_sides, sides_for, state_shardings
from lowrank_jax.projection.state import Evidence, MatrixState, ProjectionState
from lowrank_jax.projection.transformation import Projection, explain, projection_of, scale_by_projection
from lowrank_jax.resolution import Report, Views, resolve
from lowrank_jax.version import __version__

__all__ = [
    "Evidence",
    "MatrixState",
    "MatrixView",
    "Projection",
    "ProjectionState",
    "Recipe",
    "Report",
    "ResolvedView",
    "Views",
    "__version__",
    "apollo",
    "apollo_mini",
    "apply_learning_rate",
    "clocks",
    "dct_adamw",
    "explain",
    "frugal",
    "galore",
    "inner",
    "ldadam",
    "linalg",
    "memory",
    "projection_of",
    "projectors",
    "residuals",
    "resolve",
    "resolved_sides",
    "scale_by_projection",
    "sides_for",
    "state_shardings",
    "transports",
]
