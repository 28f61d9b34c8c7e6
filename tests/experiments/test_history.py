"""Runs that are extended, and runs that start from another: what is exact, what is refused, what is
recorded."""

import json
import shutil

import jax
import numpy as np
import pytest

from experiments.finetuning.task import Finetuning
from experiments.harness import history, training
from experiments.harness import runs as reading
from experiments.harness.tasks import Pretraining
from experiments.harness.workdir import claim
from experiments.reporting import page as report
from experiments.settings import configuration
from experiments.settings.sections import ConfigurationError
from tests.experiments import runs, tuning
from tests.experiments.test_training import Crash, crash_after

pytestmark = pytest.mark.slow

GALORE = {"name": "galore", "rank": 4, "projector": "power", "refresh_every": 3}
CONSTANT = {"steps": 8, "warmup_steps": 2, "final_fraction": 1.0}
EVALUATION = {"evaluate_every": 4, "evaluation_tokens": 128}


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
    folder = tmp_path_factory.mktemp("history")
    runs.write_text(folder / "text")
    training.run(config_of(folder), folder / "short", verbose=False)
    return folder


def config_of(folder, *, optimizer=None, schedule=None, run=None, **sections):
    own = {"optimizer": GALORE | (optimizer or {}), "schedule": CONSTANT | (schedule or {})}
    return runs.tiny(folder, **own, run=EVALUATION | (run or {}), **sections)


def copied(folder, name):
    shutil.copytree(folder / "short", folder / name)
    return folder / name


def test_more_steps_of_a_constant_schedule_are_the_longer_run(folder):
    longer, workdir = config_of(folder, schedule={"steps": 12}), copied(folder, "more")
    with pytest.raises(
        ConfigurationError, match=r"schedule\.steps=12: .* holds a run with 8; .*--extend to go on"
    ):
        training.run(longer, workdir, verbose=False)
    assert training.run(longer, workdir, verbose=False, extend=True)["steps"] == 12
    training.run(longer, folder / "long", verbose=False)
    runs.assert_bitwise_equal(folder / "long", workdir)
    [entry] = reading.read_history(workdir)
    assert (entry["step"], entry["changed"]) == (8, {"schedule.steps": [8, 12]})
    assert entry["before"]["validation_loss"] == runs.losses(workdir)[1][8]
    assert not reading.read_history(folder / "long")
    page = report.write([workdir], folder / "report").read_text()
    loss = runs.losses(workdir)[1][8]
    assert (
        f"extended after update 8: schedule.steps 8 -&gt; 12 (validation loss {loss:.4f} before)"
        in page
    )
    # the run is now the longer one: asked for again, it is over, and its old configuration is
    # another one's
    assert training.run(longer, workdir, verbose=False, extend=True)["steps"] == 12
    with pytest.raises(
        ConfigurationError, match=r"schedule\.steps=8: the run has done 12 updates; give more"
    ):
        training.run(config_of(folder), workdir, verbose=False, extend=True)


def test_another_rate_and_period_and_a_crash_in_the_extension(folder, monkeypatch):
    changed = {"optimizer": {"learning_rate": 3e-2, "refresh_every": 2}, "schedule": {"steps": 16}}
    config = config_of(folder, **changed)
    whole, broken = copied(folder, "whole"), copied(folder, "broken")
    training.run(config, whole, verbose=False, extend=True)
    with monkeypatch.context() as patch:
        crash_after(patch, 14)
        with pytest.raises(Crash):
            training.run(config, broken, verbose=False, extend=True)
    assert training.run(config, broken, verbose=False)["status"] == "finished"  # it is that run now
    runs.assert_bitwise_equal(whole, broken)
    assert reading.read_history(whole) == reading.read_history(broken)
    before, after = runs.losses(folder / "short")[0], runs.losses(whole)[0]
    assert before.items() <= after.items()
    assert max(after) == 16
    rates = [row["learning_rate"] for row in reading.read_run(whole).train]
    assert rates[7:9] == pytest.approx([1e-2, 3e-2])


