"""Configurations: what is wrong is found before any work, and named."""

import dataclasses
import importlib.util
import json
import math
import pathlib
import re
import subprocess
import sys
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_jax as lrx
from experiments.harness import methods, optimizers
from experiments.settings import arguments, configuration, finetuning_configuration
from experiments.settings.arguments import load
from experiments.settings.configuration import (
    OptimizerConfig,
    ScheduleConfig,
    from_dict,
    template,
    to_dict,
)
from experiments.settings.sections import ConfigurationError, plain
from tests.experiments import commands, runs

CONFIGS = sorted((pathlib.Path(configuration.__file__).parents[1] / "configs").glob("[!_]*.py"))


def load_config(path):
    specification = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_valid_and_begins_with_its_command_and_expectation(path):
    module = load_config(path)
    config = from_dict(module.get_config())
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config
    assert f"--config=experiments/configs/{path.name}" in module.__doc__
    assert "Expect" in module.__doc__
    assert "PLACEHOLDER" not in module.__doc__


def test_template_holds_the_defaults_of_every_key():
    assert from_dict(template()) == configuration.RunConfig()
    keys = {
        section: set(values)
        for section, values in template().to_dict().items()
        if isinstance(values, dict)
    }
    for section, kind in configuration.SECTIONS.items():
        fields = {field.name for field in dataclasses.fields(kind)}
        assert keys[section] == fields | ({"preset"} if section == "model" else set())


WRONG = [
    (
        {"optimizer": {"nmae": "adamw"}},
        r"optimizer\.nmae='adamw': unknown key; did you mean optimizer\.name\?",
    ),
    ({"optimiser": {}}, r"optimiser=\{\}: unknown key; did you mean optimizer\?"),
    ({"model": {"widht": 3}}, r"model\.widht=3: unknown key; did you mean model\.width\?"),
    ({"model": {"preset": "60m"}}, r"model\.preset='60m': did you mean '60M'\?"),
    ({"model": {"heads": 3}}, r"model\.heads=3 does not divide width=128"),
    ({"model": {"width": "wide"}}, r"model\.width='wide': is of type str; give int"),
    ({"optimizer": {"name": "adam"}}, r"optimizer\.name='adam': did you mean 'adamw'\?"),
    ({"optimizer": {"name": "galore"}}, r"optimizer\.rank=None: galore needs a rank"),
    (
        {"optimizer": {"name": "galore", "rank": 129}},
        r"optimizer\.rank=129: .* smallest matrix dimension is 128",
    ),
    (
        {"model": {"kv_heads": 1}, "optimizer": {"name": "galore", "rank": 33}},
        r"rank=33: .* smallest .* is 32",
    ),
    ({"optimizer": {"name": "galore", "rank": 1.5}}, r"optimizer\.rank=1\.5: a fraction lies in"),
    ({"optimizer": {"name": "galore", "rank": 0}}, r"optimizer\.rank=0: give a positive integer"),
    (
        {"optimizer": {"name": "galore", "rank": 8, "projector": "svdd"}},
        r"projector='svdd': did you mean 'svd'",
    ),
    (
        {"optimizer": {"learning_rate": -1}},
        r"optimizer\.learning_rate=-1\.0: give a positive number",
    ),
    (
        {"optimizer": {"learning_rate": True}},
        r"optimizer\.learning_rate=True: is of type bool; give float",
    ),
    ({"optimizer": {"clip_norm": 0.0}}, r"optimizer\.clip_norm=0\.0"),
    (
        {"optimizer": {"name": "optax_galore", "rank": 8}},
        r"model\.scan=True: .* set model\.scan=False",
    ),
    ({"schedule": {"steps": 0}}, r"schedule\.steps=0: give a positive integer"),
    (
        {"schedule": {"steps": 10, "warmup_steps": 10}},
        r"schedule\.warmup_steps=10: stay below steps=10",
    ),
    ({"schedule": {"final_fraction": 2}}, r"schedule\.final_fraction=2\.0"),
    (
        {"schedule": {"accumulation": 3}},
        r"schedule\.accumulation=3: choose a divisor of data\.batch_size=16",
    ),
    ({"data": {"sequence_length": 512}}, r"data\.sequence_length=512: the model takes 256"),
    ({"data": {"batch_size": 0}}, r"data\.batch_size=0"),
    (
        {"data": {"packing": "pad"}, "run": {"trigram": True}},
        r"run\.trigram=True: .* data\.packing='pack'",
    ),
    ({"checkpoint": {"keep": 0}}, r"checkpoint\.keep=0: give a positive integer"),
    ({"checkpoint": {"every": -1}}, r"checkpoint\.every=-1"),
    ({"run": {"profile_steps": [5, 3]}}, r"run\.profile_steps=\(5, 3\)"),
    ({"run": {"log_every": 0}}, r"run\.log_every=0"),
    ({"run": {"evaluation_tokens": 0}}, r"run\.evaluation_tokens=0"),
    ({"run": {"sample_prompt": ""}}, r"run\.sample_prompt=''"),
    ({"run": {"temperature": -1.0}}, r"run\.temperature=-1\.0"),
    ({"name": 3}, r"name=3: give a string"),
]


