"""The training loop in one process: numbers against NumPy, and every way a run can go wrong."""

import errno
import json
import os
import signal
import tempfile
import threading
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.harness import checkpoint, metrics, optimizers, training, updates
from experiments.harness import workdir as folders
from experiments.harness.runs import read_summary
from experiments.settings.sections import ConfigurationError
from lowrank_jax.projection.transformation import ProjectionTransformation
from tests.experiments import runs

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def compile_cache(tmp_path_factory):
    """Many runs of few programs: compile each of them once."""
    names = {"jax_compilation_cache_dir": str(tmp_path_factory.mktemp("programs"))}
    names["jax_persistent_cache_min_compile_time_secs"] = 0
    before = {name: getattr(jax.config, name) for name in names}
    for name, value in names.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    runs.write_text(folder / "text")
    return folder


@pytest.fixture(scope="module")
def whole(folder):
    """An uninterrupted run: (its folder, its summary)."""
    config = runs.tiny(folder, run={"trigram": True, "sample_tokens": 4})
    return folder / "whole", training.run(config, folder / "whole", verbose=False)


def test_a_run_records_what_it_did(folder, whole):
    workdir, summary = whole
    rows = metrics.read(workdir / "metrics.jsonl")
    train = [row for row in rows if row["kind"] == "train"]
    assert [row["step"] for row in train] == list(range(1, 13))
    assert train[-1]["tokens"] == 12 * 64
    assert train[-1]["loss"] < train[0]["loss"]
    assert [row["step"] for row in rows if row["kind"] == "eval"] == [6, 12]
    rate = optimizers.schedule(runs.tiny(folder).schedule, 1e-2)
    assert [row["learning_rate"] for row in train] == [float(rate(step)) for step in range(12)]
    assert sum(row["step_seconds"] for row in train) == pytest.approx(train[-1]["seconds"])
    assert read_summary(workdir / "summary.json") == summary
    # embedding and head, two layers of (q and o, k and v, three of the MLP, two norms), a norm;
    # adamw holds two of each
    assert summary["parameters"] == 259 * 16 * 2 + 2 * (512 + 256 + 1536 + 32) + 16
    assert summary["state_bytes"] == 8 * summary["parameters"] + 2 * 4  # two counters
    assert summary["trigram_loss"] > 0
    assert summary["sample"].startswith("def ")
    ledger = {
        row["component"]: row["bytes_measured"]
        for row in json.loads((workdir / "ledger.json").read_text())
    }
    assert ledger["parameters"] == 4 * summary["parameters"]
    assert ledger["optimizer state"] == summary["state_bytes"]
    assert ledger["temporaries"] > 0


def test_a_finished_run_is_not_repeated(folder, whole, monkeypatch):
    workdir, summary = whole
    monkeypatch.setattr(training, "_Training", None)
    assert training.run(runs.tiny(folder, run={"trigram": True}), workdir) == summary


