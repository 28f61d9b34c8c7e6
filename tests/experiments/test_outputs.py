"""What programs write: places are tested before any work, files are put in place whole, and less
replaces nothing."""

import errno
import importlib
import json
import os
import signal
import tempfile
from types import SimpleNamespace

import pytest

from experiments.benchmarks import (
    collectives,
    data_parallel,
    kernels,
    memory_7b,
    optimizer_step,
    peer_training_step,
    plans,
    refresh_subspaces,
    study,
    tapped_bounds,
    training_step,
)
from experiments.harness import outputs

RESULT = {
    "preset": "60M",
    "rows": [{"a": 1}, {"a": 2}],
    "losses": {"x": 1.0},
    "failed": ["b"],
    "command": "one",
}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rows": [{"a": 3}]}, "2 rows, where this one has 1"),
        ({"rows": None}, "2 rows, where this one has 0"),
        ({"losses": None}, "it holds losses['x']"),
        ({"losses": {"y": 1.0}}, "it holds losses['x']"),
        ({"losses": {"x": None}}, "it holds losses['x']"),
        ({"rows": [{"a": 1}, {"a": None}]}, "2 rows['a'], where this one has 1"),
        ({"rows": [{"a": 1}, {"b": 2}]}, "2 rows['a'], where this one has 1"),
        ({"preset": "130M"}, "preset '60M', where this one has '130M'"),
        ({"rank": 4}, "rank None, where this one has 4"),
    ],
)
def test_a_result_is_not_replaced_by_less(tmp_path, capsys, changes, words):
    path = tmp_path / "result.json"
    assert outputs.write_result(path, RESULT) == path
    before = path.read_bytes()
    written = outputs.write_result(path, RESULT | changes)
    assert path.read_bytes() == before
    assert (
        written == tmp_path / "result.partial.json"
        and json.loads(written.read_text()) == RESULT | changes
    )
    said = capsys.readouterr().err
    assert words in said and "--replace puts it there" in said
    assert outputs.write_result(path, RESULT | changes, replace=True) == path
    assert json.loads(path.read_text()) == RESULT | changes
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]


def test_a_result_is_replaced_by_as_much_or_more(tmp_path, capsys):
    path = tmp_path / "result.json"
    outputs.write_result(path, RESULT)
    more = RESULT | {
        "rows": [{"a": 1}, {"a": 2}, {"a": 3}],
        "failed": [],
        "command": "two",
        "further": 1,
    }
    assert outputs.write_result(path, more) == path and json.loads(path.read_text()) == more
    path.write_text("{")
    assert outputs.write_result(path, more) == tmp_path / "result.partial.json"
    assert "cannot be compared" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("knows", "words"), [(False, "{} rows, where"), (True, "{} rows['step_seconds'], where")]
)
def test_a_study_that_has_no_time_keeps_what_is_committed(tmp_path, capsys, knows, words):
    """An empty table took the place of the committed one, and one without the seconds of a step."""
    committed = study.RESULTS.read_text()
    rows = [row["method"] for row in json.loads(committed)["rows"]]
    results = tmp_path / "study.json"
    results.write_text(committed)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    flags = ["--root", str(tmp_path / "runs"), "--results", str(results), "--budget-hours", "1e-9"]
    flags += ["--known", str(study.RESULTS)] if knows else []
    try:
        assert study.main(flags) == 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert results.read_text() == committed
    partial = json.loads((tmp_path / "study.partial.json").read_text())["rows"]
    assert [row["method"] for row in partial] == rows * knows
    timed = [row for row in json.loads(committed)["rows"] if row["step_seconds"] is not None]
    words = words.format(len(timed) if knows else len(rows))
    assert f"is kept: it holds {words} this one has 0" in capsys.readouterr().err


def test_rows_of_another_preset_are_not_put_beside_those_of_the_committed_one(
    tmp_path, monkeypatch, capsys
):
    committed = (study.RESULTS.parent / "memory_7b.json").read_text()
    (tmp_path / "memory.json").write_text(committed)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setitem(
        memory_7b.PARTS, "card", lambda preset, length: iter(json.loads(committed)["card_rows"])
    )
    flags = ["--part=card", f"--output={tmp_path / 'memory.json'}"]
    assert memory_7b.main([*flags, "--preset=60M"]) == 0
    assert (tmp_path / "memory.json").read_text() == committed
    assert "slice_rows" not in json.loads((tmp_path / "memory.partial.json").read_text())
    assert memory_7b.main(flags) == 0  # the committed one's own
    assert json.loads((tmp_path / "memory.json").read_text()) == json.loads(committed)
    assert (
        capsys.readouterr().err.count("is kept: it holds preset '7B', where this one has '60M'")
        == 1
    )


def test_a_run_of_a_smaller_preset_keeps_the_times_beside_pytorch(tmp_path, monkeypatch, capsys):
    committed = (study.RESULTS.parent / "peer_training_step.json").read_text()
    (tmp_path / "peer.json").write_text(committed)
    found = {name: json.loads(committed)[name] for name in ("rows", "aims", "loss_difference")}
    monkeypatch.delattr(os, "sched_setaffinity", raising=False)
    for name, made in (("require", None), ("benchmark", found), ("version", "1")):
        monkeypatch.setattr(peer_training_step, name, lambda *given, made=made: made)
    assert (
        peer_training_step.main(
            ["--preset=nano", "--repetitions=3", f"--output={tmp_path / 'peer.json'}"]
        )
        == 0
    )
    assert (tmp_path / "peer.json").read_text() == committed
    assert json.loads((tmp_path / "peer.partial.json").read_text())["repetitions"] == 3
    assert "is kept: it holds preset '60M', where this one has 'nano'" in capsys.readouterr().err