@pytest.mark.parametrize("values, message", WRONG, ids=[str(index) for index in range(len(WRONG))])
def test_wrong_values_name_field_value_and_remedy(values, message):
    with pytest.raises(ConfigurationError, match=message):
        from_dict(values)


def test_numbers_keep_their_kind():
    config = from_dict(
        {
            "optimizer": {"name": "galore", "rank": 0.25, "learning_rate": 1},
            "run": {"profile_steps": [2, 3]},
        }
    )
    assert config.optimizer.rank == 0.25
    assert config.optimizer.learning_rate == 1.0
    assert isinstance(config.optimizer.learning_rate, float)
    assert isinstance(from_dict({"optimizer": {"name": "galore", "rank": 8}}).optimizer.rank, int)
    assert config.run.profile_steps == (2, 3)


def test_schedule_is_linear_then_cosine():
    rate = optimizers.schedule(ScheduleConfig(steps=110, warmup_steps=10, final_fraction=0.1), 0.5)
    steps = np.arange(111)
    cosine = 0.05 + 0.45 * 0.5 * (1 + np.cos(np.pi * (steps - 10) / 100))
    expected = np.where(steps < 10, 0.5 * steps / 10, cosine)
    np.testing.assert_allclose(
        [float(rate(step)) for step in steps], expected, rtol=1e-5, atol=1e-7
    )
    assert float(optimizers.schedule(ScheduleConfig(steps=1), 0.5)(0)) == 0.5


PARAMS = {
    "layers": {"mlp": {"up_proj": {"kernel": jnp.ones((2, 8, 12))}}},
    "norm": {"scale": jnp.ones(8)},
}
FLAT = {
    "layer_0": {"up_proj": {"kernel": jnp.ones((8, 12))}},
    "lm_head": {"kernel": jnp.ones((8, 20))},
}


@pytest.mark.parametrize("name", methods.names("pretrain"))
def test_every_optimizer_is_built_and_projects_the_blocks_alone(name):
    method = methods.METHODS[name]
    stacked = not any(refused.key == "scan" for refused in method.refuses)
    params = PARAMS if stacked else FLAT
    config = OptimizerConfig(**runs.settings_of(name))
    optimizer = optimizers.build(config, lambda step: 0.1, stacked=stacked, seed=0)
    state = jax.eval_shape(optimizer.init, params)
    if method.projects:
        # bases of outputs, whatever the shape
        side = "cols" if name in ("dion", "dion3") else "rows"
        # Muon and SOAP project nothing away, and the rank of MoFaSGD is its momentum's
        rank = 4 if method.takes("rank") and name != "mofasgd" else 8
        assert optimizers.sides(state) == {"layers/mlp/up_proj/kernel": (side, rank)}
        assert jax.eval_shape(optimizers.skipped, state).shape == ()
    else:
        assert optimizers.sides(state) == {}
        assert optimizers.skipped(state) == 0
    if name == "optax_galore":
        sizes = {leaf.shape for leaf in jax.tree.leaves(state)}
        assert (8, 20) in sizes  # the head keeps full moments
        assert (8, 12) not in sizes


