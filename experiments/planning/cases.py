"""Cases of a plan: one configuration compiled for one target, and products of lists."""

import ast
import dataclasses
import hashlib
import itertools
import json
import math
import re
from collections.abc import Sequence
from typing import Any

import lowrank_jax as lrx
from experiments.harness import methods, optimizers
from experiments.planning import targets
from experiments.settings import configuration
from experiments.settings.configuration import RunConfig
from experiments.settings.sections import ConfigurationError, build, one_of, require

# What another optimizer takes over from the configuration's, where it has it.
SHARED = ("learning_rate", "clip_norm", "rank", "refresh_every", "backprop")
PLANS = ("optax", "full", "projected")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One program to compile.

    Attributes:
      config: with its mesh and its optimizer.
      topology: name of a target.
      execute: also run the program once and measure what it takes (CPU only).
    """

    config: RunConfig
    topology: str
    execute: bool = False

    @property
    def target(self) -> targets.Target:
        """The target, taken apart."""
        return targets.parse(self.topology)

    def to_json(self) -> dict[str, Any]:
        """For the process that compiles it, and for `from_json`."""
        config = json.loads(json.dumps(configuration.to_dict(self.config)))
        return {"config": config, "topology": self.topology, "execute": self.execute}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Case":
        """The case that `to_json` wrote."""
        return cls(
            config=configuration.from_dict(values["config"]),
            topology=values["topology"],
            execute=values["execute"],
        )

    @property
    def key(self) -> str:
        """Equal for equal programs: a digest of all that decides them."""
        values = self.to_json()
        decisive = {
            name: values["config"][name]
            for name in ("model", "data", "optimizer", "schedule", "mesh")
        }
        text = json.dumps([decisive, values["topology"], values["execute"]], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def label(self) -> str:
        """A few words: preset, target, mesh, optimizer."""
        mesh = (
            ",".join(f"{name}={size}" for name, size in self.mesh_sizes().items() if size > 1)
            or "one device"
        )
        return f"{self.config.preset} {self.topology} {mesh} {self.name}"

    @property
    def name(self) -> str:
        """The optimizer with what is unlike its default, and its gradients."""
        own = self.config.optimizer
        words = ", ".join(word for word in (own.projector, own.options) if word)
        extra = f" ({words})" if words else ""
        return f"{own.name}{extra}" + ("" if own.backprop is None else f", {own.backprop}")

    def mesh_sizes(self) -> dict[str, int]:
        """Sizes of the mesh's axes on the target, without -1.

        Raises:
          ConfigurationError: where they do not make up the target's devices.
        """
        sizes, chips = dict(self.config.mesh.sizes), self.target.chips
        # an axis that is left open takes what the others leave
        known = math.prod(size for size in sizes.values() if size > 0)
        opened = [name for name, size in sizes.items() if size == -1]
        if len(opened) == 1 and chips % known == 0:
            sizes[opened[0]] = chips // known
        is_whole = math.prod(sizes.values()) == chips and min(sizes.values()) > 0
        text = ",".join(f"{name}={size}" for name, size in self.config.mesh.sizes.items())
        remedy = f"{self.topology} has {chips} devices; choose sizes whose product that is"
        require(is_whole, "mesh", text, remedy)
        return sizes

    def check(self) -> None:
        """ConfigurationError for what is known to fail, before anything is compiled."""
        sizes = self.mesh_sizes()
        parts, batch = self.config.schedule.accumulation, self.config.data.batch_size
        shares = sizes["data"] * sizes["fsdp"]
        remedy = (
            f"does not divide over data * fsdp = {shares} with schedule.accumulation={parts}; "
            f"choose a multiple of {shares * parts}, or "
            f"--config.schedule.accumulation={max(1, batch // shares)} or a divisor of it"
        )
        require(batch % (shares * parts) == 0, "data.batch_size", batch, remedy)
        runs_here = not self.execute or self.target.kind == "cpu"
        require(runs_here, "execute", True, "only cpu targets are run; use cpu:N")
        if self.target.kind == "tpu":
            remedy = (
                f"{self.config.optimizer.name} would take an exact SVD, whose program takes "
                "minutes to compile and hundreds of MiB on a TPU; give "
                "--config.optimizer.projector=power or alternating"
            )
            exact = optimizers.decomposes(self.config.optimizer)
            require(not exact, "optimizer.projector", self.config.optimizer.projector, remedy)


def optimizer_of(config: RunConfig) -> Any:
    """The configured optimizer without clipping in front, so that its projection shows.

    Without a mesh's sides, too.
    """
    rate = optimizers.schedule(config.schedule, config.optimizer.learning_rate)
    side = None if config.optimizer.side == "sharding" else config.optimizer.side
    settings = dataclasses.replace(config.optimizer, clip_norm=None, side=side)
    return optimizers.build(settings, rate, stacked=config.model.scan, seed=config.run.seed)


def gradients_of(config: RunConfig) -> str:
    """Which gradients the step takes: "full", or for projected backprop what `lrx.projection.gradient_mode` says."""
    if config.optimizer.backprop != "projected":
        return "full"
    return lrx.projection.gradient_mode(optimizer_of(config).projection)


def with_optimizer(config: RunConfig, text: str) -> RunConfig:
    """The configuration with another optimizer, spelled `name:field=value:...`.

    Another method takes over learning rate, clipping, rank, period and form of the step, where it
    has them; the configuration's own method keeps everything. A setting that is no key of the
    section is an option of the method.

    >>> config = with_optimizer(RunConfig(), "galore:rank=32:projector=power")
    >>> config.optimizer.name, config.optimizer.rank, config.optimizer.projector
    ('galore', 32, 'power')
    """
    name, *settings = text.split(":")
    one_of("optimizers", name, methods.names("pretrain"))
    method = methods.METHODS[name]
    given: dict[str, Any] = {"name": name}
    for setting in settings:
        field, equals, value = setting.partition("=")
        require(equals, "optimizers", text, "write settings as name:field=value:field=value")
        try:
            given[field] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            given[field] = value
    # what is no key of the section is an option of the method
    keys = [field.name for field in dataclasses.fields(configuration.OptimizerConfig)]
    options = {key: given.pop(key) for key in [*given] if key not in keys and method.takes(key)}
    if options:
        given["options"] = ", ".join(f"{key}={value!r}" for key, value in options.items())
    own = dataclasses.asdict(config.optimizer)
    if name != own["name"]:
        own = {
            key: value
            for key, value in own.items()
            if key in SHARED and method.takes(key) and not (key == "rank" and method.own_rank)
        }
    return dataclasses.replace(
        config, optimizer=build(configuration.OptimizerConfig, "optimizer", own | given)
    )


def with_backprop(config: RunConfig, text: str) -> RunConfig:
    """The configuration with another form of the step, see `OptimizerConfig.backprop`.

    "optax" is the optax form.
    """
    one_of("backprop", text, PLANS)
    projects = methods.METHODS[config.optimizer.name].projects
    value = None if text == "optax" or not projects else text
    return dataclasses.replace(
        config, optimizer=dataclasses.replace(config.optimizer, backprop=value)
    )


def with_mesh(config: RunConfig, text: str) -> RunConfig:
    """The configuration with another mesh, spelled "fsdp=8,tensor=2"; data takes the rest.

    >>> with_mesh(RunConfig(), "fsdp=8").mesh.sizes
    {'data': -1, 'fsdp': 8, 'sequence': 1, 'tensor': 1}
    """
    sizes: dict[str, Any] = {}
    for part in text.split(","):
        axis, _, size = part.strip().partition("=")
        require(
            re.fullmatch("-?[0-9]+", size),
            "meshes",
            text,
            "write them as 'data=16;fsdp=8,tensor=2'",
        )
        sizes[axis] = int(size)
    own = {"spread": config.mesh.spread, "explicit": config.mesh.explicit} | sizes
    return dataclasses.replace(config, mesh=build(configuration.MeshConfig, "mesh", own))


def product(
    config: RunConfig,
    topologies: Sequence[str],
    *,
    meshes: Sequence[str] = (),
    optimizers: Sequence[str] = (),
    backprops: Sequence[str] = (),
    execute: bool = False,
) -> tuple[list[Case], list[str]]:
    """Every combination that is a program of its own, and why the others are left out.

    Args:
      config: what is not listed comes from here.
      topologies: names of targets.
      meshes, optimizers, backprops: as for `with_mesh`, `with_optimizer`, `with_backprop`; empty
        keeps the configuration's own.
      execute: see `Case`.

    Raises:
      ConfigurationError: where nothing is left.
    """
    found: dict[str, Case] = {}
    notes: list[str] = []
    lists: tuple[Sequence[str | None], ...] = (
        meshes or [None],
        optimizers or [None],
        backprops or [None],
    )
    for topology, (mesh, optimizer, backprop) in itertools.product(
        topologies, [*itertools.product(*lists)]
    ):
        try:
            # the optimizer before the form of its step: another one may have no other form
            own = config if mesh is None else with_mesh(config, mesh)
            own = own if optimizer is None else with_optimizer(own, optimizer)
            own = own if backprop is None else with_backprop(own, backprop)
            case = Case(config=own, topology=topology, execute=execute)
            case.check()
        except ConfigurationError as error:
            words = " ".join(word for word in (topology, mesh, optimizer, backprop) if word)
            notes.append(f"left out: {words}: {error}")
            continue
        is_projected = own.optimizer.backprop == "projected"
        # where both forms are listed, one program is enough
        if is_projected and len(backprops) > 1 and gradients_of(own) == "full":
            note = (
                f"{case.name}: needs full gradients at every step, so that its program is that of "
                "backprop=full"
            )
            notes += [] if note in notes else [note]
            continue
        found.setdefault(case.key, case)  # equal programs once
    if not found:
        raise ConfigurationError(
            notes[0].removeprefix("left out: ") if notes else "nothing to plan"
        )
    return list(found.values()), notes
