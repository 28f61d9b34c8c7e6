"""The report: what stands in the page, and what it does with runs that are not whole."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest

from experiments.harness import command, workdir
from experiments.harness.runs import RunError, read_run, read_runs
from experiments.reporting import figures
from experiments.reporting import page as report
from experiments.settings.sections import ConfigurationError


def make_run(
    folder,
    *,
    optimizer="galore",
    final=1.7,
    steps=1000,
    step_seconds=0.08,
    seed=0,
    finished=True,
    ledger=True,
):
    """A run folder as the trainer writes it, with a plausible loss curve."""
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    config = {
        "name": folder.name,
        "model": {"preset": "nano", "width": 128},
        "optimizer": {
            "name": optimizer,
            "learning_rate": 0.01,
            "rank": None if optimizer == "adamw" else 32,
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    lines, seconds = [], 0.0

    def curve(step):
        return final + 3.85 * (1 + step / 18) ** -0.75 - 3.85 * (1 + 1000 / 18) ** -0.75

    for step in range(1, steps + 1):
        took = (
            step_seconds
            * (1 + 0.06 * random.normal())
            * (6 if optimizer == "galore" and step % 200 == 0 else 1)
        )
        took = 3.1 if step == 1 else took
        seconds += took
        row = {
            "kind": "train",
            "step": step,
            "loss": curve(step) + 0.05 * random.normal(),
            "tokens": step * 4096,
            "seconds": seconds,
            "step_seconds": took,
            "tokens_per_second": 4096 / took,
            "learning_rate": 0.01,
            "grad_norm": 1.0,
            "mfu": 0.2,
            "skipped": 0,
        }
        lines.append(row)
        if step % 100 == 0:
            value = curve(step) + 0.02
            lines.append(
                {
                    "kind": "eval",
                    "step": step,
                    "loss": value,
                    "perplexity": float(np.exp(value)),
                    "script_perplexity": 5.0,
                    "tokens": 100_000,
                    "seconds": seconds,
                }
            )
    lines.insert(0, {"kind": "note", "step": 0, "text": "started"})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if ledger:
        state = {"adamw": 7.4, "galore": 3.1}.get(optimizer, 2.6)
        rows = [
            ("parameters", 3.7, 3.7),
            ("optimizer state", state, state),
            ("gradients", 3.7, None),
            ("activations", 9.1, None),
            ("temporaries", None, 6.2),
        ]
        size = {"bytes_formula": 1, "bytes_measured": 2}
        table = [
            {"component": row[0]}
            | {k: None if row[i] is None else int(row[i] * 2**20) for k, i in size.items()}
            for row in rows
        ]
        (folder / "ledger.json").write_text(json.dumps(table))
    if finished:
        value = curve(steps) + 0.02
        summary = {
            "status": "finished",
            "name": folder.name,
            "optimizer": optimizer,
            "preset": "nano",
            "parameters": 918_912,
            "steps": steps,
            "tokens": steps * 4096,
            "validation_loss": value,
            "perplexity": float(np.exp(value)),
            "trigram_loss": 2.1432,
            "state_bytes": 3_250_000,
            "median_step_seconds": step_seconds,
            "total_seconds": seconds,
            "versions": {"jax": "0.10.2"},
            "sample": "def <main>():\n    return self & other",
        }
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    base = tmp_path_factory.mktemp("runs")
    return [
        make_run(base / "adamw", optimizer="adamw", final=1.62, step_seconds=0.071, seed=1),
        make_run(base / "galore", optimizer="galore", final=1.74, step_seconds=0.084, seed=2),
        make_run(base / "dct_adamw", optimizer="dct_adamw", final=1.69, step_seconds=0.078, seed=3),
        make_run(
            base / "frugal",
            optimizer="frugal",
            final=1.66,
            steps=520,
            finished=False,
            ledger=False,
            seed=4,
        ),
    ]


@pytest.fixture(scope="module")
def page(runs, tmp_path_factory):
    path = report.write(runs, tmp_path_factory.mktemp("page") / "new" / "report.html")
    return path, path.read_text()


def test_page_is_self_contained(page):
    path, text = page
    assert not re.findall(r'(?:src|href)="(?!data:image/png;base64,)', text)
    assert "<script" not in text
    assert "http" not in text.replace("base64", "")[:500]
    assert sorted(file.name for file in path.parent.iterdir()) == [
        "report.html",
        "report_loss.png",
        "report_memory.png",
        "report_step_time.png",
    ]
    assert text.count("data:image/png;base64,") == 3


def test_headline_holds_the_summary_and_marks_the_best(page):
    _, text = page
    rows = re.findall(r"<tr>(.*?)</tr>", text.split("<h2>")[0])[1:]
    cells = [
        [re.sub("<.*?>", "", cell) for cell in re.findall(r"<td>(.*?)</td>", row)] for row in rows
    ]
    assert [cell[0] for cell in cells] == [
        "adamw",
        "galore",
        "dct_adamw",
        "frugal unfinished, step 520",
    ]
    assert cells[0][1:9] == [
        "adamw",
        "0.92 M",
        "4.10 M",
        "1.6400",
        "5.155",
        "2.1432",
        "3.10 MiB",
        "71 ms",
    ]
    assert cells[3][2] == cells[3][6] == "-"
    assert float(cells[3][4]) == pytest.approx(read_run_loss(500), abs=1e-4)
    assert re.findall(r"<span class=best>(.*?)<", text) == ["1.6400"]


def read_run_loss(step, final=1.66):
    return final + 3.85 * (1 + step / 18) ** -0.75 - 3.85 * (1 + 1000 / 18) ** -0.75 + 0.02


def test_configuration_shows_only_what_differs(page):
    _, text = page
    table = text.split("<h2>Configuration</h2>")[1].split("</table>")[0]
    assert "optimizer.name" in table
    assert "optimizer.rank" in table
    assert "learning_rate" not in table
    assert "model.width" not in table


def test_sampled_text_is_escaped(page):
    assert "def &lt;main&gt;():\n    return self &amp; other" in page[1]


def test_missing_ledger_is_named(page):
    assert "No ledger.json: frugal." in page[1]


def test_broken_last_line_and_repeated_steps(tmp_path):
    folder = make_run(tmp_path / "resumed", steps=20, finished=False)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(
            json.dumps(
                {"kind": "train", "step": 20, "loss": 0.5, "seconds": 9.0, "step_seconds": 0.1}
            )
            + "\n"
        )
        file.write('{"kind": "train", "st')
    run = read_run(folder)
    assert [row["step"] for row in run.train] == list(range(1, 21))
    assert run.train[-1]["loss"] == 0.5
    assert len(run.step_seconds) == 19
    assert not run.finished
    assert report.write([folder], tmp_path / "folder") == tmp_path / "folder" / "report.html"


def test_run_that_recorded_nothing(tmp_path):
    folder = tmp_path / "empty"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("")
    text = report.write([folder], tmp_path / "empty.html").read_text()
    assert "No run has recorded a step yet" in text
    assert "data:image" not in text


def test_loss_that_is_not_finite_leaves_a_gap(tmp_path):
    folder = make_run(tmp_path / "diverged", steps=60, finished=False)
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(
        re.sub(r'("step": [345]\d, "loss": )[\d.]+', r"\1null", text)
    )
    run = read_run(folder)
    assert run.train[-1]["loss"] is not None
    assert run.train[-5]["loss"] is None
    report.write([folder], tmp_path / "diverged.html")


def test_names_tell_runs_of_the_same_folder_name_apart(tmp_path):
    folders = [make_run(tmp_path / group / "seed0", steps=3) for group in ("a", "b")]
    assert [run.name for run in read_runs([*folders, folders[0]])] == ["a/seed0", "b/seed0"]


def test_errors_name_the_folder_and_the_remedy(tmp_path):
    with pytest.raises(RunError, match="no run folders"):
        report.write([], tmp_path / "x.html")
    with pytest.raises(RunError, match="absent does not exist: give the folder that"):
        report.write([tmp_path / "absent"], tmp_path / "x.html")
    with pytest.raises(RunError, match=r"has no metrics\.jsonl"):
        report.write([tmp_path], tmp_path / "x.html")
    folder = make_run(tmp_path / "damaged", steps=3)
    (folder / "metrics.jsonl").write_text('{"kind": "train"\n')
    with pytest.raises(RunError, match="line 1 is not JSON.*remove the line"):
        report.write([folder], tmp_path / "x.html")
    (folder / "metrics.jsonl").write_text("")
    (folder / "summary.json").write_text("{")
    with pytest.raises(RunError, match="is not JSON"):
        report.write([folder], tmp_path / "x.html")
    assert not (tmp_path / "x.html").exists()


def test_smoothing_against_a_direct_mean():
    values = np.random.default_rng(0).normal(size=50)
    values[[3, 4, 20]] = np.nan
    for window in (1, 2, 7, 100):
        half = window // 2
        direct = [
            np.nanmean(values[max(0, i - half) : i + half + 1]) if window > 1 else values[i]
            for i in range(50)
        ]
        np.testing.assert_allclose(figures.smoothed(values, window), direct)


def test_memory_bars_are_as_long_as_the_ledger(runs):
    loaded = read_runs(runs)
    axes = figures.memory(loaded).axes[0]
    ends = {}
    for bar in axes.patches:
        place = round(bar.get_y() + bar.get_height() / 2)
        ends[place] = max(ends.get(place, 0.0), bar.get_x() + bar.get_width())
    expected = [3.7 + state + 3.7 + 9.1 + 6.2 for state in (7.4, 3.1, 2.6)]
    np.testing.assert_allclose([ends[place] for place in range(3)], expected, rtol=1e-5)


@pytest.mark.slow
def test_command_line(runs, tmp_path):
    command = [sys.executable, "-m", "experiments.report"]
    done = subprocess.run(
        [*command, *map(str, runs), "--output", str(tmp_path / "r.html")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "r.html").stat().st_size > 50_000
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("report: no run folders")


def evaluated_on(folder, *, evaluated, size=None, text=None, data=None):
    """A run whose evaluations say what they are of, as the trainer writes it."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in lines:
        row |= (
            {"evaluated": evaluated, "bytes": size, "text": text} if row["kind"] == "eval" else {}
        )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"data": data or {}}))
    return folder