@pytest.mark.parametrize(
    "name, field, value",
    [("adamw", "refresh_every", 5), ("sgd", "b1", 0.5), ("dct_adamw", "projector", "svd")],
)
def test_a_setting_the_method_lacks_is_refused(name, field, value):
    config = OptimizerConfig(name=name, rank=4 if name == "dct_adamw" else None, **{field: value})
    with pytest.raises(
        ConfigurationError, match=rf"optimizer\.{field}={value!r}: {name} has no such setting"
    ):
        optimizers.build(config, lambda step: 0.1, stacked=True, seed=0)


@pytest.mark.parametrize("projector", methods.PROJECTORS)
def test_projector_is_heeded(projector):
    config = OptimizerConfig(name="galore", rank=4, projector=projector)
    optimizer = optimizers.build(config, lambda step: 0.1, stacked=True, seed=0)
    plain = optimizers.build(
        dataclasses.replace(config, clip_norm=None), lambda step: 0.1, stacked=True, seed=0
    )
    found = plain.projection.projector
    assert type(found).__name__.lower() == {"sketch": "randomized"}.get(projector, projector)
    assert getattr(found, "iterations", 1) == (0 if projector == "sketch" else 1)
    assert len(optimizer.init(PARAMS)) == 2  # clipping, then the method


@pytest.mark.parametrize("backprop", configuration.BACKPROP)
@pytest.mark.parametrize("when", ["before", "after"])
def test_backprop_and_the_clock_are_heeded(backprop, when):
    config = OptimizerConfig(
        name="galore", rank=4, backprop=backprop, refresh_when=when, refresh_every=7
    )
    optimizer = optimizers.build(config, lambda step: 0.1, stacked=True, seed=0)
    assert optimizer.projection.clip_norm == 1.0  # of what is kept, not chained before
    assert (
        optimizer.projection.refresh_schedule.when,
        optimizer.projection.refresh_schedule.period,
    ) == (when, 7)


@pytest.mark.parametrize("projector", [None, *methods.PROJECTORS])
@pytest.mark.parametrize("backprop", [None, *configuration.BACKPROP])
def test_full_gradients_are_told_with_what_avoids_them(backprop, projector):
    """The flag that the note names takes fewer of them, until there is nothing to say."""
    config = OptimizerConfig(name="galore", rank=4, backprop=backprop, projector=projector)
    plain = dataclasses.replace(config, clip_norm=None)
    optimizer = optimizers.build(plain, lambda step: 0.1, stacked=True, seed=0)
    is_thin = projector in ("alternating", "sketch")
    assert optimizer.projection.refresh_schedule.when == ("after" if is_thin else "before")
    plan = lrx.projection.gradient_mode(optimizer.projection)
    assert plan == ("sketch at a refresh" if is_thin else "full at a refresh")
    for _ in range(3):
        note = optimizers.full_gradients(config)
        if note is None:
            break
        field, value = re.search(r"--config\.optimizer\.(\w+)=(\w+)", note).groups()
        assert getattr(config, field) != value
        config = dataclasses.replace(config, **{field: value})
    assert note is None
    assert config.backprop == "projected"


