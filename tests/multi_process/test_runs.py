"""Runs of two and four processes: the numbers of one process, and nothing lost when one of them
is."""

import json
import re
import shutil
import signal
import time

import numpy as np
import pytest

from tests.experiments.runs import assert_bitwise_equal, losses, write_text
from tests.multi_process.processes import STEPS, Processes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hosts")
    write_text(folder / "text")
    return folder


@pytest.fixture(scope="module")
def one(folder):
    """The run of one process."""
    with Processes(folder, folder / "one", 1, run__sample_tokens=4) as run:
        run.finish()
    return folder / "one"


@pytest.fixture(scope="module")
def two(folder):
    """The uninterrupted run of two processes."""
    with Processes(folder, folder / "two", 2, run__sample_tokens=4) as run:
        run.finish()
    return folder / "two"


@pytest.fixture(scope="module")
def stopped(folder):
    """A run of two processes of which one got SIGTERM; and what they said."""
    workdir = folder / "stopped"
    with Processes(folder, workdir, 2) as run:
        run.wait_for(workdir, 12)
        run.children[1].send_signal(signal.SIGTERM)
        said = run.finish()
    return workdir, said


def resumed(folder, source, name, count):
    """A copy of a run's folder, after `count` processes went on with it."""
    shutil.copytree(source, folder / name)
    with Processes(folder, folder / name, count) as run:
        run.finish()
    return folder / name


def assert_close(left, right):
    """The same batches, and losses that differ by rounding at most."""
    for ours, theirs in zip(losses(left), losses(right), strict=True):
        assert ours.keys() == theirs.keys()
        for step in ours:
            np.testing.assert_allclose(
                ours[step], theirs[step], rtol=0, atol=1e-5, err_msg=f"{left} step {step}"
            )


def test_two_processes_have_the_losses_of_one(one, two):
    assert_close(two, one)
    assert list(losses(two)[0]) == list(range(1, STEPS + 1))


def test_the_lead_writes_what_a_run_has_once(one, two):
    ours, theirs = (json.loads((path / "summary.json").read_text()) for path in (two, one))
    assert ours.keys() == theirs.keys()
    assert ours["device"].startswith("2 x ") and theirs["device"].startswith("1 x ")
    assert ours["sample"]
    assert ours["validation_loss"] == pytest.approx(theirs["validation_loss"], abs=1e-5)
    assert sorted(path.name for path in two.iterdir()) == sorted(
        path.name for path in one.iterdir()
    )
    assert sorted(path.name for path in (two / "checkpoints").iterdir()) == [
        "10",
        "20",
        "30",
        "40",
        "50",
        "60",
    ]
    manifest = json.loads((two / "checkpoints" / "60" / "manifest.json").read_text())
    files = {
        str(path.relative_to(two / "checkpoints/60/state"))
        for path in two.glob("checkpoints/60/state/**/*")
    }
    assert manifest["files"].keys() <= files and manifest["extra"]["tokens"] == ours["tokens"]


def test_a_signal_to_one_stops_all_at_one_update(stopped, two, folder):
    workdir, said = stopped
    updates = {re.search(r"stopped after update (\d+) of", text).group(1) for text in said}
    assert len(updates) == 1
    (step,) = map(int, updates)
    assert 12 <= step < STEPS
    assert (
        max(losses(workdir)[0]) == step
        and (workdir / "checkpoints" / str(step) / "manifest.json").exists()
    )
    assert_bitwise_equal(resumed(folder, workdir, "stopped-two", 2), two)


def test_a_signal_inside_an_evaluation_stops_all_at_one_batch(tmp_path):
    write_text(tmp_path / "text", words=2500)  # hundreds of batches
    workdir = tmp_path / "run"
    options = {"schedule__steps": 6, "run__evaluate_every": 3, "run__evaluation_tokens": None}
    with Processes(tmp_path, workdir, 2, **options) as run:
        run.wait_for(workdir, 3)
        run.children[1].send_signal(signal.SIGTERM)
        said = run.finish()
    assert all("stopped after update 3 of 6" in text for text in said), said
    assert "step 3: the evaluation was stopped" in said[0]
    assert list(losses(workdir)[1]) == []
    with Processes(tmp_path, workdir, 2, **options) as run:
        run.finish()
    assert list(losses(workdir)[1]) == [3, 6]


def test_one_process_goes_on_with_what_two_began(stopped, one, folder):
    assert_close(resumed(folder, stopped[0], "stopped-one", 1), one)


def test_two_processes_go_on_with_what_one_began(one, folder):
    shutil.copytree(one, folder / "cut")
    (folder / "cut" / "summary.json").unlink()
    for step in (40, 50, 60):
        shutil.rmtree(folder / "cut" / "checkpoints" / str(step))
    assert_close(resumed(folder, folder / "cut", "one-two", 2), one)


def test_a_killed_process_ends_the_others_and_nothing_is_lost(two, folder):
    workdir = folder / "killed"
    with Processes(folder, workdir, 2) as run:
        run.wait_for(workdir, 15)
        run.children[1].kill()
        began = time.monotonic()
        codes = run.codes(40)
        took, said = time.monotonic() - began, run.outputs()[0]
    assert codes[1] == -signal.SIGKILL and codes[0] not in (0, 2)
    assert took < 30
    assert "start all of them again" in said or "another task died" in said, said
    assert not (workdir / "summary.json").exists() and max(losses(workdir)[0]) < STEPS
    assert_bitwise_equal(resumed(folder, workdir, "killed-two", 2), two)


def test_four_processes_lose_their_lead_and_two_go_on(one, folder):
    workdir = folder / "four"
    with Processes(folder, workdir, 4) as run:
        run.wait_for(workdir, 15)
        run.children[0].kill()
        codes = run.codes(40)
        said = run.outputs()
    assert codes[0] == -signal.SIGKILL and 0 not in codes
    assert all(
        "start all of them again" in text or "another task died" in text for text in said[1:]
    ), said
    assert_close(resumed(folder, workdir, "four-two", 2), one)
