"""What is measured on the base's own data: its cost, how it is turned off, and SIGTERM while it
goes on."""

import json
import shutil

import pytest

from experiments.finetuning.task import Finetuning
from tests.experiments import runs, tuning

pytestmark = pytest.mark.slow

ADAPTER = {"method": "lora(rank=2, dropout=0.2)", "whole": ["norm/scale"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuning")
    tuning.pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def whole(folder):
    """An uninterrupted run with dropout: (its folder, its summary)."""
    return folder / "whole", tuning.run(tuning.tiny(folder, adapter=ADAPTER), folder / "whole")


@pytest.mark.parametrize(
    "step, title", [(0, "base's domain"), (6, "validation"), (12, "base's domain")]
)
def test_sigterm_while_forgetting_is_measured_and_the_resumed_run_repeats_it(
    folder, whole, monkeypatch, step, title
):
    config = tuning.tiny(folder, adapter=ADAPTER)
    workdir = folder / f"terminated {step}"
    with monkeypatch.context() as patch:
        taken = runs.terminate_in_evaluation(patch, step, title, 2)
        stopped = tuning.run(config, workdir, handle_signals=True)
    assert stopped == {"status": "stopped", "step": step, "steps": 12}
    assert taken == [2]
    assert tuning.run(config, workdir)["status"] == "finished"
    assert list(runs.losses(workdir)[1]) == [0, 6, 12]
    runs.assert_bitwise_equal(whole[0], workdir)


def batches_of(task):
    """{title: batches} of an evaluation of the first state."""
    counts = {}

    def watch(title, total, batches):
        counts[title] = 0
        for batch in batches:
            counts[title] += 1
            yield batch
        assert counts[title] == total

    task.evaluate(task.initial(), watch)
    return counts


@pytest.mark.parametrize("length", [4, 16])
@pytest.mark.parametrize("tokens", [64, None])
def test_forgetting_costs_at_most_the_validation_and_reads_no_training_text(folder, length, tokens):
    config = tuning.tiny(
        folder,
        run={"domain_tokens": None, "evaluation_tokens": tokens},
        data={"sequence_length": length, "batch_size": 4},
    )
    task = Finetuning(config)
    counts = batches_of(task)
    assert 1 <= counts["base's domain"] <= counts["validation"]
    own, domain = task.dataset.validation, task.domain.validation
    assert domain.length * domain.evaluated() > own.length * own.evaluated(
        tokens
    )  # all of it would cost more
    assert counts["base's domain"] * domain.length <= counts["validation"] * own.length
    assert task.domain.train is None


@pytest.mark.parametrize("before", [None, 64])
def test_what_was_before_is_told_only_where_it_is_of_the_same_tokens(folder, whole, before):
    """An older version of the library began the run, and measured it on other tokens of the base's
    domain."""
    workdir = folder / f"of {before} tokens"
    shutil.copytree(whole[0], workdir)
    (workdir / "summary.json").unlink()
    path = workdir / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    first = next(row for row in rows if row["kind"] == "eval")
    assert whole[1]["domain_loss_before"] == first["domain_loss"]
    assert first.pop("domain_tokens") == 512
    first |= {} if before is None else {"domain_tokens": before}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = tuning.run(tuning.tiny(folder, adapter=ADAPTER), workdir)
    assert summary["domain_loss_before"] is None
    assert summary["domain_loss"] == whole[1]["domain_loss"]
    assert summary["validation_loss_before"] == whole[1]["validation_loss_before"]


def test_forgetting_can_be_turned_off_even_on_resume(folder, whole, monkeypatch):
    with monkeypatch.context() as patch:
        runs.terminate_in_evaluation(patch, 6, "base's domain", 0)
        tuning.run(tuning.tiny(folder, adapter=ADAPTER), folder / "less", handle_signals=True)
    config = tuning.tiny(folder, adapter=ADAPTER, run={"forgetting": False})
    assert tuning.run(config, folder / "less")["domain_loss"] is None
    assert any("forgetting is not measured" in text for text in runs.notes(folder / "less"))
    runs.assert_bitwise_equal(whole[0], folder / "less")
