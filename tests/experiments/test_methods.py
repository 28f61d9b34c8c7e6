"""The one table of optimizers: nothing else in the programs lists them, and a row is all that a new
one needs."""

import ast
import dataclasses
import pathlib
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.harness import methods, optimizers, workdir
from experiments.harness.methods import METHODS, PROJECTORS
from experiments.settings import configuration
from experiments.settings.configuration import OptimizerConfig, ScheduleConfig
from experiments.settings.sections import ConfigurationError
from lowrank_jax.projection.projectors.correlated import Correlated
from lowrank_jax.projection.projectors.grassmann import Grassmann
from lowrank_jax.projection.projectors.online_pca import OnlinePca
from lowrank_jax.projection.projectors.power import Power
from lowrank_jax.projection.projectors.svd import Svd, TwoSidedSvd
from lowrank_jax.projection.projectors.switch import Switch
from lowrank_jax.projection.projectors.switching import Switching
from tests.experiments import runs
from tests.experiments.commands import ENVIRONMENT

ROOT = pathlib.Path(__file__).parents[2]
# Configuration files and benchmarks choose methods by name; nothing else does.
ROOMS = ("harness", "settings", "finetuning", "planning", "reporting", "models", "data")
FILES = [
    *(ROOT / "experiments").glob("*.py"),
    *(path for room in ROOMS for path in (ROOT / "experiments" / room).rglob("*.py")),
    ROOT / "experiments" / "benchmarks" / "study.py",
]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_other_file_names_a_method(path):
    """But "adamw", which is everybody's default."""
    names = set(METHODS) - {"adamw"}
    if path.name == "methods.py":
        return
    named = [
        node.value
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in names
    ]
    assert named == []


def projector_of(**settings):
    config = OptimizerConfig(clip_norm=None, **settings)
    return config, optimizers.build(config, lambda step: 0.1, stacked=True, seed=0).projection


def takes_singular_vectors(projector):
    if isinstance(projector, Switch):
        return takes_singular_vectors(projector.first) or takes_singular_vectors(projector.then)
    return isinstance(projector, Correlated | Grassmann | Svd | Switching | TwoSidedSvd) or (
        isinstance(projector, Power | OnlinePca) and projector.first == "svd"
    )


@pytest.mark.parametrize("name", ["galore", "muon"])
def test_the_rate_of_plain_leaves_follows_the_schedule_to_its_own_peak(name):
    rank = 4 if METHODS[name].takes("rank") else None
    config = OptimizerConfig(
        clip_norm=None,
        name=name,
        rank=rank,
        learning_rate=0.02,
        options="plain_learning_rate=0.005",
    )
    rate = optimizers.schedule(ScheduleConfig(steps=100), 0.02)
    recipe = optimizers.build(config, rate, stacked=True, seed=0).recipe
    for step in (3, 50, 99):
        own = float(recipe.rate(step, plain=True))
        np.testing.assert_allclose(own, float(recipe.rate(step)) / 4, rtol=1e-6)


@pytest.mark.parametrize("projector", [None, *PROJECTORS])
@pytest.mark.parametrize("name", methods.projections())
def test_the_table_says_what_decomposes(name, projector):
    if projector is not None and not METHODS[name].takes("projector"):
        return
    config, projection = projector_of(**runs.settings_of(name), projector=projector)
    own = takes_singular_vectors(projection.projector) or projection.inner.decomposes
    assert optimizers.decomposes(config) == own


@pytest.mark.parametrize(
    "name, options", [("ldadam", "first='range'"), ("frugal", "projection='columns'")]
)
def test_an_option_may_do_without_a_decomposition(name, options):
    assert optimizers.decomposes(OptimizerConfig(name=name, rank=4))
    config, projection = projector_of(name=name, rank=4, options=options)
    assert not optimizers.decomposes(config)
    assert not takes_singular_vectors(projection.projector)


