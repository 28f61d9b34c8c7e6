"""Configurations of fine-tuning: what is wrong is found before any work, and named."""

import dataclasses
import importlib.util
import json
import pathlib

import pytest

import lowrank_jax as lrx
from experiments.settings import configuration, finetuning_configuration
from experiments.settings.finetuning_configuration import (
    TuningConfig,
    from_dict,
    parse,
    template,
    to_dict,
)
from experiments.settings.sections import ConfigurationError

CONFIGS = sorted(
    (pathlib.Path(configuration.__file__).parents[1] / "configs" / "finetune").glob("[!_]*.py")
)


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
    assert f"--config=experiments/configs/finetune/{path.name}" in module.__doc__
    assert "Expect" in module.__doc__


def test_template_holds_the_defaults_of_every_key():
    assert from_dict(template()) == TuningConfig()
    keys = {
        section: set(values)
        for section, values in template().to_dict().items()
        if isinstance(values, dict)
    }
    for section, kind in finetuning_configuration.SECTIONS.items():
        assert keys[section] == {field.name for field in dataclasses.fields(kind)}


WRONG = [
    ({"adaptor": {}}, r"adaptor=\{\}: unknown key; did you mean adapter\?"),
    ({"base": {"sourse": "x"}}, r"base\.sourse='x': unknown key; did you mean base\.source\?"),
    (
        {"base": {"source": ""}},
        r"base\.source='': name a folder, such as runs/default, or a base\.preset",
    ),
    (
        {"base": {"preset": "digits"}},
        r"base\.preset='digits': parameters come from base\.source; leave it None",
    ),
    ({"base": {"source": "", "preset": "digit"}}, r"base\.preset='digit': did you mean 'digits'\?"),
    (
        {"base": {"source": "", "preset": "digits"}},
        r"base\.source='': adapters want a trained base",
    ),
    ({"base": {"dtype": "half"}}, r"base\.dtype='half': .*Choose one of float32, bfloat16"),
    ({"base": {"remat": "most"}}, r"base\.remat='most'"),
    (
        {"adapter": {"method": "lora(8)"}},
        r"method='lora\(8\)': write calls of adapters with keywords alone",
    ),
    ({"adapter": {"method": "lora(rank=8"}}, r"adapter\.method='lora\(rank=8': is no expression"),
    ({"adapter": {"method": "lora(rnk=8)"}}, r"lora has no rnk; its settings are group, rank"),
    (
        {"adapter": {"method": "lora(rank=0)"}},
        r"adapter\.method='lora\(rank=0\)': rank=0 must be a positive integer",
    ),
    ({"adapter": {"method": "lora()"}}, r"adapter\.method='lora\(\)': .*rank"),
    ({"adapter": {"method": "loda(rank=8)"}}, r"did you mean 'lora'\?"),
    (
        {"adapter": {"method": "lora(rank=open('x'))"}},
        r"write calls of adapters with keywords alone",
    ),
    ({"adapter": {"method": "__import__(name='os')"}}, r"adapter\.method=.*Choose one of"),
    ({"adapter": {"method": "pissa()"}}, r"adapter\.method='pissa\(\)': is no adapter"),
    ({"adapter": {"method": "8"}}, r"adapter\.method='8': is no adapter"),
    ({"adapter": {"rules": (("a",),)}}, r"adapter\.rules=\('a',\): give pairs"),
    (
        {"adapter": {"rules": (("a", "lara(rank=2)"),)}},
        r"adapter\.rules='lara\(rank=2\)': did you mean 'lora'",
    ),
    ({"adapter": {"bias": "some"}}, r"adapter\.bias='some'"),
    (
        {"adapter": {"method": "", "whole": ("norm/.*",)}},
        r"adapter\.whole=\('norm/\.\*',\): the whole model trains",
    ),
    (
        {"adapter": {"method": "", "layers": (0,)}},
        r"adapter\.layers=\(0,\): the whole model trains",
    ),
    ({"adapter": {"method": "", "bias": "all"}}, r"adapter\.bias='all': the whole model trains"),
    (
        {"optimizer": {"name": "galore", "rank": 4}},
        r"name='galore': projects kernels, which adapters freeze",
    ),
    (
        {"adapter": {"method": ""}, "optimizer": {"name": "lora_plus"}},
        r"='lora_plus': steps the factors of adapters",
    ),
    (
        {"optimizer": {"name": "optax_galore", "rank": 4}},
        r"optimizer\.name='optax_galore': did you mean 'galore'",
    ),
    (
        {"schedule": {"accumulation": 3}},
        r"schedule\.accumulation=3: choose a divisor of data\.batch_size=16",
    ),
    (
        {"data": {"task": "classification", "name": "a.jsonl"}, "run": {"sample_tokens": 4}},
        r"run\.sample_tokens=4",
    ),
    (
        {"data": {"packing": "pad"}, "run": {"trigram": True}},
        r"run\.trigram=True: a trigram model reads a packed",
    ),
    ({"data": {"name": "digits"}}, r"data\.task='language_modelling': digits has classes"),
    ({"run": {"domain_tokens": 0}}, r"run\.domain_tokens=0"),
    ({"run": {"log_every": 0}}, r"run\.log_every=0"),
    ({"name": 3}, r"name=3: give a string"),
]


@pytest.mark.parametrize("values, message", WRONG, ids=[str(index) for index in range(len(WRONG))])
def test_wrong_values_name_field_value_and_remedy(values, message):
    with pytest.raises(ConfigurationError, match=message):
        from_dict(values)


def test_an_expression_is_the_adapter_that_python_makes_of_it():
    adapters = lrx.adapters
    assert parse("lora(rank=4, alpha=-2, dropout=0.5)") == adapters.lora(
        rank=4, alpha=-2, dropout=0.5
    )
    nested = "lora(rank=4, init=pissa(iterations=2))"
    assert parse(nested) == adapters.lora(rank=4, init=adapters.pissa(iterations=2))
    config = from_dict(
        {"adapter": {"rules": [["a/.*", "dora(rank=2)"], ["b/.*", ""]], "targets": ".*"}}
    )
    expected = (("a/.*", adapters.dora(rank=2)), ("b/.*", None), (".*", adapters.lora(rank=8)))
    assert config.adapter.parsed() == expected
    assert from_dict({"adapter": {"method": ""}}).adapter.parsed() == ()


def is_adapter(name):
    kind = getattr(lrx.adapters, name)
    return name.islower() and isinstance(kind, type) and issubclass(kind, lrx.adapters.Adapter)


@pytest.mark.parametrize("name", [name for name in lrx.adapters.__all__ if is_adapter(name)])
def test_every_adapter_of_the_library_can_be_written(name):
    kind = getattr(lrx.adapters, name)
    needed = {
        field.name: 2
        for field in dataclasses.fields(kind)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    written = f"{name}({', '.join(f'{key}={value}' for key, value in needed.items())})"
    assert parse(written) == kind(**needed)
