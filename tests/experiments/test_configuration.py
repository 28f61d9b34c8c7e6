"""Configurations: what is wrong is found before any work, and named."""

import dataclasses
import importlib.util
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import configuration, optimizers
from experiments.configuration import ConfigurationError, OptimizerConfig, ScheduleConfig, from_dict, template, to_dict

CONFIGS = sorted((pathlib.Path(configuration.__file__).parent / "configs").glob("[!_]*.py"))


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
    keys = {section: set(values) for section, values in template().to_dict().items() if isinstance(values, dict)}
    for section, kind in configuration._SECTIONS.items():
        fields = {field.name for field in dataclasses.fields(kind)}
        assert keys[section] == fields | ({"preset"} if section == "model" else set())


WRONG = [
    ({"optimizer": {"nmae": "adamw"}}, r"optimizer\.nmae='adamw': unknown key; did you mean optimizer\.name\?"),
    ({"optimiser": {}}, r"optimiser=\{\}: unknown key; did you mean optimizer\?"),
    ({"model": {"widht": 3}}, r"model\.widht=3: unknown key; did you mean model\.width\?"),
    ({"model": {"preset": "60m"}}, r"model\.preset='60m': did you mean '60M'\?"),
    ({"model": {"heads": 3}}, r"model\.heads=3 does not divide width=128"),
    ({"model": {"width": "wide"}}, r"model\.width='wide': is of type str; give int"),
    ({"optimizer": {"name": "adam"}}, r"optimizer\.name='adam': did you mean 'adamw'\?"),
    ({"optimizer": {"name": "galore"}}, r"optimizer\.rank=None: galore needs a rank"),
    ({"optimizer": {"name": "galore", "rank": 129}}, r"optimizer\.rank=129: .* smallest matrix dimension is 128"),
    ({"model": {"kv_heads": 1}, "optimizer": {"name": "galore", "rank": 33}}, r"rank=33: .* smallest .* is 32"),
    ({"optimizer": {"name": "galore", "rank": 1.5}}, r"optimizer\.rank=1\.5: a fraction lies in"),
    ({"optimizer": {"name": "galore", "rank": 0}}, r"optimizer\.rank=0: give a positive integer"),
    ({"optimizer": {"name": "galore", "rank": 8, "projector": "svdd"}}, r"projector='svdd': did you mean 'svd'"),
    ({"optimizer": {"learning_rate": -1}}, r"optimizer\.learning_rate=-1\.0: give a positive number"),
    ({"optimizer": {"learning_rate": True}}, r"optimizer\.learning_rate=True: is of type bool; give float"),
    ({"optimizer": {"clip_norm": 0.0}}, r"optimizer\.clip_norm=0\.0"),
    ({"optimizer": {"name": "optax_galore", "rank": 8}}, r"model\.scan=True: .* set model\.scan=False"),
    ({"schedule": {"steps": 0}}, r"schedule\.steps=0: give a positive integer"),
    ({"schedule": {"steps": 10, "warmup_steps": 10}}, r"schedule\.warmup_steps=10: stay below steps=10"),
    ({"schedule": {"final_fraction": 2}}, r"schedule\.final_fraction=2\.0"),
    ({"schedule": {"accumulation": 3}}, r"schedule\.accumulation=3: choose a divisor of data\.batch_size=16"),
    ({"data": {"sequence_length": 512}}, r"data\.sequence_length=512: the model takes 256"),
    ({"data": {"batch_size": 0}}, r"data\.batch_size=0"),
    ({"data": {"packing": "pad"}, "run": {"trigram": True}}, r"run\.trigram=True: .* data\.packing='pack'"),
    ({"checkpoint": {"keep": 0}}, r"checkpoint\.keep=0: keep at least 1"),
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
        {"optimizer": {"name": "galore", "rank": 0.25, "learning_rate": 1}, "run": {"profile_steps": [2, 3]}}
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
    np.testing.assert_allclose([float(rate(step)) for step in steps], expected, rtol=1e-5, atol=1e-7)
    assert float(optimizers.schedule(ScheduleConfig(steps=1), 0.5)(0)) == 0.5


PARAMS = {"layers": {"mlp": {"up_proj": {"kernel": jnp.ones((2, 8, 12))}}}, "norm": {"scale": jnp.ones(8)}}
FLAT = {"layer_0": {"up_proj": {"kernel": jnp.ones((8, 12))}}, "lm_head": {"kernel": jnp.ones((8, 20))}}


@pytest.mark.parametrize("name", configuration.OPTIMIZERS)
def test_every_optimizer_is_built_and_projects_the_blocks_alone(name):
    projected = name not in ("adamw", "sgd")
    stacked = name != "optax_galore"
    params = PARAMS if stacked else FLAT
    config = OptimizerConfig(name=name, rank=4 if projected else None)
    optimizer = optimizers.build(config, lambda step: 0.1, stacked=stacked, seed=0)
    state = jax.eval_shape(optimizer.init, params)
    if name in configuration.LOWRANK:
        assert optimizers.sides(state) == {"layers/mlp/up_proj/kernel": ("rows", 4)}
        assert jax.eval_shape(optimizers.skipped, state).shape == ()
    else:
        assert optimizers.sides(state) == {}
        assert optimizers.skipped(state) == 0
    if name == "optax_galore":
        sizes = {leaf.shape for leaf in jax.tree.leaves(state)}
        assert (8, 20) in sizes  # the head keeps full moments
        assert (8, 12) not in sizes


@pytest.mark.parametrize(
    "name, field, value", [("adamw", "refresh_every", 5), ("sgd", "b1", 0.5), ("dct_adamw", "projector", "svd")]
)
def test_a_setting_the_method_lacks_is_refused(name, field, value):
    config = OptimizerConfig(name=name, rank=4 if name == "dct_adamw" else None, **{field: value})
    with pytest.raises(ConfigurationError, match=rf"optimizer\.{field}={value!r}: {name} has no such setting"):
        optimizers.build(config, lambda step: 0.1, stacked=True, seed=0)


@pytest.mark.parametrize("projector", configuration.PROJECTORS)
def test_projector_is_heeded(projector):
    config = OptimizerConfig(name="galore", rank=4, projector=projector)
    optimizer = optimizers.build(config, lambda step: 0.1, stacked=True, seed=0)
    plain = optimizers.build(dataclasses.replace(config, clip_norm=None), lambda step: 0.1, stacked=True, seed=0)
    found = plain.projection.projector
    assert type(found).__name__.lower() == {"sketch": "randomized"}.get(projector, projector)
    assert getattr(found, "iterations", 1) == (0 if projector == "sketch" else 1)
    assert len(optimizer.init(PARAMS)) == 2  # clipping, then the method


@pytest.mark.parametrize("backprop", configuration.BACKPROP)
@pytest.mark.parametrize("when", ["before", "after"])
def test_backprop_and_the_clock_are_heeded(backprop, when):
    config = OptimizerConfig(name="galore", rank=4, backprop=backprop, refresh_when=when, refresh_every=7)
    optimizer = optimizers.build(config, lambda step: 0.1, stacked=True, seed=0)
    assert optimizer.projection.clip_norm == 1.0  # of what is kept, not chained before
    assert (optimizer.projection.clock.when, optimizer.projection.clock.period) == (when, 7)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"backprop": "low"}, "optimizer.backprop='low'"),
        ({"name": "adamw", "rank": None, "backprop": "full"}, "adamw projects nothing"),
        ({"refresh_when": "now"}, "optimizer.refresh_when='now'"),
        ({"name": "adamw", "rank": None, "refresh_when": "after"}, "adamw has no basis"),
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
        (["--config.optimizer.rnak=3"], 'Did you mean "rank" instead of "rnak"?'),
        (["--config.optimizer.rank=4096"], "configuration error: optimizer.rank=4096"),
    ],
    ids=["unknown key", "rank"],
)
def test_the_command_line_exits_with_2_and_one_message(flags, message, tmp_path):
    command = [sys.executable, "-m", "experiments.pretrain", f"--workdir={tmp_path}/run", *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=pathlib.Path(configuration.__file__).parents[1])
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "config.json").exists()
