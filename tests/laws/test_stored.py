"""The law of what is stored: old states go on as they did, trajectories stay what they were."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.adapters import pair_methods
from tests.laws import adapters, stored
from tests.laws import methods as m

METHODS = {method.name: method for method in stored.ROWS}
ADAPTERS = {row.name: row for row in adapters.ROWS}
FAST = {
    "methods": [name for name, method in METHODS.items() if method.fast],
    "pairs": pair_methods.FAST,
    "adapters": [name for name, row in ADAPTERS.items() if row.fast],
}


def every_stored(kind):
    """Each row of each version; a row that is not fast is marked slow."""
    return pytest.mark.parametrize(
        "version, name",
        [
            pytest.param(
                version,
                name,
                id=f"{version.name}-{name}",
                marks=() if name in FAST[kind] else pytest.mark.slow,
            )
            for version in stored.versions()
            for name in stored.read(version)[kind]
        ],
    )


@every_stored("methods")
def test_an_old_state_goes_on_as_it_did(version, name):
    saved, method = stored.read(version)["methods"][name], METHODS[name]
    params = stored.restored(saved["params"], m.params_like())
    state = stored.restored(saved["state"], jax.eval_shape(m.program(method)[0].init, params))
    assert int(m.projection_state(state).step) > 0
    m.assert_close(stored.to_end(method, params, state), saved["end"], method.tolerance)


@every_stored("pairs")
def test_an_old_state_of_pairs_goes_on_as_it_did(version, name):
    saved = stored.read(version)["pairs"][name]
    params = stored.restored(saved["params"], pair_methods.params_like())
    state = stored.restored(
        saved["state"], jax.eval_shape(stored.pair_program(name)[0].init, params)
    )
    end, _ = stored.pair_steps(name, params, state, range(stored.SAVED, pair_methods.STEPS))
    m.assert_close(end, saved["end"], 1e-4)


@every_stored("adapters")
def test_old_adapters_mean_what_they_did(version, name):
    saved, row = stored.read(version)["adapters"][name], ADAPTERS[name]
    like = adapters.start(row)
    train, fixed = (
        stored.restored(saved["train"], like.train),
        stored.restored(saved["fixed"], like.frozen),
    )
    found = adapters.program(row)(
        adapters.params(), like.replace(train=train, frozen=fixed), adapters.inputs()
    )
    m.assert_close(found["kernels"], saved["kernels"], 1e-5)


COMMAND = "python -m tests.laws.stored fingerprints"


def test_every_row_has_a_fingerprint_and_no_other():
    """The command writes them in the order of the table."""
    rows, known = [method.name for method in m.METHODS], [*stored.known_fingerprints()]
    missing, gone = set(rows) - set(known), set(known) - set(rows)
    assert rows == known, f"missing: {missing}, no row: {gone}; run `{COMMAND}`"


def test_a_row_without_a_fingerprint_is_told_the_command(tmp_path, monkeypatch):
    """Which computes the missing ones, keeps the others, and drops those of rows that are gone."""
    file, (first, second, *_) = tmp_path / "fingerprints.json", m.METHODS
    monkeypatch.setattr(stored, "FINGERPRINTS", file)
    monkeypatch.setattr(m, "METHODS", (first, second))
    file.write_text(json.dumps({first.name: {"kept": [1.0]}, "gone": {}}))
    with pytest.raises(LookupError, match=f"no row {second.name!r}: `{COMMAND}`"):
        stored.known_fingerprint(second.name)
    stored.write_fingerprints([])
    assert [*stored.known_fingerprints()] == [first.name, second.name]
    assert stored.known_fingerprint(first.name) == {"kept": [1.0]}
    np.testing.assert_allclose(
        stored.known_fingerprint(second.name)["dense/kernel"],
        stored.fingerprint(second)["dense/kernel"],
    )
    with pytest.raises(SystemExit, match="'galroe' is no row"):
        stored.write_fingerprints(["galroe"])


@m.every_method()
def test_the_trajectory_is_what_it_was(method):
    known = stored.known_fingerprint(method.name)
    found = stored.fingerprint(method)
    assert found.keys() == known.keys()
    for path, numbers in known.items():
        size = max(1.0, numbers[0])
        np.testing.assert_allclose(
            found[path],
            numbers,
            rtol=10 * method.tolerance,
            atol=method.tolerance * size,
            err_msg=path,
        )


def test_a_state_that_lacks_an_array_is_refused():
    like = {"a": jnp.ones(2), "b": jnp.ones(3)}
    with pytest.raises(ValueError, match="saved: 'b' is None"):
        stored.restored({"a": np.ones(2, np.float32)}, like)
    with pytest.raises(ValueError, match="saved: 'b' is .*4.*has .*3"):
        stored.restored({"a": np.ones(2, np.float32), "b": np.ones(4, np.float32)}, like)
    with pytest.raises(ValueError, match="saved: 'c' has no place"):
        stored.restored({name: np.ones(2, np.float32) for name in "abc"}, like)
