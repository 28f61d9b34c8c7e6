"""Sections of a configuration: checks that name field, value and remedy; from dictionaries."""

import dataclasses
import difflib
import inspect
import re
import sys
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar


class ConfigurationError(ValueError):
    """A configuration that cannot be run; the message names field, value and remedy."""


def require(condition: Any, field: str, value: Any, remedy: str) -> None:
    """ConfigurationError unless `condition` holds.

    >>> require(False, "schedule.steps", 0, "give a positive integer")
    Traceback (most recent call last):
    experiments.settings.sections.ConfigurationError: schedule.steps=0: give a positive integer
    """
    if not condition:
        raise ConfigurationError(f"{field}={_shown(value)}: {remedy}")


def _shown(value: Any) -> str:
    """The value as it is written; Python writes no integer of more than some thousand digits."""
    is_long = isinstance(value, int) and value.bit_length() > 256
    return f"(an integer of {value.bit_length()} bits)" if is_long else repr(value)


def one_of(field: str, value: Any, choices: Iterable[str]) -> None:
    """ConfigurationError unless `value` is among `choices`.

    Names a choice that `value` begins, else the longest of which it holds all words, else the
    nearest in spelling.
    """
    choices = [*choices]
    text = value if isinstance(value, str) else _shown(value)
    begun = [choice for choice in choices if text and choice.startswith(text)]
    held = [choice for choice in choices if f"_{choice}_" in f"_{text}_"]
    near = begun or sorted(held, key=len)[-1:] or difflib.get_close_matches(text, choices, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    require(value in choices, field, value, f"{hint}Choose one of {', '.join(choices)}")


def reject_unknown(prefix: str, given: Mapping, known: Iterable[str]) -> None:
    """ConfigurationError for the first key that is not `known`; names the nearest one."""
    known = [*known]
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = (
                f"did you mean {prefix}{near[0]}?" if near else f"known keys are {', '.join(known)}"
            )
            raise ConfigurationError(f"{prefix}{key}={_shown(given[key])}: unknown key; {hint}")


LARGEST = 2**31 - 1  # of integers: counters and seeds are int32 on devices


@dataclasses.dataclass(frozen=True, kw_only=True)
class Range:
    """The numbers that a key takes; None leaves a side open, where integers end at LARGEST.

    >>> (
    ...     Range(at_least=0, below=1).words(float),
    ...     Range(above=0).words(float),
    ...     Range(at_least=1).words(int),
    ... )
    ('give a number in [0, 1)', 'give a positive number', 'give a positive integer')
    """

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None

    def holds(self, value: float) -> bool:
        """Whether the number lies in the range; NaN and infinity lie in none."""
        largest = LARGEST if isinstance(value, int) else sys.float_info.max
        is_number = abs(value) <= largest
        is_above = self.at_least is None or value >= self.at_least
        is_above = is_above and (self.above is None or value > self.above)
        is_below = self.at_most is None or value <= self.at_most
        return is_number and is_above and is_below and (self.below is None or value < self.below)

    def words(self, kind: type) -> str:
        """The remedy, for an integer or a float."""
        noun = "integer" if kind is int else "number"
        is_positive = self.above == 0 or (kind is int and self.at_least == 1)
        if is_positive and self._ends()[1] is None:
            return f"give a positive {noun}"
        joined = "in" if self._ends()[1] is not None else "of" if self.above is None else ""
        ranged = f"{joined} {self}".strip()
        return f"give {'an' if kind is int else 'a'} {noun} {ranged}"

    def __str__(self) -> str:
        low, high = self._ends()
        if high is not None:
            return (
                f"{'[' if self.above is None else '('}{low:g}, "
                f"{high:g}{']' if self.below is None else ')'}"
            )
        return (
            "finite" if low is None else f"{'at least' if self.above is None else 'above'} {low:g}"
        )

    def _ends(self) -> tuple[float | None, float | None]:
        low = self.at_least if self.above is None else self.above
        high = self.at_most if self.below is None else self.below
        return low, high


def number(default: Any = dataclasses.MISSING, **limits: float) -> Any:
    """A field for numbers in a `Range(**limits)`, or None where its type says so."""
    return dataclasses.field(default=default, metadata={"range": Range(**limits)})


def choice(default: Any, choices: Iterable[str]) -> Any:
    """A field for one of the named choices."""
    return dataclasses.field(default=default, metadata={"choices": (*choices,)})


def check(kind: type, prefix: str, values: Mapping[str, Any]) -> None:
    """ConfigurationError for the first value of a wrong kind, range or choice."""
    for field in dataclasses.fields(kind):
        if field.name not in values:
            continue
        value, name = values[field.name], f"{prefix}{field.name}"
        limits, choices = field.metadata.get("range"), field.metadata.get("choices")
        if choices is not None and value is not None:
            one_of(name, value, choices)
        if limits is not None and _typed(name, value, field.type) is not None:
            require(limits.holds(value), name, value, limits.words(type(value)))


class Section:
    """Base of the sections, frozen dataclasses that check ranges and choices however made.

    A subclass gives SECTION, the name of its table in the configuration.
    """

    SECTION: ClassVar[str]

    def __post_init__(self):
        check(type(self), f"{self.SECTION}.", vars(self))


def descriptions(kind: type) -> dict[str, str]:
    """{field: what its class's docstring says of it under "Attributes"}, of base classes too.

    >>> class Own:
    ...     '''Some.
    ...
    ...     Attributes:
    ...       a, b: two numbers,
    ...         in a line and a half.
    ...     '''
    >>> descriptions(Own)
    {'a': 'two numbers, in a line and a half.', 'b': 'two numbers, in a line and a half.'}
    """
    found: dict[str, str] = {}
    # base classes first: a subclass may say more of a field
    for base in reversed(kind.__mro__):
        text = inspect.cleandoc(base.__dict__.get("__doc__") or "")
        _, header, entries = text.partition("Attributes")
        lines = entries.splitlines()[1:] if header else []
        names: list[str] = []
        for line in lines:
            entry = re.match(r"  (\w+(?:, \w+)*): (.*)", line)  # "a, b: what they are"
            if entry:
                names = entry[1].split(", ")
                found |= dict.fromkeys(names, entry[2])
            elif line.startswith("    "):  # goes on
                found |= {name: f"{found[name]} {line.strip()}" for name in names}
            elif line.strip():  # the next paragraph of the docstring
                break
    return found


def plain(values: Mapping) -> dict:
    """A ConfigDict or a nested dictionary as a dictionary."""
    return values.to_dict() if hasattr(values, "to_dict") else dict(values)


def table(kind: type, values: Mapping, *, free: bool = False):
    """The section as a ConfigDict that takes what the command line spells for several types.

    `from_dict` checks their type. With `free`, every key is of that kind, and None until it is set.
    """
    from ml_collections import config_dict

    hints = typing.get_type_hints(kind)
    result = config_dict.ConfigDict()
    for key, value in values.items():
        # a ConfigDict keeps the type of a value, unless a placeholder of any type stands there
        loose = free and key in hints
        if loose or isinstance(hints.get(key), types.UnionType):
            result[key] = config_dict.placeholder(object)
            result[key] = None if loose else value
        else:
            result[key] = value
    return result


def build(kind: type, section: str, given: Mapping):
    """The checked dataclass `kind` from a dictionary; errors begin with the section's name."""
    hints = typing.get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]
    reject_unknown(f"{section}.", given, names)
    values = {key: _typed(f"{section}.{key}", value, hints[key]) for key, value in given.items()}
    check(kind, f"{section}.", values)
    try:
        return kind(**values)
    except ConfigurationError:
        raise
    except (ValueError, TypeError) as error:
        message = str(error)
        raise ConfigurationError(
            message if message.startswith(section) else f"{section}.{message}"
        ) from error


def _typed(field: str, value: Any, hint: Any) -> Any:
    """`value` as `hint` says: integers become floats and lists tuples, nothing else changes."""
    is_union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    choices = typing.get_args(hint) if is_union else (hint,)
    if value is None and type(None) in choices:
        return None
    kinds = tuple(typing.get_origin(choice) or choice for choice in choices)
    if isinstance(value, list) and tuple in kinds:  # JSON has no tuples
        return tuple(value)
    is_bool = isinstance(value, bool)  # an int for Python, and for nobody else
    plain_kinds = tuple(kind for kind in kinds if isinstance(kind, type))
    matches = Any in kinds or isinstance(value, plain_kinds)
    if is_bool and bool not in kinds:
        matches = False
    if not matches and isinstance(value, int) and not is_bool and float in kinds:
        remedy = "is too large for a number; give a smaller one"
        require(abs(value) <= sys.float_info.max, field, value, remedy)
        return float(value)
    named = " or ".join(
        getattr(kind, "__name__", str(kind)) for kind in kinds if kind is not type(None)
    )
    require(matches, field, value, f"is of type {type(value).__name__}; give {named}")
    return value