def test_options_reach_the_method():
    params = {"layers": {"kernel": jnp.ones((2, 8, 12))}}

    def size(options):
        config = OptimizerConfig(name="dct_adamw", rank=4, options=options)
        optimizer = optimizers.build(config, lambda step: 0.1, stacked=True, seed=0)
        leaves = jax.tree.leaves(jax.eval_shape(optimizer.init, params))
        return sum(leaf.size for leaf in leaves)

    assert size("error_feedback=True") - size(None) == 2 * 8 * 12


@pytest.mark.parametrize(
    "options, message",
    [
        ("3", r"write it as keyword arguments in Python, such as 'steps=5"),
        ("kind=open('x')", r"write it as keyword arguments"),
        ("kind=3)(", r"write it as keyword arguments"),
        ("knid=3", r"dct_adamw has no option 'knid'; its options are kind, "),
        ("eps=1e-3", r"eps is a key of its own: --config\.optimizer\.eps"),
        ("views=3", r"dct_adamw has no option 'views'"),
    ],
)
def test_options_that_are_none_are_refused(options, message):
    config = OptimizerConfig(name="dct_adamw", rank=4, options=options)
    with pytest.raises(ConfigurationError, match=r"optimizer\.options=.*: " + message):
        optimizers.check(config)


def test_an_option_without_a_default_must_be_given():
    assert METHODS["golore"].required == ("random_from",)
    assert sum(bool(method.required) for method in METHODS.values()) == 1
    with pytest.raises(
        ConfigurationError,
        match=r"golore needs random_from.*optimizer\.options='random_from=\.\.\.'",
    ):
        optimizers.check(OptimizerConfig(name="golore", rank=4))
    _, projection = projector_of(name="golore", rank=4, options="random_from=7")
    assert projection.projector.at == 7


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize(
    "name, options, active", [("lisa", "active=1", 1), ("badam", "period=7, order='random'", 1)]
)
def test_a_sampler_counts_the_layers_of_our_models(name, options, active, stacked):
    """Of a stack and of separate blocks the state holds the active layers alone."""
    kernels = {"kernel": jnp.ones((3, 8, 12) if stacked else (8, 12))}
    params = {"layers": kernels} if stacked else {f"layer_{i}": kernels for i in range(3)}
    config = OptimizerConfig(name=name, options=options, clip_norm=None)
    optimizer = optimizers.build(config, lambda step: 0.1, stacked=stacked, seed=0)
    state = jax.eval_shape(optimizer.init, params)
    moments = [x for x in jax.tree.leaves(state.projection.matrices) if x.ndim > 1]
    assert sum(x.size for x in moments) == active * 2 * 8 * 12


def test_leaves_that_are_not_projected_may_have_a_rate_of_their_own():
    """It follows the schedule, to a peak of its own."""
    options = "plain_learning_rate=0.03"
    config = OptimizerConfig(name="muon", learning_rate=0.01, clip_norm=None, options=options)
    rate = optimizers.schedule(configuration.ScheduleConfig(steps=10, warmup_steps=5), 0.01)
    optimizer = optimizers.build(config, rate, stacked=False, seed=0)
    params = {"kernel": jnp.eye(4), "bias": jnp.zeros(3)}
    state = optimizer.init(params)
    gradients = {"kernel": jnp.eye(4), "bias": jnp.ones(3)}
    for step in range(3):
        updates, state = optimizer.update(gradients, state, params)
        # the first moments of a constant gradient are that gradient: AdamW steps by its rate
        expected = -3 * rate(step) * jnp.ones(3)
        assert jnp.allclose(updates["bias"], expected, rtol=1e-4), step


def test_options_stay_with_the_method_of_the_file():
    given = {"name": "galore", "rank": 4, "options": "error_feedback=True"}
    notes = optimizers.fit(given, "dct_adamw", ["name", "rank"])
    assert given["options"] is None
    assert "is left out: they are dct_adamw's" in notes[0]


