"""The public surface is the list in WORKSPACE.md: one address a thing, and `dir` shows nothing else."""

import inspect
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

import lowrank_jax as lrx

ROOT = Path(__file__).parents[2]


def listed() -> dict[str, set[str]]:
    """The table of WORKSPACE.md: {kind: names}."""
    text = (ROOT / "WORKSPACE.md").read_text().partition("## Public surface")[2]
    rows = re.findall(r"^\| ([a-z ]+) \| (`.+) \|$", text.partition("\n## ")[0], flags=re.MULTILINE)
    return {kind: set(re.findall(r"`(\w+)`", names)) for kind, names in rows}


KINDS = listed()


def rooms() -> dict[str, types.ModuleType]:
    """Every public module by its address, those within others too."""
    found = {f"lrx.{name}": getattr(lrx, name) for name in sorted(KINDS["rooms"])}
    for address, room in list(found.items()):
        inside = {f"{address}.{name}": getattr(room, name) for name in room.__all__}
        found |= {name: value for name, value in inside.items() if inspect.ismodule(value)}
    return found


ROOMS = rooms()

# One function by the names of its two uses.
SAME = [["lrx.adapted", "lrx.tapped"]]


def test_the_top_is_what_the_workspace_lists():
    assert set(KINDS) == {"verbs", "types", "named optimizers", "rooms"}
    names = set().union(*KINDS.values())
    assert set(dir(lrx)) - {"__version__"} == set(lrx.__all__) - {"__version__"} == names
    assert sum(map(len, KINDS.values())) == len(names)
    assert len(KINDS["verbs"] | KINDS["types"]) <= 25


def test_each_name_is_of_its_kind():
    for name in KINDS["types"]:
        assert inspect.isclass(getattr(lrx, name)), name
    for name in KINDS["verbs"] | KINDS["named optimizers"]:
        assert inspect.isfunction(getattr(lrx, name)), name
    for name in KINDS["rooms"]:
        assert inspect.ismodule(getattr(lrx, name)), name


@pytest.mark.parametrize("address", ROOMS)
def test_a_room_shows_what_is_public_and_nothing_else(address):
    room = ROOMS[address]
    assert dir(room) == sorted(set(room.__all__))
    assert all(hasattr(room, name) and not name.startswith("_") for name in room.__all__)


def test_what_a_method_written_outside_needs_is_public():
    line = (ROOT / "WORKSPACE.md").read_text().partition("A method written outside")[2]
    addresses = re.findall(r"`lrx\.(\w+)\.(\w+)`", line.partition("\n\n")[0])
    assert len(addresses) >= 18
    for room, name in addresses:
        assert name in getattr(lrx, room).__all__, (room, name)


def test_each_thing_has_one_address():
    addresses: dict[int, list[str]] = {}
    for place, room in {"lrx": lrx, **ROOMS}.items():
        for name in room.__all__:
            value = getattr(room, name)
            if callable(value) or inspect.ismodule(value):
                addresses.setdefault(id(value), []).append(f"{place}.{name}")
    assert [found for found in addresses.values() if len(found) > 1] == SAME


def test_families_stand_in_adapters_alone():
    families = {
        name
        for name in lrx.adapters.__all__
        if inspect.isclass(value := getattr(lrx.adapters, name))
        and issubclass(value, lrx.adapters.Adapter)
        and value is not lrx.adapters.Adapter
    }
    assert {"lora", "dora", "oft", "vera"} <= families and not families & set(lrx.__all__)


@pytest.mark.slow
def test_completion_offers_rooms_that_are_not_imported_yet():
    code = (
        "import sys, lowrank_jax as lrx; assert 'nnx' in dir(lrx); print('flax.nnx' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