def test_what_avoids_full_gradients_of_the_other_methods():
    def note(name, **fields):
        rank = None if name == "apollo_mini" else 4
        return optimizers.full_gradients(
            OptimizerConfig(name=name, rank=rank, backprop="projected", **fields)
        )

    assert "refresh_when=after" in note("galore", projector="alternating", refresh_when="before")
    assert "refresh_every=200" in note("dct_adamw")
    assert "galore with optimizer.projector=alternating" in note("dct_adamw", refresh_every=200)
    for name in ("apollo", "apollo_mini", "frugal", "ldadam"):
        assert f"{name} reads all of the gradient" in note(name)
    # whose `refresh_every` is a rate
    assert "moves at each by the gradient; to hold none" in note("online_subspace_descent")
    assert optimizers.full_gradients(OptimizerConfig()) is None


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"backprop": "low"}, "optimizer.backprop='low'"),
        ({"name": "adamw", "rank": None, "backprop": "full"}, "adamw projects nothing"),
        ({"refresh_when": "now"}, "optimizer.refresh_when='now'"),
        ({"name": "adamw", "rank": None, "refresh_when": "after"}, "adamw projects nothing"),
    ],
)
def test_backprop_that_cannot_be(fields, message):
    with pytest.raises(ConfigurationError, match=message):
        OptimizerConfig(**({"name": "galore", "rank": 4} | fields))


def test_clipping_is_heeded():
    params = {"w": jnp.zeros(4)}
    for clip, size in ((1.0, 1.0), (None, 20.0)):
        config = OptimizerConfig(name="sgd", learning_rate=1.0, clip_norm=clip)
        optimizer = optimizers.build(config, lambda step: 1.0, stacked=True, seed=0)
        update, _ = optimizer.update({"w": jnp.full(4, 10.0)}, optimizer.init(params), params)
        assert float(jnp.linalg.norm(update["w"])) == pytest.approx(size)


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            ["--config.optimizer.rnak=3"],
            "section optimizer has no key 'rnak'; did you mean optimizer.rank?",
        ),
        (["--config.optimizer.rank=4096"], "configuration error: optimizer.rank=4096"),
        (["--config.schedule.steps=ten"], "configuration error: flag --config.schedule.steps=ten"),
        (
            [f"--config.schedule.steps={10**400}"],
            "configuration error: schedule.steps=(an integer of 1329 bits): give",
        ),
        (["--wrokdir=a"], "Did you mean: workdir"),
        (
            ["--config.optimizer.name=adamw", "--config.optimizer.rank=8"],
            "rank=8: adamw has no such setting",
        ),
    ],
    ids=["unknown key", "rank", "no number", "digits", "unknown flag", "lacking"],
)
def test_the_command_line_exits_with_2_and_one_message(flags, message, tmp_path):
    command = [sys.executable, "-m", "experiments.pretrain", f"--workdir={tmp_path}/run", *flags]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=pathlib.Path(configuration.__file__).parents[2]
    )
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "config.json").exists()


TABLES = {"pretrain": configuration, "finetune": finetuning_configuration}
ALL_CONFIGS = CONFIGS + sorted((CONFIGS[0].parent / "finetune").glob("[!_]*.py"))


# Settings that some method has and others lack.
SETTINGS = ("rank", "projector", "refresh_every", "scale", "b1", "momentum", "ratio", "damping")


@pytest.mark.parametrize("path", ALL_CONFIGS, ids=lambda path: path.stem)
def test_any_file_takes_any_method_by_one_flag(path):
    """What the file says for its own method and another lacks is left out; a flag that says so
    stays an error."""
    settings = finetuning_configuration if path.parent.name == "finetune" else configuration
    file = plain(load(str(path)))
    own = file["optimizer"]["name"]
    for name in settings.SECTIONS["optimizer"].__dataclass_fields__["name"].metadata["choices"]:
        given = plain(load(str(path))) | {"optimizer": file["optimizer"] | {"name": name}}
        method = methods.METHODS[name]
        for refused in method.refuses:
            if refused.section != "optimizer":  # what the optimizer's section says is left out
                given[refused.section] |= {refused.key: not refused.value}
        needs_rank = method.needs_rank(None) and name != own
        explicit = ["name", "rank"] if needs_rank else ["name"]
        given["optimizer"] |= {"rank": 8} if needs_rank else {}
        if method.required:
            given["optimizer"] |= {"options": runs.settings_of(name)["options"]}
            explicit.append("options")
        if settings is finetuning_configuration and method.projects:
            given["adapter"] |= {"method": ""}
        if method.kind == methods.PAIRS:
            given["adapter"] |= {"method": "lora(rank=2)"}
            given["base"] |= {"source": "runs/default", "preset": None}
        notes = optimizers.fit(given["optimizer"], own, explicit)
        config = settings.from_dict(given)
        optimizers.build(config.optimizer, lambda step: 0.1, stacked=True, seed=0)
        changed = {
            key for key, value in file["optimizer"].items() if value != given["optimizer"][key]
        } - {*explicit}
        assert all(given["optimizer"][key] is None for key in changed)
        assert len(notes) == len(changed) + (name != own)
        lacked = next((key for key in SETTINGS if not method.takes(key)), None)
        if lacked in given["optimizer"]:
            given["optimizer"][lacked] = {"projector": "svd", "rank": 8}.get(lacked, 0.5)
            optimizers.fit(given["optimizer"], own, [*explicit, lacked])
            with pytest.raises(
                ConfigurationError, match=rf"optimizer\.{lacked}=|refresh_every=0.5: is of type"
            ):
                optimizers.check(settings.from_dict(given).optimizer)