REFUSED = [
    (study, "--budget-hours", ("0", "-1", "nan", "inf", "x")),
    (study, "--workers", ("0", "-2", "1.5", "x")),
    (study, "--steps", ("0",)),
    (study, "--tokens", ("0", "-64", "100", "x")),
    (study, "--methods", ("Adam", "")),
    (plans, "--budget_minutes", ("0", "-1")),
    (refresh_subspaces, "--budget_minutes", ("0",)),
    (refresh_subspaces, "--seeds", ("0",)),
    (refresh_subspaces, "--steps", ("-1",)),
    (optimizer_step, "--repetitions", ("0",)),
    (optimizer_step, "--refresh_repetitions", ("-1",)),
    (optimizer_step, "--only", ("(",)),
    (training_step, "--batch", ("0",)),
    (training_step, "--length", ("0",)),
    (training_step, "--repetitions", ("0",)),
    (training_step, "--parts", ("0",)),
    (peer_training_step, "--preset", ("61M",)),
    *(
        (peer_training_step, f"--{name}", ("0",))
        for name in ("batch", "length", "repetitions", "threads")
    ),
    (memory_7b, "--length", ("0",)),
    (memory_7b, "--preset", ("8B",)),
    (collectives, "--preset", ("61M",)),
    (data_parallel, "--preset", ("61M",)),
    *(
        (program, "--output", ("/dev/null", "/dev", "/proc/version/x"))
        for program in (collectives, plans, memory_7b, peer_training_step)
    ),
    (study, "--results", ("/dev/null", "/")),
    (study, "--root", ("/dev/null",)),
]


@pytest.mark.parametrize(
    ("program", "flag", "values"), REFUSED, ids=lambda part: getattr(part, "__name__", None)
)
def test_numbers_and_places_that_make_no_sense_are_refused(program, flag, values, capsys):
    for value in values:
        with pytest.raises(SystemExit) as ended:
            program.main([f"{flag}={value}"])
        assert ended.value.code == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert f"argument {flag}: " in line and value in line


@pytest.mark.parametrize("program", [kernels, tapped_bounds])
def test_a_target_that_is_none_is_refused(program, capsys):
    assert program.main(["--target=v9z:2x2"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_less_of_one_kernel_keeps_the_rows_of_all(tmp_path, monkeypatch, capsys):
    """The next kernel's rows removed the file in which those of the first one were put aside."""
    rows = [
        {"target": "v5e:2x2", "kernel": name, "case": case}
        for name in kernels.KERNELS
        for case in (1, 2)
    ]
    rows += [{"target": "h100", "kernel": "dct_scores", "case": 1}]
    (tmp_path / "kernels.json").write_text(json.dumps({"rows": rows}))
    target = SimpleNamespace(name="v5e:2x2", kind="tpu", chip="v5e", devices=lambda: [None])
    monkeypatch.setattr(kernels, "RESULTS", tmp_path / "kernels.json")
    monkeypatch.setattr(kernels.targets, "parse", lambda name: target)
    monkeypatch.setattr(kernels, "with_environment", lambda *given: None)
    monkeypatch.setattr(kernels, "row", lambda case, device: {"case": case})
    for number, name in enumerate(kernels.KERNELS):
        module = importlib.import_module(f"experiments.benchmarks.kernel_cases.{name}")
        monkeypatch.setattr(module, "cases", lambda kind, chip, number=number: [1, 2][: number + 1])
    assert kernels.main(["--target=v5e:2x2"]) == 0
    assert json.loads((tmp_path / "kernels.json").read_text())["rows"] == rows
    aside = json.loads((tmp_path / "kernels.partial.json").read_text())["rows"]
    expected = [
        rows[-1],
        *(row for row in rows[:-1] if (row["kernel"], row["case"]) != ("dct_scores", 2)),
    ]
    assert aside == expected
    assert "is kept: it holds 9 rows, where this one has 8" in capsys.readouterr().err
    assert kernels.main(["--target=v5e:2x2", "--replace"]) == 0
    assert json.loads((tmp_path / "kernels.json").read_text())["rows"] == expected


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_places_that_cannot_be_written_are_named_before_any_work(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    wrong = {
        ("file", True): "is a file, where a folder is to be written",
        ("link", True): "is a file",
        ("", False): "is a folder, where a file is to be written",
        ("file/below/deep", True): "lies below a file, ",
        ("file/below/deep.json", False): "lies below a file, ",
        ("x" * 300, False): "File name too long",
        ("/dev/null", False): "is no ordinary file",
        ("loop", False): "cannot be written",
    }
    for (name, is_folder), words in wrong.items():
        assert words in outputs.problem(tmp_path / name, is_folder=is_folder), name
    fine = (
        ("new/folder", True),
        ("new/file.json", False),
        ("file", False),
        ("link", False),
        ("", True),
    )
    for name, is_folder in fine:
        assert outputs.problem(tmp_path / name, is_folder=is_folder) is None, name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link", "loop"]  # no trace
    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    assert "No space left on device" in outputs.problem(tmp_path / "new", is_folder=True)


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    outputs.write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": None}
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        outputs.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": None} and [
        file.name for file in tmp_path.iterdir()
    ] == ["result.json"]


def test_a_link_to_a_result_stays_one(tmp_path):
    (tmp_path / "link.json").symlink_to(tmp_path / "file.json")
    outputs.write_json(tmp_path / "link.json", [1])
    assert (tmp_path / "link.json").is_symlink() and json.loads(
        (tmp_path / "file.json").read_text()
    ) == [1]
