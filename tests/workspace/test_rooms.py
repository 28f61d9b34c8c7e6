"""Which file of the library may import which: tiers from below to above, and no circle anywhere.

An import that stands in a function or under `TYPE_CHECKING` counts like any other: a circle that is hidden is a circle.
"""

import ast
import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "lowrank_jax"

# From below to above. A file imports what stands before it in its own tier, and anything below; of a
# room (a folder) the files import each other, without circles.
TIERS = (
    ("version", "deprecations", "reprs", "typing", "codes", "trees", "checks", "serialization"),
    ("sharding", "rows"),
    ("matrices",),
    ("kernel_node", "default_views", "resolution"),
    ("linalg",),
    ("kernels",),
    ("quantized", "functions", "optim"),
    ("projection", "adapters", "factorized"),
    ("memory", "linen", "nnx", "interop"),
)
PLACE = {
    name: (tier, place) for tier, names in enumerate(TIERS) for place, name in enumerate(names)
}


def module_of(path: Path, root: Path = ROOT) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules(package: Path = PACKAGE) -> dict[str, Path]:
    return {module_of(path, package.parent): path for path in sorted(package.rglob("*.py"))}


def imported(path: Path, known: dict[str, Path], root: Path = ROOT) -> set[str]:
    """The modules of `known` that a file imports, wherever in the file that stands."""
    here = module_of(path, root)
    package = here if path.name == "__init__.py" else here.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            name = "." * node.level + (node.module or "")
            base = importlib.util.resolve_name(name, package) if node.level else name
            # `from a import b` imports the module a.b where there is one, and else a
            found |= {
                f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base
                for alias in node.names
            }
    return {name for name in found if name in known} - {here}


def graph(package: Path = PACKAGE) -> dict[str, set[str]]:
    known = modules(package)
    return {name: imported(path, known, package.parent) for name, path in known.items()}


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """The sets of files that import each other, found as strongly connected components."""
    order: list[str] = []
    seen: set[str] = set()

    def visit(name, arrows, into):
        stack = [(name, iter(sorted(arrows[name])))]
        seen.add(name)
        while stack:
            top, rest = stack[-1]
            for other in rest:
                if other not in seen:
                    seen.add(other)
                    stack.append((other, iter(sorted(arrows[other]))))
                    break
            else:
                stack.pop()
                into.append(top)

    for name in sorted(edges):
        if name not in seen:
            visit(name, edges, order)
    back: dict[str, set[str]] = {name: set() for name in edges}
    for name, others in edges.items():
        for other in others:
            back[other].add(name)
    seen.clear()
    found = []
    for name in reversed(order):
        if name not in seen:
            component: list[str] = []
            visit(name, back, component)
            if len(component) > 1:
                found.append(sorted(component))
    return found


def room(module: str) -> str:
    return module.split(".")[1]


def test_every_file_imports_downwards():
    wrong = []
    for name, others in graph().items():
        if name == "lowrank_jax":  # the public surface, which imports everything
            continue
        assert room(name) in PLACE, f"{name}: give the room {room(name)} a place in TIERS"
        for other in others:
            if other == "lowrank_jax":
                wrong.append(f"{name} imports the public surface; import the file that has it")
            elif room(other) != room(name) and PLACE[room(other)] >= PLACE[room(name)]:
                wrong.append(f"{name} imports {other}, which stands above it")
    assert not wrong


def test_there_is_no_circle():
    assert not circles(graph())


def test_nothing_is_imported_for_types_alone():
    hidden = [
        name
        for name, path in modules().items()
        if any(
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            for node in ast.walk(ast.parse(path.read_text()))
        )
    ]
    assert not hidden


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from ..linalg import svd", "lowrank_jax.linalg"),
        ("from .. import linalg", "lowrank_jax.linalg"),
        ("import lowrank_jax.linalg", "lowrank_jax.linalg"),
        ("from lowrank_jax import linalg", "lowrank_jax.linalg"),
        ("from .state import x", "lowrank_jax.projection.state"),
        ("def f():\n    from lowrank_jax.linalg import svd", "lowrank_jax.linalg"),
        ("if TYPE_CHECKING:\n    from lowrank_jax import linalg", "lowrank_jax.linalg"),
    ],
)
def test_every_spelling_of_an_import_is_seen(tmp_path, source, expected):
    package = tmp_path / "lowrank_jax"
    for name in ("linalg", "projection/state", "projection/one"):
        file = package / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("from lowrank_jax.projection import one\n" if "/" not in name else "")
    (package / "projection" / "one.py").write_text(source)
    found = graph(package)
    assert expected in found["lowrank_jax.projection.one"]
    assert bool(circles(found)) is (expected == "lowrank_jax.linalg")