def test_the_baseline_of_galore_s_file():
    given = plain(load(str(CONFIGS[0].parent / "llama_60m.py")))["optimizer"]
    given["name"] = "adamw"
    notes = optimizers.fit(given, "galore", ["name"])
    assert notes == [
        "optimizer.learning_rate=0.01 is kept, which the configuration file has for galore",
        "optimizer.rank=128 of the configuration file is left out: adamw has no such setting",
        "optimizer.refresh_every=200 of the configuration file is left out: adamw has no such "
        "setting",
    ]
    assert (given["rank"], given["refresh_every"], given["learning_rate"]) == (None, None, 0.01)


@pytest.mark.parametrize(
    "projector, explicit", [(None, ()), ("power", ()), ("power", ("projector",))]
)
def test_a_projector_brings_its_rank_to_apollo_mini(projector, explicit):
    """Whether the file says the projector or a flag does, the rank of the file is the
    projector's."""
    given = {"name": "apollo_mini", "rank": 4, "projector": projector}
    notes = optimizers.fit(given, "galore", ["name", *explicit])
    assert given["rank"] == (None if projector is None else 4)
    assert [note for note in notes if "rank" in note] == (
        []
        if projector
        else [
            "optimizer.rank=4 of the configuration file is left out: apollo_mini has a rank of its "
            "own, 1"
        ]
    )
    config = from_dict({"optimizer": given}).optimizer
    optimizer = optimizers.build(config, lambda step: 0.1, stacked=True, seed=0)
    kept = optimizers.sides(jax.eval_shape(optimizer.init, PARAMS))
    assert kept == {"layers/mlp/up_proj/kernel": ("rows", 1 if projector is None else 4)}


def numeric_fields():
    for name, settings in TABLES.items():
        for section, kind in settings.SECTIONS.items():
            for key, hint in typing.get_type_hints(kind).items():
                kinds = typing.get_args(hint) or (hint,)
                if not key.isupper() and {int, float} & {*kinds}:
                    yield pytest.param(settings, section, key, kinds, id=f"{name}.{section}.{key}")


@pytest.mark.parametrize("settings, section, key, kinds", [*numeric_fields()])
def test_every_number_out_of_its_range_is_refused_on_each_side(settings, section, key, kinds):
    limits = settings.SECTIONS[section].__dataclass_fields__[key].metadata["range"]
    low = limits.at_least if limits.above is None else limits.above
    outside = [] if low is None else [low - 1, *([low] if limits.above is not None else [])]
    if float in kinds:
        outside = [float(value) for value in outside]
        high = limits.at_most if limits.below is None else limits.below
        outside += [math.inf, -math.inf, math.nan] if high is None else [float(high) + 1, math.nan]
        outside += [] if limits.below is None else [float(limits.below)]
    else:
        outside = [int(value) for value in outside] + [2**31]
    assert len(outside) >= 2
    for value in outside:
        with pytest.raises(
            ConfigurationError, match=rf"^{section}\.{key}={re.escape(repr(value))}: "
        ):
            settings.from_dict({section: {key: value}})


