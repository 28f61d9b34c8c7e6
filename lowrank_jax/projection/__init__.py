"""Projection optimizers as optax transformations: one transformation with slots, and named
recipes.

What users call stands at the top of `lowrank_jax`; here are the types that they meet, what asks a
projection about itself, and what a named optimizer of one's own is made with.
"""

import functools

from lowrank_jax.projection.fused import Fused
from lowrank_jax.projection.optimizers.recipe import (
    CommonOptions,
    Recipe,
    named,
    projector_of,
    recipe,
)
from lowrank_jax.projection.partition_specs import resolved_sides, sides_for
from lowrank_jax.projection.slots import Projection
from lowrank_jax.projection.stack import Stack
from lowrank_jax.projection.state import MatrixState, Projected, ProjectionState
from lowrank_jax.projection.tapped import Tapped
from lowrank_jax.projection.taps import Taps
from lowrank_jax.projection.training import gradient_mode
from lowrank_jax.projection.transformation import projection_of

__all__ = [
    "CommonOptions",
    "Fused",
    "MatrixState",
    "Projected",
    "Projection",
    "ProjectionState",
    "Recipe",
    "Stack",
    "Tapped",
    "Taps",
    "gradient_mode",
    "named",
    "projection_of",
    "projector_of",
    "recipe",
    "resolved_sides",
    "sides_for",
]
__dir__ = functools.partial(sorted, __all__)
