"""Old public names work, warn with the new name, and stand in CHANGELOG.md."""

import contextlib
import dataclasses
import inspect
import re
from pathlib import Path

import pytest

from lowrank_jax import deprecations

ROOT = Path(__file__).parents[2]
OPTIONS = [(row, function) for row in deprecations.OPTIONS for function in row.functions]


def changelog() -> set[tuple[str, str]]:
    text = (ROOT / "CHANGELOG.md").read_text()
    found = re.findall(r"^\| (.+?) +\| (.+?) +\|$", text, flags=re.MULTILINE)
    return set(found) - {("old", "new")}


def test_the_changelog_shows_every_row():
    names = {
        (f"`{row.address}`", f"`{row.new}`" if "." in row.new else f"`{row.module}.{row.new}`")
        for row in deprecations.NAMES
    }
    options = set()
    for row in deprecations.OPTIONS:
        old_values, new_values = zip(*row.values, strict=True) if row.values else ((), ())
        functions = ", ".join(f"`{name}`" for name in row.functions)
        options.add(
            (f"`{_said(row.old, old_values)}` of {functions}", f"`{_said(row.new, new_values)}`")
        )
    assert changelog() == names | options


def _said(option, values):
    return f"{option}=" + " or ".join(repr(value).replace("'", '"') for value in values)


@pytest.mark.parametrize("row", deprecations.NAMES, ids=lambda row: row.address)
def test_an_old_name_is_the_new_one_and_says_so(row):
    owner = deprecations.find(row.module)
    if inspect.isclass(owner):  # read from an instance, which only its own tests can make
        assert isinstance(inspect.getattr_static(owner, row.old), property)
        fields = (
            {f.name for f in dataclasses.fields(owner)} if dataclasses.is_dataclass(owner) else ()
        )
        assert row.new in fields or hasattr(owner, row.new)
        return
    with pytest.warns(DeprecationWarning, match=re.escape(f"use {row.new}")) as caught:
        old = getattr(owner, row.old)
    assert old is deprecations.find(row.new)
    assert {warning.filename for warning in caught} == {__file__}
    assert row.old not in getattr(owner, "__all__", ()) and row.old not in dir(owner)


@pytest.mark.parametrize(("row", "function"), OPTIONS, ids=lambda value: str(value)[:40])
def test_an_old_option_is_taken_and_says_so(row, function):
    taken = deprecations.find(function)
    parameters = inspect.signature(taken).parameters
    assert row.new in parameters and row.old not in parameters
    value = row.values[0][0] if row.values else None
    with (
        pytest.warns(DeprecationWarning, match=re.escape(f"use {row.new}=")),
        contextlib.suppress(Exception),  # what else it needs is not given
    ):
        taken(**{row.old: value})
    with pytest.raises(TypeError, match=f"drop {row.old}="):
        taken(**{row.old: value, row.new: value})


def option(monkeypatch, decorated):
    row = deprecations.Option(
        functions=("lrx.f",), old="products", new="implementation", values=(("kernel", "pallas"),)
    )
    monkeypatch.setattr(deprecations, "OPTIONS", (row,))
    return deprecations.options("lrx.f")(decorated)


def test_an_option_of_a_function(monkeypatch):
    def f(x, *, implementation="xla"):
        return x, implementation

    new = option(monkeypatch, f)
    assert new(1) == (1, "xla") and new(1, implementation="kernel") == (1, "kernel")
    with pytest.warns(DeprecationWarning, match="products= of lrx.f is deprecated") as caught:
        assert new(1, products="kernel") == (1, "pallas")
    assert caught[0].filename == __file__
    assert list(inspect.signature(new).parameters) == ["x", "implementation"]
    with pytest.raises(TypeError, match="drop products="):
        new(1, products="kernel", implementation="xla")


def test_an_option_of_a_class(monkeypatch):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class F:
        implementation: str = "xla"

    new = option(monkeypatch, F)
    with pytest.warns(DeprecationWarning, match="use implementation="):
        assert new(products="kernel") == F(implementation="pallas")
    assert list(inspect.signature(new).parameters) == ["implementation"]


def test_an_attribute_of_a_class(monkeypatch):
    row = deprecations.Name(module="lrx.F", old="plan", new="layout")
    monkeypatch.setattr(deprecations, "NAMES", (row,))

    @dataclasses.dataclass(frozen=True)
    class F:
        layout: int
        plan = deprecations.attribute("lrx.F", "plan")

    with pytest.warns(DeprecationWarning, match=r"use lrx\.F\.layout"):
        assert F(3).plan == 3
