"""Fine-tuning on meshes: the losses of one device, a base that is divided, and runs that go on on
another mesh."""

import dataclasses
import math
import shutil
from typing import Any

import jax
import numpy as np
import pytest

from experiments.finetuning import base as base_module
from experiments.finetuning.base import parameter_digest
from experiments.finetuning.sources import open_base
from experiments.finetuning.task import Finetuning
from experiments.harness import optimizers
from experiments.settings import finetuning_configuration
from experiments.settings.finetuning_configuration import BaseConfig
from experiments.settings.sections import ConfigurationError
from lowrank_jax import sharding
from lowrank_jax.sharding.meshes import make_mesh
from tests.experiments import runs, tuning

MESHES: dict[str, dict[str, Any]] = {
    "fsdp x tensor": {"data": 1, "fsdp": 4, "tensor": 2},
    "data x fsdp": {"data": 2, "fsdp": 4},
}
MESHES["explicit"] = MESHES["fsdp x tensor"] | {"explicit": True}
UP = "mlp/up_proj"
ROWS = {"data": {"batch_size": 8}}
GALORE = {"name": "galore", "rank": 4, "projector": "power", "side": "sharding", "eps": 1e-4}
DIGITS = {"task": "classification", "name": "digits", "sequence_length": None, "batch_size": 8}
MIXED = [
    ["embed/embedding", "lora(rank=2)"],
    [".*q_proj.*", "oft(block=4)"],
    [".*down_proj.*", "shira(rank=2)"],
]
CASES = {
    "lora": {},
    "pissa, altlora_plus": {
        "adapter": {"method": "lora(rank=2, init='pissa')"},
        "optimizer": {"name": "altlora_plus"},
    },
    "dora": {"adapter": {"method": "dora(rank=2)"}, "run": {"sample_tokens": 4}},
    "galore": {"adapter": {"method": ""}, "optimizer": GALORE},
    "dora, text classes": {
        "adapter": {"method": "dora(rank=2, dropout=0.1)"},
        "data": {"task": "classification"},
    },
    "mixed": {"adapter": {"rules": MIXED}},
    "by a kernel": {
        "adapter": {"method": "lora(rank=2, implementation='pallas')"},
        "schedule": {"accumulation": 1},
    },
    "vision transformer": {
        "base": {"source": "", "preset": "digits"},
        "adapter": {"method": ""},
        "data": DIGITS,
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuning")
    tuning.pretrained(folder, **ROWS)
    return folder


def config_of(folder, name, **mesh):
    sections = {**CASES[name], "data": ROWS["data"] | CASES[name].get("data", {})}
    values = dataclasses.asdict(tuning.tiny(folder, **sections))
    return finetuning_configuration.from_dict(values | {"mesh": mesh})


def figures(task):
    """The loss before the first update, those of three, and the first state."""
    state = task.initial()
    found = [task.evaluate(state)[0]["loss"]]
    update, first = jax.jit(task.update()), state
    for step in range(3):
        state, measured = update(state, task.on_devices(task.host_batch(step)), *task.frozen)
        found.append(float(measured["loss"]))
    return found, first


def share(leaf):
    """Devices over which an array is divided."""
    return leaf.size // math.prod(leaf.sharding.shard_shape(leaf.shape))


RUNS = [
    ("pissa, altlora_plus", "explicit"),
    ("galore", "data x fsdp"),
    ("dora, text classes", "explicit"),
    ("by a kernel", "explicit"),
    ("mixed", "explicit"),
    ("vision transformer", "fsdp x tensor"),
]


@pytest.mark.parametrize(("name", "mesh"), RUNS)
def test_losses_are_those_of_one_device(folder, name, mesh):
    task = Finetuning(config_of(folder, name, **MESHES[mesh]))
    alone = Finetuning(config_of(folder, name), jax.devices()[:1])
    alone.keep_sides(optimizers.sides(task.abstract["opt_state"]))
    (got, state), (want, _) = figures(task), figures(alone)
    np.testing.assert_allclose(got, want, atol=1e-5)
    if task.parts.adapts:
        fsdp, tensor = 4, MESHES[mesh].get("tensor", 1)
        pair, kernel = (
            state["params"]["sites"][f"layers/{UP}/kernel"],
            task.frozen[0]["layers"]["mlp"]["up_proj"],
        )
        assert (share(kernel["kernel"]), share(pair["a"]), share(pair["b"])) == (
            fsdp * tensor,
            fsdp,
            tensor,
        )
    if name == "galore":  # the dimension that the mesh divides stays as it is
        assert optimizers.sides(task.abstract["opt_state"])[f"layers/{UP}/kernel"] == ("cols", 4)


def test_what_an_explicit_mesh_does_not_do_is_refused(folder, monkeypatch):
    monkeypatch.setattr(
        sharding, "with_out_sharding", lambda function, spec: function
    )  # nobody says where x R lies
    values = dataclasses.asdict(tuning.tiny(folder, adapter={"method": "oft(block=4)"}, **ROWS))
    config = finetuning_configuration.from_dict(values | {"mesh": MESHES["explicit"]})
    with pytest.raises(
        ConfigurationError,
        match=r"mesh\.explicit=True: adapter\.method=.*; set mesh\.explicit=False",
    ):
        Finetuning(config)


def test_kernels_of_adapters_learn_how_the_frozen_matrices_lie(folder, monkeypatch):
    task, seen = Finetuning(config_of(folder, "lora", **MESHES["fsdp x tensor"])), {}
    run = lambda tree, batch: (seen.update(sharding.current_partition_specs.get()), (0, 0, 0))[1]  # noqa: E731
    monkeypatch.setattr(task, "_run", run)
    jax.eval_shape(
        task.sums, task.abstract["params"], task.host_batch(0), task.abstract, task.frozen[0]
    )
    assert seen[f"layers/{UP}/kernel"] == (None, "fsdp", "tensor")


@pytest.mark.parametrize("block", [base_module.BLOCK, 3 * 4 * 16])
def test_a_digest_is_the_same_wherever_parameters_lie(folder, block, monkeypatch):
    monkeypatch.setattr(base_module, "BLOCK", block)  # 3 rows of some leaves, which leave a rest
    base = open_base(BaseConfig(source=str(folder / "base")), 0)
    params = [
        base.read(base.placing(mesh))
        for mesh in (None, *(make_mesh(**own) for own in MESHES.values()))
    ]
    assert [share(own["layers"]["mlp"]["up_proj"]["kernel"]) for own in params] == [1, 8, 4, 8]
    assert len({parameter_digest(own) for own in params}) == 1


def test_a_run_goes_on_on_another_mesh_and_is_a_base(folder, tmp_path):
    first = tmp_path / "first"
    begun = config_of(folder, "dora", **MESHES["explicit"])
    assert tuning.run(begun, first)["sample"]
    moved = tmp_path / "moved"
    shutil.copytree(first, moved)
    (moved / "summary.json").unlink()
    shutil.rmtree(moved / "checkpoints" / "12")
    summary = tuning.run(config_of(folder, "dora", **MESHES["data x fsdp"]), moved)
    assert summary["status"] == "finished" and any(
        "checkpoint of step 8" in text for text in runs.notes(moved)
    )
    for ours, theirs in zip(runs.losses(moved), runs.losses(first), strict=True):
        for step in ours:
            np.testing.assert_allclose(ours[step], theirs[step], atol=1e-5)
    tuned = open_base(BaseConfig(source=str(moved)), 0)
    meshes = (make_mesh(**MESHES[name]) for name in ("explicit", "fsdp x tensor"))
    *divided, whole = (tuned.read(tuned.placing(own)) for own in (*meshes, None))
    for params in divided:
        assert share(params["layers"]["mlp"]["up_proj"]["kernel"]) == 8
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), params, whole)
