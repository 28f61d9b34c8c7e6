"""What older versions called things: states in an older format and configurations with older keys
are read as the present ones."""

import dataclasses
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.harness import manifest, versions, workdir
from experiments.harness.checkpoint import Checkpoints, MismatchError
from experiments.harness.versions import Change, Copy, Key
from experiments.settings import configuration, finetuning_configuration
from tests.experiments import runs
from tests.experiments.commands import ENVIRONMENT
from tests.experiments.runs import ROOT

# Two steps of a format: what a field of each kind of change comes to.
FIRST = Change(
    kind="projection",
    version=versions.CURRENT["projection"],
    renamed=((r"(.*)/schedule/count", r"\1/rate/count"), (r"(.*)/basis", r"\1/subspace")),
    removed=(r".*/unused",),
    filled=((r"(.*)/memory", 0.5), (r"(.*)/clock", Copy(r"\1/step"))),
)
SECOND = Change(
    kind="projection",
    version=versions.CURRENT["projection"] + 1,
    renamed=((r"(.*)/subspace", r"\1/frame"),),
    filled=((r"(.*)/seen", Copy(r"\1/clock")),),
)
KIND = {"projection": versions.CURRENT["projection"]}


def old_tree():
    matrix = {"basis": jnp.arange(6.0).reshape(2, 3), "unused": jnp.ones(2)}
    state = {
        "format_version": jnp.asarray(KIND["projection"], jnp.int32),
        "step": jnp.asarray(7, jnp.int32),
        "refreshes": jnp.asarray(2, jnp.int32),
        "schedule": {"count": jnp.asarray(9, jnp.int32)},
        "matrices": {"kernel": matrix},
    }
    return {"params": {"kernel": jnp.ones((2, 4))}, "opt_state": state}


def new_tree():
    """The same state in the format after SECOND, with other numbers."""
    state = {
        "format_version": jnp.asarray(KIND["projection"] + 2, jnp.int32),
        "step": jnp.asarray(0, jnp.int32),
        "clock": jnp.asarray(0, jnp.int32),
        "seen": jnp.asarray([0, 0], jnp.int32),
        "refreshes": jnp.asarray(0, jnp.int32),
        "rate": {"count": jnp.asarray(0, jnp.int32)},
        "matrices": {"kernel": {"frame": jnp.zeros((2, 3)), "memory": jnp.zeros((2, 2))}},
    }
    return {"params": {"kernel": jnp.zeros((2, 4))}, "opt_state": state}


@pytest.fixture
def raised(monkeypatch):
    """A library whose states are two formats on."""
    monkeypatch.setattr(versions, "CHANGES", (FIRST, SECOND))
    monkeypatch.setitem(versions.CURRENT, "projection", KIND["projection"] + 2)


@pytest.fixture
def saved(tmp_path):
    """A checkpoint of this version."""
    store = Checkpoints(tmp_path / "checkpoints")
    store.save(7, old_tree(), {"tokens": 3})
    store.wait()
    yield store
    store.close()


def abstract(tree):
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
    )


def assert_is_the_old_state(state):
    matrix = state["matrices"]["kernel"]
    np.testing.assert_array_equal(matrix["frame"], np.arange(6.0).reshape(2, 3))
    np.testing.assert_array_equal(matrix["memory"], np.full((2, 2), 0.5))
    np.testing.assert_array_equal(state["seen"], [7, 7])
    assert int(state["step"]) == int(state["clock"]) == 7
    assert int(state["rate"]["count"]) == 9
    assert int(state["format_version"]) == KIND["projection"] + 2


def test_a_manifest_names_the_formats(saved):
    values = manifest.read(saved.directory / "7")
    assert values["states"] == versions.CURRENT
    assert values["format"] == 1


def test_an_older_state_is_restored_as_the_present_one(saved, raised):
    restored = saved.restore(abstract(new_tree()))
    assert (restored.step, restored.extra) == (7, {"tokens": 3})
    assert_is_the_old_state(restored.tree["opt_state"])
    np.testing.assert_array_equal(restored.tree["params"]["kernel"], np.ones((2, 4)))


def test_parameters_alone_need_no_map(saved, raised):
    params = {"params": new_tree()["params"]}
    tree = saved.restore(abstract(params), partial=True).tree
    np.testing.assert_array_equal(tree["params"]["kernel"], np.ones((2, 4)))


def test_a_step_between_the_two(saved, monkeypatch):
    """A checkpoint of the format in the middle is read by the second change alone."""
    monkeypatch.setattr(versions, "CHANGES", (FIRST,))
    monkeypatch.setitem(versions.CURRENT, "projection", KIND["projection"] + 1)
    like = new_tree()
    state, matrix = like["opt_state"], like["opt_state"]["matrices"]["kernel"]
    matrix["subspace"] = matrix.pop("frame")
    del state["seen"]
    middle = saved.restore(abstract(like)).tree
    assert int(middle["opt_state"]["format_version"]) == KIND["projection"] + 1
    saved.save(8, middle)
    saved.wait()
    monkeypatch.setattr(versions, "CHANGES", (FIRST, SECOND))
    monkeypatch.setitem(versions.CURRENT, "projection", KIND["projection"] + 2)
    restored = saved.restore(abstract(new_tree()))
    assert restored.step == 8
    assert_is_the_old_state(restored.tree["opt_state"])


