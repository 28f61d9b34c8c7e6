"""The figures of a report, as matplotlib figures: loss, memory ledger, step time.

Colours of runs are Okabe and Ito's, of components Tol's light scheme: told apart with any colour
vision.
"""

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import blended_transform_factory

from experiments.harness.metrics import format_bytes
from experiments.harness.runs import Run, on_one_domain

RUN_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (5, 1.5, 1, 1.5)))
COMPONENT_COLOURS = (
    "#77AADD",
    "#EE8866",
    "#44BB99",
    "#EEDD88",
    "#FFAABB",
    "#BBCC33",
    "#99DDFF",
    "#AAAA00",
    "#BBBBBB",
)
GREY = "#555555"
START = 0.08  # the part of a run whose losses may lie above the figure


def colour(index: int) -> str:
    """Of the run at this place; after seven runs the dashes change and the colours repeat."""
    return RUN_COLOURS[index % len(RUN_COLOURS)]


def smoothed(values: Sequence[float], window: int) -> np.ndarray:
    """Mean over a centred window, narrower at both ends; gaps (nan) are left out of the mean.

    >>> smoothed([1.0, 2.0, 6.0], 3).tolist()
    [1.5, 3.0, 4.0]
    """
    x = np.asarray(values, float)
    known = np.isfinite(x)
    # running sums, so that each window is a difference of two
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, x, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    centre = np.arange(len(x))
    low, high = np.maximum(centre - window // 2, 0), np.minimum(centre + window // 2 + 1, len(x))
    count = counts[high] - counts[low]
    return np.where(count > 0, (sums[high] - sums[low]) / np.maximum(count, 1), np.nan)


def _trigram_lines(runs: Sequence[Run], by_step: Any, by_time: Any) -> list[float]:
    """Draws the losses of the trigram models of the runs' texts, and gives them."""
    found = (run.final("trigram_loss") for run in runs)
    lines = sorted({round(value, 4) for value in found if value is not None})
    for value in lines:
        for axes in (by_step, by_time):
            axes.axhline(value, color=GREY, linestyle="--", linewidth=1)
        left = blended_transform_factory(by_time.transAxes, by_time.transData)
        style: dict[str, Any] = {"color": GREY, "fontsize": 8, "ha": "right", "va": "bottom"}
        by_time.text(0.99, value, f"trigram model {value:.3f}", transform=left, **style)
    return lines


def loss(runs: Sequence[Run]) -> Figure:
    """Training loss (smoothed, thin) and validation loss (markers), by updates and by time."""
    figure = _figure(10.0, 4.4)
    by_step, by_time = _axes(figure, 2)
    rows = [row for run in runs for row in run.train + run.evaluations]
    unit, seconds = _unit_of_time(max((row["seconds"] for row in rows), default=0.0))
    ends, tops, bottoms = [], [], []
    for index, run in enumerate(runs):
        # more runs than colours: each further round of colours has another dash
        dash = DASHES[index // len(RUN_COLOURS) % len(DASHES)]
        style: dict[str, Any] = {"color": colour(index), "linestyle": dash}
        window = max(1, len(run.train) // 50)  # 2 % of the run
        train = smoothed([_number(row.get("loss")) for row in run.train], window)
        evaluated = [row for row in run.evaluations if row.get("loss") is not None]
        for axes, key, scale in ((by_step, "step", 1), (by_time, "seconds", seconds)):
            x = [row[key] / scale for row in run.train]
            axes.plot(x, train, linewidth=0.9, alpha=0.4, **style)
            x, y = [row[key] / scale for row in evaluated], [row["loss"] for row in evaluated]
            axes.plot(x, y, marker="o", markersize=4.5, linewidth=1.6, **style)
        # the first steep piece would flatten all the rest, and may lie above the figure
        shown = train[int(START * len(train)) :]
        values = [
            *shown[np.isfinite(shown)],
            *(row["loss"] for row in evaluated if row["step"] > START * run.steps),
        ]
        if values:
            tops.append(max(values))
            bottoms.append(min(values))
            last = evaluated[-1]["loss"] if evaluated else values[-1]
            ends.append((last, run.name, colour(index)))
    lines = _trigram_lines(runs, by_step, by_time)
    if tops:
        top, bottom = max([*tops, *lines]), min([*bottoms, *lines])
        # a margin, and some height where all values are one
        height = top - bottom
        by_step.set_ylim(bottom - 0.06 * height - 1e-3, top + 0.04 * height + 1e-3)
    by_step.set(xlabel="update", ylabel="loss (nats per token)")
    by_time.set(xlabel=f"{unit} of training")
    for axes in (by_step, by_time):
        axes.set_xlim(left=0)
        axes.grid(axis="y", color="#e5e5e5", linewidth=0.6)
    _end_labels(by_step, ends)
    return figure


def _unit_of_time(longest: float) -> tuple[str, int]:
    """The largest unit of which a run takes more than two, and its seconds."""
    units = (("hours", 3600), ("minutes", 60), ("seconds", 1))
    return next((unit, size) for unit, size in units if longest > 2 * size or size == 1)


def memory(runs: Sequence[Run]) -> Figure:
    """The memory ledger: one stacked bar per run, of measured bytes where there are any."""
    shown = [run for run in runs if run.ledger]
    names = list(dict.fromkeys(row["component"] for run in shown for row in run.ledger))
    # a bar for each run, and rows of five names in the legend
    figure = _figure(10.0, 1.2 + 0.42 * len(shown) + 0.25 * ((len(names) + 4) // 5))
    (axes,) = _axes(figure)
    totals = [sum(ledger_bytes(row) for row in run.ledger) for run in shown]
    units = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B"))
    scale, unit = next((size, name) for size, name in units if max(totals) >= size or size == 1)
    left = np.zeros(len(shown))
    for index, name in enumerate(names):
        of_run = [
            sum(ledger_bytes(row) for row in run.ledger if row["component"] == name)
            for run in shown
        ]
        width = np.array(of_run) / scale
        # more components than colours: the further ones are hatched
        fill = COMPONENT_COLOURS[index % len(COMPONENT_COLOURS)]
        hatch = "///" if index >= len(COMPONENT_COLOURS) else None
        axes.barh(
            range(len(shown)),
            width,
            0.62,
            left=left,
            color=fill,
            hatch=hatch,
            edgecolor="white",
            linewidth=0.8,
            label=name,
        )
        left += width
    for place, total in enumerate(totals):
        axes.annotate(
            format_bytes(total),
            (total / scale, place),
            (5, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
        )
    axes.set_yticks(range(len(shown)), [run.name for run in shown])
    axes.set(xlabel=unit, xlim=(0, 1.13 * max(totals) / scale or 1), ylim=(len(shown) - 0.5, -0.5))
    axes.tick_params(axis="y", length=0)
    figure.legend(loc="outside upper center", ncols=5, frameon=False, fontsize=8.5)
    return figure


def ledger_bytes(row: dict) -> int:
    """Bytes of a ledger row: measured, else by formula, else none."""
    measured = row.get("bytes_measured")
    return int(measured if measured is not None else row.get("bytes_formula") or 0)


def step_quantiles(run: Run) -> dict[str, float]:
    """Median, 95th percentile and worst seconds of a step."""
    times = run.step_seconds
    return {
        "median": statistics.median(times),
        "95 %": float(np.quantile(times, 0.95)),
        "worst": max(times),
    }


def step_time(runs: Sequence[Run]) -> Figure:
    """Median, 95th percentile and worst step of each run, on a logarithmic axis."""
    shown = [(index, run) for index, run in enumerate(runs) if run.step_seconds]
    figure = _figure(10.0, 1.0 + 0.42 * len(shown))
    (axes,) = _axes(figure)
    for place, (index, run) in enumerate(shown):
        milliseconds = {key: 1e3 * value for key, value in step_quantiles(run).items()}
        style: dict[str, Any] = {
            "color": colour(index),
            "zorder": 3,
            "linestyle": "none",
            "markersize": 7,
        }
        axes.hlines(
            place, milliseconds["median"], milliseconds["worst"], color=colour(index), linewidth=1.2
        )
        axes.plot(milliseconds["median"], place, marker="o", **style)
        axes.plot(milliseconds["95 %"], place, marker="|", markeredgewidth=2, **style)
        axes.plot(
            milliseconds["worst"],
            place,
            marker="o",
            markerfacecolor="white",
            markeredgewidth=1.4,
            **style,
        )
        axes.annotate(
            f"{milliseconds['median']:.3g} ms",
            (milliseconds["median"], place),
            (-8, 0),
            ha="right",
            va="center",
            textcoords="offset points",
            fontsize=8.5,
        )
    low = min(1e3 * step_quantiles(run)["median"] for _, run in shown)
    high = max(1e3 * step_quantiles(run)["worst"] for _, run in shown)
    # a worst step may be a hundred times the median
    if high > 4 * low:
        axes.set_xscale("log")
        axes.set_xlim(low / (high / low) ** 0.18 / 1.1, high * 1.1)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_minor_formatter(
            lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else ""
        )
    else:
        axes.set_xlim(0, high * 1.06)
    axes.set(xlabel="milliseconds per step", ylim=(len(shown) - 0.5, -0.5))
    axes.grid(axis="x", which="both", color="#eeeeee", linewidth=0.6)
    axes.set_yticks(range(len(shown)), [run.name for _, run in shown])
    axes.tick_params(axis="y", length=0)
    return figure


def forgetting(runs: Sequence[Run]) -> Figure:
    """What fine-tuning gives and takes: loss on the base's domain against validation loss."""
    figure = _figure(7.0, 4.2)
    (axes,) = _axes(figure)
    for index, run in enumerate(runs):
        rows = [row for row in on_one_domain(run.evaluations) if row.get("loss") is not None]
        if not rows:
            continue
        x, y = [row["loss"] for row in rows], [row["domain_loss"] for row in rows]
        axes.plot(x, y, color=colour(index), linewidth=1.2, marker=".", label=run.name)
        if rows[0]["step"] == 0:  # before the first update
            axes.plot(
                x[:1], y[:1], color=colour(index), marker="o", markerfacecolor="white", markersize=8
            )
        axes.plot(x[-1:], y[-1:], color=colour(index), marker="o", markersize=8)
    axes.set(xlabel="validation loss", ylabel="loss on the base's domain")
    axes.grid(color="#eeeeee", linewidth=0.6)
    axes.legend(frameon=False, fontsize=8.5)
    return figure


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained", dpi=200)
    FigureCanvasAgg(figure)
    return figure


def _axes(figure: Figure, count: int = 1) -> list[Axes]:
    axes = list(figure.subplots(1, count, sharey=True, squeeze=False)[0])
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
        each.set_axisbelow(True)
    return axes


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def _end_labels(axes: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Names beside the right border at the height of their last values, pushed apart."""
    if not ends:
        return
    low, high = axes.get_ylim()
    gap = 0.052 * (high - low)  # the height of a line of text
    ordered = sorted(ends)
    heights = np.array([value for value, _, _ in ordered])
    # neighbours that overlap move apart, each by half
    for _ in range(50 * len(ordered)):
        overlap = np.maximum(gap - np.diff(heights), 0) / 2
        heights[:-1] -= overlap
        heights[1:] += overlap
    heights += max(0.0, low - heights[0]) - max(0.0, heights[-1] - high)
    # a thin line leads from the value to its name
    right = blended_transform_factory(axes.transAxes, axes.transData)
    for height, (value, name, tint) in zip(heights, ordered, strict=True):
        axes.plot(
            [1.0, 1.03], [value, height], transform=right, color=tint, linewidth=0.8, clip_on=False
        )
        axes.text(
            1.04,
            height,
            f"{name}  {value:.3f}",
            transform=right,
            color=tint,
            fontsize=8.5,
            va="center",
        )