def test_a_finished_run_is_shown_from_a_folder_that_can_only_be_read(folder, whole, monkeypatch):
    def read_only(*args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(folders, "locked", read_only)
    monkeypatch.setattr(os, "mkdir", read_only)
    monkeypatch.setattr(tempfile, "TemporaryFile", read_only)
    config = runs.tiny(folder, run={"trigram": True, "sample_tokens": 4})
    assert training.run(config, whole[0], verbose=False) == whole[1]
    message = "workdir=.*: cannot be written .Read-only file system.; give another place"
    with pytest.raises(ConfigurationError, match=message):
        training.run(config, folder / "another", verbose=False)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_update_is_the_gradient_of_the_token_mean(accumulation):
    """Linear model with a closed form: gradient = sum_i w_i x_i (softmax - onehot) / sum_i w_i, in
    NumPy."""

    class Linear:
        def apply(self, variables, inputs):
            return variables["params"]["w"][inputs]

    rng = np.random.default_rng(0)
    weights = rng.integers(0, 2, (8, 5)).astype(np.float32)
    weights[:2] = 0  # microbatches of unequal weight
    batch = {
        "inputs": rng.integers(0, 6, (8, 5)),
        "targets": rng.integers(0, 6, (8, 5)),
        "weights": weights,
    }
    w = rng.normal(size=(6, 6)).astype(np.float32)
    step = updates.train_step(Linear(), optax.sgd(1.0), accumulation)
    state = {
        "params": {"w": jnp.asarray(w)},
        "opt_state": optax.sgd(1.0).init({"w": jnp.asarray(w)}),
    }
    state, measured = jax.jit(step)(state, jax.tree.map(jnp.asarray, batch))

    gradient, total = np.zeros((6, 6)), 0.0
    for token, target, weight in zip(
        *(batch[name].ravel() for name in ("inputs", "targets", "weights")), strict=True
    ):
        chances = np.exp(w[token].astype(float))
        chances /= chances.sum()
        total -= weight * np.log(chances[target])
        gradient[token] += weight * (chances - np.eye(6)[target])
    gradient /= weights.sum()
    np.testing.assert_allclose(state["params"]["w"], w - gradient, atol=1e-6)
    np.testing.assert_allclose(measured["loss"], total / weights.sum(), rtol=1e-6)
    np.testing.assert_allclose(measured["grad_norm"], np.linalg.norm(gradient), rtol=1e-5)
    assert float(measured["tokens"]) == weights.sum()


def test_evaluation_is_the_token_mean_and_the_scripts_number_divides_by_one_more():
    batches = [(10.0, 4.0), (3.0, 2.0), (7.0, 1.0)]
    result = updates.evaluate(lambda params, batch: batch, None, batches)
    assert result["loss"] == pytest.approx(20.0 / 7.0)
    assert result["perplexity"] == pytest.approx(np.exp(20.0 / 7.0))
    assert result["script_perplexity"] == pytest.approx(np.exp((2.5 + 1.5 + 7.0) / 4))
    assert result["tokens"] == 7


class Crash(Exception):
    pass


def crash_after(monkeypatch, step):
    """Die once the metrics of `step` are written, as a failing machine would: nothing is saved or
    closed in order."""
    collect = training._Training._collect

    def failing(self):
        collect(self)
        if self.step >= step:
            raise Crash

    monkeypatch.setattr(training._Training, "_collect", failing)


@pytest.mark.parametrize("name", ["adamw", "apollo"])
def test_a_crashed_run_resumes_bitwise(folder, whole, monkeypatch, name):
    config = runs.tiny(folder, run={"trigram": True, "sample_tokens": 4})
    expected = whole[0]
    if name != "adamw":
        config = runs.tiny(folder, optimizer={"name": name, "rank": 4})
        expected = folder / f"{name} whole"
        training.run(config, expected, verbose=False)
    workdir = folder / f"{name} crashed"
    with monkeypatch.context() as patch:
        crash_after(patch, 7)
        with pytest.raises(Crash):
            training.run(config, workdir, verbose=False)
    assert max(runs.losses(workdir)[0]) == 7
    assert training.run(config, workdir, verbose=False)["status"] == "finished"
    assert "resumed from the checkpoint of step 4; 4 later lines" in " ".join(runs.notes(workdir))
    runs.assert_bitwise_equal(expected, workdir)


@pytest.mark.parametrize("damage", ["bit", "number", "counter"])
def test_a_damaged_checkpoint_is_passed_over_and_the_run_ends_alike(
    folder, whole, monkeypatch, damage
):
    config = runs.tiny(folder, run={"trigram": True, "sample_tokens": 4})
    workdir = folder / f"damaged {damage}"
    with monkeypatch.context() as patch:
        crash_after(patch, 10)
        with pytest.raises(Crash):
            training.run(config, workdir, verbose=False)
    newest, number = workdir / "checkpoints" / "8", 8
    if damage == "bit":
        files = [path for path in (newest / "state").rglob("*") if path.is_file()]
        victim = max(files, key=lambda path: path.stat().st_size)
        data = bytearray(victim.read_bytes())
        data[-100] ^= 16
        victim.write_bytes(data)
    else:
        number = 9
        newest = newest.rename(workdir / "checkpoints" / "9")
    if damage == "counter":  # even where somebody has sealed it anew
        values = json.loads((newest / checkpoint.MANIFEST).read_text()) | {"step": 9}
        del values["digest"]
        checkpoint.write_json(
            newest / checkpoint.MANIFEST, {**values, "digest": checkpoint.digest(values)}
        )
    training.run(config, workdir, verbose=False)
    texts = " ".join(runs.notes(workdir))
    words = {
        "bit": "file state/",
        "number": "the folder 9 holds step 8",
        "counter": "its state has seen 8 updates",
    }
    assert f"{workdir}/checkpoints/{number}: damaged, {words[damage]}" in texts
    assert "resumed from the checkpoint of step 4" in texts
    runs.assert_bitwise_equal(whole[0], workdir)


def test_a_stop_request_saves_and_returns(folder, whole, monkeypatch):
    config = runs.tiny(folder, run={"trigram": True, "sample_tokens": 4})
    workdir = folder / "stopped"
    evaluate = training._Training._evaluate

    def stop_during_evaluation(self, state):
        evaluate(self, state)
        self.stop.set()

    with monkeypatch.context() as patch:
        patch.setattr(training._Training, "_evaluate", stop_during_evaluation)
        assert training.run(config, workdir, verbose=False) == {
            "status": "stopped",
            "step": 6,
            "steps": 12,
        }
    assert training.run(config, workdir, verbose=False)["status"] == "finished"
    runs.assert_bitwise_equal(whole[0], workdir)


def test_another_configurations_folder_is_refused(folder, whole):
    other = runs.tiny(folder, run={"trigram": True}, optimizer={"learning_rate": 2e-2})
    message = (
        r"optimizer\.learning_rate=0\.02: .* holds a run with 0\.01; "
        r".*--config\.optimizer\.learning_rate=0\.01"
    )
    with pytest.raises(ConfigurationError, match=message):
        training.run(other, whole[0])
    watched = runs.tiny(folder, run={"trigram": True, "log_every": 7}, checkpoint={"keep": 5})
    assert training.run(watched, whole[0])["status"] == "finished"


def test_another_processes_folder_is_refused(folder, tmp_path):
    with (
        folders.locked(tmp_path),
        pytest.raises(ConfigurationError, match="another process trains here"),
    ):
        training.run(runs.tiny(folder), tmp_path)


@pytest.mark.parametrize(
    "sections, message",
    [
        ({"data": {"name": "./nowhere"}}, r"data\.name='\./nowhere': no such folder"),
        ({"data": {"name": "lm1b"}}, r"data\.name='lm1b' is not prepared"),
        (
            {"model": {"vocabulary_size": 100}},
            r"data\.tokenizer='bytes': has 259 tokens, the model 100; set",
        ),
        ({"optimizer": {"momentum": 0.5}}, r"optimizer\.momentum=0\.5: adamw has no such setting"),
    ],
    ids=["folder", "not prepared", "vocabulary", "setting"],
)
def test_what_cannot_run_is_refused_before_any_work(folder, tmp_path, sections, message):
    with pytest.raises(ConfigurationError, match=message):
        training.run(runs.tiny(folder, **sections), tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_devices_and_disk_are_checked(folder, monkeypatch, tmp_path):
    config = runs.tiny(folder, schedule={"accumulation": 2})
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    with pytest.raises(
        ConfigurationError,
        match=r"batch_size=4: .* 4 devices with schedule.accumulation=2; .* multiple of 8",
    ):
        folders.check_devices(config)
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1000))
    with pytest.raises(
        ConfigurationError, match=r"3 checkpoints take 2\.93 KiB, the disk has 1000 B left"
    ):
        folders.check_disk(tmp_path, {"w": np.zeros(250, np.float32)}, keep=2)
    folders.check_disk(tmp_path, {"w": np.zeros(250, np.float32)}, keep=0)


