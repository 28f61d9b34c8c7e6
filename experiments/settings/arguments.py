"""The command line of a program: flags of absl, and one for every key of its configuration.

A key is set by `--config.section.key=value`.

Whatever is wrong with it ends with one line and exit code 2; `--help` prints the program's
docstring, its flags, and every key with its meaning, as the docstrings of the sections give it.
"""

import difflib
import os
import pathlib
import re
import runpy
import sys
import textwrap
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from absl import flags
from ml_collections import config_flags

from experiments.harness import optimizers, versions
from experiments.settings.sections import ConfigurationError, descriptions, plain

ASKING = ("--help", "-help", "-h", "-?", "--helpshort", "--helpfull")
FURTHER = {
    "name": "of the run, and of its folder.",
    "model.preset": "the shape that the other keys of model change.",
}


def parser(settings: types.ModuleType, default: pathlib.Path) -> Callable[[list[str]], list[str]]:
    """What `absl.app.run` takes as `flags_parser`.

    Args:
      settings: the module `configuration` or `finetuning_configuration`.
      default: the configuration file where none is named.
    """

    def parse(argv: list[str]) -> list[str]:
        try:
            present = [versions.present_flag(word) for word in argv]
            if present != argv:
                sys.argv = argv = present  # config_flags looks there for the keys that are set
            file = named_file(argv, default)
            if any(word in ASKING for word in argv[1:]):
                print(page(settings, file, argv[0]))
                sys.exit(0)
            check_keys(argv, settings)
            load(file)  # its errors are told better here
            config_flags.DEFINE_config_file(
                "config",
                os.path.relpath(default),
                "Python file; a flag --config.section.key=value changes a key",
            )
            return flags.FLAGS(argv)
        except ConfigurationError as error:
            sys.exit(refuse(str(error)))
        except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
            message = error.args[0] if isinstance(error, KeyError) else error
            sys.exit(refuse(" ".join(str(message).split())))

    return parse


def configured(settings: types.ModuleType) -> tuple[Any, list[str]]:
    """The checked configuration of the parsed flags, and notes on what of the file is left out.

    A flag that chooses another method than the file leaves out what of the file the method lacks;
    what other flags say stays, and is an error where the method lacks it.
    """
    flag = flags.FLAGS["config"]
    # flags win over the file, whatever names the file uses
    explicit = config_flags.get_override_values(flag)
    given, renamed = versions.present_keys(plain(flags.FLAGS.config), explicit)
    # what the file says for its own method may be nothing for the one that a flag chose
    own = plain(load(config_flags.get_config_filename(flag)))["optimizer"]["name"]
    by_flag = [key.removeprefix("optimizer.") for key in explicit]
    notes = optimizers.fit(given["optimizer"], own, by_flag)
    config = settings.from_dict(given)
    optimizers.check(config.optimizer)
    return config, [*renamed, *notes]


def refuse(message: str) -> int:
    """Says what is wrong with the configuration; the exit code."""
    print(f"configuration error: {message}", file=sys.stderr)
    return 2


def named_file(argv: Sequence[str], default: pathlib.Path) -> str:
    """The configuration file that the command line names.

    `file.py:argument` is for `get_config(argument)`.
    """
    found = os.path.relpath(default)
    for word, following in zip(argv, [*argv[1:], ""], strict=True):
        match = re.fullmatch(r"--?config(?:=(.*))?", word)
        if match:
            found = following if match[1] is None else match[1]
    return found


def load(file: str) -> Any:
    """What `get_config` of a configuration file gives.

    Raises ConfigurationError that names the file and what went wrong in it.
    """
    path, *argument = file.split(":", 1)
    if not pathlib.Path(path).is_file():
        raise ConfigurationError(
            f"config={path!r}: no such file; name one, such as experiments/configs/default.py"
        )
    try:
        made = runpy.run_path(path)
        return made["get_config"](*argument)
    except Exception as error:  # of the file's own code: whatever it raises
        line = error.lineno if isinstance(error, SyntaxError) else _line(error, path)
        where = "" if line is None else f", line {line}"
        told = f"{type(error).__name__}: {error}"
        if isinstance(error, KeyError) and error.args == ("get_config",):
            told = "defines no function get_config"
        raise ConfigurationError(f"config={path!r}{where}: {told}") from error