def bold(page):
    """{column: names of the runs that are bold there} of the page's first table."""
    table = re.search(r'<table class="headline">(.*?)</table>', page, re.DOTALL)[1]
    titles = re.findall(r"<th>(.*?)</th>", table)
    found = {}
    for row in re.findall(r"<tr>(<td>.*?)</tr>", table):
        cells = re.findall(r"<td>(.*?)</td>", row)
        for title, cell in zip(titles, cells, strict=True):
            if "class=best" in cell:
                found.setdefault(title, []).append(re.sub(r"<[^>]*>", "", cells[0]))
    return found


def test_losses_of_different_tokens_are_never_compared(tmp_path):
    """Bytes and pieces of one text, and another text: the smallest loss is bold in each group of
    more than one."""
    runs = [
        evaluated_on(
            make_run(tmp_path / "bytes-a", final=1.2, seed=1),
            evaluated="b",
            size=100_000,
            text="t",
            data={"name": "c4", "tokenizer": "bytes"},
        ),
        evaluated_on(
            make_run(tmp_path / "bytes-b", final=1.1, seed=2),
            evaluated="b",
            size=100_000,
            text="t",
            data={"name": "c4", "tokenizer": "bytes"},
        ),
        evaluated_on(
            make_run(tmp_path / "pieces", final=3.0, seed=3),
            evaluated="p",
            size=400_000,
            text="t",
            data={"name": "c4", "tokenizer": "spiece.model"},
        ),
        evaluated_on(
            make_run(tmp_path / "other", final=0.1, seed=4),
            evaluated="o",
            size=100_000,
            text="u",
            data={"name": "wiki", "tokenizer": "bytes"},
        ),
    ]
    page = report._headline(read_runs(runs))
    assert bold(page) == {"validation loss": ["bytes-b"], "bits per byte": ["pieces"]}
    assert "Not all runs were evaluated on the same tokens" in page
    assert (
        "A: bytes-a, bytes-b: data.name = &#x27;c4&#x27;, data.tokenizer = &#x27;bytes&#x27;"
        in page
    )
    assert "C: other: data.name = &#x27;wiki&#x27;" in page
    assert f"{3.02 * 100_000 / 400_000 / np.log(2):.4f}" in page  # nats a token to bits a byte
    alone = report._headline(read_runs(runs[2:]))
    assert bold(alone) == {}
    same = report._headline(read_runs(runs[:2]))
    assert bold(same) == {"validation loss": ["bytes-b"], "bits per byte": ["bytes-b"]}
    assert "Not all runs" not in same


