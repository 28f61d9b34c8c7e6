"""Rows of plans as a table on the terminal, as the tables of a page, and as a figure of stacked bars."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.reporting.markdown import aims, markdown, mebibytes

GIB = 2**30
PARTS = ("parameters", "bases", "moments", "other state", "temporaries", "program")
_STATE = {"basis": "bases", "moments": "moments"}


def parts(row: dict[str, Any]) -> dict[str, float]:
    """Bytes of a chip by PARTS; of a program that was not placed, temporaries and program are not
    known apart."""
    found = dict.fromkeys(PARTS, 0.0)
    for entry in row["components"]:
        name = entry["component"]
        found["parameters" if name == "parameters" else _STATE.get(name, "other state")] += entry[
            "bytes"
        ]
    found["temporaries"] = row.get("temporary_bytes", row["peak_bytes"] - row["argument_bytes"])
    found["program"] = row.get("code_bytes", 0)
    return found


def state_bytes(row: dict[str, Any]) -> tuple[float, float]:
    """Optimizer state of a chip, and the whole state over the number of chips."""
    rows = [entry for entry in row["components"] if entry["component"] != "parameters"]
    return sum(entry["bytes"] for entry in rows), sum(entry["share_bytes"] for entry in rows)


def _verdict(row: dict[str, Any]) -> str:
    return {True: "yes", False: "NO", None: "-"}[row["fits"]]


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}" if size >= 0.01 * GIB or size == 0 else f"{size / GIB:.1g}"


def _cells(row: dict[str, Any]) -> list[str]:
    own, sizes = parts(row), ",".join(f"{name}={size}" for name, size in row["mesh"].items())
    moved = row.get("collectives", {}).get("normal")
    state = state_bytes(row)[0]
    more = ">" if not row["placed"] else ""
    limit = "-" if row["limit_bytes"] is None else _gib(row["limit_bytes"])
    return [
        row["preset"],
        row["topology"],
        sizes or "-",
        row["name"],
        row["gradients_by"],
        _gib(own["parameters"]),
        _gib(state),
        more + _gib(own["temporaries"]),
        _gib(own["program"]),
        more + _gib(row["peak_bytes"]),
        limit,
        _verdict(row),
        f"{row['flops'] / row['chips'] / 1e12:.3g}",
        "-" if moved is None else _gib(sum(moved.values())),
        f"{row['compile_seconds']:.0f}",
    ]


HEADER = [
    "preset",
    "target",
    "mesh",
    "optimizer",
    "gradients",
    "parameters",
    "state",
    "temporaries",
    "program",
    "peak",
    "of",
    "fits",
    "TFLOP",
    "moved",
    "compile, s",
]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Columns on the terminal: GiB, TFLOP and GiB moved of one chip in one update; failures as
    lines below."""
    shown = [row for row in rows if "error" not in row]
    lines = [HEADER, *(_cells(row) for row in shown)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADER))]
    text = []
    for line in lines:
        cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        text.append("  ".join(cells).rstrip())
    failed = [f"failed: {row['error']}" for row in rows if "error" in row]
    return "\n".join(text + failed)


def details(row: dict[str, Any]) -> str:
    """Everything about one row."""
    own, share = state_bytes(row)
    scale, unit = (GIB, "GiB") if row["peak_bytes"] >= GIB else (2**20, "MiB")
    lines = [
        f"{row['preset']} on {row['topology']} ({row['chips']} devices), {row['name']}: gradients "
        f"{row['gradients_by']}; {row['rows_per_chip']} rows of {row['length']} at once on a chip"
    ]
    lines.append(f"{'bytes of a chip':<32}{unit:>9}  whole / chips")
    for entry in row["components"]:
        lines.append(
            f"  {entry['component']:<30}{entry['bytes'] / scale:>9.3f}{entry['share_bytes'] / scale:>9.3f}"
        )
    lines.append(f"  {'state in all':<30}{own / scale:>9.3f}{share / scale:>9.3f}")
    if row["placed"]:
        lines.append(f"  {'temporaries':<30}{row['temporary_bytes'] / scale:>9.3f}")
        lines.append(f"  {'program':<30}{row['code_bytes'] / scale:>9.3f}")
    told = {
        name.replace("_", " "): size / scale for name, size in row["temporaries"].items() if size
    }
    known = ", ".join(f"{name} {size:.3f}" for name, size in told.items())
    lines.append(
        f"  of the temporaries, by formula: {known}; the compiler does not tell them apart"
    )
    limit = "" if row["limit_bytes"] is None else f" of {row['limit_bytes'] / scale:.3f}"
    least = "" if row["placed"] else "at least "
    fits = {True: "fits", False: "does NOT fit", None: "no limit known"}[row["fits"]]
    lines.append(f"  {'peak':<30}{least}{row['peak_bytes'] / scale:>9.3f}{limit}: {fits}")
    speed = (
        ""
        if row["seconds_at_peak"] is None
        else f"; at the chip's peak {row['seconds_at_peak'] * 1e3:.3g} ms"
    )
    lines.append(f"FLOP of an update, all chips, by formula: {row['flops']:.4g}{speed}")
    if row["placed"]:
        if row["compiler_flops"]:
            lines.append(
                f"FLOP of a chip, by the compiler: {row['compiler_flops']:.4g} (a loop's body "
                "counted once, branches not taken too)"
            )
        for name, title in (
            ("normal", "between refreshes"),
            ("with_refresh", "with the branch of a refresh"),
        ):
            moved = row["collectives"][name]
            text = ", ".join(f"{kind} {size / scale:.3f}" for kind, size in moved.items()) or "none"
            lines.append(f"collectives of a chip, {unit}, {title}: {text}")
    lines.append(
        f"traced in {row['trace_seconds']:.1f} s, compiled in {row['compile_seconds']:.1f} s"
    )
    return "\n".join(lines)


