"""The study's queue decides what to run next, and collects what it found."""

import json
import math
import os
import pathlib
import subprocess
import sys
import time

import pytest

from experiments.benchmarks import study
from experiments.harness import outputs
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
    row = study.collect(done, 1000, 1.0, 2.0, {"AdamW": 0.5})["rows"][0]
    assert row["learning_rate"] == 3e-3 and row["seeds"] == 3 and row["complete"]
    assert row["spread"] == pytest.approx(0.02) and row["step_seconds"] == 0.5


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
    rank = config.optimizer.rank
    assert rank is None if method == "AdamW" else rank == config.model.width // 4


def test_the_committed_study_covers_every_method():
    result = json.loads(study.RESULTS.read_text())
    assert [row["method"] for row in result["rows"]] == list(study.METHODS)
    assert result["steps"] >= 1000


def test_known_results_are_not_repeated(tmp_path):
    done, _ = finish(lambda rate: abs(math.log(rate / 3e-3)))
    outputs.write_json(tmp_path / "known.json", study.collect(done, 1000, 1.0, 2.0, {}))
    again = study.finished(tmp_path)
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
    again = subprocess.run(
        [*command, "--budget-hours", "1e-9"], cwd=ROOT, env=environment, timeout=120, check=False
    )
    assert again.returncode == 0
    assert json.loads((tmp_path / "study.json").read_text())["runs"] == first["runs"]