def test_an_extension_that_died_while_it_was_noted_can_be_repeated(folder, monkeypatch):
    config, workdir = config_of(folder, schedule={"steps": 12}), copied(folder, "noted")
    with monkeypatch.context() as patch:
        patch.setattr(training.folder, "as_json", lambda config: 1 / 0)
        patch.setattr(training.folder, "check_processes", lambda *given: None)
        patch.setattr(
            training.folder, "claim", lambda *given, **more: (None, {"schedule.steps": [8, 12]})
        )
        patch.setattr(training.checkpoint, "digest", lambda value: "")
        with pytest.raises(ZeroDivisionError):
            training.run(config, workdir, verbose=False, extend=True)
    training.run(config, workdir, verbose=False, extend=True)
    [entry] = reading.read_history(workdir)
    assert entry["changed"] == {"schedule.steps": [8, 12]}


def test_what_is_no_extension_is_refused_and_nothing_is_touched(folder):
    workdir = folder / "short"
    texts = {name: (workdir / name).read_text() for name in ("config.json", "summary.json")}
    for sections, message in (
        (
            {"optimizer": {"rank": 8}},
            r"optimizer\.rank=8: .*holds a run with 4; give another --workdir, or",
        ),
        ({"run": {"seed": 1}}, r"run\.seed=1"),
        (
            {"optimizer": {"learning_rate": 0.1}},
            r"schedule\.steps=8: the run has done 8 updates; give more",
        ),
    ):
        with pytest.raises(ConfigurationError, match=message):
            training.run(config_of(folder, **sections), workdir, verbose=False, extend=True)
    assert texts == {name: (workdir / name).read_text() for name in texts}
    assert not (workdir / "history.json").exists()


def test_a_change_that_needs_another_state_is_refused(folder):
    plain = runs.tiny(folder, optimizer={"name": "sgd"}, schedule={"steps": 2}, run=EVALUATION)
    training.run(plain, folder / "sgd", verbose=False)
    moving = runs.tiny(
        folder, optimizer={"name": "sgd", "momentum": 0.9}, schedule={"steps": 4}, run=EVALUATION
    )
    message = (
        r"optimizer\.momentum, schedule\.steps: under the new value .*start_from=.*sgd and another "
        r"--workdir"
    )
    with pytest.raises(ConfigurationError, match=message):
        training.run(moving, folder / "sgd", verbose=False, extend=True)
    assert claim(plain, folder / "sgd")[0]["steps"] == 2


def started(folder, with_, source="short", task=Pretraining, config=None):
    """(the arrays of the run that is started from, the new state's, the fresh one's), by path."""
    start = {"start_from": str(folder / source), "start_with": with_}
    config = config_of(folder, run=start) if config is None else config
    made = task(config)
    fresh = made.initial()
    entry, state = history.started(config.run, made, fresh, print)
    assert entry["step"] in (8, 12)

    def flat(tree):
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        plain = {
            path: jax.random.key_data(leaf) if path[0].key == "key" else leaf
            for path, leaf in leaves
        }
        name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")  # noqa: E731
        return {name(path): np.asarray(leaf) for path, leaf in plain.items()}

    return runs.final_arrays(folder / source)[1], flat(state), flat(fresh)


def test_parameters_of_another_run_and_an_optimizer_that_knows_nothing(folder):
    there, here, fresh = started(folder, None)
    for path, array in here.items():
        expected = there[path] if path.startswith("params/") else fresh[path]
        np.testing.assert_array_equal(array, expected, err_msg=path)
    assert any((there[path] != fresh[path]).any() for path in here if path.startswith("params/"))


