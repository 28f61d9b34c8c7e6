"""The one table of optimizers: what `config.optimizer.name` can be, and what the programs know of it.

A new optimizer is one file of the library, one row of the laws, and one row here: from it follow
the choices of the configuration and of `--help`, the errors for settings that it lacks, the
planner's cases and its advice, and the study. Settings that no other method has need no key of
their own: `optimizer.options` takes whatever is in the signature of `build`.
"""

import ast
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import optax

import lowrank_jax as lrx

# What a method steps: every leaf as it is, projections of matrices, or the factors of adapters.
PLAIN, PROJECTION, PAIRS = "plain", "projection", "pairs"

# Keys of the section optimizer that mean the same for every method.
COMMON = ("name", "learning_rate", "clip_norm", "options")
# Keys that only a projection has, whatever its function's signature says.
OF_PROJECTIONS = ("side", "backprop", "refresh_when")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Studied:
    """One line of the study of optimizers (`experiments.study`).

    Attributes:
      title: of its row.
      learning_rate: the centre of the grid that is searched.
      settings: keys of the section optimizer besides the rank, which is the same for all.
    """

    title: str
    learning_rate: float
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refusal:
    """A value elsewhere in the configuration that a method does not work with.

    Attributes:
      section, key, value: what is refused.
      remedy: why, and what to set in its place.
    """

    section: str
    key: str
    value: Any
    remedy: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Projector:
    """A subspace that may stand in place of a method's own.

    Attributes:
      name: of `optimizer.projector`.
      build: makes it of `rank`.
      decomposes: a refresh takes exact singular vectors.
    """

    name: str
    build: Callable[..., lrx.projectors.Projector]
    decomposes: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """One optimizer that a configuration can name.

    Attributes:
      name: of `optimizer.name`.
      build: `build(learning_rate, **settings)`. Its signature says which settings the method has.
      kind: PLAIN, PROJECTION or PAIRS.
      own_rank: the rank where none is given; None of a method that takes a rank wants one.
      decomposes: a refresh takes exact singular vectors: always, never, or `(option, value)`, where
        that option has that value.
      rates: options that are learning rates of other groups of leaves, such as those that are not
        projected: the peak of a schedule that has the shape of the method's own.
      peak: the setting that takes the peak of the schedule, `optimizer.learning_rate`; or None.
      programs: which of "pretrain" and "finetune" take it.
      refuses: what it does not work with.
      advice: settings with which the planner tries it where something else does not fit; None is
        not tried.
      studied: its lines of the study.
    """

    name: str
    build: Callable[..., optax.GradientTransformation]
    kind: str = PROJECTION
    own_rank: int | None = None
    decomposes: bool | tuple[str, Any] = False
    rates: tuple[str, ...] = ()
    peak: str | None = None
    programs: tuple[str, ...] = ("pretrain", "finetune")
    refuses: tuple[Refusal, ...] = ()
    advice: Mapping[str, Any] | None = None
    studied: tuple[Studied, ...] = ()

    @property
    def projects(self) -> bool:
        """It steps projections of matrices, by one of our projection transformations."""
        return self.kind == PROJECTION

    @property
    def other_rates(self) -> tuple[str, ...]:
        """Settings that are learning rates: every projection has one of its plain leaves."""
        return (*self.rates, *(("plain_learning_rate",) if self.projects else ()))

    @property
    def parameters(self) -> dict[str, Any]:
        """{setting: its default} of `build`."""
        signature = inspect.signature(self.build).parameters.values()
        return {one.name: one.default for one in signature if one.kind is not one.VAR_KEYWORD}

    @property
    def required(self) -> tuple[str, ...]:
        """Options that must be given, since `build` has no default of them. A rank is none."""
        keys = {"learning_rate", "rank"}
        empty = inspect.Parameter.empty
        return tuple(
            key for key, own in self.parameters.items() if own is empty and key not in keys
        )

    def takes(self, key: str) -> bool:
        """Whether the method has a setting: a key of the section optimizer, or an option."""
        if key == "projector" and "rank" not in self.parameters:
            return False  # it would have no rank
        return (
            key in COMMON
            or (self.projects and key in (*OF_PROJECTIONS, "views", "seed"))
            or (key in self.parameters and key not in OF_PROJECTIONS)
        )

    def needs_rank(self, projector: str | None) -> bool:
        """Whether a rank must be given. A projector in place of the method's own brings none."""
        has_own = self.own_rank is not None and projector is None
        return self.takes("rank") and not has_own

    def decomposes_with(self, projector: str | None, options: Mapping[str, Any]) -> bool:
        """Whether a refresh takes exact singular vectors, with these settings."""
        if projector is not None:
            return PROJECTORS[projector].decomposes
        if isinstance(self.decomposes, bool):
            return self.decomposes
        option, value = self.decomposes
        return options.get(option, self.parameters[option]) == value