def test_a_run_that_does_not_record_what_it_evaluated_is_not_said_to_be_of_other_content(tmp_path):
    data = {"name": "c4", "tokenizer": "bytes"}
    old = evaluated_on(make_run(tmp_path / "old", final=1.0), evaluated="", data=data)
    new = evaluated_on(make_run(tmp_path / "new", final=1.2), evaluated="x", data=data)
    other = evaluated_on(make_run(tmp_path / "other", final=1.1), evaluated="y", data=data)
    page = report._headline(read_runs([old, new]))
    assert bold(page) == {}
    assert "Not all runs are known to have been evaluated on the same tokens" in page
    assert "<li>A: old: an older version did not record what was evaluated</li>" in page
    assert "<li>B: new: what was evaluated is recorded</li>" in page
    page = report._headline(read_runs([old, new, other]))
    assert "<li>A: old: an older version did not record what was evaluated</li>" in page
    for name in ("B: new", "C: other"):
        assert (
            f"<li>{name}: the same configuration of data, whose content or tokenizer is "
            "another</li>" in page
        )
    page = report._headline(read_runs([new, other]))
    assert "Not all runs were evaluated on the same tokens" in page


def test_runs_that_do_not_say_what_they_evaluated_are_told_apart_by_their_configurations(tmp_path):
    first = evaluated_on(
        make_run(tmp_path / "a", final=1.2), evaluated=None, data={"name": "c4", "batch_size": 4}
    )
    second = evaluated_on(
        make_run(tmp_path / "b", final=1.1), evaluated=None, data={"name": "c4", "batch_size": 8}
    )
    third = evaluated_on(
        make_run(tmp_path / "c", final=1.0), evaluated=None, data={"name": "wiki", "batch_size": 4}
    )
    for folder in (first, second, third):  # as older runs wrote them
        text = (folder / "metrics.jsonl").read_text()
        (folder / "metrics.jsonl").write_text(
            text.replace(', "evaluated": null, "bytes": null, "text": null', "")
        )
    assert bold(report._headline(read_runs([first, second, third]))) == {"validation loss": ["b"]}