@pytest.mark.parametrize(
    "change, message",
    [
        (dataclasses.replace(FIRST, filled=FIRST.filled[1:]), "leaf opt_state/matrices/kernel/mem"),
        (
            dataclasses.replace(FIRST, removed=()),
            "leaf opt_state/matrices/kernel/unused is float32",
        ),
        (dataclasses.replace(FIRST, renamed=FIRST.renamed[1:]), "leaf opt_state/rate/count is abs"),
    ],
)
def test_a_table_that_forgets_a_field_is_refused(saved, raised, monkeypatch, change, message):
    monkeypatch.setattr(versions, "CHANGES", (change, SECOND))
    with pytest.raises(MismatchError, match=message):
        saved.restore(abstract(new_tree()))


def test_without_a_table_another_format_is_another_optimizer(saved):
    with pytest.raises(MismatchError, match="belongs to another model or optimizer"):
        saved.restore(abstract(new_tree()))


def test_a_newer_state_is_refused_by_name(saved, monkeypatch):
    monkeypatch.setitem(versions.CURRENT, "projection", KIND["projection"] - 1)
    with pytest.raises(MismatchError, match="holds projection states of format"):
        saved.restore(abstract(old_tree()))
    assert saved.restore(abstract({"params": old_tree()["params"]}), partial=True).step == 7


def test_a_state_of_pairs_keeps_its_own_format(raised):
    stored = {"opt_state/format_version": 1, "opt_state/step": 3}
    translated = versions.translation(stored, {"projection": KIND["projection"], "pairs": 1})
    like = {path: jax.ShapeDtypeStruct((), jnp.int32) for path in stored}
    found = translated.tree(lambda wanted: {path: stored[path] for path in wanted}, like)
    assert int(found["opt_state/format_version"]) == versions.CURRENT["pairs"]


def test_a_manifest_without_formats_is_of_the_first_ones_that_there_were():
    change = Change(kind="projection", version=2, renamed=(("a", "b"),))
    assert versions.translation(["a"], None, (change,)).sources == {"b": "a"}
    assert versions.translation(["a"], {"projection": 3}, (change,)) is None


# ------------------------------------------------------------------------------- configurations


@pytest.fixture
def renamed(monkeypatch):
    """Keys that older versions called otherwise, one of them with other values."""
    keys = (
        Key(section="optimizer", old="period", new="refresh_every"),
        Key(
            section="run",
            old="begin_with",
            new="start_with",
            values=(("weights", "parameters"), ("all", "state")),
        ),
    )
    monkeypatch.setattr(versions, "KEYS", keys)


OLD = {
    "optimizer": {"name": "galore", "rank": 4, "period": 9},
    "run": {"start_from": "runs/x", "begin_with": "weights"},
}


@pytest.mark.parametrize("settings", [configuration, finetuning_configuration])
def test_an_old_key_works_and_says_what_it_is_now(renamed, settings):
    values = OLD | ({} if settings is configuration else {"adapter": {"method": ""}})
    with pytest.warns(DeprecationWarning, match=r"optimizer\.|run\.") as caught:
        config = settings.from_dict(values)
    assert (config.optimizer.refresh_every, config.run.start_with) == (9, "parameters")
    assert [str(one.message).split(";")[0] for one in caught] == [
        "optimizer.period is optimizer.refresh_every now",
        "run.begin_with is run.start_with now",
    ]
    assert {one.filename for one in caught} == {__file__}


def test_an_old_run_is_the_same_run_under_present_keys(renamed, tmp_path):
    config = runs.tiny(tmp_path, optimizer={"name": "galore", "rank": 4, "refresh_every": 9})
    values = workdir.as_json(config)
    values["optimizer"]["period"] = values["optimizer"].pop("refresh_every")
    workdir.write_files(tmp_path, {"config.json": values})
    assert workdir.read_config(tmp_path)["optimizer"]["refresh_every"] == 9
    assert workdir.claim(config, tmp_path) == (None, {})


def test_meanings_of_a_checkpoint_are_compared_by_present_keys(renamed, tmp_path):
    tree = {"params": {"kernel": jnp.ones(3)}}

    def store(meaning):
        return Checkpoints(tmp_path / "checkpoints", meaning={"optimizer": meaning})

    first = store({"period": 9})
    first.save(1, tree)
    first.close()
    same, other = store({"refresh_every": 9}), store({"refresh_every": 8})
    assert same.restore(abstract(tree)).step == 1
    with pytest.raises(MismatchError, match=r"optimizer\.refresh_every=9"):
        other.restore(abstract(tree))
    same.close()
    other.close()


FILE = """
from experiments.settings import configuration

def get_config():
    config = configuration.template()
    config.optimizer.name, config.optimizer.rank = "galore", 4
    config.optimizer.period = 9
    return config
"""
PROGRAM = """
import sys
from experiments.harness import versions
versions.KEYS = (versions.Key(section="optimizer", old="period", new="refresh_every"),)
from experiments.settings import arguments, configuration
arguments.parser(configuration, sys.argv[1].partition("=")[2])(sys.argv)
config, notes = arguments.configured(configuration)
print(config.optimizer.refresh_every, notes)
"""


@pytest.mark.parametrize(
    "words, period",
    [([], 9), (["--config.optimizer.period=5"], 5), (["--config.optimizer.refresh_every=6"], 6)],
)
def test_files_and_flags_may_use_old_keys(tmp_path, words, period):
    """A flag wins over a file, whichever names the two use."""
    (tmp_path / "config.py").write_text(FILE)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, f"--config={tmp_path}/config.py", *words],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=os.environ | ENVIRONMENT,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{period} ['optimizer.period is optimizer.refresh_every now")