def test_data_that_changed_is_refused_on_resume(folder, monkeypatch, tmp_path):
    text = runs.write_text(tmp_path / "text")
    config = runs.tiny(tmp_path)
    with monkeypatch.context() as patch:
        crash_after(patch, 7)
        with pytest.raises(Crash):
            training.run(config, tmp_path / "run", verbose=False)
    (text / "0.txt").write_text("other words")
    with pytest.raises(
        ConfigurationError, match="its tokens changed since the checkpoint of step 4"
    ):
        training.run(config, tmp_path / "run", verbose=False)


def test_a_full_disk_does_not_stop_the_run_but_fails_the_final_save(
    folder, whole, monkeypatch, tmp_path
):
    config = runs.tiny(folder, run={"trigram": True, "sample_tokens": 4})
    save = checkpoint.Checkpoints.save
    full = {4}

    def sometimes_full(self, step, tree, extra=None):
        if step in full:
            self._fail(step, OSError(28, "No space left on device"))
            self._raise()
        save(self, step, tree, extra)

    monkeypatch.setattr(checkpoint.Checkpoints, "save", sometimes_full)
    training.run(config, tmp_path / "goes on", verbose=False)
    assert any(
        "disk is full" in text and "Training goes on" in text
        for text in runs.notes(tmp_path / "goes on")
    )
    runs.assert_bitwise_equal(whole[0], tmp_path / "goes on")
    full.add(12)
    with pytest.raises(checkpoint.DiskFullError, match="the last good step is 8"):
        training.run(config, tmp_path / "ends", verbose=False)


