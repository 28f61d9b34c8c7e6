"""The one place that maps the names of `config.optimizer.name` to functions of optax and
lowrank_jax."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import optax

import lowrank_jax as lrx
from experiments.settings.configuration import LOWRANK, OptimizerConfig, ScheduleConfig
from experiments.settings.sections import ConfigurationError
from lowrank_jax.optim.learning_rate import LearningRateState
from lowrank_jax.optim.pair_update import PairsState


def schedule(config: ScheduleConfig, learning_rate: float) -> optax.Schedule:
    """Linear from 0 to `learning_rate` over the warm-up, then a cosine to `final_fraction` of it at
    the last update.

    >>> rate = schedule(ScheduleConfig(steps=100, warmup_steps=10), 1.0)
    >>> float(rate(10)), round(float(rate(100)), 6)
    (1.0, 0.1)
    """
    warmup = max(1, config.steps // 10) if config.warmup_steps is None else config.warmup_steps
    warmup = min(warmup, config.steps - 1)
    end = learning_rate * config.final_fraction
    return optax.warmup_cosine_decay_schedule(
        0.0 if warmup else learning_rate, learning_rate, warmup, config.steps, end
    )


def build(
    config: OptimizerConfig,
    rate: optax.Schedule,
    *,
    stacked: bool,
    seed: int,
    sides: tuple[tuple[str, str], ...] = (),
) -> optax.GradientTransformation:
    """The configured optimizer, after clipping by the global norm (of what it keeps, where
    `backprop` is set).

    Args:
      config: names the method; its None fields keep the method's own defaults.
      rate: learning rate by update.
      stacked: the model's layers lie along a leading axis of each kernel under `layers`.
      seed: of random projections.
      sides: what "sharding" comes to, of `lrx.sides_for`.

    Raises ConfigurationError for a field that the method does not have.
    """
    check(config)
    function, arguments = METHODS[config.name], {}
    for field in OWN:
        value = getattr(config, field, None)
        if value is not None:
            arguments[field] = value
    if config.projector is not None:
        arguments["projector"] = PROJECTORS[config.projector](rank=arguments.pop("rank"))
    if config.name in LOWRANK:
        arguments |= {"views": views(stacked), "seed": seed}
    if config.side is not None:
        if config.side == "sharding" and not sides:
            raise ConfigurationError(
                "optimizer.side='sharding': parameters lie whole on each device; leave it None"
            )
        arguments["side"] = sides if config.side == "sharding" else config.side
    if config.backprop is not None:
        arguments["clip_norm"] = config.clip_norm
    optimizer = function(rate, **arguments)
    if config.refresh_when is not None:
        clock = dataclasses.replace(optimizer.projection.clock, when=config.refresh_when)
        optimizer = function(rate, **arguments | {"clock": clock})
    if config.clip_norm is None or config.backprop is not None:
        return optimizer
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)


OWN = (
    "rank",
    "projector",
    "refresh_every",
    "scale",
    "weight_decay",
    "b1",
    "b2",
    "eps",
    "momentum",
    "ratio",
    "damping",
)


def check(config: OptimizerConfig) -> None:
    """ConfigurationError for a setting that the method does not have."""
    for field in OWN:
        value = getattr(config, field, None)
        if value is not None and not has(config.name, field):
            raise ConfigurationError(
                f"optimizer.{field}={value!r}: {config.name} has no such setting; leave it None"
            )


def has(name: str, field: str) -> bool:
    """Whether a method has a setting of `OptimizerConfig`."""
    if field in ("name", "learning_rate", "clip_norm"):
        return True
    if field in ("side", "backprop", "refresh_when"):
        return name in LOWRANK
    return field in inspect.signature(METHODS[name]).parameters


def fit(given: dict[str, Any], own: str, explicit: Collection[str]) -> list[str]:
    """Sets to None what a configuration file says for its own method and the chosen one lacks;
    notes of what was done.

    Args:
      given: the section optimizer with the chosen name, changed in place.
      own: the file's method.
      explicit: fields that were set by hand, which stay.
    """
    name = given.get("name")
    if name == own or name not in METHODS:
        return []
    notes = []
    for field, value in given.items():
        if value is None or field in explicit:
            continue
        has_own_rank = field == "rank" and name == "apollo_mini" and given.get("projector") is None
        if field == "learning_rate":
            notes.append(
                f"optimizer.learning_rate={value!r} is kept, which the configuration file has for "
                f"{own}"
            )
        elif has_own_rank or not has(name, field):
            reason = "has a rank of its own, 1" if has_own_rank else "has no such setting"
            notes.append(
                f"optimizer.{field}={value!r} of the configuration file is left out: {name} "
                f"{reason}"
            )
            given[field] = None
    return notes


def full_gradients(config: OptimizerConfig) -> str | None:
    """Why a step of a low-rank method holds full gradients, and what avoids it; None where it holds
    none."""
    if config.name not in LOWRANK:
        return None
    plain = dataclasses.replace(config, clip_norm=None, side=None)
    projection = build(plain, lambda step: 1.0, stacked=True, seed=0).projection
    plan, projector = lrx.plan(projection), type(projection.projector).__name__.lower()
    another = (
        "to hold none, take another method, such as galore with optimizer.projector=alternating"
    )
    if projection.residual.sees_gradient:
        return f"full gradients at every update: {config.name} reads all of the gradient; {another}"
    if plan == "full":
        remedy = "--config.optimizer.refresh_every=200 takes them at a refresh alone"
        return f"full gradients at every update: the basis moves at each by the gradient; {remedy}"
    if config.backprop != "projected":
        fewer = "them at a refresh alone" if plan == "full at a refresh" else "none"
        remedy = f"--config.optimizer.backprop=projected takes {fewer}"
        return f"full gradients at every update: backprop={config.backprop!r}; {remedy}"
    if plan != "full at a refresh":
        return None
    reason, remedy = f"{projector} reads the gradient", another
    if "grad" not in projection.projector.needs:
        reason = "it comes before the update"
        remedy = "--config.optimizer.refresh_when=after takes thin products"
    elif has(config.name, "projector"):
        remedy = "--config.optimizer.projector=alternating takes thin products"
    return f"full gradients at a refresh, which the peak of memory shows: {reason}; {remedy}"


def views(stacked: bool) -> lrx.Views:
    """Which leaves of our models count layers."""
    return lrx.Views(stacked=(r"layers/.*",) if stacked else ())


def skipped(state) -> jax.Array | int:
    """How many updates the optimizer refused because a gradient was not finite (0 when it does not
    watch for it)."""
    return sum(value for _, value in optax.tree.get_all_with_path(state, "skipped"))


# The nodes of an optimizer's state by whose count its learning rate follows the schedule: {type:
# field of the count}.
SCHEDULED: dict[type, str] = {
    LearningRateState: "count",
    optax.ScaleByScheduleState: "count",
    PairsState: "step",
}


def is_scheduled(node: Any) -> bool:
    """Whether a node of an optimizer's state is one of SCHEDULED."""
    return type(node) in SCHEDULED


