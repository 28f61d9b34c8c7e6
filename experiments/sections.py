"""Sections of a configuration: checks whose errors name field, value and remedy, and the way from dictionaries."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any


class ConfigurationError(ValueError):
    """A configuration that cannot be run; the message names field, value and remedy."""


def require(condition: Any, field: str, value: Any, remedy: str) -> None:
    """ConfigurationError unless `condition` holds.

    >>> require(False, "schedule.steps", 0, "give a positive integer")
    Traceback (most recent call last):
    experiments.sections.ConfigurationError: schedule.steps=0: give a positive integer
    """
    if not condition:
        raise ConfigurationError(f"{field}={value!r}: {remedy}")


def one_of(field: str, value: Any, choices: Iterable[str]) -> None:
    """ConfigurationError unless `value` is among `choices`; names the nearest one."""
    choices = [*choices]
    near = difflib.get_close_matches(str(value), choices, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    require(value in choices, field, value, f"{hint}Choose one of {', '.join(choices)}")


def reject_unknown(prefix: str, given: Mapping, known: Iterable[str]) -> None:
    """ConfigurationError for the first key of `given` that is not `known`; names the nearest one."""
    known = [*known]
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known keys are {', '.join(known)}"
            raise ConfigurationError(f"{prefix}{key}={given[key]!r}: unknown key; {hint}")


def plain(values: Mapping) -> dict:
    """A ConfigDict or a nested dictionary as a dictionary."""
    return values.to_dict() if hasattr(values, "to_dict") else dict(values)


def table(kind: type, values: Mapping, *, free: bool = False):
    """The section as a ConfigDict that takes whatever the command line spells for keys of several types.

    `from_dict` checks their type. With `free`, every key is of that kind, and None until it is set.
    """
    from ml_collections import config_dict

    hints = typing.get_type_hints(kind)
    result = config_dict.ConfigDict()
    for key, value in values.items():
        loose = free and key in hints
        if loose or isinstance(hints.get(key), types.UnionType):
            result[key] = config_dict.placeholder(object)
            result[key] = None if loose else value
        else:
            result[key] = value
    return result


def build(kind: type, section: str, given: Mapping):
    """The dataclass `kind` from a dictionary of its fields, checked; errors begin with the section's name."""
    hints = typing.get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]
    reject_unknown(f"{section}.", given, names)
    values = {key: _typed(f"{section}.{key}", value, hints[key]) for key, value in given.items()}
    try:
        return kind(**values)
    except ConfigurationError:
        raise
    except (ValueError, TypeError) as error:
        message = str(error)
        raise ConfigurationError(message if message.startswith(section) else f"{section}.{message}") from error


def _typed(field: str, value: Any, hint: Any) -> Any:
    """`value` as `hint` says: integers become floats and lists tuples, nothing else is converted."""
    choices = (
        typing.get_args(hint)
        if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
        else (hint,)
    )
    if value is None and type(None) in choices:
        return None
    kinds = tuple(typing.get_origin(choice) or choice for choice in choices)
    if isinstance(value, list) and tuple in kinds:
        return tuple(value)
    if isinstance(value, bool) and bool not in kinds:
        matches = False
    else:
        matches = Any in kinds or isinstance(value, tuple(kind for kind in kinds if isinstance(kind, type)))
    if not matches and isinstance(value, int) and not isinstance(value, bool) and float in kinds:
        return float(value)
    named = " or ".join(getattr(kind, "__name__", str(kind)) for kind in kinds if kind is not type(None))
    require(matches, field, value, f"is of type {type(value).__name__}; give {named}")
    return value
