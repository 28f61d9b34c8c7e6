"""A run that dies and is started again ends where the uninterrupted one does, bit for bit."""

import json
import random
import signal
import time

import pytest

from tests.experiments import commands, runs

pytestmark = pytest.mark.slow

STEPS, EVERY = 240, 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from experiments.settings import configuration

    folder = tmp_path_factory.mktemp("resume")
    runs.write_text(folder / "text")
    config = runs.tiny(
        folder,
        optimizer={"name": "dct_adamw", "rank": 4, "refresh_every": 3},
        schedule={"steps": STEPS, "accumulation": 2},
        checkpoint={"every": EVERY},
        run={"evaluate_every": 60, "compile_cache": True},
    )
    commands.write(folder, "configuration", configuration.to_dict(config))
    assert commands.start("pretrain", folder, "whole").wait(300) == 0, (
        folder / "whole.log"
    ).read_text()
    return folder


def test_killed_twice_at_random_and_resumed(folder):
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    generator = random.Random(seed)
    for low, high in ((3, 60), (110, 200)):
        process = commands.start("pretrain", folder, "killed")
        commands.wait_for_step(process, folder / "killed", generator.randint(low, high))
        time.sleep(generator.uniform(0, 0.03))
        process.send_signal(signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL
    at_death = max(runs.losses(folder / "killed")[0])
    assert commands.start("pretrain", folder, "killed").wait(240) == 0
    runs.assert_bitwise_equal(folder / "whole", folder / "killed")
    resumed = [
        int(text.split("step ")[1].split(";")[0])
        for text in runs.notes(folder / "killed")
        if text.startswith("resumed")
    ]
    # a save is finished before the next one begins, so what is lost is at most the interval it was
    # written in and one more
    assert at_death - resumed[-1] <= 2 * EVERY


def test_terminated_saves_exits_with_0_and_says_how_to_resume(folder):
    process = commands.start("pretrain", folder, "terminated")
    commands.wait_for_step(process, folder / "terminated", 33)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    log = (folder / "terminated.log").read_text()
    saved = max(int(path.name) for path in (folder / "terminated" / "checkpoints").iterdir())
    assert f"stopped after update {saved} of {STEPS}" in log
    assert (
        f"-m experiments.pretrain --config={folder}/config.py --workdir={folder}/terminated" in log
    )
    assert max(runs.losses(folder / "terminated")[0]) == saved  # not one update is lost
    assert not (folder / "terminated" / "summary.json").exists()
    assert commands.start("pretrain", folder, "terminated").wait(240) == 0
    runs.assert_bitwise_equal(folder / "whole", folder / "terminated")


def test_the_finished_run_holds_its_record(folder):
    workdir = folder / "whole"
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert summary["steps"] == STEPS
    assert summary["tokens"] == STEPS * 4 * 16
    assert summary["validation_loss"] == runs.losses(workdir)[1][STEPS]
    assert "validation loss" in (folder / "whole.log").read_text()
