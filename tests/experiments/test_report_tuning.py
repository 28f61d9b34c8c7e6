"""What the report adds for fine-tuning: how much trains, accuracy, and what the base forgets."""

import json
import re

import numpy as np
import pytest

from experiments.harness.runs import read_runs
from experiments.reporting import figures
from experiments.reporting import page as report


def make_run(folder, *, adapter, domain, accuracy=None, finished=True):
    """A run folder as `experiments.finetune` writes it, evaluated at steps 0, 10 and 20."""
    folder.mkdir()
    config = {"name": folder.name, "adapter": {"method": adapter}, "optimizer": {"name": "adamw"}}
    (folder / "config.json").write_text(json.dumps(config))
    rows = [
        {
            "kind": "train",
            "step": step,
            "loss": 2.0,
            "tokens": step,
            "seconds": step,
            "step_seconds": 1.0,
        }
        for step in range(1, 21)
    ]
    for number, step in enumerate((0, 10, 20)):
        row = {"kind": "eval", "step": step, "loss": 2.0 - 0.2 * number, "seconds": step}
        row |= {} if domain is None else {"domain_loss": domain[number]}
        rows.append(row | ({} if accuracy is None else {"accuracy": accuracy}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = {
        "status": "finished",
        "parameters": 2_000_000,
        "trainable_parameters": 12_345,
        "validation_loss": 1.6,
    }
    summary |= {"steps": 20, "total_seconds": 20.0}
    summary |= {"validation_accuracy": accuracy, "domain_loss": domain and domain[-1]}
    summary |= {"domain_loss_before": domain and domain[0], "optimizer": "adamw", "tokens": 20}
    if finished:
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


@pytest.fixture
def folders(tmp_path):
    return [
        make_run(tmp_path / "lora", adapter="lora(rank=8)", domain=[1.5, 1.55, 1.5625]),
        make_run(
            tmp_path / "unfinished",
            adapter="",
            domain=[1.5, 1.75, 1.8],
            accuracy=0.875,
            finished=False,
        ),
        make_run(tmp_path / "other", adapter="", domain=None),
    ]


def test_the_headline_has_the_columns_that_some_run_fills(folders, tmp_path):
    text = report.write(folders, tmp_path / "report.html").read_text()
    head = text.split("<h2>")[0]
    titles = [re.sub("<.*?>", "", cell) for cell in re.findall(r"<th>(.*?)</th>", head)]
    rows = [
        [re.sub("<.*?>", "", cell) for cell in re.findall(r"<td>(.*?)</td>", row)]
        for row in re.findall(r"<tr>(.*?)</tr>", head)[1:]
    ]
    table = {title: [row[number] for row in rows] for number, title in enumerate(titles)}
    assert table["trained"] == ["12,345", "-", "12,345"]
    assert table["base's domain, before"] == ["1.5000", "-", "-"]
    assert table["after"] == ["1.5625", "1.8000", "-"]
    assert table["accuracy"] == ["-", "87.50%", "-"]
    assert "<h2>Forgetting</h2>" in text
    assert (tmp_path / "report_forgetting.png").is_file()
    alone = report.write(folders[2:], tmp_path / "alone.html").read_text()
    assert "Forgetting" not in alone and "accuracy" not in alone.split("<h2>")[0]


def test_the_figure_leaves_out_what_is_of_other_tokens_of_the_domain(folders):
    path = folders[0] / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row |= (
            {"domain_tokens": 512} if row["kind"] == "eval" and row["step"] else {}
        )  # an older version began it
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    axes = figures.forgetting(read_runs(folders[:1])).axes[0]
    (line,) = [line.get_xydata() for line in axes.lines if len(line.get_xydata()) == 2]
    np.testing.assert_allclose(line, [[1.8, 1.55], [1.6, 1.5625]])


def test_the_figure_goes_from_evaluation_to_evaluation(folders):
    axes = figures.forgetting(read_runs(folders)).axes[0]
    paths = [line.get_xydata() for line in axes.lines if len(line.get_xydata()) == 3]
    np.testing.assert_allclose(paths[0], [[2.0, 1.5], [1.8, 1.55], [1.6, 1.5625]])
    np.testing.assert_allclose(paths[1][:, 1], [1.5, 1.75, 1.8])
    assert len(paths) == 2  # the third run has no base's domain
    ends = [line for line in axes.lines if len(line.get_xydata()) == 1]
    assert [line.get_xydata().tolist() for line in ends[:2]] == [[[2.0, 1.5]], [[1.6, 1.5625]]]
    assert [line.get_markerfacecolor() for line in ends[:2]] == ["white", figures.colour(0)]
