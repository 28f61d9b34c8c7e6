"""What is wrong with several processes is said before any work, by each of them, with exit code
2."""

import threading
import time

import pytest

from experiments.harness import distributed
from experiments.harness.distributed import Hosts
from experiments.settings.sections import ConfigurationError
from tests.experiments.runs import write_text
from tests.multi_process.processes import Processes, free_port


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("joining")
    write_text(folder / "text")
    return folder


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"coordinator": "a:1", "processes": 2, "process": 2},
            "process=2: with processes=2 give 0 to 1",
        ),
        ({"coordinator": "a:1", "processes": 2, "process": -1}, "process=-1: "),
        ({"coordinator": "a:1", "processes": 0, "process": 0}, "processes=0: "),
        ({"coordinator": "a", "processes": 2, "process": 0}, "coordinator='a': write host:port"),
        ({"coordinator": "a:70000", "processes": 2, "process": 0}, "coordinator='a:70000': "),
        ({"coordinator": "a:1", "processes": 2}, "process=None: .*go together"),
        ({"processes": 2, "process": 0}, "coordinator=None: .*go together"),
        ({"automatic": True, "processes": 2}, "processes=2: .*give one of the two"),
        ({"join_timeout": 0}, "join_timeout=0: "),
        ({"silence_timeout": 0}, "silence_timeout=0: "),
    ],
)
def test_wrong_flags(values, message):
    with pytest.raises(ConfigurationError, match=message):
        Hosts(**values)


def test_a_coordinator_that_nobody_reaches():
    address, began = f"127.0.0.1:{free_port()}", time.monotonic()
    with pytest.raises(
        ConfigurationError, match=f"coordinator='{address}': no process listens there after 1 s"
    ):
        distributed.join(Hosts(coordinator=address, processes=2, process=1, join_timeout=1))
    assert 0.9 < time.monotonic() - began < 5


def test_alone_everything_is_the_identity():
    distributed.join(Hosts())
    assert distributed.leads() and not distributed.joined() and distributed.exchange("a") == ["a"]
    assert distributed.by_lead(lambda: (1, 2), ValueError) == (1, 2)
    with pytest.raises(KeyError), distributed.together(ValueError):
        raise KeyError("own")
    asked = threading.Event()
    stop = distributed.Stop(asked)
    assert not stop.before() and not stop.poll()
    asked.set()
    assert stop.before() and stop.poll()


def refused(run):
    codes = run.codes()
    assert codes == [2] * len(codes), run.outputs()
    return run.outputs()


def test_the_command_refuses_wrong_flags(folder):
    flags = ("--coordinator=127.0.0.1:1", "--processes=2", "--process=2")
    with Processes(folder, folder / "run", 1, *flags) as run:
        (said,) = refused(run)
    assert said.strip() == "configuration error: process=2: with processes=2 give 0 to 1"
    assert not (folder / "run").exists()


def test_processes_that_do_not_come(folder):
    flags = (
        f"--coordinator=127.0.0.1:{free_port()}",
        "--processes=2",
        "--process=0",
        "--join_timeout=2",
    )
    with Processes(folder, folder / "run", 1, *flags) as run:
        (said,) = refused(run)
    assert "process 0 of 2 could not join the others (some did not come within 2 s)" in said
    assert not (folder / "run").exists()


def test_a_batch_that_the_processes_do_not_divide(folder):
    with Processes(folder, folder / "odd", 2, data__batch_size=7) as run:
        said = refused(run)
    assert all("data.batch_size=7: does not divide over 2 devices" in text for text in said), said
    assert not (folder / "odd" / "checkpoints").exists()


def test_processes_with_other_configurations(folder):
    with Processes(folder, folder / "other", 2, optimizer__rank=[4, 2]) as run:
        first, second = refused(run)
    assert "process 1: optimizer" in first and "process 0 was given" in second


def test_a_folder_that_is_not_shared(folder):
    with Processes(folder, [folder / "own", folder / "other-host"], 2) as run:
        said = refused(run)
    assert all("give a folder that all hosts share" in text for text in said), said