def _line(error: BaseException, path: str) -> int | None:
    """The last line of the file that was running."""
    found, trace = None, error.__traceback__
    while trace is not None:
        found = trace.tb_lineno if trace.tb_frame.f_code.co_filename == path else found
        trace = trace.tb_next
    return found


def keys(settings: types.ModuleType) -> dict[str, tuple[str, ...]]:
    """{section: its keys}; the keys beside the sections stand under ""."""
    found: dict[str, tuple[str, ...]] = {"": ("name",)}
    for section, table in settings.template().items():
        if section != "name":
            found[section] = tuple(table)
    return found


def check_keys(argv: Sequence[str], settings: types.ModuleType) -> None:
    """ConfigurationError for the first `--config.section.key` that there is not.

    >>> from experiments.settings import configuration
    >>> check_keys(["", "--config.optimizer.rnak=3"], configuration)
    Traceback (most recent call last):
    experiments.settings.sections.ConfigurationError: optimizer.rnak: section optimizer has no key 'rnak'; did ...
    """
    sections = keys(settings)
    join = lambda section, key: f"{section}.{key}" if section else key  # noqa: E731
    known = [join(section, key) for section, table in sections.items() for key in table]
    for word in argv[1:]:
        match = re.fullmatch(r"--?(?:no)?config\.([^=]+)(?:=.*)?", word, re.DOTALL)
        if match is None or match[1] in known:
            continue
        path = match[1]
        section, _, key = path.partition(".")
        if path in sections:
            raise ConfigurationError(
                f"{path}: is a section; set one of its keys, {', '.join(sections[path])}"
            )
        # the right key in the wrong section, else the nearest spelling
        elsewhere = [name for name in known if name.rpartition(".")[2] == key]
        near = elsewhere or difflib.get_close_matches(path, known, n=1)
        hint = f"did you mean {' or '.join(near)}?" if near else f"keys are {', '.join(known)}"
        wrong = (
            f"section {section} has no key {key!r}"
            if section in sections
            else f"there is no section {section!r}"
        )
        raise ConfigurationError(f"{path}: {wrong}; {hint}")


def page(settings: types.ModuleType, file: str, program: str) -> str:
    """What `--help` prints."""
    main = sys.modules["__main__"]
    lines = [(main.__doc__ or "").strip(), "", "Flags:"]
    for name, value in sorted(flags.FLAGS.flag_values_dict().items()):
        if _is_own(name, program):
            shown = "" if value is None else repr(value)
            lines += _entry(f"--{name}", shown, flags.FLAGS[name].help or "")
    lines += [
        "",
        "Keys of the configuration, written --config.section.key=value, as this file sets them:",
        f"  {file}",
    ]
    # as the file sets them, beside the program's own defaults where they differ
    values = settings.to_dict(settings.from_dict(load(file)))
    defaults = settings.to_dict(settings.from_dict({}))
    for section, kind in settings.SECTIONS.items():
        lines += ["", section, *_section(section, kind, values[section], defaults[section])]
    lines += ["", *_entry("name", _value(values["name"], defaults["name"]), FURTHER["name"])]
    return "\n".join(lines)


def _is_own(name: str, program: str) -> bool:
    module = str(flags.FLAGS.find_module_defining_flag(name))
    return module == program or module.startswith("experiments.")


def _section(
    section: str, kind: type, values: Mapping[str, Any], defaults: Mapping[str, Any]
) -> Iterator[str]:
    texts, fields = descriptions(kind), kind.__dataclass_fields__  # type: ignore[attr-defined]
    for key, value in values.items():
        # the docstring of the section's class says what a key means
        text = texts.get(key) or FURTHER[f"{section}.{key}"]
        field = fields.get(key)
        if field is not None and "choices" in field.metadata:
            text += f" Choices: {', '.join(field.metadata['choices'])}."
        if field is not None and "range" in field.metadata:
            text += f" Values: {field.metadata['range']}."
        yield from _entry(key, _value(value, defaults[key]), text)


def _value(value: Any, default: Any) -> str:
    return repr(value) if value == default else f"{value!r} (default {default!r})"


def _entry(name: str, value: str, text: str) -> Iterator[str]:
    yield f"  {name} = {value}" if value else f"  {name}"
    yield from textwrap.wrap(
        " ".join(text.split()), 100, initial_indent="      ", subsequent_indent="      "
    )
