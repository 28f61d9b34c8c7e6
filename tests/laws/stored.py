"""States as a user of the library saves them, that older versions wrote; numbers of trajectories.

    python -m tests.laws.stored states tests/checkpoints/state_N
    python -m tests.laws.stored fingerprints [ROW ...]

writes the states of the present version N of the optimizers' state, which stay as they are ever
after, or the fingerprints of new rows and of the named ones, whose numbers changed on purpose.

A state is what `flax.serialization.to_bytes` makes of it: names to arrays, all the way down.
"""

import functools
import json
import pathlib
import sys
from typing import Any

import jax
import numpy as np
from flax import serialization

import lowrank_jax as lrx
from lowrank_jax.projection import versions as versions_of_state
from tests.adapters import pair_methods
from tests.laws import adapters, methods

STATES, FINGERPRINTS = "states.msgpack", pathlib.Path(__file__).with_name("fingerprints.json")
SAVED = methods.STEPS // 2

# Beside the rows of the laws: storage that none of them has.
MORE = (
    methods.Method(
        name="galore-stored8",
        factory=lrx.galore,
        tolerance=2e-3,
        options={
            "learning_rate": 0.1,
            "rank": 4,
            "refresh_every": 2,
            "inner": lrx.inner.stored8(block=8, minimum=1),
        },
    ),
)
ROWS = (*methods.METHODS, *MORE)


def flat(tree: Any) -> dict[str, np.ndarray]:
    """{path: array} of nested names, or of any pytree."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in leaves
    }


def restored(saved: Any, like: Any) -> Any:
    """What was saved, in the structure of `like` and the present layout; every array must be there,
    of its shape and dtype."""
    return versions_of_state.upgraded(saved, like)


def versions() -> list[pathlib.Path]:
    """The folders of stored states, the oldest first."""
    return sorted((pathlib.Path(__file__).parents[1] / "checkpoints").glob("state_*"))


@functools.cache
def read(version: pathlib.Path) -> dict[str, Any]:
    """{"methods", "pairs", "adapters"}: {row: {"params", "state", "end"}}, of adapters {"train",
    "fixed", "kernels"}."""
    return serialization.msgpack_restore((version / STATES).read_bytes())


# What is done with a state: the first or the last steps of a trajectory.


def from_begin(method: methods.Method):
    """(parameters, state) after SAVED steps."""
    live = np.arange(methods.STEPS) < SAVED
    return methods.run(method, methods.gradients(), live)[0]


def to_end(method: methods.Method, params, state):
    """The parameters after all steps, from those after SAVED steps."""
    _, compiled, _ = methods.program(method)
    live = jax.numpy.arange(methods.STEPS) >= SAVED
    return compiled(methods.copy(params), methods.copy(state), methods.gradients(), live)[0][0]


@functools.cache
def pair_program(name: str):
    """(transformation, its compiled update) of an optimizer on pairs."""
    transformation = pair_methods.build(name)
    return transformation, jax.jit(transformation.update, compiler_options=methods.FAST_COMPILE)


def pair_steps(name: str, params, state, steps):
    """(parameters, state) after these steps."""
    _, update = pair_program(name)
    for step in steps:
        updates, state = update(methods.at(pair_methods.gradients(), step), state, params)
        params = jax.tree.map(jax.numpy.add, params, updates)
    return params, state


# Writing.


def write_states(version: pathlib.Path) -> None:
    """The states of all rows, into a folder of `versions()`."""
    found: dict[str, Any] = {"methods": {}, "pairs": {}, "adapters": {}}
    for method in ROWS:
        params, state = from_begin(method)
        end = to_end(method, params, state)
        found["methods"][method.name] = {"params": params, "state": state, "end": end}
    for name in pair_methods.METHODS:
        params = pair_methods.params_like()
        params, state = pair_steps(name, params, pair_program(name)[0].init(params), range(SAVED))
        end, _ = pair_steps(name, params, state, range(SAVED, pair_methods.STEPS))
        found["pairs"][name] = {"params": params, "state": state, "end": end}
    for row in adapters.ROWS:
        moved, kernels = adapters.moved(row), adapters.ran(row, "moved")["kernels"]
        found["adapters"][row.name] = {
            "train": moved.train,
            "fixed": moved.frozen,
            "kernels": kernels,
        }
    (version / STATES).write_bytes(serialization.to_bytes(found))


def fingerprint(method: methods.Method) -> dict[str, list[float]]:
    """{leaf: the norm of its displacement over all steps, and its first and its last entry}."""
    (params, _), _ = methods.trajectory(method)
    found = {}
    for path, (new, old) in flat_pairs(params, methods.params_like()).items():
        moved = (np.asarray(new, np.float64) - old).ravel()
        found[path] = [float(x) for x in (np.linalg.norm(moved), moved[0], moved[-1])]
    return found


def flat_pairs(a: Any, b: Any) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{path: the arrays of two trees}."""
    other = flat(b)
    return {path: (array, other[path]) for path, array in flat(a).items()}


def known_fingerprints() -> dict[str, Any]:
    """{row: its stored fingerprint}."""
    return json.loads(FINGERPRINTS.read_text())


def known_fingerprint(row: str) -> dict[str, list[float]]:
    """That of one row, which must have one."""
    known = known_fingerprints()
    if row not in known:
        raise LookupError(
            f"{FINGERPRINTS.name} has no row {row!r}: `python -m tests.laws.stored fingerprints` "
            "computes the missing ones"
        )
    return known[row]


def write_fingerprints(again: list[str]) -> None:
    """Those of the rows that have none, and of the named rows, which the table must have."""
    rows = [method.name for method in methods.METHODS]
    unknown = [name for name in again if name not in rows]
    if unknown:
        raise SystemExit(f"{unknown[0]!r} is no row: choose among {', '.join(rows)}")
    known = {name: numbers for name, numbers in known_fingerprints().items() if name not in again}
    found = {
        method.name: known.get(method.name) or fingerprint(method) for method in methods.METHODS
    }
    FINGERPRINTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    if command == "states":
        write_states(pathlib.Path(arguments[0]))
    else:
        write_fingerprints(arguments)
