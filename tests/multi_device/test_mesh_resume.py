"""Whole runs on meshes: the losses of one device, checkpoints that move between meshes, and sides
that stay."""

import json
import shutil

import jax
import numpy as np
import pytest

from experiments.harness import checkpoint, optimizers, training, updates
from experiments.harness.tasks import Pretraining
from experiments.settings import configuration
from experiments.settings.sections import ConfigurationError

MODEL = {
    "preset": "nano",
    "layers": 2,
    "width": 32,
    "hidden": 64,
    "heads": 4,
    "kv_heads": 4,
    "sequence_length": 16,
}
OPTIMIZER = {
    "name": "galore",
    "rank": 8,
    "projector": "power",
    "refresh_every": 3,
    "eps": 1e-4,
    "side": "sharding",
}


def config_of(**mesh):
    return configuration.from_dict(
        {
            "model": MODEL,
            "data": {"sequence_length": 16, "batch_size": 8},
            "optimizer": OPTIMIZER,
            "schedule": {"steps": 4},
            "checkpoint": {"every": 2},
            "mesh": mesh,
            "run": {
                "log_every": 1,
                "evaluation_tokens": 256,
                "sample_tokens": 0,
                "compile_cache": False,
            },
        }
    )


def losses(workdir):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["kind"] == "train"]


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A finished run on fsdp=4, tensor=2."""
    workdir = tmp_path_factory.mktemp("first")
    training.run(config_of(fsdp=4, tensor=2, data=1), workdir, verbose=False)
    return workdir


def halved(first, workdir):
    """The folder as it was after two updates."""
    shutil.copytree(first, workdir)
    shutil.rmtree(workdir / "checkpoints" / "4")
    (workdir / "summary.json").unlink()


def test_the_losses_of_a_run_are_those_of_one_device(first):
    task = Pretraining(config_of(fsdp=4, tensor=2, data=1))
    update = jax.jit(updates.train_step(task.model, task.optimizer, 1))
    state, alone = jax.tree.map(np.asarray, task.initial()), []
    for step in range(4):
        state, measured = update(state, task.host_batch(step))
        alone.append(float(measured["loss"]))
    np.testing.assert_allclose(losses(first), alone, atol=1e-5)


@pytest.mark.parametrize("explicit", [False, True])
def test_a_run_goes_on_on_another_mesh_with_the_sides_that_it_began_with(first, tmp_path, explicit):
    config = config_of(fsdp=8, data=1, explicit=explicit)

    def sides(task):
        return {
            path: side for path, (side, _) in optimizers.sides(task.abstract["opt_state"]).items()
        }

    stored = {
        path: side for path, (side, _) in checkpoint.stored_sides(first / "checkpoints").items()
    }
    assert stored != sides(Pretraining(config))  # of its own it would choose others
    workdir = tmp_path / "moved"
    halved(first, workdir)
    summary = training.run(config, workdir, verbose=False)
    assert (summary["status"], summary["steps"]) == ("finished", 4)
    np.testing.assert_allclose(losses(workdir), losses(first), atol=1e-5)
    after = {
        path: side for path, (side, _) in checkpoint.stored_sides(workdir / "checkpoints").items()
    }
    assert after == stored


def test_sides_are_the_configured_ones():
    values = configuration.to_dict(config_of(fsdp=4, tensor=2, data=1))
    for side in ("rows", "cols"):
        config = configuration.from_dict(values | {"optimizer": OPTIMIZER | {"side": side}})
        found = optimizers.sides(Pretraining(config).abstract["opt_state"])
        assert {own for own, _ in found.values()} == {side}
    with pytest.raises(ConfigurationError, match=r"optimizer.side='both'"):
        configuration.from_dict(values | {"optimizer": OPTIMIZER | {"side": "both"}})
    with pytest.raises(
        ConfigurationError, match=r"optimizer.side='sharding': parameters lie whole"
    ):
        optimizers.build(config_of().optimizer, lambda step: 1e-3, stacked=True, seed=0)


def test_a_batch_divides_over_its_own_axes_only():
    assert config_of(data=-1, tensor=4).mesh.parts(8) == 2
    assert config_of(data=2, fsdp=2, sequence=2).mesh.parts(8) == 4
    assert config_of(data=2, fsdp=2, sequence=-1).mesh.parts(8) == 4