def _label(row: dict[str, Any]) -> str:
    mesh = ",".join(f"{axis}={size}" for axis, size in row["mesh"].items())
    return " ".join([row["preset"], row["topology"], mesh, row["name"]])


def figure(rows: Sequence[dict[str, Any]]) -> Any:
    """One bar for each row: a chip's bytes by component, with the chip's limit as a line; a
    matplotlib figure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [row for row in rows if "error" not in row]
    canvas = Figure(figsize=(10.0, 1.4 + 0.34 * len(shown)), layout="constrained", dpi=150)
    FigureCanvasAgg(canvas)
    axes = canvas.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    ends = _bars(axes, shown)
    _limits(axes, shown, ends)
    axes.set_yticks(range(len(shown)), [_label(row) for row in shown], fontsize=8)
    limits = [(row["limit_bytes"] or 0) / GIB for row in shown]
    right = max([*ends, *limits], default=1.0)
    # room for the text on the right of the longest bar
    axes.set(xlabel="GiB of one chip", xlim=(0, 1.16 * right or 1), ylim=(len(shown) - 0.4, -0.6))
    axes.tick_params(axis="y", length=0)
    canvas.legend(loc="outside upper center", ncols=7, frameon=False, fontsize=8)
    return canvas


def _bars(axes: Any, shown: Sequence[dict[str, Any]]) -> np.ndarray:
    """Draws the components one after the other; where each bar ends, in GiB."""
    from experiments.reporting.figures import COMPONENT_COLOURS

    left = np.zeros(len(shown))
    for index, name in enumerate(PARTS):
        width = np.array([parts(row)[name] for row in shown]) / GIB
        if width.any():
            axes.barh(
                range(len(shown)),
                width,
                0.66,
                left=left,
                color=COMPONENT_COLOURS[index],
                edgecolor="white",
                linewidth=0.6,
                label=name,
            )
        left += width
    return left


def _limits(axes: Any, shown: Sequence[dict[str, Any]], ends: np.ndarray) -> None:
    """Draws each chip's memory as a line, and writes the peak beside the bar."""
    drawn = False
    for place, row in enumerate(shown):
        limit = row["limit_bytes"]
        if limit is not None:
            # the legend names the lines once
            label = None if drawn else "the chip's memory"
            x, y = [limit / GIB] * 2, [place - 0.42, place + 0.42]
            axes.plot(x, y, color="black", linewidth=1.4, label=label)
            drawn = True
        verdict = "" if row["fits"] is not False else "  does not fit"
        text = f"{row['peak_bytes'] / GIB:.2f}{verdict}"
        end = max(ends[place], (limit or 0) / GIB)
        offset = {"xytext": (5, 0), "textcoords": "offset points"}
        axes.annotate(text, (end, place), **offset, va="center", fontsize=8)


def plans(result: dict[str, Any]) -> str:
    """The tables of `docs/results/plans.md`: the rows, predictions against a process, the aims."""
    lines = []
    for row in result["rows"]:
        cells, (own, share) = _cells(row), state_bytes(row)
        fits = {True: "yes", False: "**no**", None: "-"}[row["fits"]]
        mesh = ", ".join(f"{name} {size}" for name, size in row["mesh"].items()) or "one card"
        lines.append(
            [
                f"{row['preset']}, {row['topology']}",
                mesh,
                row["name"],
                *cells[5:7],
                f"{own / share:.3f}",
                cells[7],
                cells[9],
                fits,
                cells[12],
                cells[13],
            ]
        )
    header = ["model, target", "mesh", "optimizer, gradients", "parameters, GiB a chip", "state"]
    header += ["state over whole / chips", "temporaries", "peak", "fits", "TFLOP", "moved, GiB"]
    notes = [
        f"`{result['command']}`: one chip in one update, {result['length']} tokens a row, by the "
        "target's compiler; nothing was run. Moved: what collectives give between two refreshes."
    ]
    if result["not_reached"]:
        notes.append(f"Not reached yet: {len(result['not_reached'])} of {result['wanted']} rows.")
    found = [markdown(header, lines), " ".join(notes)]
    if result["reality"]:
        found += [
            _reality(result["reality"]),
            (
                "Small programs that ran here, all devices together: what the compiler said and "
                "what the process took (its resident memory at most in a step, less that before; "
                "the last column is what that shows where there is nothing to show)."
            ),
        ]
    return "\n\n".join([*found, aims(result["aims"], bound="bound")])


def _reality(rows: Sequence[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        took, chips = row["measured"], row["chips"]
        predicted = chips * row["temporary_bytes"]
        lines.append(
            [
                f"{row['preset']}, {row['topology']}",
                row["name"],
                *(
                    mebibytes(size)
                    for size in (
                        chips * row["argument_bytes"],
                        took["argument_bytes"],
                        predicted,
                        took["temporary_bytes"],
                    )
                ),
                f"{took['temporary_bytes'] / predicted - 1:+.1%}",
                mebibytes(took["error_bytes"]),
            ]
        )
    header = [
        "model, target",
        "optimizer, gradients",
        "arguments, MiB",
        "took",
        "temporaries, MiB",
        "took",
    ]
    return markdown([*header, "difference", "of nothing, MiB"], lines)