def poison(monkeypatch, bad, *, value=True):
    """NaN as the loss, or with value=False as its gradient alone, of updates whose number, from 0,
    satisfies `bad`."""
    make, sums = updates.step, updates.loss_sums

    def poisoned_step(loss, optimizer, accumulation):
        inner = make(loss, optimizer, accumulation)

        def update(state, batch):
            count = optax.tree.get(state["opt_state"], "steps_seen")
            return inner(state, batch | {"factor": jnp.where(bad(count), jnp.nan, 1.0)})

        return update

    def poisoned_sums(model, params, batch):
        loss, weight = sums(model, params, batch)
        factor = batch.get("factor", 1.0)
        root = jnp.sqrt(jnp.where(jnp.isnan(factor), 0.0, 1.0) + 0 * loss)
        return (loss * factor if value else loss + root - jax.lax.stop_gradient(root)), weight

    monkeypatch.setattr(training.optimizers, "build", counting(optimizers.build))
    monkeypatch.setattr(updates, "step", poisoned_step)
    monkeypatch.setattr(updates, "loss_sums", poisoned_sums)


def counting(build):
    """An optimizer that also counts calls in its state, so that a program can know the step."""

    def make(*args, **kwargs):
        optimizer = build(*args, **kwargs)

        def update(grads, state, params):
            moves, inner = optimizer.update(grads, state["inner"], params)
            return moves, {"steps_seen": state["steps_seen"] + 1, "inner": inner}

        init = lambda p: {"steps_seen": jnp.zeros((), jnp.int32), "inner": optimizer.init(p)}  # noqa: E731
        counted = ProjectionTransformation(init, update)
        counted.projection = getattr(optimizer, "projection", None)
        return counted

    return make


def test_a_skipped_update_is_noted_and_the_run_goes_on(folder, monkeypatch, tmp_path):
    poison(monkeypatch, lambda count: count == 4)
    config = runs.tiny(folder, optimizer={"name": "dct_adamw", "rank": 4})
    summary = training.run(config, tmp_path, verbose=False)
    assert (summary["status"], summary["skipped"]) == ("finished", 1)
    assert [text for text in runs.notes(tmp_path) if "skipped" in text] == [
        "update 5 was skipped: a gradient was not finite, or its norm above 1e12 (1 so far)"
    ]
    rows = {
        row["step"]: row
        for row in metrics.read(tmp_path / "metrics.jsonl")
        if row["kind"] == "train"
    }
    assert rows[5]["loss"] is None
    assert (rows[4]["skipped"], rows[5]["skipped"], rows[12]["skipped"]) == (0, 1, 1)
    assert rows[6]["loss"] is not None


def test_a_run_that_diverges_ends_and_keeps_the_last_good_checkpoint(folder, monkeypatch, tmp_path):
    poison(monkeypatch, lambda count: count >= 5)
    config = runs.tiny(folder, schedule={"steps": 40})
    summary = training.run(config, tmp_path, verbose=False)
    assert (summary["status"], summary["steps"]) == ("diverged", 15 + 1)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"4"}
    assert any("not finite after update 8: not saved" in text for text in runs.notes(tmp_path))


@pytest.mark.slow
def test_a_run_of_skipped_updates_ends_whatever_the_loss_is(folder, monkeypatch, tmp_path):
    poison(monkeypatch, lambda count: count >= 5, value=False)
    config = runs.tiny(folder, schedule={"steps": 40}, optimizer={"name": "dct_adamw", "rank": 4})
    summary = training.run(config, tmp_path, verbose=False)
    assert (summary["status"], summary["steps"], summary["skipped"]) == ("diverged", 15 + 1, 11)


def test_metrics_file_survives_a_line_cut_short(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = metrics.Metrics(path)
    for step in range(1, 6):
        writer.write("train", step=step, loss=jnp.float32(step), seconds=1.0, bad=float("nan"))
    writer.close()
    with open(path, "a") as file:
        file.write('{"kind": "train", "st')
    assert [row["step"] for row in metrics.read(path)] == [1, 2, 3, 4, 5]
    assert metrics.read(path)[0] == {
        "kind": "train",
        "step": 1,
        "loss": 1.0,
        "seconds": 1.0,
        "bad": None,
    }
    assert metrics.truncate(path, 3) == 2
    writer = metrics.Metrics(path)
    writer.write("train", step=4, loss=0.5)
    writer.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4]


def test_tensorboard_and_profile_are_written_on_request(folder, tmp_path):
    config = runs.tiny(folder, run={"tensorboard": True, "profile_steps": [3, 4]})
    training.run(config, tmp_path, verbose=False)
    assert list((tmp_path / "tensorboard").glob("events.*"))
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    assert any("profile of steps 3 to 4" in text for text in runs.notes(tmp_path))


def test_signals_set_the_flag_once_and_handlers_return():
    before = signal.getsignal(signal.SIGTERM)
    with folders.stop_flag(True) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.wait(5)
        assert signal.getsignal(signal.SIGTERM) == before  # a second one acts as ever
    with folders.stop_flag(False) as stop:
        assert isinstance(stop, threading.Event)
        assert signal.getsignal(signal.SIGTERM) == before