def parse_options(text: str | None) -> dict[str, Any]:
    """`optimizer.options` as keyword arguments.

    Raises ValueError for what is none.

    >>> parse_options("steps=5, nesterov=False")
    {'steps': 5, 'nesterov': False}
    """
    remedy = "write it as keyword arguments in Python, such as 'steps=5, nesterov=False'"
    try:
        call = ast.parse(f"options({text or ''})", mode="eval").body
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name)) or call.args:
            raise ValueError(remedy)
        if not all(one.arg for one in call.keywords):  # "**settings"
            raise ValueError(remedy)
        return {str(one.arg): ast.literal_eval(one.value) for one in call.keywords}
    except (SyntaxError, ValueError) as error:
        raise ValueError(remedy) from error


# ------------------------------------------------------------------ functions of other signatures


def _optax_galore(
    learning_rate: Any,
    *,
    rank: int,
    refresh_every: int = 200,
    scale: float = 0.25,
    weight_decay: float = 0.0,
) -> optax.GradientTransformation:
    """`optax.contrib.galore` on the kernels of the blocks; it would also take the head."""

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


def _apollo_mini(learning_rate: Any, **settings: Any) -> optax.GradientTransformation:
    """`lrx.apollo_mini`, with the settings of `lrx.apollo` by name; a projector brings its rank."""
    own = {"rank": None} if "projector" in settings else {}
    return lrx.apollo_mini(learning_rate, **own | settings)


_apollo_mini.__signature__ = inspect.signature(lrx.apollo)  # type: ignore[attr-defined]


def _pairs(method: Callable[..., optax.GradientTransformation]) -> Callable[..., Any]:
    """An optimizer of the factors of adapters, whose scale comes with every update."""
    signature = inspect.signature(method)
    own = [one for name, one in signature.parameters.items() if name != "scale"]

    def build(learning_rate: Any, **settings: Any) -> optax.GradientTransformation:
        return method(learning_rate, scale=1.0, **settings)

    build.__signature__ = signature.replace(parameters=own)  # type: ignore[attr-defined]
    return build


# ------------------------------------------------------------------------------------- the tables


# Of methods that project a momentum: what they keep is a sum of gradients, and no step of it is
# clipped. Without the setting the gradients themselves are clipped.
_KEEPS_SUMS = tuple(
    Refusal(
        section="optimizer",
        key="backprop",
        value=backprop,
        remedy="it projects a sum of all gradients, which every step reads; leave "
        "optimizer.backprop None",
    )
    for backprop in ("projected", "full")
)


# Of methods that move few layers at a time: what they keep of the others is no state at all.
_SAMPLES_LAYERS = tuple(
    Refusal(
        section="optimizer",
        key="backprop",
        value=backprop,
        remedy="which layers are active changes with the steps, and the fused forms write every "
        "layer; leave optimizer.backprop None",
    )
    for backprop in ("projected", "full")
)


def _table(rows: Iterable[Any]) -> dict[str, Any]:
    return {row.name: row for row in rows}


