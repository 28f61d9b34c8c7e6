"""The shape of the workspace itself: attributions, rooms and their imports, recorded values, sizes
of files."""

import ast
import configparser
import doctest
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
LIBRARY = sorted((ROOT / "lowrank_jax").rglob("*.py"))
PROGRAMS = sorted((ROOT / "experiments").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
MARK = "TO" + "DO"


def imported(path: Path, root: Path = ROOT) -> set[str]:
    """Dotted names of every module a file imports, relative imports made absolute.

    `from a import b` gives both a and a.b, because b may be a module.
    """
    package = path.relative_to(root).with_suffix("").parts[:-1]
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            module = ".".join(base + ([node.module] if node.module else []))
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return names


def test_library_never_imports_programs():
    wrong = {
        str(p.relative_to(ROOT)): n
        for p in LIBRARY
        for n in imported(p)
        if n.split(".")[0] == "experiments"
    }
    assert not wrong


def requirements(lines: str) -> set[str]:
    return {re.split(r"[<>=\[]", line)[0].replace("-", "_").lower() for line in lines.split()}


def config() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def extras() -> dict[str, set[str]]:
    return {name: requirements(text) for name, text in config()["options.extras_require"].items()}


# Names of modules that are not their distributions'.
DISTRIBUTIONS = {
    "absl": "absl_py",
    "haiku": "dm_haiku",
    "orbax": "orbax_checkpoint",
    "sklearn": "scikit_learn",
}


def distributions(files: list[Path]) -> dict[str, set[str]]:
    """What of other projects each file imports, as distributions; what jax brings does not count."""
    own = {*sys.stdlib_module_names, "numpy", "lowrank_jax", "experiments", "tests", ""}
    tops = {path: {name.split(".")[0] for name in imported(path)} - own for path in files}
    return {
        str(path.relative_to(ROOT)): {DISTRIBUTIONS.get(name, name).lower() for name in names}
        for path, names in tops.items()
    }


def test_the_library_requires_what_it_imports_and_nothing_else():
    required = requirements(config()["options"]["install_requires"])
    assert required == {"jax", "jaxlib", "flax", "optax"}
    assert not {path: n - required for path, n in distributions(LIBRARY).items() if n - required}


def test_the_programs_extras_bring_what_they_import():
    known = requirements(config()["options"]["install_requires"]) | extras()["experiments"]
    # of environments of their own: conversions, foreign tokenizers, the peer, models of others
    known |= extras()["prepare"] | extras()["tokenizers"] | extras()["peer"] | extras()["zoo"]
    known |= {"gemma"}  # which `make test-zoo` installs beside the zoo, without what it asks for
    assert not {path: n - known for path, n in distributions(PROGRAMS).items() if n - known}


def test_everything_that_the_mission_names_is_declared():
    declared = requirements(config()["options"]["install_requires"])
    declared |= extras()["experiments"] | extras()["test"]
    mission = {"jax", "jaxlib", "flax", "optax", "orbax_checkpoint", "chex", "tensorflow_datasets"}
    assert declared >= mission | {"absl_py"}


def test_an_installation_brings_the_library_alone():
    assert config()["options.packages.find"]["include"].split() == ["lowrank_jax*"]
    assert (ROOT / "lowrank_jax" / "py.typed").exists()
    assert config()["options.package_data"]["lowrank_jax"] == "py.typed"


@pytest.mark.parametrize("module", ["orbax", "tensorflow_datasets"])
def test_a_program_without_its_extra_names_it(module):
    code = f"import sys; sys.modules[{module!r}] = None; import experiments.pretrain"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT
    )
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"ImportError: the programs in experiments/ need {module}: ")
    assert "pip install -e '.[experiments]'" in last


def test_the_citation_has_the_version():
    version = re.search(r'= "(.+)"', (ROOT / "lowrank_jax" / "version.py").read_text()).group(1)
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()


def test_the_workflow_runs_the_gate():
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert re.search(r"^ +- run: \.ci/run$", text, flags=re.MULTILINE)
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


def test_every_requirement_is_bounded_on_both_sides():
    groups = [config()["options"]["install_requires"], *config()["options.extras_require"].values()]
    for line in "\n".join(groups).split():
        assert ("<" in line and ">=" in line) or "==" in line, line


@pytest.mark.slow
def test_import_is_light():
    heavy = ("flax.nnx", "tensorflow", "torch", "matplotlib", "experiments", "tensorflow_datasets")
    code = f"import sys, lowrank_jax; print([n for n in {heavy!r} if n in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


# Files that parse JSON that is no file's: a round trip of their own values, or what a child process
# says.
NO_FILE = {
    "experiments/planning/queue.py",
    "experiments/planning/program.py",
    "experiments/planning/cases.py",
    "experiments/benchmarks/study.py",
    "experiments/harness/checkpoint.py",
    "experiments/harness/workdir.py",
    "experiments/harness/manifest.py",
    "experiments/harness/distributed.py",
    "experiments/benchmarks/tpu_programs.py",
}


