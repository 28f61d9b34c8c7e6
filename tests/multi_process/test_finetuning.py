"""Fine-tuning by several processes: the numbers of one process, on a base that they share out."""

import json
import signal

import numpy as np
import pytest

from tests.experiments import tuning
from tests.experiments.runs import assert_bitwise_equal, final_arrays, losses, notes
from tests.multi_process.processes import Processes
from tests.multi_process.test_runs import assert_close

STEPS = 30
FLAGS = {
    "data.sequence_length": 16,
    "data.batch_size": 8,
    "optimizer.learning_rate": 1e-2,
    "schedule.steps": STEPS,
    "checkpoint.every": 10,
    "checkpoint.keep": 3,
    "run.evaluate_every": 15,
    "run.evaluation_tokens": 512,
    "run.sample_tokens": 4,
    "run.trigram": False,
}
LORA = {"adapter.method": "lora(rank=2)"}
GALORE = {
    "adapter.method": "",
    "optimizer.name": "galore",
    "optimizer.rank": 4,
    "optimizer.backprop": "projected",
    "optimizer.projector": "power",
    "optimizer.eps": 1e-4,
    "optimizer.learning_rate": 1e-3,
    "schedule.steps": 8,
    "mesh.data": 1,
    "mesh.fsdp": -1,
}
SHARED = {
    "mesh__data": 1,
    "mesh__fsdp": -1,
    "mesh__explicit": True,
}  # the base, on a mesh of explicit axes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hosts")
    tuning.pretrained(folder)
    return folder


def start(folder, workdir, count, values, **changes):
    """Processes that tune `folder`/base on `folder`/text."""
    values = FLAGS | values | {"base.source": str(folder / "base")}
    config = "finetune/documentation.py"
    return Processes(
        folder, workdir, count, program="finetune", config=config, values=values, **changes
    )


def test_two_processes_that_share_a_base_have_the_losses_of_one_and_lose_nothing(folder):
    one, two, killed = (folder / name for name in ("one", "two", "killed"))
    with start(folder, one, 1, LORA) as run:
        run.finish()
    with start(folder, two, 2, LORA, **SHARED) as run:
        run.finish()
    assert_close(two, one)
    assert list(losses(two)[0]) == list(range(1, STEPS + 1))
    ours, theirs = (json.loads((path / "summary.json").read_text()) for path in (two, one))
    assert ours["device"].startswith("2 x ") and ours["base_digest"] == theirs["base_digest"]
    assert ours["domain_loss"] == pytest.approx(theirs["domain_loss"], abs=1e-5)
    assert ours["sample"]
    with start(folder, killed, 2, LORA, **SHARED) as run:
        run.wait_for(killed, 12)
        run.children[1].send_signal(signal.SIGKILL)
        assert 0 not in run.codes(40)
    with start(folder, killed, 2, LORA, **SHARED) as run:
        run.finish()
    assert_bitwise_equal(killed, two)


def test_projected_backprop_of_the_whole_model(folder):
    found = {}
    for count in (1, 2):
        workdir = folder / f"galore-{count}"
        with start(folder, workdir, count, GALORE) as run:
            run.finish()
        assert any("projected gradients agree" in text for text in notes(workdir))
        found[count] = workdir
    assert_close(found[2], found[1])
    arrays = final_arrays(found[2])[1]
    for path, array in final_arrays(found[1])[1].items():
        if path.startswith("params/"):
            np.testing.assert_allclose(arrays[path], array, atol=1e-4, err_msg=path)
