"""The configured optimizer: built from its row of the table, checked, and its state read.

The table is `experiments.harness.methods`.
"""

import dataclasses
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import optax

import lowrank_jax as lrx
from experiments.harness.methods import (
    COMMON,
    METHODS,
    OF_PROJECTIONS,
    PROJECTORS,
    Method,
    parse_options,
)
from experiments.settings.configuration import OptimizerConfig, ScheduleConfig
from experiments.settings.sections import ConfigurationError
from lowrank_jax.optim.learning_rate import LearningRateState
from lowrank_jax.optim.pair_update import PairsState
from lowrank_jax.typing import Kernel, Pytree


def schedule(config: ScheduleConfig, learning_rate: float) -> optax.Schedule:
    """Linear from 0 to `learning_rate`, then a cosine to `final_fraction` of it at the end.

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
    """The configured optimizer, after clipping by the global norm.

    With `backprop` set, what it keeps of the gradient is clipped.

    Args:
      config: names the method; its None fields keep the method's own defaults.
      rate: learning rate by update.
      stacked: the model's layers lie along a leading axis of each kernel under `layers`.
      seed: of random projections.
      sides: what "sharding" comes to, of `lrx.projection.sides_for`.

    Raises ConfigurationError for a field that the method does not have.
    """
    check(config)
    method = METHODS[config.name]
    # what the configuration sets goes to the method by name; the rest keeps the method's default
    arguments = {key: value for key, value in _settings(config).items() if key not in _TRANSLATED}
    options = parse_options(config.options)
    # other groups of leaves have a peak of their own, and the same schedule
    for key in method.other_rates:
        if key in options:
            options[key] = _with_peak(rate, config.learning_rate, options[key])
    if method.peak is not None:
        arguments[method.peak] = config.learning_rate
    arguments |= options
    if config.projector is not None:
        arguments["projector"] = PROJECTORS[config.projector].build(rank=arguments.pop("rank"))
    arguments |= {
        key: value
        for key, value in {"views": views(stacked), "seed": seed}.items()
        if method.takes(key)
    }
    if config.side is not None:
        if config.side == "sharding" and not sides:
            raise ConfigurationError(
                "optimizer.side='sharding': parameters lie whole on each device; leave it None"
            )
        arguments["side"] = sides if config.side == "sharding" else config.side
    if config.backprop is not None:
        arguments["clip_norm"] = config.clip_norm
    optimizer = method.build(rate, **arguments)
    if config.refresh_when is not None:
        # the method's own period and phase stay, so it is built twice
        own = optimizer.projection.refresh_schedule
        moved = dataclasses.replace(own, when=config.refresh_when)
        optimizer = method.build(rate, **arguments | {"refresh_schedule": moved})
    # projected backprop clips what it keeps of the gradient, inside the step
    if config.clip_norm is None or config.backprop is not None:
        return optimizer
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)


# Keys that `build` turns into other arguments.
_TRANSLATED = (*COMMON, *OF_PROJECTIONS, "projector")


def _settings(config: OptimizerConfig) -> dict[str, Any]:
    """The keys of the section that are set."""
    return {
        field.name: value
        for field in dataclasses.fields(config)
        if (value := getattr(config, field.name)) is not None
    }


def _with_peak(rate: optax.Schedule, own: float, peak: float) -> optax.Schedule:
    """The schedule with another peak: the learning rate of another group of leaves."""
    return lambda step: rate(step) * (peak / own)


def check(config: OptimizerConfig) -> None:
    """ConfigurationError for a setting or an option that the method does not have."""
    method = METHODS[config.name]
    for key, value in _settings(config).items():
        if not method.takes(key):
            raise ConfigurationError(
                f"optimizer.{key}={value!r}: {config.name} has no such setting; leave it None"
            )
    keys = [field.name for field in dataclasses.fields(config)]
    known = [key for key in method.parameters if key not in (*keys, *_GIVEN)]
    given = _options(config)
    for option in method.required:
        if option not in given:
            raise ConfigurationError(
                f"optimizer.options={config.options!r}: {config.name} needs {option}, which has no "
                f"default; give it as --config.optimizer.options='{option}=...'"
            )
    for option in given:
        if option in keys:
            remedy = f"{option} is a key of its own: --config.optimizer.{option}"
        elif option not in known:
            remedy = f"{config.name} has no option {option!r}; its options are {', '.join(known)}"
        else:
            continue
        raise ConfigurationError(f"optimizer.options={config.options!r}: {remedy}")


# Arguments that the programs give themselves.
_GIVEN = ("views", "seed", "refresh_schedule", "inner")


def _options(config: OptimizerConfig) -> dict[str, Any]:
    try:
        return parse_options(config.options)
    except ValueError as error:
        raise ConfigurationError(f"optimizer.options={config.options!r}: {error}") from error


def decomposes(config: OptimizerConfig) -> bool:
    """Whether a refresh of the configured optimizer takes exact singular vectors."""
    return METHODS[config.name].decomposes_with(config.projector, _options(config))


def fit(given: dict[str, Any], own: str, explicit: Collection[str]) -> list[str]:
    """Sets to None what a file says for its own method and the chosen one lacks; notes of it.

    Args:
      given: the section optimizer with the chosen name, changed in place.
      own: the file's method.
      explicit: fields that were set by hand, which stay.
    """
    name = given.get("name")
    if name == own or name not in METHODS:
        return []
    notes, method = [], METHODS[name]
    for field, value in given.items():
        if value is None or field in explicit:
            continue
        if field == "learning_rate":
            notes.append(
                f"optimizer.learning_rate={value!r} is kept, which the configuration file has for "
                f"{own}"
            )
        elif reason := _unfit(method, field, value, own, given.get("projector")):
            notes.append(
                f"optimizer.{field}={value!r} of the configuration file is left out: {reason}"
            )
            given[field] = None
    return notes


def _unfit(method: Method, field: str, value: Any, own: str, projector: str | None) -> str | None:
    """Why a value that a file says for its method `own` is nothing for another; None where it is."""
    refused = {(no.section, no.key, no.value) for no in method.refuses}
    if ("optimizer", field, value) in refused:
        return f"{method.name} does not work with it"
    if field == "options":
        return f"they are {own}'s"
    if not method.takes(field):
        return f"{method.name} has no such setting"
    if field == "rank" and not method.needs_rank(projector):
        return f"{method.name} has a rank of its own, {method.own_rank}"
    return None


def full_gradients(config: OptimizerConfig) -> str | None:
    """Why a step of a low-rank method holds full gradients, and what avoids it; or None."""
    if not METHODS[config.name].projects:
        return None
    plain = dataclasses.replace(config, clip_norm=None, side=None)
    projection = build(plain, lambda step: 1.0, stacked=True, seed=0).projection
    plan, projector = (
        lrx.projection.gradient_mode(projection),
        type(projection.projector).__name__.lower(),
    )
    another = f"to hold none, take another method, such as {_thin_method()}"
    if projection.reads_gradient:
        return f"full gradients at every update: {config.name} reads all of the gradient; {another}"
    if plan == "full" and not hasattr(projection.refresh_schedule, "period"):
        return f"full gradients at every update: the basis moves at each by the gradient; {another}"
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
    if "target" not in projection.projector.reads:
        reason = "it comes before the update"
        remedy = "--config.optimizer.refresh_when=after takes thin products"
    elif METHODS[config.name].takes("projector"):
        remedy = "--config.optimizer.projector=alternating takes thin products"
    return f"full gradients at a refresh, which the peak of memory shows: {reason}; {remedy}"


def _thin_method() -> str:
    """The first of the table that the planner would try, with its settings."""
    name, advice = next((n, m.advice) for n, m in METHODS.items() if m.advice)
    settings = " and ".join(f"optimizer.{key}={value}" for key, value in advice.items())
    return f"{name} with {settings}"


def views(stacked: bool) -> lrx.Views:
    """Which leaves of our models count layers."""
    return lrx.Views(stacked=(r"layers/.*",) if stacked else ())


# Counts of an optimizer's state: updates that were refused, and layer by layer those that were
# refused when some layers had moved already.
REFUSED = ("skipped", "partly_skipped")


def skipped(state) -> jax.Array | int:
    """How many updates were refused because a gradient was not finite; 0 where none are."""
    return sum(value for name in REFUSED for _, value in optax.tree.get_all_with_path(state, name))


# The nodes of an optimizer's state by whose count its learning rate follows the schedule: {type:
# field of the count}.
SCHEDULED: dict[type, str] = {
    LearningRateState: "count",
    optax.ScaleByScheduleState: "count",
    PairsState: "step",
}


def is_scheduled(node: Kernel) -> bool:
    """Whether a node of an optimizer's state is one of SCHEDULED."""
    return type(node) in SCHEDULED


