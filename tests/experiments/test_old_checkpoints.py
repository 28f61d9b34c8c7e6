"""Run folders of older versions load, train on, and give the losses that their own version gave."""

import json

import numpy as np
import pytest

from experiments.settings import configuration, finetuning_configuration
from lowrank_jax.adapters.versions import present_path
from tests.experiments import old_checkpoints as old
from tests.experiments import runs

FAST = ("dct_adamw",)
RUNS = [(version, name) for version in old.versions() for name in old.expected(version)]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """The runs of each version, unpacked once: every test goes on with a run of its own."""
    folders = {}

    def of(version):
        if version not in folders:
            folders[version] = tmp_path_factory.mktemp(version.name)
            old.unpack(version, folders[version])
        return folders[version]

    return of


def assert_as_expected(workdir, known):
    """Losses within 1e-5; norms and weighted sums of parameters within 2e-5 of the norm."""
    found = old.figures(workdir)
    assert found["step"] == known["step"] == old.STEPS
    for kind in ("losses", "evaluations"):
        assert found[kind].keys() == known[kind].keys()
        np.testing.assert_allclose(
            [*found[kind].values()], [*known[kind].values()], rtol=1e-5, err_msg=kind
        )
    wanted = {present_path(path): numbers for path, numbers in known["parameters"].items()}
    assert found["parameters"].keys() == wanted.keys()
    for path, numbers in wanted.items():
        np.testing.assert_allclose(
            found["parameters"][path], numbers, rtol=0, atol=2e-5 * numbers[0], err_msg=path
        )


@pytest.mark.parametrize(
    "version, name",
    [
        pytest.param(
            version,
            name,
            id=f"{version.name}-{name}",
            marks=() if name in FAST else pytest.mark.slow,
        )
        for version, name in RUNS
    ],
)
def test_an_old_run_goes_on_as_it_did(unpacked, version, name):
    folder = unpacked(version)
    assert old.resume(folder, name)["status"] == "finished"
    assert any(
        text.startswith(f"resumed from the checkpoint of step {old.SAVED};")
        for text in runs.notes(folder / name)
    )
    assert_as_expected(folder / name, old.expected(version)[name])


def test_another_loss_or_parameter_is_noticed(monkeypatch):
    version, name = next((version, name) for version, name in RUNS if name in FAST)
    known = old.expected(version)[name]
    monkeypatch.setattr(old, "figures", lambda workdir: known)
    assert_as_expected(None, known)
    for change in (
        {
            "losses": known["losses"]
            | {str(old.STEPS): known["losses"][str(old.STEPS)] * (1 + 2e-5)}
        },
        {
            "parameters": {
                path: [norm, total + 4e-5 * norm]
                for path, (norm, total) in known["parameters"].items()
            }
        },
        {"parameters": dict(list(known["parameters"].items())[1:])},
    ):
        with pytest.raises(AssertionError):
            assert_as_expected(None, json.loads(json.dumps(known | change)))


def test_what_the_writer_asks_for_are_configurations():
    for values in (*old.BASES.values(), *old.PRETRAINED.values()):
        configuration.from_dict(values)
    for values in old.TUNED.values():
        finetuning_configuration.from_dict(values)
