"""SIGTERM inside the long pieces of a run that are no update: obeyed at once, and repeated on
resume bit for bit."""

import os
import signal

import pytest

from experiments.data import ngram
from experiments.data.tokenizer import ByteTokenizer
from experiments.harness import evaluated, metrics, training
from tests.experiments import runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stop")
    runs.write_text(folder / "text")
    return folder


@pytest.fixture(scope="module")
def whole(folder):
    """An uninterrupted run: (its folder, its summary)."""
    config = runs.tiny(folder, run={"trigram": True, "sample_tokens": 4})
    return folder / "whole", training.run(config, folder / "whole", verbose=False)


@pytest.mark.slow
@pytest.mark.parametrize("step", [6, 12])
def test_sigterm_inside_an_evaluation_stops_it_and_the_resumed_run_repeats_it(
    folder, whole, monkeypatch, step
):
    config = runs.tiny(folder, run={"trigram": True, "sample_tokens": 4})
    workdir = folder / f"terminated in the evaluation {step}"
    with monkeypatch.context() as patch:
        taken = runs.terminate_in_evaluation(patch, step, "validation", 2)
        stopped = training.run(config, workdir, handle_signals=True, verbose=False)
    assert stopped == {"status": "stopped", "step": step, "steps": 12}
    assert taken == [2]  # not one batch more
    assert list(runs.losses(workdir)[1]) == [6][: step // 6 - 1]
    assert training.run(config, workdir, verbose=False)["status"] == "finished"
    assert list(runs.losses(workdir)[1]) == [6, 12]
    runs.assert_bitwise_equal(whole[0], workdir)


@pytest.mark.slow
def test_sigterm_while_data_are_prepared_or_read_or_the_run_is_summed_up_stops_at_once(
    folder, whole, monkeypatch
):
    config = runs.tiny(
        folder, run={"trigram": True, "sample_tokens": 4}, data={"directory": str(folder / "fresh")}
    )
    workdir = folder / "terminated at once"

    def sending(function, call):
        calls = []

        def wrapped(*arguments):
            calls.append(None)
            if len(calls) == call:
                os.kill(os.getpid(), signal.SIGTERM)
            assert len(calls) <= call
            return function(*arguments)

        return wrapped

    with monkeypatch.context() as patch:
        patch.setattr(ByteTokenizer, "encode", sending(ByteTokenizer.encode, 5))
        stopped = training.run(config, workdir, handle_signals=True, verbose=False)
    assert stopped == {"status": "stopped", "step": None, "steps": 12}
    assert not [
        path for path in (folder / "fresh").rglob("*") if path.suffix != ".lock" and path.is_file()
    ]
    with monkeypatch.context() as patch:
        patch.setattr(evaluated, "spelled", sending(evaluated.spelled, 1))
        stopped = training.run(config, workdir, handle_signals=True, verbose=False)
    assert stopped == {"status": "stopped", "step": None, "steps": 12}
    assert runs.losses(workdir) == ({}, {})
    with monkeypatch.context() as patch:
        patch.setattr(ngram, "trigram_loss", sending(ngram.trigram_loss, 1))
        stopped = training.run(config, workdir, handle_signals=True, verbose=False)
    assert stopped == {"status": "stopped", "step": 12, "steps": 12}
    assert not (workdir / "summary.json").exists()
    assert training.run(config, workdir, verbose=False)["trigram_loss"] == whole[1]["trigram_loss"]
    runs.assert_bitwise_equal(whole[0], workdir)


def test_a_long_evaluation_tells_how_far_it_is(capsys, monkeypatch):
    progress = metrics.Progress(10, 0, every=1)
    progress.part("step 3: validation", 0, 7)
    progress.part("step 3: validation", 1, 7)
    monkeypatch.setattr(metrics, "PART_EVERY", 0.0)
    progress.part("step 3: validation", 2, 7)
    assert capsys.readouterr().err == "step 3: validation: batch 2 of 7\n"
