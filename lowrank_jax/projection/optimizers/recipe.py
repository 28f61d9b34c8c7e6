"""A named optimizer: a frozen recipe, with its paper's defaults and no logic of its own."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import optax

from lowrank_jax import sharding
from lowrank_jax.optim.learning_rate import LearningRateState, apply_learning_rate
from lowrank_jax.projection import refresh_schedules as clocks
from lowrank_jax.projection import residuals
from lowrank_jax.projection import transformation as form
from lowrank_jax.projection.slots import Projection
from lowrank_jax.projection.state import ProjectionState
from lowrank_jax.projection.transformation import ProjectionTransformation


class RecipeState(NamedTuple):
    """State of a named optimizer; no field has the name of a hyper-parameter, which
    `optax.tree_get` looks up."""

    projection: ProjectionState
    schedule: LearningRateState


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """A projection, a learning rate and a decay rule; `optax()` is its optax form.

    Attributes:
      projection: the slots of the projection transformation.
      learning_rate, weight_decay, when, mask: see `apply_learning_rate`.

    >>> import lowrank_jax as lrx
    >>> recipe = lrx.galore(1e-2, rank=8).recipe
    >>> recipe.when, recipe.projection.scale
    ('post', 0.25)
    """

    projection: Projection
    learning_rate: Any
    weight_decay: Any = 0.0
    when: str = "pre"
    mask: Any = None

    def optax(self) -> ProjectionTransformation:
        """`scale_by_projection`, then `apply_learning_rate`, which a skipped step leaves untouched
        too."""
        final = apply_learning_rate(
            self.learning_rate, self.weight_decay, when=self.when, mask=self.mask
        )

        def init(params):
            with sharding.mesh_of(params):
                projection = form.init(self.projection, params)
                return RecipeState(projection, sharding.settled(final.init(params)))

        def update(updates, state, params=None, **extra):
            updates, projection = form.update(
                self.projection, updates, state.projection, params, **extra
            )
            accepted = projection.skipped == state.projection.skipped
            updates, rate = final.update(updates, state.schedule, params, accepted=accepted)
            return updates, RecipeState(projection, rate)

        transformation = ProjectionTransformation(init, update)
        transformation.projection = self.projection
        transformation.recipe = self
        return transformation


def _recipe(
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: Any,
    when: str,
    *,
    own_clock: clocks.Clock,
    mask: Any = None,
    common: dict | None = None,
    **slots: Any,
):
    """The optax form of a recipe; `own_clock` serves where the user gave no `clock`."""
    if common is not None:  # optax.inject_hyperparams hands `**common` on as one keyword
        slots = {"own_clock": own_clock, "mask": mask} | slots | common
        return _recipe(learning_rate, weight_decay, when, **slots)
    if "clock" not in slots:
        slots["clock"] = _sparing(
            own_clock, slots["projector"], slots.get("residual", residuals.discard())
        )
    return Recipe(
        projection=Projection(**slots),
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        when=when,
        mask=mask,
    ).optax()


def _sparing(clock: clocks.Clock, projector: Any, residual: Any) -> clocks.Clock:
    """The clock, after the update where projected backprop then never takes a full gradient (see
    `lrx.plan`).

    That is where a refresh reads a thin product of the gradient or none of it, and nothing else
    reads all of it.
    """
    reads_gradient = not projector.moves or "grad" in projector.needs or residual.sees_gradient
    return clock if reads_gradient else dataclasses.replace(clock, when="after")


def _projector(default: Callable, rank: Any, projector: Any, **options: Any) -> Any:
    """`projector`, or the method's own at this rank; ValueError unless exactly one of the two is
    given."""
    if projector is not None:
        if rank is not None:
            raise ValueError(
                f"rank={rank} and projector={projector} both fix the rank; give one of them"
            )
        return projector
    if rank is None:
        raise ValueError(
            "rank=None: give rank as an integer, a fraction, or by path, or give a projector"
        )
    return default(rank=rank, **options)
