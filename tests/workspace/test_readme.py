"""What stands in the documents runs as it stands there: every block of code alone, in a fresh place."""

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from lowrank_jax import deprecations
from tests.experiments.commands import ENVIRONMENT
from tests.workspace.test_workspace import extras

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / name for name in ("README.md", "WORKSPACE.md", "CONTRIBUTING.md")]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
TEXTS = {str(path.relative_to(ROOT)): path.read_text() for path in PAGES}
EVERYTHING = "\n".join(TEXTS.values())
ZOO = "docs/adapt_any_model.md"  # its blocks need the packages of tests/zoo, and run there


def blocks(language: str, page: str | None = None) -> list:
    """Every fenced block of a language, named by its page and place there."""
    found = []
    texts = TEXTS.items() if page is None else [(page, TEXTS[page])]
    for page, text in texts:
        inside = re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
        found += [pytest.param(block, id=f"{page}-{i}") for i, block in enumerate(inside)]
    return found


def test_every_block_is_code_that_runs():
    for page, text in TEXTS.items():
        fences = re.findall(r"^```(.*)$", text, flags=re.MULTILINE)
        assert set(fences[::2]) <= {"python", "bash"} and set(fences[1::2]) <= {""}, page


def promised(block: str) -> list[str]:
    """The output that a block promises: the lines of comment at its end."""
    lines = block.rstrip("\n").split("\n")
    code = next(i for i in range(len(lines), 0, -1) if not lines[i - 1].startswith("# "))
    return [line.removeprefix("# ").rstrip() for line in lines[code:]]


def alike(found: str, expected: str) -> bool:
    """Equal words; numbers equal up to one in the last place that is shown."""
    a, b = found.split(), expected.split()
    return len(a) == len(b) and all(
        _number(x, y) if re.fullmatch(r"-?\d+\.\d+", y) else x == y
        for x, y in zip(a, b, strict=True)
    )


def _number(found: str, expected: str) -> bool:
    places = len(expected.partition(".")[2])
    return abs(float(found) - float(expected)) <= 1.01 * 10**-places


def test_a_wrong_output_is_seen():
    assert promised("f()\n# here\ng()\n# step 1  loss 0.12\n# end\n") == [
        "step 1  loss 0.12",
        "end",
    ]
    assert alike("step 1 loss 0.12", "step 1  loss 0.13")
    assert not alike("step 1 loss 0.12", "step 1 loss 0.14")
    assert not alike("step 2 loss 0.12", "step 1 loss 0.12") and not alike("a", "a b")


@pytest.mark.parametrize("block", [one for one in blocks("python") if ZOO not in one.id])
def test_a_block_of_python_runs_alone_and_prints_what_it_says(block):
    check_block(block)


def check_block(block: str) -> None:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(block, "block", "exec"), {"__name__": "block"})
    expected = promised(block)
    assert not expected or alike(printed.getvalue(), "\n".join(expected)), printed.getvalue()


def commands(block: str) -> list[list[str]]:
    lines = block.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


LINES = [
    pytest.param(words, id=f"{block.id}-{i}")
    for block in blocks("bash")
    for i, words in enumerate(commands(*block.values))
]

# Parses the flags of a program as its command line does, and stops before it does anything.
PARSE = """
import argparse, runpy, sys
from absl import app

def parsed(self, *args, **kwargs):
    parse(self, *args, **kwargs)
    sys.exit(0)

parse, argparse.ArgumentParser.parse_args = argparse.ArgumentParser.parse_args, parsed
app.run = lambda main, flags_parser: flags_parser(sys.argv)
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""


def test_every_line_of_a_shell_is_of_a_known_kind():
    kinds = {tuple(line.values[0][: 2 if line.values[0][0] == "pip" else 1]) for line in LINES}
    assert kinds <= {("pip", "install"), ("python",), ("make",)}


@pytest.mark.slow
@pytest.mark.parametrize(
    "words", [line for line in LINES if line.values[0][:2] == ["python", "-m"]]
)
def test_a_command_names_a_program_and_flags_that_it_knows(words):
    if not words[2].startswith("experiments."):
        pytest.skip("a program of Python's own")
    done = run_python(["-c", PARSE, *words[2:]], cwd=ROOT)
    assert done.returncode == 0, done.stderr


def run_python(words, cwd):
    environment = os.environ | ENVIRONMENT
    return subprocess.run(
        [sys.executable, *words],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_an_unknown_flag_is_seen():
    for wrong in (["experiments.pretrain", "--worm=a"], ["experiments.export", "--worm=a"]):
        assert run_python(["-c", PARSE, *wrong], cwd=ROOT).returncode == 2


@pytest.mark.slow
def test_the_first_commands_really_run(tmp_path):
    """Those of the smallest configuration, in an empty folder with the checkout's programs."""
    for name in ("experiments", "lowrank_jax"):
        (tmp_path / name).symlink_to(ROOT / name)
    quick = next(
        block.values[0] for block in blocks("bash") if "configs/tiny.py" in block.values[0]
    )
    for words in commands(quick):
        done = run_python(words[1:], cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "report.html").stat().st_size > 10_000
    assert (tmp_path / "exported" / "config.json").exists()


@pytest.mark.parametrize("words", [line for line in LINES if line.values[0][0] == "pip"])
def test_what_is_installed_is_declared(words):
    for word in words[2:]:
        named = re.search(r"\[(.+)\]", word)
        if word.startswith("."):
            assert set(named[1].split(",") if named else ()) <= set(extras()), word


@pytest.mark.parametrize(
    "name", sorted(set(re.findall(r"python -m ((?:experiments|tests)[\w.]*)", EVERYTHING)))
)
def test_a_command_names_a_program(name):
    path = ROOT / Path(*name.split("."))
    assert path.with_suffix(".py").exists() or (path / "__main__.py").exists()


@pytest.mark.parametrize("target", sorted(set(re.findall(r"`make ([a-z-]+)", EVERYTHING))))
def test_a_make_target_exists(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


@pytest.mark.parametrize(
    "path", sorted(set(re.findall(r"`((?:[\w.]+/)+[\w.]+)`", TEXTS["README.md"])))
)
def test_a_named_file_exists(path):
    assert (ROOT / path).exists() or path.startswith("runs/")


@pytest.mark.parametrize("page", TEXTS)
def test_a_name_of_the_library_is_there_and_not_an_old_one(page):
    for name in sorted(set(re.findall(r"\blrx(?:\.\w+)+", TEXTS[page]))):
        deprecations.find(name)


@pytest.mark.parametrize("page", TEXTS)
def test_a_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)\)", TEXTS[page]):
        assert ((ROOT / page).parent / target).exists(), target


def test_the_readme_is_short():
    assert len(TEXTS["README.md"].splitlines()) <= 200
