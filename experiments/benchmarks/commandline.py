"""The command lines of benchmarks: sensible numbers, writable places, one line of error.

Exit codes: 0 done, 1 failed, 2 wrong arguments or files, 130 interrupted.
"""

import argparse
import functools
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from experiments.harness import outputs
from experiments.models import llama
from experiments.settings.sections import LARGEST, ConfigurationError
from lowrank_jax.interop.documents import DocumentError


def parser(text: str | None, output: str | Path | None = None) -> argparse.ArgumentParser:
    """A parser with the program's docstring, and --output and --replace for a result.

    Args:
      text: the docstring.
      output: where the result goes by default.
    """
    made = argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if output is not None:
        made.add_argument(
            "--output", type=file, default=str(output), help="the result (default: %(default)s)"
        )
        add_replace(made)
    return made


def add_replace(made: argparse.ArgumentParser) -> None:
    """The flag that lets a result be replaced by less."""
    made.add_argument(
        "--replace", action="store_true", help="write the result even where the file holds more"
    )


class Main(Protocol):
    """A program: takes its command line, by default the process's, and returns the exit code."""

    def __call__(self, arguments: Sequence[str] | None = None) -> int: ...


def command(main: Callable[[Sequence[str]], None]) -> Main:
    """A `main(arguments)` that ends with one line where arguments or files are wrong."""

    @functools.wraps(main)
    def run(arguments: Sequence[str] | None = None) -> int:
        try:
            main(sys.argv[1:] if arguments is None else arguments)
        except (ConfigurationError, DocumentError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except OSError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
        return 0

    return run


def positive(text: str) -> float:
    """A number above 0, of hours, minutes and the like.

    >>> positive("0")
    Traceback (most recent call last):
    argparse.ArgumentTypeError: 0: give a positive number
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: give a positive number")
    return value


def count(text: str) -> int:
    """A whole number above 0, of workers, steps, repetitions and the like.

    >>> count("2"), count("1_000")
    (2, 1000)
    """
    try:
        value = int(text)
    except ValueError:
        value = 0
    if not 1 <= value <= LARGEST:
        raise argparse.ArgumentTypeError(f"{text}: give a positive integer")
    return value


def preset(text: str) -> str:
    """The name of a model's preset."""
    if text not in llama.PRESETS:
        raise argparse.ArgumentTypeError(f"{text!r}: choose one of {', '.join(llama.PRESETS)}")
    return text


def pattern(text: str) -> str:
    """A regular expression."""
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from error
    return text


def file(text: str) -> Path:
    """A file that can be written."""
    return _place(text, is_folder=False)


def folder(text: str) -> Path:
    """A folder in which files can be written."""
    return _place(text, is_folder=True)


def _place(text: str, *, is_folder: bool) -> Path:
    found = outputs.problem(text, is_folder=is_folder)
    if found is not None:
        raise argparse.ArgumentTypeError(f"{text!r} {found}; give another place")
    return Path(text)