def test_files_are_read_by_the_one_reader():
    """`lowrank_jax.interop.documents` says what is wrong with a file; json alone raises, or lets it
    through."""
    found = {}
    for path in LIBRARY + PROGRAMS:
        calls = [
            node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)
        ]
        texts = [ast.unparse(call) for call in calls]
        found[str(path.relative_to(ROOT))] = [
            text for text in texts if re.match(r"json\.loads?\(", text)
        ]
    reading = {name for name, texts in found.items() if texts} - {
        "lowrank_jax/interop/documents.py"
    }
    assert reading <= NO_FILE
    of_files = {
        name: text
        for name, texts in found.items()
        for text in texts
        if re.search(r"read|open\(|file", text)
    }
    assert not of_files


def test_public_names_have_examples():
    import lowrank_jax

    parser = doctest.DocTestParser()
    missing = []
    for name in getattr(lowrank_jax, "__all__", []):
        value = getattr(lowrank_jax, name)
        if inspect.isfunction(value) or inspect.isclass(value):
            text = inspect.getdoc(value) or ""
            if not parser.get_examples(text):
                missing.append(name)
    assert not missing, f"no runnable example in the docstring of {missing}"


@pytest.mark.parametrize("path", LIBRARY + PROGRAMS, ids=lambda p: str(p.relative_to(ROOT)))
def test_functions_are_short(path):
    """At most 60 lines after the docstring; a file holds one concept, however long that is."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, functions):
            has_docstring = ast.get_docstring(node) is not None and len(node.body) > 1
            first = node.body[1 if has_docstring else 0]
            lines = node.end_lineno - first.lineno + 1
            assert lines <= 60, (
                f"{path}:{node.lineno}: {node.name} has {lines} lines; is it two functions?"
            )


@pytest.mark.parametrize("path", LIBRARY + PROGRAMS + TESTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_finished(path):
    assert MARK not in path.read_text()


def test_every_attribution_is_complete():
    lines = [
        line
        for line in (ROOT / "third_party" / "README.md").read_text().splitlines()
        if line.startswith("|")
    ]
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert header == ["method", "paper", "official code", "licence", "what of it is used"]
    methods = " ".join(row[0] for row in rows)
    for row in rows:
        assert len(row) == 5, row
        assert all(row), row
        if "NC" in row[3] or row[3] == "none stated":
            assert "facts only" in row[4] or row[4] == "recorded values", row
    for method in (
        "GaLore",
        "DCT-AdamW",
        "FRUGAL",
        "LDAdam",
        "APOLLO",
        "Fira",
        "Muon",
        "optax",
        "LLaMA",
    ):
        assert method in methods
    repositories = "\n".join(row[2] for row in rows)
    for recorded in traces()["rows"]:
        project = recorded["official"].split("@")[0].split(" ")[0]
        assert project in repositories or project == "torch.optim.AdamW", project


def traces():
    return json.loads((ROOT / "third_party" / "golden" / "projection_traces.json").read_text())


def test_recorded_rows_are_complete():
    rows = traces()["rows"]
    assert len({row["name"] for row in rows}) == len(rows) == 31
    for row in rows:
        assert set(row) == {"name", "method", "configuration", "official", "tolerance", "traces"}
        assert set(row["traces"]) == {"6x4", "4x6"}
        assert all(
            set(trace) == {"norm", "entry_0_0", "entry_1_2"} for trace in row["traces"].values()
        )
        assert 2e-4 <= row["tolerance"] <= 5e-2


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
@pytest.mark.parametrize("name", ["adamw_a", "adamw_b", "frugal_sign_only"])
def test_problem_as_written_gives_the_recorded_values(name, shape):
    """Anchors the problem's definition by the three methods that need no projector."""
    data = traces()
    setting = data["defaults"]
    row = next(row for row in data["rows"] if row["name"] == name)
    learning_rate, decay, b1, b2 = (
        setting[k] for k in ("learning_rate", "weight_decay", "b1", "b2")
    )
    i, j = np.arange(shape[0])[:, None], np.arange(shape[1])[None, :]
    first = weight = 0.1 * np.sin(1 + 0.7 * i + 0.3 * j**2)
    m = v = np.zeros(shape)
    for t in range(setting["steps"]):
        gradient = np.sin(0.5 + 1.3 * i * (j + 1) + 0.9 * t) + 0.5 * np.cos(
            0.2 * t * (i + 1) + 1.1 * j
        )
        m, v = b1 * m + (1 - b1) * gradient, b2 * v + (1 - b2) * gradient**2
        correction, epsilon = np.sqrt(1 - b2 ** (t + 1)), row["configuration"]["eps"]
        if name == "frugal_sign_only":
            weight = (1 - learning_rate * decay) * weight - learning_rate * np.sign(gradient)
        elif name == "adamw_a":
            direction = correction / (1 - b1 ** (t + 1)) * m / (np.sqrt(v) + epsilon)
            weight = (weight - learning_rate * direction) * (1 - learning_rate * decay)
        else:
            direction = m / (1 - b1 ** (t + 1)) / (np.sqrt(v) / correction + epsilon)
            weight = (1 - learning_rate * decay) * weight - learning_rate * direction
    moved = weight - first
    trace = row["traces"][f"{shape[0]}x{shape[1]}"]
    np.testing.assert_allclose(
        [np.linalg.norm(moved), moved[0, 0], moved[1, 2]],
        [trace["norm"], trace["entry_0_0"], trace["entry_1_2"]],
        rtol=row["tolerance"],
    )
