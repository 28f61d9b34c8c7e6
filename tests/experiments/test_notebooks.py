"""The notebooks run, cell by cell, in the order in which they stand."""

import json
from pathlib import Path

import matplotlib
import pytest

NOTEBOOKS = sorted((Path(__file__).parents[2] / "experiments" / "notebooks").glob("*.ipynb"))


def test_the_notebooks_are_there():
    assert [path.stem for path in NOTEBOOKS] == ["adapting_a_model", "building_blocks"]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, capsys):
    matplotlib.use("Agg")
    from matplotlib import pyplot

    cells = json.loads(path.read_text())["cells"]
    namespace: dict = {}
    try:
        for number, cell in enumerate(cells):
            if cell["cell_type"] == "code":
                exec(
                    compile("".join(cell["source"]), f"{path.name}, cell {number}", "exec"),
                    namespace,
                )
        assert pyplot.get_fignums() and capsys.readouterr().out
    finally:
        pyplot.close("all")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_shows_its_results(path):
    """Committed with outputs, pictures among them, in order, and with nothing of the machine it ran
    on."""
    text = path.read_text()
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert any(
        "image/png" in output.get("data", {}) for cell in cells for output in cell["outputs"]
    )
    assert all(output["output_type"] != "error" for cell in cells for output in cell["outputs"])
    assert "/home/" not in text and "/work" not in text and "/tmp" not in text