@pytest.mark.parametrize("settings, section, key, kinds", [*numeric_fields()])
def test_an_integer_of_any_length_is_refused(settings, section, key, kinds):
    del kinds
    for value in (10**400, -(10**400), 10**5000):
        with pytest.raises(
            ConfigurationError, match=rf"^{section}\.{key}=\(an integer of \d+ bits\): "
        ):
            settings.from_dict({section: {key: value}})


@pytest.mark.parametrize("name", TABLES)
def test_help_says_what_every_key_means(name):
    settings = TABLES[name]
    page = arguments.page(settings, str(CONFIGS[0] if name == "pretrain" else ALL_CONFIGS[-1]), "")
    blocks = page.split("Keys of the configuration")[1].split("\n\n")
    told = {block.splitlines()[0]: block for block in blocks}
    for section, table in settings.template().items():
        for key in table if section != "name" else ():
            assert re.search(rf"^  {key} = .+\n      \S+", told[section], re.MULTILINE), (
                section,
                key,
            )


@pytest.mark.parametrize(
    "text, message",
    [
        (None, r"config='.*config\.py': no such file"),
        ("def get_config(:", r"config='.*config\.py', line 1: SyntaxError"),
        ("x = 1", r"config='.*config\.py': defines no function get_config"),
        (
            "def get_config():\n    return missing",
            r"config='.*config\.py', line 2: NameError: name 'missing'",
        ),
    ],
    ids=["no file", "syntax", "no function", "name"],
)
def test_what_is_wrong_with_a_file_is_told_in_one_line(tmp_path, text, message):
    if text is not None:
        (tmp_path / "config.py").write_text(text)
    with pytest.raises(ConfigurationError, match=message):
        load(str(tmp_path / "config.py"))


@pytest.mark.slow
def test_the_baseline_runs_by_one_flag(tmp_path):
    runs.write_text(tmp_path / "text")
    commands.write(
        tmp_path,
        "configuration",
        BASELINE | {"data": BASELINE["data"] | {"name": str(tmp_path / "text")}},
    )
    assert (
        commands.start("pretrain", tmp_path, "run", "--config.optimizer.name=adamw").wait(300) == 0
    )
    assert (
        "note: optimizer.rank=4 of the configuration file is left out"
        in (tmp_path / "run.log").read_text()
    )
    ran = json.loads((tmp_path / "run" / "config.json").read_text())["optimizer"]
    assert (ran["name"], ran["rank"], ran["backprop"]) == ("adamw", None, None)


BASELINE = {
    "model": {
        "width": 16,
        "hidden": 32,
        "heads": 2,
        "kv_heads": 1,
        "layers": 2,
        "sequence_length": 16,
    },
    "data": {"sequence_length": 16, "batch_size": 4},
    "optimizer": {"name": "galore", "rank": 4, "backprop": "projected"},
    "schedule": {"steps": 2},
    "run": {"evaluation_tokens": 64, "sample_tokens": 0},
}


REFUSED = [(method, refused) for method in methods.METHODS.values() for refused in method.refuses]


@pytest.mark.parametrize(
    ("method", "refused"),
    REFUSED,
    ids=[f"{method.name}-{no.key}={no.value}" for method, no in REFUSED],
)
def test_what_a_method_refuses_is_an_error_with_its_remedy(method, refused):
    given = plain(load(str(next(path for path in CONFIGS if path.stem == "tiny"))))
    for other in method.refuses:
        given[other.section][other.key] = not other.value if isinstance(other.value, bool) else None
    given["optimizer"] |= {"name": method.name}
    optimizers.fit(given["optimizer"], "dct_adamw", ["name"])
    given["optimizer"] |= {"rank": 8} if method.needs_rank(None) else {}
    configuration.from_dict(given)
    given[refused.section][refused.key] = refused.value
    with pytest.raises(ConfigurationError, match=re.escape(refused.remedy)):
        configuration.from_dict(given)
