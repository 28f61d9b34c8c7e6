"""One self-contained page that compares runs: loss, memory, step time, configuration, sampled text.

    python -m experiments.report runs/adamw runs/galore --output report.html

The page needs no other file and no network; the figures are also written beside it as PNG files.
"""

import argparse
import base64
import html
import io
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from experiments.harness import outputs
from experiments.harness.metrics import format_bytes, format_seconds
from experiments.harness.runs import Run, RunError, history_lines, read_runs
from experiments.reporting import figures
from experiments.settings.sections import ConfigurationError

MISSING = "-"

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 "Source Sans 3", "Helvetica Neue", Arial, sans-serif; color: #1a1a1a; background: #fff;
       max-width: 1060px; margin: 2.2em auto; padding: 0 1.2em; }
h1 { font-size: 1.6em; margin: 0 0 .2em; } h2 { font-size: 1.15em; margin: 2em 0 .5em; }
p { margin: .3em 0 .8em; } .note, figcaption { color: #555; font-size: .9em; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92em; }
.wide { overflow-x: auto; }
th, td { padding: .28em .8em; text-align: right; white-space: nowrap; }
th { font-weight: 600; border-bottom: 1.5px solid #1a1a1a; border-top: 1.5px solid #1a1a1a; vertical-align: bottom; }
tbody tr:last-child td { border-bottom: 1.5px solid #1a1a1a; }
th:first-child, td:first-child, .text td, .text th { text-align: left; }
.headline td:nth-child(2), .headline th:nth-child(2) { text-align: left; }
.best { font-weight: 700; }
.swatch { display: inline-block; width: .75em; height: .75em; border-radius: 50%; margin-right: .5em; }
figure { margin: 0 0 1.2em; } figure img { width: 100%; height: auto; }
pre { background: #f6f6f4; padding: .8em 1em; white-space: pre-wrap; font-size: .85em; line-height: 1.4; }
details { margin: .4em 0; } summary { cursor: pointer; }
"""


def write(run_dirs: Sequence[str | Path], output: str | Path) -> Path:
    """Write the page of these run folders to `output`, and its figures beside it as PNG files.

    Args:
      run_dirs: folders that `python -m experiments.pretrain` wrote; finished or not.
      output: the HTML file, or a folder (a path without a suffix) to hold report.html; made when it
        is missing.

    Returns: the path of the page.
    Raises:
      RunError: there is no run, or a folder is none; the message names it and the remedy.
      ConfigurationError: nothing can be written there.
    """
    runs = read_runs(run_dirs)
    output = Path(output)
    output = outputs.check(
        "output", output if output.suffix else output / "report.html", is_folder=False
    )
    # a section is there where some run has something for it
    body = "\n".join(
        [
            f"<h1>{_title(runs)}</h1>",
            _origin(runs),
            _headline(runs),
            *_loss(runs, output),
            *_forgetting(runs, output),
            "<h2>Memory</h2>",
            *_memory(runs, output),
            *_step_time(runs, output),
            *_history(runs),
            "<h2>Configuration</h2>",
            *_configuration(runs),
            *_samples(runs),
        ]
    )
    document = (
        '<!doctype html>\n<html lang="en"><head><meta '
        f'charset="utf-8"><title>{_title(runs)}</title>'
    )
    text = f"{document}\n<style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    # a name of a file may hold bytes that are no character
    return outputs.write_bytes(output, text.encode(errors="replace"))


def _title(runs: Sequence[Run]) -> str:
    if len(runs) == 1:
        return f"Run {html.escape(runs[0].name)}"
    return f"{len(runs)} runs side by side"


def _loss(runs: Sequence[Run], output: Path) -> Iterable[str]:
    """Losses of training and validation, as far as they are recorded."""
    if not any(run.train or run.evaluations for run in runs):
        yield "<p class=note>No run has recorded a step yet.</p>"
        return
    caption = (
        "Thin: training loss, smoothed over 2 % of the run. Markers: validation loss, exact "
        "mean over tokens; its last value stands beside the name. The first "
        f"{figures.START:.0%} of a run may lie above the figure."
    )
    if len(_groups(runs)) > 1:
        caption += (
            " Runs of different data or tokenizers are not on one scale here: see the letters "
            "above."
        )
    yield "<h2>Loss</h2>"
    yield _picture(figures.loss(runs), output, "loss", caption)


def _forgetting(runs: Sequence[Run], output: Path) -> Iterable[str]:
    """Loss on the base's domain against the new one, of fine-tuning runs that measured it."""
    if any(row.get("domain_loss") is not None for run in runs for row in run.evaluations):
        caption = (
            "One marker an evaluation, from before the first update (open) to the last one (large, "
            "filled)."
        )
        yield "<h2>Forgetting</h2>"
        yield _picture(figures.forgetting(runs), output, "forgetting", caption)


def _step_time(runs: Sequence[Run], output: Path) -> Iterable[str]:
    """Quantiles of a step's time, as a figure and in milliseconds."""
    timed = [run for run in runs if run.step_seconds]
    if timed:
        caption = "Filled: median. Bar: 95th percentile. Open: worst. The first step is left out."
        rows = [
            [_name(runs, run), *(f"{1e3 * v:.4g}" for v in figures.step_quantiles(run).values())]
            for run in timed
        ]
        yield "<h2>Step time</h2>"
        yield _picture(figures.step_time(runs), output, "step_time", caption)
        yield _table(["run", "median ms", "95 % ms", "worst ms"], rows)


def _samples(runs: Sequence[Run]) -> Iterable[str]:
    """What each run wrote at its end."""
    samples = [(run, text) for run in runs if (text := run.summary.get("sample"))]
    if samples:
        yield "<h2>Sampled text</h2>"
    for run, text in samples:
        yield f"<p>{_name(runs, run)}</p><pre>{html.escape(str(text))}</pre>"


def _origin(runs: Sequence[Run]) -> str:
    """The versions that made the runs, each set of them once."""
    versions = {
        "; ".join(f"{k} {v}" for k, v in sorted((run.summary.get("versions") or {}).items()))
        for run in runs
    }
    text = " / ".join(sorted(html.escape(version) for version in versions if version))
    return f"<p class=note>{text}</p>" if text else ""


def _headline(runs: Sequence[Run]) -> str:
    """The table of one figure a column and one run a row."""
    letters = _groups(runs)

    def column(key, show, group):
        """The figure of each run; bold is the smallest of the finished ones of a `group`."""

        def cell(run):
            value = run.final(key)
            # an unfinished run is no rival: its figure still moves
            rivals = [one.final(key) for one in runs if one.finished and group(one) == group(run)]
            known = [rival for rival in rivals if rival is not None]
            best = run.finished and len(runs) > 1 and len(known) > 1 and value == min(known)
            return f"<span class={'best' if best else 'plain'}>{_cell(value, show)}</span>"

        return cell

    def figure(key, show):
        return lambda run: _cell(run.final(key), show)

    columns = [
        ("run", lambda run: _name(runs, run) + _status(run)),
        ("optimizer", lambda run: html.escape(str(run.final("optimizer") or ""))),
        ("parameters", figure("parameters", _millions)),
        ("trained", figure("trainable_parameters", "{:,}".format)),
        ("tokens", figure("tokens", _millions)),
        ("data", lambda run: letters[run.evaluated]),
        ("validation loss", column("validation_loss", "{:.4f}".format, lambda run: run.evaluated)),
        ("bits per byte", column("bits_per_byte", "{:.4f}".format, lambda run: run.text)),
        ("accuracy", figure("validation_accuracy", "{:.2%}".format)),
        ("perplexity", figure("perplexity", "{:.3f}".format)),
        ("base's domain, before", figure("domain_loss_before", "{:.4f}".format)),
        ("after", figure("domain_loss", "{:.4f}".format)),
        ("trigram loss", figure("trigram_loss", "{:.4f}".format)),
        ("optimizer state", figure("state_bytes", format_bytes)),
        ("median step", figure("median_step_seconds", lambda seconds: f"{1e3 * seconds:.4g} ms")),
        ("time", figure("total_seconds", format_seconds)),
    ]
    # columns of fine-tuning, and the letters where all runs have one, are left out when empty
    optional = {"trained", "accuracy", "base's domain, before", "after", "bits per byte"}
    cells = {title: [show(run) for run in runs] for title, show in columns}
    empty = {MISSING, f"<span class=plain>{MISSING}</span>"}
    titles = [
        title for title, shown in cells.items() if title not in optional or not {*shown} <= empty
    ]
    titles = [title for title in titles if title != "data" or len(letters) > 1]
    rows = [[cells[title][number] for title in titles] for number in range(len(runs))]
    return _table(titles, rows, "headline") + _apart(runs, letters)


def _groups(runs: Sequence[Run]) -> dict[str, str]:
    """{what is evaluated: its letter}, in the order of the runs."""
    found = dict.fromkeys(run.evaluated for run in runs)
    return {
        key: chr(ord("A") + number) if number < 26 else str(number)
        for number, key in enumerate(found)
    }


def _apart(runs: Sequence[Run], letters: dict[str, str]) -> str:
    """Which runs were evaluated on different tokens, or may have been, and what is known of it."""
    if len(letters) < 2:
        return ""
    # by what of the configuration of data do the groups differ?
    one_of_each = {run.evaluated: run for run in reversed(runs)}
    keys = dict.fromkeys(key for run in one_of_each.values() for key in run.data)
    differing = [
        key for key in keys if len({repr(run.data.get(key)) for run in one_of_each.values()}) > 1
    ]
    # runs of older versions say less of what they were evaluated on
    recorded = sum(run.records_tokens for run in one_of_each.values())
    is_mixed = 0 < recorded < len(letters)
    lines = []
    for key, letter in letters.items():
        told = [f"{name} = {one_of_each[key].data.get(name)!r}" for name in differing]
        if is_mixed and not one_of_each[key].records_tokens:
            told.append("an older version did not record what was evaluated")
        elif not told and recorded == 1:  # nothing to say how it differs from
            told.append("what was evaluated is recorded")
        elif not told:
            told.append("the same configuration of data, whose content or tokenizer is another")
        what = ", ".join(told)
        members = ", ".join(run.name for run in runs if run.evaluated == key)
        lines.append(f"<li>{letter}: {html.escape(members)}: {html.escape(what)}</li>")
    same = "are known to have been evaluated" if is_mixed else "were evaluated"
    text = (
        f"Not all runs {same} on the same tokens. Losses a token and perplexities compare only "
        "runs of one letter, of which the smallest is bold; bits per byte compare runs on the same "
        "text whatever their tokenizer."
    )
    return f"<p class=note>{text}</p><ul class=note>{''.join(lines)}</ul>"


def _history(runs: Sequence[Run]) -> Iterable[str]:
    """Extensions, and the runs that others started from."""
    if any(run.history for run in runs):
        yield "<h2>History</h2>"
    for run in runs:
        if run.history:
            lines = "".join(f"<li>{html.escape(line)}</li>" for line in history_lines(run.history))
            yield f"<p>{_name(runs, run)}</p><ul>{lines}</ul>"


def _status(run: Run) -> str:
    """A note on a run that did not come to its end, "" for one that did."""
    status = run.summary.get("status", "finished") if run.finished else "unfinished"
    if status == "finished":
        return ""
    return f" <span class=note>{html.escape(status)}, step {run.steps}</span>"


def _memory(runs: Sequence[Run], output: Path) -> Iterable[str]:
    """Bytes by component, of formula and of the compiled program side by side."""
    shown = [run for run in runs if run.ledger]
    if shown:
        caption = (
            "Bytes per component: measured from the compiled program where they were measured, "
            "else by formula."
        )
        yield _picture(figures.memory(runs), output, "memory", caption)
        names = list(dict.fromkeys(row["component"] for run in shown for row in run.ledger))
        header = [
            "component",
            *(f"{_name(runs, run)}<br><span class=note>formula / measured</span>" for run in shown),
        ]
        rows = []
        for name in names:
            cells = []
            for run in shown:
                row = next((row for row in run.ledger if row["component"] == name), {})
                pair = (row.get("bytes_formula"), row.get("bytes_measured"))
                cells.append(" / ".join(_cell(count, format_bytes) for count in pair))
            rows.append([html.escape(name), *cells])
        yield _table(header, rows)
    missing = [html.escape(run.name) for run in runs if not run.ledger]
    if missing:
        yield f"<p class=note>No ledger.json: {', '.join(missing)}.</p>"


def _configuration(runs: Sequence[Run]) -> Iterable[str]:
    """What differs between the runs, and all of each, folded away."""
    flat = [_flatten(run.config) for run in runs]
    if len(runs) > 1:
        keys = [
            key for key in dict.fromkeys(key for config in flat for key in config) if key != "name"
        ]
        differing = [key for key in keys if len({repr(config.get(key)) for config in flat}) > 1]
        if differing:
            rows = [
                [html.escape(key), *(_value(config.get(key)) for config in flat)]
                for key in differing
            ]
            yield _table(["differs", *(_name(runs, run) for run in runs)], rows, "text")
        else:
            yield "<p>The configurations are the same.</p>"
    for run, config in zip(runs, flat, strict=True):
        lines = html.escape("\n".join(f"{key} = {value!r}" for key, value in config.items()))
        yield f"<details><summary>All of {_name(runs, run)}</summary><pre>{lines}</pre></details>"


def _flatten(config: dict, prefix: str = "") -> dict[str, Any]:
    """Nested keys joined by dots.

    >>> _flatten({"optimizer": {"name": "galore", "rank": 32}, "name": "a"})
    {'optimizer.name': 'galore', 'optimizer.rank': 32, 'name': 'a'}
    """
    flat: dict[str, Any] = {}
    for key, value in config.items():
        is_section = isinstance(value, dict)
        flat |= _flatten(value, f"{prefix}{key}.") if is_section else {f"{prefix}{key}": value}
    return flat


def _name(runs: Sequence[Run], run: Run) -> str:
    swatch = f'<span class=swatch style="background:{figures.colour(runs.index(run))}"></span>'
    return swatch + html.escape(run.name)


def _value(value: Any) -> str:
    return MISSING if value is None else html.escape(str(value))


def _cell(value: Any, show) -> str:
    return MISSING if value is None else show(value)


def _millions(count: float) -> str:
    return f"{count / 1e6:,.2f} M"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "numbers") -> str:
    head = "".join(f"<th>{cell}</th>" for cell in header)
    body = "\n".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        "<div class=wide><table "
        f'class="{kind}"><thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'
    )


def _picture(figure: Figure, output: Path, name: str, caption: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    outputs.write_bytes(output.with_name(f"{output.stem}_{name}.png"), buffer.getvalue())
    data = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<figure><img alt="{name}" '
        f'src="data:image/png;base64,{data}"><figcaption>{caption}</figcaption></figure>'
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: run folders, and where to write."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.report", description=__doc__.splitlines()[0]
    )
    parser.add_argument("runs", nargs="*", metavar="RUN", help="folder of a run")
    parser.add_argument(
        "--output",
        default="report.html",
        help="the page to write, or a folder for it (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    try:
        print(write(options.runs, options.output))
    except (RunError, ConfigurationError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"report: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
