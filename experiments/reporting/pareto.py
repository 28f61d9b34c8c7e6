"""The figure of the study of optimizers: `python -m experiments.reporting.pareto` writes
docs/results/compare.png from the committed result.

Loss against what a method costs: bytes of state, seconds of a step, bytes that replicas reduce. The
line joins the methods than which no other is both cheaper and better.
"""

import hashlib
import io
import json
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.harness import outputs
from experiments.reporting.figures import GREY, RUN_COLOURS
from lowrank_jax.interop import documents

ROOT = pathlib.Path(__file__).parents[2]
RESULT = ROOT / "experiments" / "results" / "compare.json"
PICTURE = ROOT / "docs" / "results" / "compare.png"
COSTS = {
    "state_bytes": ("state, MiB", 2**-20),
    "step_seconds": ("step, ms", 1e3),
    "reduced_bytes": ("reduced in a step, MiB", 2**-20),
}
FRONT, OTHERS = RUN_COLOURS[1], RUN_COLOURS[0]


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which of `(cost, loss)` no other beats in both, by cost.

    >>> front([(3.0, 1.0), (1.0, 2.0), (2.0, 3.0), (1.0, 2.5)])
    [1, 0]
    """
    found: list[int] = []
    for index in sorted(range(len(points)), key=points.__getitem__):
        if not found or points[index][1] < points[found[-1]][1]:
            found.append(index)
    return found


def digest(rows: Sequence[Mapping[str, Any]]) -> str:
    """Of what the figure shows, which its file carries."""
    names = ("method", "validation_loss", *COSTS)
    shown = [[row[name] for name in names] for row in rows]
    return hashlib.sha256(json.dumps(shown).encode()).hexdigest()


def figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """A panel a cost; losses above the frame, of which one would hide the rest, lie on its edge."""
    made = Figure(figsize=(11.0, 6.5 * len(COSTS)), layout="constrained")
    FigureCanvasAgg(made)
    panels = made.subplots(len(COSTS), 1)
    losses = [row["validation_loss"] for row in rows]
    lowest, middle = min(losses), statistics.median(losses)
    top = min(max(losses), middle + 1.5 * (middle - lowest))
    for panel, (name, (label, unit)) in zip(panels, COSTS.items(), strict=True):
        known = [row for row in rows if row[name] is not None]
        points = [(row[name] * unit, min(row["validation_loss"], top)) for row in known]
        best = front(points)
        costs, best_losses = ([points[i][axis] for i in best] for axis in (0, 1))
        panel.step(costs, best_losses, where="post", color=FRONT, lw=1)
        for index, (point, row) in enumerate(zip(points, known, strict=True)):
            on_front = index in best
            panel.plot(*point, "o", ms=5, color=FRONT if on_front else OTHERS)
            style: dict[str, Any] = {"color": "black" if on_front else GREY}
            # labels above and below in turns: neighbours by loss would cover each other
            above = index % 2 == 0
            style |= {"xytext": (3, 3 if above else -3), "va": "bottom" if above else "top"}
            panel.annotate(row["method"], point, textcoords="offset points", fontsize=7, **style)
        panel.set_xscale("log")
        panel.set_xlabel(label)
        panel.set_ylabel("validation loss, nats a byte")
        panel.grid(alpha=0.3, which="both")
        panel.margins(x=0.12)
    return made


def main() -> None:
    """Writes the figure."""
    rows = documents.read(RESULT, dict)["rows"]
    made = figure(sorted(rows, key=lambda row: row["validation_loss"]))
    buffer = io.BytesIO()
    made.savefig(buffer, dpi=110, metadata={"Description": digest(rows)})
    outputs.write_bytes(PICTURE, buffer.getvalue())


if __name__ == "__main__":
    main()