def done(state) -> int | None:
    """How many updates an optimizer's state has seen, by its learning rate's count; None where it
    keeps none."""
    nodes = filter(is_scheduled, jax.tree.leaves(state, is_leaf=is_scheduled))
    counts = [getattr(node, SCHEDULED[type(node)]) for node in nodes]
    return int(counts[0]) + int(skipped(state)) if counts else None


def restarted(state: Any) -> Any:
    """An optimizer's state whose schedule begins anew, and whose count of skipped updates too; the
    rest stays.

    Optimizers of pairs alternate by the count of the schedule, and so begin with the first factor
    again.
    """

    def begin(node):
        if not is_scheduled(node):
            return node
        field = SCHEDULED[type(node)]
        return node._replace(**{field: jnp.zeros_like(getattr(node, field))})

    begun = jax.tree.map(begin, state, is_leaf=is_scheduled)
    counts = optax.tree.get_all_with_path(begun, "skipped")
    return optax.tree.set(begun, skipped=jnp.zeros_like(counts[0][1])) if counts else begun


def sides(state) -> dict[str, tuple[int, int]]:
    """{path: (side, rank)} of the projected matrices of an optimizer state: what shapes alone do
    not tell."""
    holds_view = lambda node: hasattr(node, "view")  # noqa: E731
    nodes = [node for node in jax.tree.leaves(state, is_leaf=holds_view) if holds_view(node)]
    return {node.view.path: (node.view.side, node.view.rank) for node in nodes}


def _optax_galore(learning_rate, *, rank, refresh_every=200, scale=0.25, weight_decay=0.0):
    """`optax.contrib.galore` on the kernels of the blocks, as the papers do; it would also take the
    head."""

    def numbers(params):
        def one(path, leaf):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            in_block = name.startswith("layer_") and name.endswith("kernel")
            return optax.contrib.GaLoreDimensionNumbers() if in_block else None

        return jax.tree_util.tree_map_with_path(one, params)

    return optax.contrib.galore(
        learning_rate,
        rank,
        refresh_every,
        scale,
        weight_decay=weight_decay,
        weight_dimension_numbers=numbers,
    )


def _apollo_mini(learning_rate, **settings):
    """`lrx.apollo_mini`, with the settings of `lrx.apollo` by name; a projector brings its rank."""
    own = {"rank": None} if "projector" in settings else {}
    return lrx.apollo_mini(learning_rate, **own | settings)


_apollo_mini.__signature__ = inspect.signature(lrx.apollo)  # type: ignore[attr-defined]


def _pairs(method: Callable) -> Callable:
    """An optimizer of the factors of adapters; their scale comes with every update, see
    `updates.step`."""
    signature = inspect.signature(method)
    own = [one for name, one in signature.parameters.items() if name != "scale"]

    def build(learning_rate, **settings):
        return method(learning_rate, scale=1.0, **settings)

    build.__signature__ = signature.replace(parameters=own)  # type: ignore[attr-defined]
    return build


PROJECTORS: dict[str, Callable[..., lrx.projectors.Projector]] = {
    "svd": lrx.projectors.svd,
    "power": lrx.projectors.power,
    "randomized": lrx.projectors.randomized,
    "alternating": lrx.projectors.alternating,
    "sketch": functools.partial(lrx.projectors.randomized, iterations=0),
}

METHODS = {
    "adamw": optax.adamw,
    "sgd": optax.sgd,
    "optax_galore": _optax_galore,
    "galore": lrx.galore,
    "dct_adamw": lrx.dct_adamw,
    "frugal": lrx.frugal,
    "ldadam": lrx.ldadam,
    "apollo": lrx.apollo,
    "apollo_mini": _apollo_mini,
    "lora_plus": lrx.lora_plus,
    "scaled_adamw": _pairs(lrx.scaled_adamw),
    "altlora": _pairs(lrx.altlora),
    "altlora_plus": _pairs(lrx.altlora_plus),
}
