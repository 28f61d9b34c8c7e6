"""What tests cost is measured where they run, and summed by law and by method."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import durations
from tests.laws.methods import METHODS

TESTS = """
import time
import pytest

def busy(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass

@pytest.fixture
def prepared():
    busy(0.2)

def test_fixtures_count(prepared):
    busy(0.1)

@pytest.mark.parametrize("row", ["a", "b"])
def test_sleep_does_not(row):
    time.sleep(0.5)
"""


@pytest.mark.parametrize("processes", [0, 2])
def test_cpu_seconds_come_from_every_process(tmp_path, processes):
    (tmp_path / "test_busy.py").write_text(TESTS)
    (tmp_path / "empty.ini").write_text("[pytest]\n")
    options = [f"-c{tmp_path}/empty.ini", "-pno:cacheprovider", "-ptests.durations"]
    options += [f"-n{processes}", f"--cpu-seconds={tmp_path}/found.json"]
    subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(tmp_path)],
        check=True,
        capture_output=True,
        cwd=Path(__file__).parents[2],
    )
    found = json.loads((tmp_path / "found.json").read_text())
    spent = {name.split("::")[1]: seconds for name, seconds in found.items()}
    assert sorted(spent) == [
        "test_fixtures_count",
        "test_sleep_does_not[a]",
        "test_sleep_does_not[b]",
    ]
    assert 0.3 <= spent.pop("test_fixtures_count") < 0.5
    assert max(spent.values()) < 0.2


def test_sums_by_law_and_by_method():
    first, second = METHODS[0].name, METHODS[1].name
    seconds = {f"x.py::one[{first}]": 2.0, f"x.py::one[{second}]": 1.0, f"x.py::two[{first}]": 3.0}
    assert durations.by_law(seconds) == [("x.py::one", 2, 3.0, 2.0), ("x.py::two", 1, 3.0, 3.0)]
    assert durations.by_method(seconds) == [
        (first, 2, 5.0, "x.py::two", 3.0),
        (second, 1, 1.0, "x.py::one", 1.0),
    ]
    stored = {"x.py::old[state_2-galore-dct]": 2.0, "x.py::one[test_dtype-galore]": 1.0}
    assert [row[0] for row in durations.by_method(stored)] == ["galore-dct", "galore"]
    assert "3.0  x.py::two" in durations.report(seconds)
