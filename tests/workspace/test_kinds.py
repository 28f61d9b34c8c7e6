"""What stands in an array's place is known by its class, and is asked by the verbs of that class."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "lowrank_jax"
VERBS = {"dequantize", "requantize", "specs", "dot_general", "multiply", "blocks", "bound", "tap"}


def questions(source: str) -> list[str]:
    """The attributes that a source asks an object for by name, to learn of what kind it is."""
    return [
        node.args[1].value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in ("hasattr", "getattr")
        and len(node.args) > 1
        and isinstance(node.args[1], ast.Constant)
    ]


def test_kernels_and_codes_are_told_apart_by_class():
    assert questions('hasattr(x, "dequantize") or getattr(y, "specs", None)') == [
        "dequantize",
        "specs",
    ]
    asked = {
        f"{path.relative_to(PACKAGE)}: {verb}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for verb in questions(path.read_text())
        if verb in VERBS
    }
    assert not asked, "ask isinstance(x, KernelNode) or trees.is_quantized(x)"
