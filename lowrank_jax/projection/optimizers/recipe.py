"""A named optimizer: a frozen recipe, with its paper's defaults and no logic of its own."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypedDict, TypeVar

import jax
import optax

from lowrank_jax import deprecations, sharding
from lowrank_jax.checks import check_number
from lowrank_jax.optim.learning_rate import (
    LearningRateState,
    apply_learning_rate,
    at_step,
    selected_for_decay,
)
from lowrank_jax.projection import transformation as form
from lowrank_jax.projection.active import sampled
from lowrank_jax.projection.refresh_schedules import RefreshSchedule
from lowrank_jax.projection.residuals import Residual
from lowrank_jax.projection.samplers import Sampler
from lowrank_jax.projection.slots import Projection
from lowrank_jax.projection.state import ProjectionState
from lowrank_jax.projection.targets import Target
from lowrank_jax.projection.transformation import ProjectionTransformation
from lowrank_jax.projection.transports import Transport
from lowrank_jax.reprs import Short, show
from lowrank_jax.resolution import Views
from lowrank_jax.typing import Pytree, Rank, Rate, Scalar

Function = TypeVar("Function", bound=Callable)


class RecipeState(NamedTuple):
    """State of a named optimizer; no field has the name of a hyper-parameter, which
    `optax.tree_get` looks up."""

    projection: ProjectionState
    rate: LearningRateState

    def __repr__(self) -> str:
        return show(self)


@deprecations.options("lrx.projection.Recipe")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe(Short):
    """A projection, a learning rate and a decay rule; `optax()` is its optax form.

    Attributes:
      projection: the slots of the projection transformation.
      learning_rate, weight_decay, decay, mask: see `apply_learning_rate`.
      plain_learning_rate: of the leaves that are not projected, a number or a schedule; None for
        the one of the others.

    >>> import lowrank_jax as lrx
    >>> recipe = lrx.galore(1e-2, rank=8).recipe
    >>> recipe.decay, recipe.projection.scale
    ('after', 0.25)
    """

    projection: Projection
    learning_rate: Rate
    weight_decay: Rate = 0.0
    decay: str = "before"
    mask: Pytree = None
    plain_learning_rate: Rate | None = None

    when = deprecations.attribute("lrx.projection.Recipe", "when")

    def __post_init__(self):
        check_number("plain_learning_rate", self.plain_learning_rate, otherwise="a schedule")

    def rate(self, count: jax.Array, *, plain: bool = False, given: Any = None) -> Scalar:
        """The learning rate of a step, of the leaves that are projected or of the `plain` others.

        Args:
          count: accepted steps, which drive schedules.
          given: in place of `learning_rate`.
        """
        if plain and self.plain_learning_rate is not None:
            return at_step(self.plain_learning_rate, count)
        return at_step(self.learning_rate if given is None else given, count)

    def _rates(self, params: Pytree, updates: Pytree, count: jax.Array, given: Any) -> Any:
        """A tree of the rates of the updates, or None where all leaves have one."""
        if self.plain_learning_rate is None:
            return None
        kinds = [leaf.view is None for leaf in self.projection.report(params).leaves]
        rates = {plain: self.rate(count, plain=plain, given=given) for plain in (False, True)}
        return jax.tree.unflatten(jax.tree.structure(updates), [rates[plain] for plain in kinds])

    def optax(self) -> ProjectionTransformation:
        """`scale_by_projection`, then `apply_learning_rate`, which a skipped step leaves untouched
        too."""

        def build(projection):
            return dataclasses.replace(self, projection=projection)._functions()

        functions = self._functions()
        if self.projection.sampler.samples:
            functions = sampled(
                self.projection,
                build,
                lambda state: state.projection,
                lambda state, new: state._replace(projection=new),
                self._decays,
            )
        transformation = ProjectionTransformation(*functions)
        transformation.projection = self.projection
        transformation.recipe = self
        return transformation

    def _decays(self, params: Pytree) -> Any:
        """A tree of booleans: which leaves decay."""
        return selected_for_decay(params, params, self.weight_decay, self.mask)

    def _functions(self) -> tuple[Callable, Callable]:
        """`(init, update)` of all layers."""
        final = apply_learning_rate(
            self.learning_rate, self.weight_decay, decay=self.decay, mask=self.mask
        )

        def init(params):
            with sharding.mesh_of(params):
                projection = form.init(self.projection, params)
                return RecipeState(projection, sharding.replicate_rest(final.init(params)))

        def update(updates, state, params=None, **extra):
            given = extra.pop("learning_rate", None)
            check_number("learning_rate", given)
            if self.projection.reads_learning_rate:
                extra |= {"learning_rate": self.rate(state.rate.count, given=given)}
            gradients = updates
            updates, projection = form.update(
                self.projection, gradients, state.projection, params, **extra
            )
            accepted = projection.skipped == state.projection.skipped
            tree = gradients if params is None else params
            rates = self._rates(tree, updates, state.rate.count, given)
            own = {"accepted": accepted, "rates": rates, "learning_rate": given}
            updates, rate = final.update(updates, state.rate, params, **own)
            return updates, RecipeState(projection, rate)

        return init, update


class CommonOptions(TypedDict, total=False):
    """What every named optimizer takes beside its own options; None leaves the method's choice.

    Under `optax.inject_hyperparams` a `mask` that is a function belongs into its `static_args`, as
    for optax's own optimizers.
    """

    inner: Any  # what runs inside the subspace, in place of the method's own
    refresh_schedule: RefreshSchedule | None  # when the basis moves, in place of `refresh_every`
    transport: Transport | None  # what becomes of the moments
    target: Target | None  # what is projected
    residual: Residual | None  # what becomes of the rest
    sampler: Sampler | None  # which layers are active
    side: Any  # which dimension is shrunk, see `lrx.resolution.resolve`
    tie: str | None  # and which of a square
    views: Views | None  # which leaves are matrices
    plain: Any  # the inner transformation of leaves that are not projected
    plain_learning_rate: Any  # and their rate, in place of the one of the others
    mask: Pytree  # which leaves decay, see `lrx.apply_learning_rate`
    clip_norm: Scalar | None  # of the global norm of what is kept
    guard: bool  # skip steps that are not finite
    seed: Scalar  # of random bases and sketches


_DEFAULTS: dict[str, Any] = {"guard": True, "seed": 0}


def named(function: Function) -> Function:
    """Decorates a named optimizer `(learning_rate, *, own options, **common)`.

    `help()` and editors show the common options beside its own, each by name; old names of options
    are taken with a warning.
    """
    signature = inspect.signature(function)
    own = {n: x for n, x in signature.parameters.items() if x.kind is not x.VAR_KEYWORD}
    common = [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=_DEFAULTS.get(name), annotation=kind
        )
        for name, kind in CommonOptions.__annotations__.items()
        if name not in own
    ]
    shown: Any = function
    shown.__signature__ = signature.replace(parameters=[*own.values(), *common])
    return deprecations.options(f"lrx.{function.__name__}")(function)


def recipe(
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: Rate,
    decay: str,
    common: Mapping[str, Any],
    *,
    refresh_schedule: RefreshSchedule,
    **slots: Any,
) -> ProjectionTransformation:
    """The optax form of a recipe.

    Args:
      learning_rate, weight_decay, decay: of the final transformation.
      common: the options of `CommonOptions` that the user gave, which win.
      refresh_schedule: the method's own.
      **slots: the method's other choices.
    """
    given = {name: value for name, value in common.items() if value is not None}
    unknown = given.keys() - CommonOptions.__annotations__.keys()
    if unknown:
        raise TypeError(f"unknown options {sorted(unknown)}; see help() of the optimizer")
    mask, plain_rate = given.pop("mask", None), given.pop("plain_learning_rate", None)
    slots |= given
    if "refresh_schedule" not in slots:
        slots["refresh_schedule"] = _sparing(refresh_schedule, slots)
    return Recipe(
        projection=Projection(**slots),
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        decay=decay,
        mask=mask,
        plain_learning_rate=plain_rate,
    ).optax()


def _sparing(schedule: RefreshSchedule, slots: dict[str, Any]) -> RefreshSchedule:
    """The schedule, after the update where projected backprop then never takes a full gradient (see
    `lrx.projection.gradient_mode`).

    That is where a refresh reads a thin product of the gradient or none of it, and nothing else
    reads all of it.
    """
    projection = Projection(**slots, refresh_schedule=schedule)
    projector = projection.projector
    reads = not projector.moves or "target" in projector.reads or projection.reads_gradient
    return schedule if reads else dataclasses.replace(schedule, when="after")


def projector_of(default: Callable, rank: Rank | None, projector: Any, **options: Any) -> Any:
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
