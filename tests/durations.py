"""What the tests cost in processor seconds, which another program beside them hardly changes.

    make test
    python -m tests.durations [FILE ...]

prints a table of CPU seconds by law (a test function of any file), the dearest rows, and what each
row of the table of methods costs in all laws together. `pytest --cpu-seconds=FILE` writes a file,
and `make test` one a tier into `.pytest_cache/cpu_seconds/`, which are read where none is named.
Seconds of child processes that ended are those of the test that started them.
"""

import argparse
import collections
import json
import os
import pathlib
import time

import pytest

FOLDER = pathlib.Path(__file__).parents[1] / ".pytest_cache" / "cpu_seconds"
CALLED = pytest.StashKey[float]()


def cpu_seconds() -> float:
    """Of this process, all its threads, and its children that ended."""
    times = os.times()
    return time.process_time() + times.children_user + times.children_system


def pytest_addoption(parser):
    parser.addoption("--cpu-seconds", metavar="FILE", help="write what each test costs")


def pytest_configure(config):
    if path := config.getoption("--cpu-seconds"):
        config.pluginmanager.register(Recorder(path))


class Recorder:
    """Gives every report its CPU seconds, and writes the sums where the session is led from.

    The three phases of a test (setup, call, teardown) are one number. xdist's workers measure, and
    their reports carry the numbers to the process that writes.
    """

    def __init__(self, path: str):
        self.path, self.seconds = pathlib.Path(path), collections.Counter()

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item):
        item.stash[CALLED] = cpu_seconds()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item):
        report, now = (yield), cpu_seconds()
        report.cpu_seconds, item.stash[CALLED] = now - item.stash.get(CALLED, now), now
        return report

    def pytest_runtest_logreport(self, report):
        self.seconds[report.nodeid] += report.cpu_seconds

    def pytest_sessionfinish(self, session):
        if hasattr(session.config, "workerinput"):
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        rounded = {name: round(seconds, 3) for name, seconds in self.seconds.items()}
        self.path.write_text(json.dumps(rounded, indent=0))


def law_of(name: str) -> str:
    """The test function of a row."""
    return name.partition("[")[0]


def by_law(seconds: dict[str, float]) -> list[tuple[str, int, float, float]]:
    """`(law, rows, seconds, seconds of the dearest row)`, the dearest law first."""
    laws = collections.defaultdict(list)
    for name, spent in seconds.items():
        laws[law_of(name)].append(spent)
    table = [(law, len(spent), sum(spent), max(spent)) for law, spent in laws.items()]
    return sorted(table, key=lambda row: -row[2])


def by_method(seconds: dict[str, float]) -> list[tuple[str, int, float, str, float]]:
    """`(method, rows, seconds, its dearest row, seconds of that)`, the dearest method first."""
    from tests.laws.methods import METHODS

    # the longest name that an identifier ends with: "a test-galore-dct" is none of galore
    names = sorted((method.name for method in METHODS), key=len, reverse=True)
    found: dict[str, dict[str, float]] = collections.defaultdict(dict)
    for name, spent in seconds.items():
        row = "-" + name.partition("[")[2].removesuffix("]")
        method = next((method for method in names if row.endswith("-" + method)), None)
        if method is not None:
            found[method][name] = spent
    table = []
    for method, rows in found.items():
        dearest = max(rows, key=rows.get)
        table.append((method, len(rows), sum(rows.values()), law_of(dearest), rows[dearest]))
    return sorted(table, key=lambda row: -row[2])


def report(seconds: dict[str, float], laws: int = 40, rows: int = 10) -> str:
    """The three tables as text."""
    table = by_law(seconds)
    lines = [f"{len(seconds)} tests, {sum(seconds.values()) / 60:.1f} CPU minutes", ""]
    lines += [f"{'CPU s':>8} {'rows':>5} {'a row':>7} {'dearest':>8}  law"]
    for law, count, total, dearest in table[:laws]:
        lines.append(f"{total:8.1f} {count:5d} {total / count:7.2f} {dearest:8.2f}  {law}")
    lines += ["", f"{'CPU s':>8}  the dearest rows"]
    for name in sorted(seconds, key=seconds.get, reverse=True)[:rows]:
        lines.append(f"{seconds[name]:8.1f}  {name}")
    lines += ["", f"{'CPU s':>8} {'rows':>5} {'dearest':>8}  method and its dearest law"]
    for method, count, total, law, dearest in by_method(seconds):
        lines.append(f"{total:8.1f} {count:5d} {dearest:8.2f}  {method}: {law.split('::')[-1]}")
    return "\n".join(lines)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="*", type=pathlib.Path)
    parser.add_argument("--laws", type=int, default=40, help="how many laws are printed")
    parser.add_argument("--rows", type=int, default=10, help="how many rows are printed")
    options = parser.parse_args()
    files = options.files or sorted(FOLDER.glob("*.json"))
    if not files:
        parser.error(f"no file in {FOLDER}: run `make test`, or pytest with --cpu-seconds=FILE")
    seconds: dict[str, float] = {}
    for file in files:
        seconds.update(json.loads(file.read_text()))
    print(report(seconds, options.laws, options.rows))


if __name__ == "__main__":
    main()