def test_a_run_from_before_options_is_still_the_same_run(tmp_path):
    config = configuration.from_dict({"optimizer": {"name": "dct_adamw", "rank": 4}})
    values = workdir.as_json(config)
    del values["optimizer"]["options"]
    workdir.write_files(tmp_path, {"config.json": values})
    assert workdir.claim(config, tmp_path) == (None, {})
    other = dataclasses.replace(
        config, optimizer=dataclasses.replace(config.optimizer, options="kind=2")
    )
    with pytest.raises(ConfigurationError, match=r"optimizer\.options='kind=2'"):
        workdir.claim(other, tmp_path)


NEW = """
    import dataclasses
    import lowrank_jax as lrx
    from experiments.harness import methods

    built = {}

    def tilted(learning_rate, *, rank=None, tilt=0.5, rest_learning_rate=1e-3, b1=0.9, **common):
        built.update(rate=learning_rate, tilt=tilt, rest=rest_learning_rate)
        return lrx.galore(learning_rate, rank=rank, b1=b1, **common)

    methods.METHODS["tilted"] = methods.Method(
        name="tilted", build=tilted, rates=("rest_learning_rate",), advice={"b1": 0.8},
        decomposes=("tilt", 0.5),
        studied=(methods.Studied(title="Tilted", learning_rate=1e-2),),
    )

    from experiments.benchmarks import study
    from experiments.harness import optimizers
    from experiments.planning import advice, cases
    from experiments.settings import arguments, configuration, finetuning_configuration

    # the configuration, its help and its errors
    given = {"name": "tilted", "rank": 4, "learning_rate": 0.02,
             "options": "tilt=0.25, rest_learning_rate=0.005"}
    config = configuration.from_dict({"optimizer": given})
    finetuning_configuration.from_dict({"optimizer": given, "adapter": {"method": ""}})
    assert "tilted" in arguments.page(configuration, "experiments/configs/tiny.py", "x")
    for wrong in ({"rank": None}, {"name": "titled"}):
        try:
            configuration.from_dict({"optimizer": given | wrong})
        except configuration.ConfigurationError as error:
            print(error)

    # both groups of leaves follow the schedule, each to its own peak
    rate = optimizers.schedule(config.schedule, 0.02)
    optimizers.build(config.optimizer, rate, stacked=True, seed=0)
    assert built["tilt"] == 0.25
    for step in (1, 50, 500):
        assert abs(float(built["rest"](step)) / float(rate(step)) - 0.25) < 1e-6
    assert optimizers.full_gradients(config.optimizer).startswith("full gradients at every update")

    # the planner and the study
    other = configuration.from_dict({"optimizer": {"name": "adamw"}})
    planned = cases.with_optimizer(other, "tilted:rank=8:tilt=0.25").optimizer
    assert planned.options == "tilt=0.25" and not optimizers.decomposes(planned)
    assert optimizers.decomposes(dataclasses.replace(planned, options=None))
    case = cases.Case(config=other, topology="cpu:1")
    tried = [change(other).optimizer for change in advice._optimizers(case)]
    assert ("tilted", 0.8, 0.25) in [(one.name, one.b1, one.rank) for one in tried]
    assert study.METHODS["Tilted"] == (1e-2, {"name": "tilted", "rank": 32})
"""


def test_a_new_method_needs_only_its_row():
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(NEW)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=ENVIRONMENT,
    )
    assert done.returncode == 0, done.stderr
    assert "optimizer.rank=None: tilted needs a rank" in done.stdout
    assert "optimizer.name='titled': did you mean 'tilted'?" in done.stdout


def test_the_apollo_of_rank_one_needs_none():
    config, projection = projector_of(name="apollo_mini")
    assert projection.projector.rank == METHODS["apollo_mini"].own_rank == 1
    with pytest.raises(ConfigurationError, match="apollo_mini needs a rank"):
        dataclasses.replace(config, projector="power")
