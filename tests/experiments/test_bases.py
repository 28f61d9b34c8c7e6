"""Models to start from: what is wrong with a base is told before a run begins."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from experiments.finetuning.base import EXPORTED, meaning_of
from experiments.finetuning.sources import open_base
from experiments.harness import checkpoint, outputs, workdir
from experiments.models import huggingface, llama
from experiments.settings.finetuning_configuration import BaseConfig
from experiments.settings.sections import ConfigurationError
from tests.experiments import runs

CONFIG = llama.preset(
    "nano", width=16, hidden=32, heads=2, kv_heads=1, layers=2, sequence_length=16
)


def parameters(value):
    shapes = huggingface.shapes(CONFIG)
    params = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.5, leaf.dtype), shapes)
    kernel = params["layers"]["attention"]["q_proj"]["kernel"]
    params["layers"]["attention"]["q_proj"]["kernel"] = kernel.at[1, 2, 3].set(value)
    return params


def transformers(folder, params):
    huggingface.save(folder, CONFIG, params)


def run_folder(folder, params):
    config = dataclasses.replace(runs.tiny(folder), model=CONFIG)
    stored(folder, params, {"model": dataclasses.asdict(CONFIG)})
    outputs.write_json(folder / "config.json", workdir.as_json(config))


def exported(folder, params):
    description = {
        "format": EXPORTED,
        "architecture": "llama",
        "model": dataclasses.asdict(CONFIG),
    }
    description |= {"tokenizer": "bytes", "classes": [], "domain": {"name": "python_stdlib"}}
    stored(folder, params, meaning_of(description))
    outputs.write_json(folder / "config.json", description)


def stored(folder, params, meaning):
    store = checkpoint.Checkpoints(folder / "checkpoints", meaning=meaning)
    store.save(3, {"params": params})
    store.close()


@pytest.mark.parametrize("make", [transformers, run_folder, exported])
def test_a_base_that_is_not_finite_is_named_before_the_run_diverges(tmp_path, make):
    for value in (jnp.nan, jnp.inf):
        folder = tmp_path / str(value)
        make(folder, parameters(value))
        base = open_base(BaseConfig(source=str(folder)), 0)
        with pytest.raises(
            ConfigurationError, match=r"base.source=.*: 1 values of layers/attention/q_proj/kernel"
        ):
            base.read(base.placing())
    make(tmp_path / "sound", parameters(1.0))
    base = open_base(BaseConfig(source=str(tmp_path / "sound")), 0)
    assert base.read(base.placing())["layers"]["attention"]["q_proj"]["kernel"][1, 2, 3] == 1.0


@pytest.mark.parametrize("make", [run_folder, exported])
def test_a_base_whose_configuration_is_not_that_of_its_arrays_is_refused(tmp_path, make):
    """Shapes do not tell a model's rotation, or how many heads share a kernel."""
    make(tmp_path, parameters(1.0))
    text = (tmp_path / "config.json").read_text()
    for old, new in (
        ('"norm_eps": 1e-06', '"norm_eps": 0.1'),
        ('"rope_theta": 10000.0', '"rope_theta": 100.0'),
    ):
        assert old in text
        (tmp_path / "config.json").write_text(text.replace(old, new))
        base = open_base(BaseConfig(source=str(tmp_path)), 0)
        with pytest.raises(
            ConfigurationError, match=r"was written with model\.(norm_eps|rope_theta)=.*, the con"
        ):
            base.read(base.placing())
