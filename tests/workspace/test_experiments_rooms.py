"""Which file of the experiments may import which: tiers from below to above, and no circle anywhere.

An import that stands in a function counts like any other: a circle that is hidden is a circle.
"""

import ast

import pytest

import experiments
from tests.workspace.test_rooms import ROOT, circles, graph, modules

PACKAGE = ROOT / "experiments"

# From below to above. A file imports what stands before it in its own tier, and anything below. Of
# a name that is a folder, the files import each other, without circles. A file that is named takes
# its own place, not its folder's.
TIERS = (
    # configurations check themselves; files are written whole
    ("settings.sections", "harness.outputs"),
    # what knows neither a model nor data
    (
        "harness.metrics",
        "harness.collectives",
        "harness.manifest",
        "harness.versions",
        "harness.distributed",
        "harness.checkpoint",
    ),
    # what is trained, and on what
    ("data", "models"),
    ("harness.methods", "settings.configuration", "settings.finetuning_configuration", "configs"),
    # one training loop and everything around it
    (
        "harness.objectives",
        "harness.optimizers",
        "harness.updates",
        "harness.evaluated",
        "harness.runs",
        "harness.history",
        "harness.workdir",
        "harness.tasks",
        "harness.training",
        "harness.export",
    ),
    ("settings.arguments",),
    # another task of that loop, finished runs for readers, programs that are compiled only
    ("finetuning",),
    ("reporting.markdown", "reporting.figures", "reporting.page"),
    ("planning", "benchmarks"),
    ("reporting.tables", "reporting.pareto"),
    # what the training commands share, and the commands
    ("harness.command",),
    ("pretrain", "finetune", "plan", "report", "export", "study", "evidence"),
)
PLACE = {
    name: (tier, place) for tier, names in enumerate(TIERS) for place, name in enumerate(names)
}


def place(module: str) -> str:
    """The name in TIERS that a file stands under: its own, or its folder's."""
    name = module.removeprefix("experiments.")
    while name not in PLACE and "." in name:
        name = name.rpartition(".")[0]
    return name


def test_every_file_imports_downwards():
    wrong = []
    for name, others in graph(PACKAGE).items():
        here = place(name)
        if name == "experiments" or any(known.startswith(f"{here}.") for known in PLACE):
            assert not others, f"{name} imports {others}: a room's __init__.py is its docstring"
            continue
        assert here in PLACE, f"{name}: give it a place in TIERS"
        for other in others:
            there = place(other)
            if there != here and PLACE.get(there, (-1, -1)) >= PLACE[here]:
                wrong.append(f"{name} imports {other}, which stands above it")
    assert not wrong


def test_every_name_of_the_tiers_is_a_file_or_a_folder():
    known = modules(PACKAGE)
    assert [name for name in PLACE if f"experiments.{name}" not in known] == []


def test_there_is_no_circle():
    assert circles(graph(PACKAGE)) == []


def test_nothing_is_imported_for_types_alone():
    assert [
        name for name, path in modules(PACKAGE).items() if "TYPE_CHECKING" in path.read_text()
    ] == []


COMMANDS = sorted(path for path in PACKAGE.glob("*.py") if path.name != "__init__.py")


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.stem)
def test_a_command_is_short(path):
    """Below 60 lines: what it does stands in the rooms. Its docstring, which `--help` prints, is
    not counted."""
    text = path.read_text()
    documented = len((ast.get_docstring(ast.parse(text), clean=False) or "").splitlines())
    assert len(text.splitlines()) - documented < 60


@pytest.mark.parametrize("name", experiments.MOVED)
def test_what_configuration_files_of_older_versions_import_still_stands_there(name):
    with pytest.warns(DeprecationWarning, match=rf"experiments\.{name} is now experiments\."):
        module = getattr(experiments, name)
    assert module.__name__ == experiments.MOVED[name]
    assert module.template() is not None
