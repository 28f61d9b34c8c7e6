"""Old public names and options, and the new ones that warnings name.

An old name works until the next minor version. Everything old stands in the two tables of this
file and nowhere else; `CHANGELOG.md` shows the same rows to users, and
`tests/workspace/test_deprecations.py` walks them.

Three kinds of things are renamed:

* a name of a module: a row of `NAMES`, and in the module `__getattr__ = deprecations.names(__name__)`;
* a name of a class (a field, a method): a row of `NAMES` whose module is the class, such as
  `"lrx.adapters.Adaptation"`, and in the class `old = deprecations.attribute("lrx.adapters.Adaptation", "old")`;
* a keyword of a function or of a class: a row of `OPTIONS`, and the decorator
  `@deprecations.options("lrx.galore")` on the function or class.

In all rows `lrx` stands for `lowrank_jax`, as users write it.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Name:
    """A public name that moved: `{module}.{old}` is `new` now.

    Attributes:
      module: the module or class that had it, as users write it: `"lrx"`, `"lrx.adapters"`.
      old: the name there.
      new: the whole new address, such as `"lrx.refresh_schedules"`; for a class the name alone.
    """

    module: str
    old: str
    new: str

    @property
    def address(self) -> str:
        return f"{self.module}.{self.old}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Option:
    """A keyword that was renamed, and with it perhaps its values.

    Attributes:
      functions: the functions and classes that take it, as users write them.
      old: the keyword as it was.
      new: the keyword now.
      values: pairs (old, new) of values that are renamed; others are handed on as they are.
    """

    functions: tuple[str, ...]
    old: str
    new: str
    values: tuple[tuple[Any, Any], ...] = ()


def _moved(old: str, new: str, names: str) -> tuple[Name, ...]:
    """Rows of names that are called the same in another module."""
    return tuple(Name(module=old, old=name, new=f"{new}.{name}") for name in names.split())


NAMES: tuple[Name, ...] = (
    *_moved("lrx", "lrx.adapters", "AdaptedKernel Adaptation precondition_pairs"),
    *_moved("lrx", "lrx.projection", "Fused MatrixState Projected Projection ProjectionState"),
    *_moved("lrx", "lrx.projection", "Recipe Stack Tapped Taps projection_of resolved_sides"),
    *_moved("lrx", "lrx.resolution", "Report ResolvedView"),
    Name(module="lrx", old="plan", new="lrx.projection.gradient_mode"),
    *_moved("lrx.adapters", "lrx", "adapt attach effective merge to_lora"),
    *_moved("lrx.adapters", "lrx", "altlora altlora_plus lora_plus scaled_adamw"),
    Name(module="lrx", old="absorb", new="lrx.adapters.absorb"),
    Name(module="lrx", old="combine", new="lrx.adapters.combine"),
    Name(module="lrx", old="unmerge", new="lrx.adapters.unmerge"),
    Name(module="lrx", old="clocks", new="lrx.refresh_schedules"),
    Name(module="lrx", old="Evidence", new="lrx.projectors.RefreshInputs"),
    Name(module="lrx.refresh_schedules", old="Clock", new="lrx.refresh_schedules.RefreshSchedule"),
    Name(module="lrx.residuals", old="error_feedback", new="lrx.targets.error_feedback"),
    Name(
        module="lrx.residuals", old="ldadam_error_feedback", new="lrx.targets.ldadam_error_feedback"
    ),
    Name(module="lrx.projection.Projection", old="clock", new="refresh_schedule"),
    Name(module="lrx.projection.Recipe", old="when", new="decay"),
    Name(module="lrx.projection.Fused", old="products", new="implementation"),
    Name(module="lrx.meshes", old="specs", new="lrx.meshes.partition_specs"),
    Name(module="lrx.kernels", old="thin_linear", new="lrx.kernels.lora_linear"),
    Name(module="lrx.adapters.Adaptation", old="fixed", new="frozen"),
    Name(module="lrx.adapters.Adaptation", old="plan", new="layout"),
    Name(module="lrx.adapters", old="Plan", new="lrx.adapters.Layout"),
    Name(module="lrx.adapters", old="specs", new="lrx.adapters.partition_specs"),
    *_moved("lrx.linen", "lrx", "adapted tapped"),
    *_moved("lrx", "lrx.adapters", "join partition"),
    Name(module="lrx", old="resolve", new="lrx.resolution.resolve"),
    Name(module="lrx", old="sides_for", new="lrx.projection.sides_for"),
)

_NAMED = ("galore", "dct_adamw", "frugal", "ldadam", "apollo", "apollo_mini")

OPTIONS: tuple[Option, ...] = (
    Option(
        functions=(
            "lrx.scale_by_projection",
            "lrx.projection.Projection",
            *(f"lrx.{name}" for name in _NAMED),
        ),
        old="clock",
        new="refresh_schedule",
    ),
    Option(functions=("lrx.projectors.RefreshInputs",), old="grad", new="target"),
    Option(functions=("lrx.projectors.RefreshInputs",), old="moments", new="momentum"),
    Option(functions=("lrx.adapt",), old="whole", new="trainable"),
    Option(functions=("lrx.adapters.Adaptation.replace",), old="fixed", new="frozen"),
    Option(functions=("lrx.adapters.Adaptation.replace",), old="plan", new="layout"),
    Option(
        functions=(
            "lrx.apply_learning_rate",
            "lrx.altlora",
            "lrx.altlora_plus",
            "lrx.projection.Recipe",
        ),
        old="when",
        new="decay",
        values=(("pre", "before"), ("post", "after")),
    ),
    Option(
        functions=(
            "lrx.fused",
            "lrx.projection.Fused",
            "lrx.linalg.quantize_nf4",
            "lrx.projectors.dct",
            "lrx.adapters.lora",
            "lrx.adapters.dora",
        ),
        old="products",
        new="implementation",
        values=(("kernel", "pallas"),),
    ),
)


def find(address: str) -> Any:
    """What stands at an address as users write it.

    >>> find("lrx.projectors.dct").__name__
    'Dct'
    """
    first, *names = address.split(".")
    value: Any = importlib.import_module({"lrx": "lowrank_jax"}.get(first, first))
    for name in names:
        value = getattr(value, name)
    return value


def names(module: str, lazy: tuple[str, ...] = ()) -> Callable[[str], Any]:
    """The `__getattr__` of a module: its old names, with a warning each.

    Args:
      module: `__name__` of the module.
      lazy: modules below it that are imported at their first use, without a warning.

    >>> import lowrank_jax as lrx
    >>> lrx.adapters.lor
    Traceback (most recent call last):
    AttributeError: module 'lowrank_jax.adapters' has no attribute 'lor'
    """
    public = module.replace("lowrank_jax", "lrx", 1)
    moved = {row.old: row for row in NAMES if row.module == public}

    def __getattr__(name: str) -> Any:
        if name in lazy:
            return importlib.import_module(f"{module}.{name}")
        if name not in moved:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        row = moved[name]
        warn(row.address, row.new, stacklevel=3)
        return find(row.new)

    return __getattr__


def attribute(owner: str, old: str) -> Any:
    """A property of the class `owner` that reads the attribute under its new name, with a warning."""
    row = next(row for row in NAMES if (row.module, row.old) == (owner, old))

    def read(instance: Any) -> Any:
        warn(row.address, f"{owner}.{row.new}", stacklevel=3)
        return getattr(instance, row.new)

    return property(read, doc=f"Deprecated: now `{row.new}`.")


def options(address: str) -> Callable[[Function], Function]:
    """A decorator: the function or class at `address` takes its old keywords too, with a warning
    each.

    Its signature, as `help()` and editors show it, has the new ones only.

    Raises:
      TypeError: at the call, where the old and the new keyword are both given.
    """
    renamed = {row.old: row for row in OPTIONS if address in row.functions}

    def decorate(function: Function) -> Function:
        if isinstance(function, type):
            function.__init__ = _translating(function.__init__, address, renamed)  # type: ignore[misc]
            return function
        return _translating(function, address, renamed)

    return decorate


def _translating(function: Any, address: str, renamed: dict[str, Option]) -> Any:
    @functools.wraps(function)
    def call(*args, **kwargs):
        for old in renamed.keys() & kwargs.keys():
            row, value = renamed[old], kwargs.pop(old)
            if row.new in kwargs:
                raise TypeError(f"{address} got {row.new}= and its old name {old}=; drop {old}=")
            warn(f"{old}= of {address}", f"{row.new}=", stacklevel=3)
            same = [
                new for known, new in row.values if type(known) is type(value) and known == value
            ]
            kwargs[row.new] = same[0] if same else value
        return function(*args, **kwargs)

    return call


def warn(old: str, new: str, stacklevel: int) -> None:
    """The warning that an old name gives."""
    text = f"{old} is deprecated and goes with the next minor version: use {new}"
    warnings.warn(text, DeprecationWarning, stacklevel=stacklevel)