PROJECTORS: dict[str, Projector] = _table(
    [
        Projector(name="svd", build=lrx.projectors.svd, decomposes=True),
        Projector(name="power", build=lrx.projectors.power),
        Projector(name="randomized", build=lrx.projectors.randomized),
        Projector(name="alternating", build=lrx.projectors.alternating),
        Projector(name="sketch", build=functools.partial(lrx.projectors.randomized, iterations=0)),
    ]
)

METHODS: dict[str, Method] = _table(
    [
        Method(
            name="adamw",
            build=optax.adamw,
            kind=PLAIN,
            studied=(Studied(title="AdamW", learning_rate=3e-3),),
        ),
        Method(name="sgd", build=optax.sgd, kind=PLAIN),
        Method(
            name="optax_galore",
            build=_optax_galore,
            kind=PLAIN,
            decomposes=True,
            programs=("pretrain",),
            refuses=(
                Refusal(
                    section="model",
                    key="scan",
                    value=True,
                    remedy="optax.contrib.galore leaves stacked layers unprojected; set "
                    "model.scan=False",
                ),
                Refusal(
                    section="mesh",
                    key="explicit",
                    value=True,
                    remedy="optax.contrib.galore decomposes matrices as they lie, divided or not; "
                    "set mesh.explicit=False",
                ),
            ),
        ),
        Method(
            name="galore",
            build=lrx.galore,
            decomposes=True,
            # no full gradient at a refresh, and no decomposition on a TPU
            advice={"projector": "alternating"},
            studied=(
                Studied(title="GaLore (svd)", learning_rate=1e-2),
                Studied(
                    title="GaLore (power)", learning_rate=1e-2, settings={"projector": "power"}
                ),
            ),
        ),
        Method(
            name="dct_adamw",
            build=lrx.dct_adamw,
            advice={},
            studied=(Studied(title="DCT-AdamW", learning_rate=3e-3),),
        ),
        Method(
            name="golore",
            build=lrx.golore,
            decomposes=True,
            studied=(
                Studied(
                    title="GoLore", learning_rate=0.01, settings={"options": "random_from=500"}
                ),
            ),
        ),
        Method(
            name="natural_galore",
            build=lrx.natural_galore,
            decomposes=True,
            studied=(Studied(title="Natural GaLore", learning_rate=0.01),),
        ),
        Method(
            name="flora", build=lrx.flora, studied=(Studied(title="Flora", learning_rate=0.01),)
        ),
        Method(name="rso", build=lrx.rso, studied=(Studied(title="RSO", learning_rate=0.003),)),
        Method(
            name="tensor_galore",
            build=lrx.tensor_galore,
            decomposes=True,
            studied=(Studied(title="Tensor-GaLore", learning_rate=0.01),),
        ),
        Method(
            name="tsr_adam",
            build=lrx.tsr_adam,
            decomposes=True,
            studied=(Studied(title="TSR-Adam", learning_rate=0.01),),
        ),
        Method(
            name="q_galore",
            build=lrx.q_galore,
            decomposes=True,
            studied=(Studied(title="Q-GaLore", learning_rate=0.01),),
        ),
        Method(
            name="lisa",
            build=lrx.lisa,
            refuses=_SAMPLES_LAYERS,
            studied=(Studied(title="LISA", learning_rate=0.003),),
        ),
        Method(
            name="owlore",
            build=lrx.owlore,
            decomposes=True,
            refuses=_SAMPLES_LAYERS,
            studied=(
                Studied(title="OwLore", learning_rate=0.01, settings={"options": "active=2"}),
            ),
        ),
        Method(
            name="badam",
            build=lrx.badam,
            refuses=_SAMPLES_LAYERS,
            studied=(Studied(title="BAdam", learning_rate=0.003),),
        ),
        Method(
            name="dion",
            build=lrx.dion,
            refuses=_KEEPS_SUMS,
            studied=(Studied(title="Dion", learning_rate=0.01),),
        ),
        Method(
            name="dion2",
            build=lrx.dion2,
            refuses=_KEEPS_SUMS,
            studied=(Studied(title="Dion2", learning_rate=0.01),),
        ),
        Method(
            name="dion3",
            build=lrx.dion3,
            refuses=_KEEPS_SUMS,
            studied=(Studied(title="Dion3", learning_rate=0.01),),
        ),
        Method(
            name="trion",
            build=lrx.trion,
            refuses=_KEEPS_SUMS,
            studied=(Studied(title="Trion", learning_rate=0.01),),
        ),
        Method(
            name="frugal",
            build=lrx.frugal,
            decomposes=("projection", "svd"),
            studied=(Studied(title="FRUGAL", learning_rate=1e-3),),
        ),
        Method(
            name="ldadam",
            build=lrx.ldadam,
            decomposes=("first", "svd"),
            studied=(Studied(title="LDAdam", learning_rate=3e-3),),
        ),
        Method(
            name="fira",
            build=lrx.fira,
            decomposes=True,
            studied=(Studied(title="Fira", learning_rate=0.01),),
        ),
        Method(
            name="subtrack",
            build=lrx.subtrack,
            decomposes=True,
            studied=(Studied(title="SubTrack++", learning_rate=0.01),),
        ),
        Method(
            name="conda",
            build=lrx.conda,
            decomposes=True,
            studied=(Studied(title="Conda", learning_rate=0.01),),
        ),
        Method(
            name="coap",
            build=lrx.coap,
            decomposes=True,
            studied=(Studied(title="COAP", learning_rate=0.003),),
        ),
        Method(
            name="lotus", build=lrx.lotus, studied=(Studied(title="Lotus", learning_rate=0.01),)
        ),
        Method(
            name="mofasgd",
            build=lrx.mofasgd,
            decomposes=True,
            studied=(Studied(title="MoFaSGD", learning_rate=0.01),),
        ),
        Method(name="racs", build=lrx.racs, studied=(Studied(title="RACS", learning_rate=0.01),)),
        Method(
            name="alice",
            build=lrx.alice,
            decomposes=True,
            studied=(Studied(title="Alice", learning_rate=0.01),),
        ),
        Method(
            name="online_subspace_descent",
            build=lrx.online_subspace_descent,
            decomposes=("first", "svd"),
            peak="peak_rate",
            studied=(Studied(title="Online Subspace Descent", learning_rate=1e-2),),
        ),
        Method(
            name="apollo",
            build=lrx.apollo,
            studied=(Studied(title="APOLLO", learning_rate=1e-2),),
        ),
        Method(
            name="apollo_mini",
            build=_apollo_mini,
            own_rank=1,
            advice={},
            studied=(Studied(title="APOLLO-Mini", learning_rate=1e-2),),
        ),
        Method(name="muon", build=lrx.muon, studied=(Studied(title="Muon", learning_rate=0.01),)),
        Method(
            name="normuon",
            build=lrx.normuon,
            studied=(Studied(title="NorMuon", learning_rate=0.01),),
        ),
        # eigenvectors at the first step, QR of square matrices at every refresh
        Method(
            name="soap",
            build=lrx.soap,
            decomposes=True,
            studied=(Studied(title="SOAP", learning_rate=0.003),),
        ),
        Method(name="lora_plus", build=lrx.lora_plus, kind=PAIRS, programs=("finetune",)),
        Method(
            name="scaled_adamw",
            build=_pairs(lrx.scaled_adamw),
            kind=PAIRS,
            programs=("finetune",),
        ),
        Method(name="altlora", build=_pairs(lrx.altlora), kind=PAIRS, programs=("finetune",)),
        Method(
            name="altlora_plus",
            build=_pairs(lrx.altlora_plus),
            kind=PAIRS,
            programs=("finetune",),
        ),
    ]
)


def names(program: str) -> tuple[str, ...]:
    """The methods that "pretrain" or "finetune" take.

    >>> "lora_plus" in names("pretrain"), "lora_plus" in names("finetune")
    (False, True)
    """
    return tuple(name for name, method in METHODS.items() if program in method.programs)


def projections() -> tuple[str, ...]:
    """The methods that step projections of matrices."""
    return tuple(name for name, method in METHODS.items() if method.projects)