EXTENDED = {
    "extended": True,
    "step": 8,
    "changed": {"schedule.steps": [8, 12]},
    "before": {"validation_loss": 2.0},
}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("ledger.json", [{"component": 3}], "component is 3"),
        ("ledger.json", "{", "ledger.json"),
        ("history.json", "[", "history.json"),
        ("history.json", [{"extended": True}], "history.json"),
        (
            "history.json",
            [EXTENDED | {"changed": {"schedule.steps": [8]}}],
            "changed['schedule.steps'] is [8], where",
        ),
        ("history.json", [EXTENDED | {"before": {"validation_loss": "low"}}], "history.json"),
    ],
)
def test_a_damaged_file_of_a_run_is_one_message(tmp_path, capsys, name, content, words):
    """Of a run that is over, which then ends as usual, and of one that goes on, which then does not
    begin."""
    folder = make_run(tmp_path / "run", steps=20)
    (folder / "history.json").write_text(json.dumps([EXTENDED]))
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    command._report(folder)
    said = capsys.readouterr().err
    assert said.startswith("no report: ") and words in said and said.count("\n") == 1
    if name == "history.json":
        (folder / "config.json").unlink()  # what else would be compared
        with pytest.raises(ConfigurationError, match=r"workdir=.*history\.json"):
            workdir.claim(None, folder)


def test_the_report_of_a_run_that_is_over_is_written(tmp_path, capsys):
    folder = make_run(tmp_path / "run", steps=20)
    (folder / "history.json").write_text(json.dumps([EXTENDED]))
    command._report(folder)
    assert capsys.readouterr().err == "" and (folder / "report" / "report.html").is_file()