def done(state) -> int | None:
    """How many updates a state has seen, by its learning rate's count; None where it keeps none."""
    nodes = filter(is_scheduled, jax.tree.leaves(state, is_leaf=is_scheduled))
    counts = [getattr(node, SCHEDULED[type(node)]) for node in nodes]
    return int(counts[0]) + int(skipped(state)) if counts else None


def restarted(state: Pytree) -> Any:
    """An optimizer's state whose schedule and counts of skipped updates begin anew.

    The rest stays.

    Optimizers of pairs alternate by the count of the schedule, and so begin with the first factor
    again.
    """

    def begin(node):
        if not is_scheduled(node):
            return node
        field = SCHEDULED[type(node)]
        return node._replace(**{field: jnp.zeros_like(getattr(node, field))})

    begun = jax.tree.map(begin, state, is_leaf=is_scheduled)
    for name in REFUSED:
        counts = optax.tree.get_all_with_path(begun, name)
        if counts:
            begun = optax.tree.set(begun, **{name: jnp.zeros_like(counts[0][1])})
    return begun


def sides(state) -> dict[str, tuple[int, int]]:
    """{path: (side, rank)} of the projected matrices of a state, which shapes do not tell."""
    holds_view = lambda node: hasattr(node, "view")  # noqa: E731
    nodes = [node for node in jax.tree.leaves(state, is_leaf=holds_view) if holds_view(node)]
    return {node.view.path: (node.view.side, node.view.rank) for node in nodes}