def test_state_of_another_run_with_a_schedule_from_its_beginning(folder):
    there, here, _ = started(folder, "state")
    begun = [path for path in here if path.endswith(("rate/count", "/skipped", "/partly_skipped"))]
    assert len(begun) == 3
    for path, array in here.items():
        np.testing.assert_array_equal(array, 0 if path in begun else there[path], err_msg=path)
    assert any(there[path] for path in begun)


@pytest.mark.parametrize("with_", ["parameters", "state"])
def test_a_new_run_records_what_it_started_from(folder, with_):
    config = config_of(
        folder,
        schedule={"steps": 3},
        run={"start_from": str(folder / "short"), "start_with": with_},
    )
    workdir = folder / f"from {with_}"
    training.run(config, workdir, verbose=False)
    [entry] = reading.read_history(workdir)
    what = "parameters and state" if with_ == "state" else with_
    assert entry == {"started_from": str(folder / "short"), "step": 8, "with": what}
    assert json.loads((workdir / "config.json").read_text())["run"]["start_from"] == str(
        folder / "short"
    )
    # it goes on from where the other ended, on its own first batch
    first = reading.read_run(workdir).train[0]
    assert first["loss"] < reading.read_run(folder / "short").train[0]["loss"]
    assert first["learning_rate"] == 0.0
    assert "started from" in " ".join(runs.notes(workdir))


@pytest.mark.parametrize(
    "sections, message",
    [
        ({"run": {"start_from": "{}/nothing"}}, r"run\.start_from='.*nothing': holds no checkpoints; name the folder"),
        ({"run": {"start_from": "{}/short"}, "model": {"width": 32}}, r"leaf params/embed/embedding is"),
        ({"run": {"start_from": "{}/short"}, "model": {"heads": 4, "kv_heads": 2}},
         r"was written with model\.(kv_)?heads="),
        ({"run": {"start_from": "{}/short", "start_with": "state"}, "optimizer": {"rank": 8}},
         r"leaf opt_state.*run\.start_with='parameters' takes the parameters alone"),
    ],
)  # fmt: skip
def test_what_a_run_cannot_start_from(folder, tmp_path, sections, message):
    sections = sections | {
        "run": {key: value.format(folder) for key, value in sections["run"].items()}
    }
    with pytest.raises(ConfigurationError, match=message):
        training.run(config_of(folder, **sections), tmp_path / "run", verbose=False)
    assert not (tmp_path / "run" / "config.json").exists()


def test_start_with_needs_a_run():
    with pytest.raises(
        ConfigurationError, match=r"run\.start_with='state': names what run\.start_from gives"
    ):
        configuration.from_dict({"run": {"start_with": "state"}})


def test_adapters_are_extended_and_started_from(tmp_path):
    tuning.pretrained(tmp_path)
    config = tuning.tiny(tmp_path, run=EVALUATION)
    tuning.run(config, tmp_path / "first")
    start = {"start_from": str(tmp_path / "first")}
    there, here, fresh = started(
        tmp_path,
        None,
        "first",
        Finetuning,
        tuning.tiny(tmp_path, run=EVALUATION | start, schedule={"steps": 2}),
    )
    for path, array in here.items():
        expected = there[path] if path.startswith(("params/", "fixed/")) else fresh[path]
        np.testing.assert_array_equal(array, expected, err_msg=path)
    longer = tuning.tiny(
        tmp_path, run=EVALUATION, schedule={"steps": 16}, optimizer={"learning_rate": 3e-3}
    )
    summary = training.run(longer, tmp_path / "first", task=Finetuning, verbose=False, extend=True)
    assert summary["steps"] == 16
    [entry] = reading.read_history(tmp_path / "first")
    assert entry["changed"] == {"optimizer.learning_rate": [1e-2, 3e-3], "schedule.steps": [12, 16]}
    other = tuning.tiny(tmp_path, base={"source": str(tmp_path / "first")}, run=EVALUATION | start)
    with pytest.raises(
        ConfigurationError, match=r"its adapters belong to another base than base\.source"
    ):
        tuning.run(other, tmp_path / "other")
