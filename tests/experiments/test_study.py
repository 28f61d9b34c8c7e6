"""The study's queue decides what to run next, and collects what it found."""

import json
import math
import os
import pathlib
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import optax
import pytest

import lowrank_jax as lrx
from experiments.benchmarks import study
from experiments.harness import methods, outputs
from experiments.models import llama
from experiments.reporting import pareto
from experiments.settings import configuration
from tests.experiments.commands import ENVIRONMENT

ROOT = pathlib.Path(__file__).parents[2]


def summary(loss):
    return {
        "status": "finished",
        "validation_loss": loss,
        "state_bytes": 8,
        "median_step_seconds": 0.1,
        "versions": {},
    }


def finish(losses):
    """Runs everything `wanted` asks of AdamW, with losses by learning rate."""
    done, order = {}, []
    while missing := study.wanted(done, "AdamW"):
        for key in missing:
            order.append(key[1:])
            done[key] = summary(losses(key[1]) + 0.01 * key[2])
    return done, order


def test_a_best_in_the_middle_gets_two_more_seeds():
    done, order = finish(lambda rate: abs(math.log(rate / 3e-3)))
    assert order == [(1e-3, 0), (3e-3, 0), (1e-2, 0), (3e-3, 1), (3e-3, 2)]
    measured = {"AdamW": {"seconds": 0.5, "reduced_bytes": 12}}
    row = study.collect(study.Study(), done, 1.0, 2.0, measured)["rows"][0]
    assert row["learning_rate"] == 3e-3 and row["seeds"] == 3 and row["complete"]
    assert row["spread"] == pytest.approx(0.02)
    assert row["step_seconds"] == 0.5 and row["reduced_bytes"] == 12


def test_a_best_at_the_edge_extends_the_grid_at_most_twice():
    _, order = finish(lambda rate: -rate)
    assert [rate for rate, seed in order if seed == 0] == [1e-3, 3e-3, 1e-2, 3e-2, 1e-1]
    _, order = finish(lambda rate: rate)
    assert [rate for rate, seed in order if seed == 0] == [1e-3, 3e-3, 1e-2, 3e-4, 1e-4]


def test_a_diverged_run_is_the_worst():
    done, _ = finish(lambda rate: 1.0 if rate < 1e-2 else math.nan)
    key = next(key for key in done if key[1] == 1e-2)
    assert study.loss_of(done[key] | {"status": "diverged"}) == math.inf
    assert study.loss_of({"status": "finished", "validation_loss": None}) == math.inf


@pytest.mark.parametrize("method", study.METHODS)
def test_every_run_of_the_study_is_a_valid_configuration(method):
    config = configuration.from_dict(study.values(method, study.METHODS[method][0], 1, 1000))
    assert config.schedule.steps == 1000 and config.run.seed == 1
    # a quarter of the width, where the method has a rank and does not bring its own
    needs = methods.METHODS[config.optimizer.name].needs_rank(None)
    assert config.optimizer.rank == (config.model.width // 4 if needs else None)
    assert config.data.sequence_length * config.data.batch_size == 256


def test_every_optimizer_of_pretraining_is_studied():
    """But for SGD, which nobody takes, and a peer's that leaves stacked layers alone."""
    others = {name for name in methods.names("pretrain") if not methods.METHODS[name].studied}
    assert others == {"sgd", "optax_galore"}


def test_the_committed_study_speaks_of_every_method():
    result = json.loads(study.RESULTS.read_text())
    found = [row["method"] for row in result["rows"]]
    missing = result["missing"].split(", ") if result["missing"] else []
    assert sorted([*found, *missing]) == sorted(study.METHODS)
    assert result["steps"] >= 1000 and result["tokens_per_update"] == study.TOKENS


def test_the_figure_is_of_the_committed_study():
    rows = json.loads(study.RESULTS.read_text())["rows"]
    assert pareto.digest(rows).encode() in pareto.PICTURE.read_bytes()
    shown = pareto.figure(rows).axes
    for panel, name in zip(shown, pareto.COSTS, strict=True):
        labels = [text.get_text() for text in panel.texts]
        assert labels == [row["method"] for row in rows if row[name] is not None]


def test_a_command_repeats_the_study():
    assert study.Study().command == "python -m experiments.study --time"
    other = study.Study(steps=9, tokens=512, titles=("AdamW", "GaLore (svd)"))
    words = "--steps 9 --tokens 512 --methods AdamW 'GaLore (svd)'"
    assert other.command == f"python -m experiments.study --time {words}"
    config = study.values("AdamW", 1e-3, 0, 9, tokens=512)
    assert config["data"]["batch_size"] == 8


def test_reduced_bytes_are_those_of_low_rank_gradients():
    """`PᵀG` of a rank of 32 in place of the matrices of the blocks, where a step needs no others."""
    model = llama.Llama(llama.preset("nano", layers=1))
    batch = {"inputs": jnp.zeros((1, 4), jnp.int32)}
    params = jax.eval_shape(model.init, jax.random.key(0), batch["inputs"])["params"]
    views = lrx.Views(stacked=("layers/.*",))
    galore, fira = lrx.galore(1e-2, rank=32, views=views), lrx.fira(1e-2, rank=32, views=views)
    every = sum(leaf.size for leaf in jax.tree.leaves(params)) * 4
    # 4 of attention (128, 128) and 3 of (128, 352), the shorter side shrunk to 32
    saved = 4 * (4 * (128 - 32) * 128 + 3 * (128 - 32) * 352)
    of = lambda tx: study.reduced_bytes(model, tx, params, batch)  # noqa: E731
    assert of(galore) == every - saved
    assert of(fira) == of(optax.adamw(1e-3)) == every
    assert of(lrx.lisa(1e-3, active=1, views=views)) == every


def test_known_results_are_not_repeated(tmp_path):
    done, _ = finish(lambda rate: abs(math.log(rate / 3e-3)))
    own = study.Study(root=tmp_path)
    outputs.write_json(tmp_path / "known.json", study.collect(own, done, 1.0, 2.0, {}))
    again = study.finished(own)
    assert {key: study.loss_of(s) for key, s in again.items()} == {
        k: study.loss_of(s) for k, s in done.items()
    }
    assert study.wanted(again, "AdamW") == []


@pytest.mark.slow
def test_the_queue_stops_and_goes_on(tmp_path):
    command = [
        sys.executable,
        "-m",
        "experiments.study",
        "--root",
        str(tmp_path / "runs"),
        "--steps",
        "3",
        "--methods",
        "AdamW",
        "GaLore (power)",
    ]
    command += ["--results", str(tmp_path / "study.json"), "--workers", "1"]
    environment = os.environ | ENVIRONMENT
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 300
    while not list((tmp_path / "runs").glob("*/summary.json")) and time.monotonic() < deadline:
        time.sleep(0.2)
    process.terminate()
    process.communicate(timeout=120)
    first = json.loads((tmp_path / "study.json").read_text())
    assert process.returncode == 0 and first["runs"] >= 1
    assert {row["method"] for row in first["rows"]} <= {"AdamW", "GaLore (power)"}
    again = subprocess.run(
        [*command, "--budget-hours", "1e-9"], cwd=ROOT, env=environment, timeout=120, check=False
    )
    assert again.returncode == 0
    assert json.loads((tmp_path / "study.json").read_text())["runs"] == first["runs"]
