"""Tables of the documents, generated from the committed results: `python -m
experiments.reporting.tables` rewrites them in place.

A table stands on one page, README.md or below docs/, between `<!-- begin:NAME -->` and
`<!-- end:NAME -->`; `--check` exits 1 where a page and the results differ.
"""

import argparse
import math
import pathlib
import re
import statistics
import sys
from collections.abc import Callable

from experiments.harness import outputs
from experiments.planning.report import plans
from experiments.reporting.markdown import VERDICTS, aims, markdown, mebibytes, milliseconds
from lowrank_jax.interop import documents

ROOT = pathlib.Path(__file__).parents[2]
RESULTS = pathlib.Path(__file__).parents[1] / "results"


def methods(result: dict) -> str:
    """What each method keeps, and what it was checked against."""
    header = [
        "method",
        "function",
        "state of a matrix that shrinks s to r and keeps k",
        "checked against",
    ]
    names = lambda row: ", ".join(f"`{name}`" for name in row["function"].split(", "))  # noqa: E731
    rows = [[row["method"], names(row), row["state"], row["checked"]] for row in result["rows"]]
    return markdown(header, rows)


def adapters(result: dict) -> str:
    """What each adapter trains, how it starts, and what its comparison with PEFT covered."""
    header = [
        "adapter",
        "`lrx.adapters.`",
        "trained numbers",
        "delta at the start",
        "compared with PEFT",
    ]
    rows = [
        [
            row["adapter"],
            f"`{row['function']}`",
            *(row[name] for name in ("trained", "start", "checked")),
        ]
        for row in result["rows"]
    ]
    return (
        markdown(header, rows)
        + f"\n\n`{result['command']}` repeats the comparison: outputs within 1e-5."
    )


def study(result: dict) -> str:
    """Validation loss with AdamW's spread as the measure of a tie."""
    rows = result["rows"]
    reference = next((row for row in rows if row["method"] == "AdamW"), None)
    lines = []
    for row in rows:
        verdict = "" if reference is None or row is reference else _verdict(row, reference)
        seeds = f"{row['seeds']}" + ("" if row["complete"] else " (unfinished)")
        lines.append(
            [
                row["method"],
                f"{row['learning_rate']:g}",
                seeds,
                f"{row['validation_loss']:.4f}",
                f"{row['spread']:.4f}",
                verdict,
                mebibytes(row["state_bytes"]),
                milliseconds(row["step_seconds"]),
                *([mebibytes(row["reduced_bytes"])] if "reduced_bytes" in row else []),
            ]
        )
    header = ["optimizer", "best lr", "seeds", "validation loss", "max - min", "against AdamW"]
    header += ["state, MiB", "step, ms"]
    header += ["reduced, MiB"] if rows and "reduced_bytes" in rows[0] else []
    note = (
        f"`{result['command']}`: {result['preset']} preset, rank {result['rank']}, "
        f"{result['steps']} updates of {result['tokens_per_update']} tokens, {result['runs']} runs "
        f"in {result['spent_hours']:g} of {result['budget_hours']:g} hours, {result['device']}. A "
        "difference inside AdamW's spread is a tie."
    )
    diverged, missing = ", ".join(result.get("diverged") or []), result.get("missing")
    note += f" Diverged: {diverged}." if diverged else ""
    note += f" Not run yet: {missing}." if missing else ""
    return markdown(header, lines) + "\n\n" + note


def compare(result: dict) -> str:
    """The study of all optimizers, the lowest loss first."""
    by_loss = lambda row: (not math.isfinite(row["validation_loss"]), row["validation_loss"])  # noqa: E731
    return study(result | {"rows": sorted(result["rows"], key=by_loss)})


def _verdict(row: dict, reference: dict) -> str:
    if not (row["complete"] and reference["complete"]):
        return "open"
    difference = row["validation_loss"] - reference["validation_loss"]
    if not math.isfinite(difference):
        return "diverged"
    spread = max(reference["spread"], row["spread"])
    return (
        "tie"
        if abs(difference) <= spread
        else f"{'worse' if difference > 0 else 'better'} by {abs(difference):.3f}"
    )


def train(result: dict) -> str:
    """The run of `make train` against its aim."""
    loss, trigram, seconds = (
        result[name] for name in ("validation_loss", "trigram_loss", "total_seconds")
    )
    rows = [
        ["parameters", f"{result['parameters']:,}"],
        ["tokens", f"{result['tokens']:,}"],
        ["validation loss (nats per byte)", f"{result['validation_loss']:.4f}"],
        ["trigram model of the training text", f"{result['trigram_loss']:.4f}"],
        ["optimizer state", f"{mebibytes(result['state_bytes'])} MiB"],
        ["training time, 2 cores", f"{result['total_seconds']:.0f} s"],
    ]
    of = "`make train`"
    found = [
        {
            "aim": "validation loss, of the trigram model's",
            "of": of,
            "value": loss / trigram,
            "bound": 1,
            "met": loss < trigram,
        },
        {
            "aim": "training time, seconds",
            "of": of,
            "value": seconds,
            "bound": 300,
            "met": seconds <= 300,
        },
    ]
    return markdown([of, ""], rows) + "\n\n" + aims(found)


def optimizer_step(result: dict) -> str:
    """Times and bytes of one step, then every aim with what was measured."""
    rows = [
        [
            row["optimizer"],
            milliseconds(row["normal_seconds"]),
            f"{row['normal_over_adamw']:.2f}",
            milliseconds(row["worst_seconds"]),
            f"{row['worst_over_normal']:.2f}",
            milliseconds(row["amortised_seconds"]),
            mebibytes(row["state_bytes"]),
            mebibytes(row["temporary_bytes"]),
        ]
        for row in result["rows"]
    ]
    header = [
        "optimizer",
        "normal, ms",
        "of AdamW",
        "worst, ms",
        "of normal",
        "mean, ms",
        "state, MiB",
        "temporary, MiB",
    ]
    reference = result["reference"]
    note = (
        f"`{result['command']}`: {result['parameters'] / 1e6:.2f} M parameters in the block "
        f"kernels, rank {result['rank']}, medians of {result['repetitions']} interleaved steps "
        f"(refreshes: {result['refresh_repetitions']}), {result['machine']['cores']} cores. Own "
        f"arithmetic of two thin products {milliseconds(reference['own_arithmetic_seconds'])} ms "
        f"at the {reference['matmul_flops_per_second'] / 1e9:.0f} GFLOP/s of a square product, "
        f"AdamW's memory traffic {milliseconds(reference['adamw_traffic_seconds'])} ms. Where "
        "every step refreshes, normal is worst."
    )
    return "\n\n".join([markdown(header, rows), note, aims(result["aims"])])


def training_step(result: dict) -> str:
    """Whole steps: clock beside operations, then bytes, then every aim."""
    parts = []
    for part in result["tables"]:
        rows = [
            [
                row["case"],
                milliseconds(row["seconds"]),
                f"{row['clock_ratio']:.3f}",
                f"{row['operations_ratio']:.3f}",
                "-" if "amortised_ratio" not in row else f"{row['amortised_ratio']:.3f}",
                mebibytes(row["bytes"]),
                mebibytes(row["state_bytes"]),
            ]
            for row in part["rows"]
        ]
        header = [
            part["part"],
            "normal, ms",
            "of AdamW",
            "operations, of AdamW's",
            "with refreshes, of AdamW",
        ]
        parts.append(markdown([*header, "parameters + temporaries, MiB", "state, MiB"], rows))
    note = (
        f"`{result['command']}`: {result['tokens']} tokens in sequences of {result['length']}, "
        f"medians of {result['repetitions']} interleaved steps, {result['machine']['cores']} "
        "cores; refreshes every 200 steps, by exact SVD unless the row says alternating."
    )
    if result["losses"] is not None:
        found = result["losses"]
        note += (
            f" Over {found['steps']} updates of nano the losses of projected and full gradients "
            f"differ by at most {found['largest_difference']:.1e}."
        )
    return "\n\n".join([*parts, note, aims(result["aims"])])


def peer_training_step(result: dict) -> str:
    """Whole steps of PyTorch and of this library, in turns in one run, and the aim."""
    rows = [
        [
            row["case"],
            row["program"],
            milliseconds(row["seconds"]),
            f"{row['of_peer']:.2f}",
            milliseconds(row["processor_seconds"]),
            f"{row['processor_of_peer']:.2f}",
        ]
        for row in result["rows"]
    ]
    header = [
        "whole step",
        "program",
        "ms",
        "of PyTorch's AdamW",
        "processor time, ms",
        "of PyTorch's",
    ]
    versions = result["machine"]["versions"]
    note = (
        f"`{result['command']}`: {result['preset']} preset, float32, {result['tokens']} tokens in "
        f"sequences of {result['length']}, medians of {result['repetitions']} steps in turns, "
        f"{result['threads']} threads each; torch {versions['torch']}, transformers "
        f"{versions['transformers']}, jax {versions['jax']}. From the same weights the first "
        f"losses differ by {result['loss_difference']:.0e}. Ratios are to PyTorch's faster AdamW."
    )
    return "\n\n".join([markdown(header, rows), note, aims(result["aims"])])


def data_parallel(result: dict) -> str:
    """Reduced bytes of a step, in all and of the kernels that have taps."""
    rows, reference = [], result["rows"][0]
    for row in result["rows"]:
        blocks, ratio = row["block_bytes"], reference["block_bytes"] / row["block_bytes"]
        largest = "; ".join(
            f"{row['times']} x ({', '.join(map(str, row['shape']))})"
            for row in row["tensors"]
            if len(row["shape"]) > 1
        )
        rows.append(
            [
                row["case"],
                mebibytes(row["bytes"]),
                mebibytes(blocks),
                f"{ratio:.1f} x fewer",
                largest,
            ]
        )
    header = [
        "all-reduced in a step",
        "MiB",
        "kernels of the blocks, MiB",
        "of AdamW's",
        "matrices",
    ]
    note = (
        f"`{result['command']}`: {result['preset']} preset on {result['devices']} fake devices, "
        "read from the program."
    )
    return markdown(header, rows) + "\n\n" + note


def refresh_subspaces(result: dict) -> str:
    """Subspaces of refreshes in a run, as shares of what the exact SVD's captures, and the losses
    of the runs."""
    rows = []
    for row in result["rows"]:
        losses = ", ".join(f"{loss:.4f}" for loss in row["validation_losses"])
        rows.append(
            [
                row["refresh"],
                str(row["period"]),
                row["reads"],
                f"{row['largest_angle']:.1f}°",
                f"{row['median_angle']:.1f}°",
                f"{row['step_share']:.3f}",
                f"{row['window_share']:.3f}",
                f"{row['window_energy_svd']:.3f}",
                losses + ("" if row["runs"] == row["wanted"] else " (unfinished)"),
            ]
        )
    header = [
        "refresh",
        "every",
        "reads gradients",
        "largest angle to SVD's",
        "median angle",
        "energy of its gradient",
    ]
    header += ["of the next window's", "which SVD's captures", "validation loss, by seed"]
    note = (
        f"`{result['command']}`: {result['preset']} preset, rank {result['rank']}, "
        f"{result['steps']} updates of {result['tokens_per_update']} tokens, projected backprop, "
        f"every refresh after its update; {result['cpu_minutes']:g} minutes on one core. Energies "
        "are over those of the exact SVD of the same gradient in the same run; means over "
        "matrices, refreshes and seeds."
    )
    return markdown(header, rows) + "\n\n" + note


def memory_7b(result: dict) -> str:
    """Memory of the compiled 7B steps, in GiB: of one card, then of one chip of a slice."""
    names = ("parameter", "plain", "basis", "moment", "temporary", "peak")
    sizes = lambda row: [f"{row[f'{name}_bytes'] / 2**30:.2f}" for name in names]  # noqa: E731
    header = ["parameters, GiB", "plain state", "bases", "moments", "temporary", "peak"]
    card, slice_rows = [], []
    for row in result.get("card_rows", ()):
        aim = ["-", "-"] if row["met"] is None else [f"{row['bound_gib']:g}", VERDICTS[row["met"]]]
        card.append([row["weights"], str(row["rank"]), row["refresh"], *sizes(row), *aim])
    for row in result.get("slice_rows", ()):
        rank, bases = (
            ("-", "-")
            if row["rank"] == 0
            else (str(row["rank"]), "split" if row["split"] else "whole")
        )
        slice_rows.append([row["optimizer"], row["form"], rank, row["refresh"], bases, *sizes(row)])
    parts, command, length = [], result["command"], result["length"]
    if card:
        inputs = result["card_rows"][0]["input_bytes"] / 2**30
        parts += [
            markdown(["weights", "rank", "refresh", *header, "aim, below", "met or missed"], card),
            (
                f"`{command} --part card`: compiled for one {result['device']}, sequence {length}, "
                "batch 1, layer-wise step, 8-bit moments, int8 basis, stochastic rounding. A "
                "program with a refresh holds the step between two as well. Of the temporaries "
                f"{inputs:.2f} GiB are the inputs of the layers. Nothing was run."
            ),
        ]
    if slice_rows:
        parts += [
            markdown(["optimizer", "form", "rank", "refresh", "bases", *header], slice_rows),
            (
                f"`{command} --part slice`: one chip of {result['slice']}, one sequence of "
                f"{length} on each, float32 parameters and state split over the chips, products in "
                "bfloat16. Nothing was run."
            ),
        ]
    return "\n\n".join(parts)


def kernels(result: dict) -> str:
    """Each kernel on each chip beside XLA's program, over all its matrices and parts, and what was
    decided."""
    header = ["kernel", "chip", "programs", "bytes moved below XLA's: least, median, most"]
    header += ["temporaries at most, MiB: XLA's", "the kernel's", "operations below XLA's, at most"]
    # all programs of a kernel on a chip are one row
    groups: dict[tuple[str, str], list[dict]] = {}
    for row in result["rows"]:
        chip, _, _ = row["target"].partition(":")
        groups.setdefault((row["kernel"], chip), []).append(row)
    rows = []
    for (name, chip), own in sorted(groups.items()):
        less = sorted(row["less_moved"] for row in own)
        shares = (less[0], statistics.median(less), less[-1])
        largest = [max(row[side]["temporary_bytes"] for row in own) for side in ("xla", "pallas")]
        ratios = [row.get("xla_operations", 1) / row.get("pallas_operations", 1) for row in own]
        fewer = max(ratios)
        rows.append(
            [
                f"`{name}`",
                chip,
                str(len(own)),
                # + 0 makes a zero of a negative zero
                ", ".join(f"{100 * x + 0:.0f} %" for x in shares),
                *map(mebibytes, largest),
                f"{fewer:.0f} times" if fewer > 1 else "-",
            ]
        )
    verdicts = sorted(result["verdicts"].items())
    notes = [f"`{name}`: {verdict['kept']}." for name, verdict in verdicts]
    notes += [f"Not written: {one['kernel']}." for one in result["not_written"]]
    bullets = "\n".join(f"* {note}" for note in notes)
    return markdown(header, rows) + "\n\n" + bullets


def collectives(result: dict) -> str:
    """What a refresh sends under FSDP, by layout."""
    layouts = list(result["rows"][0]["received"])
    rows = []
    for row in result["rows"]:
        received = row["received"]
        best = min(received, key=received.__getitem__)
        rows.append(
            [
                row["projector"],
                str(row["rank"]),
                *(mebibytes(received[name]) for name in layouts),
                best,
            ]
        )
    note = (
        f"`{result['command']}`: MiB that one of {result['devices']} devices receives in a refresh "
        f"of the {result['preset']} preset's matrices, read from compiled programs."
    )
    return markdown(["projector", "rank", *layouts, "least"], rows) + "\n\n" + note


def any_function(result: dict) -> str:
    """What each program costs beside the plain one, and how far its gradients are off."""
    kinds = ("adapted", "effective", "tapped")
    figures = {"flops": "operations", "bytes": "bytes moved", "temporary_bytes": "temporaries"}
    header = ["model", *(f"{figure}: {', '.join(kinds)}" for figure in figures.values())]
    header += ["tracing, ms: plain, adapted, tapped", "error: adapted", "error: tapped"]
    lines = []
    for row in result["rows"]:
        plain = row["plain"]
        ratios = [
            ", ".join(f"{row[kind][name] / plain[name]:.2f}" for kind in kinds) for name in figures
        ]
        traced = (row[kind]["tracing_seconds"] for kind in ("plain", "adapted", "tapped"))
        tracing = ", ".join(milliseconds(seconds) for seconds in traced)
        errors = [f"{row[kind]:.1e}" for kind in ("adapted_error", "tapped_error")]
        lines.append([row["model"], *ratios, tracing, *errors])
    versions = ", ".join(f"{name} {version}" for name, version in result["packages"].items())
    note = (
        f"`{result['command']}` with {versions}: rank {result['rank']}; operations, bytes and "
        "temporaries over those of the plain program, which has all gradients."
    )
    return markdown(header, lines) + "\n\n" + note


def headlines(*results: dict) -> str:
    """Six results in short, each with its aim; the whole tables are in docs/results."""
    study, step, optimizer, peer, memory, plans = results
    rows = [
        [*row, f"[{page}](docs/results/{page}.md)"]
        for page, row in {
            "study": _losses(study),
            "training_step": _whole_step(step),
            "optimizer_step": _update(optimizer),
            "peer_training_step": _first_aim(
                "AdamW's whole step, of PyTorch's fused AdamW on the same model (60M, CPU)", peer
            ),
            "memory_7b": _card(memory),
            "plans": _first_aim(
                "optimizer state of one of 16 chips, above an equal share of it (APOLLO-Mini, 1B)",
                plans,
            ),
        }.items()
    ]
    return markdown(["what", "measured", "aim", "met or missed", "all of it"], rows)


def number(memory: dict) -> str:
    """One sentence, for the top of the README."""
    row = _of(memory["card_rows"], weights="int8", rank=256, refresh="none")
    return (
        "One number: a step that trains every weight of a 7B LLaMA (GaLore at rank 256, int8 weights, "
        f"8-bit moments, {memory['length']} tokens) peaks at **{row['peak_bytes'] / 2**30:.1f} GiB** "
        f"on one {memory['device']}, as its compiler lays it out; nothing was run "
        "(`docs/results/memory_7b.md`)."
    )


def _losses(study: dict) -> list[str]:
    adamw, *others = study["rows"]
    above = {row["method"]: row["validation_loss"] - adamw["validation_loss"] for row in others}
    worse = [f"{name} {gap:+.3f}" for name, gap in above.items() if gap > 0]
    return [
        f"validation loss beside AdamW's {adamw['validation_loss']:.3f}: {len(others)} methods, "
        f"{study['steps']} updates of a small model",
        f"{len(others) - len(worse)} below ({min(above.values()):+.3f} at best); above: "
        + (", ".join(worse) or "none"),
        "none above",
        VERDICTS[not worse],
    ]


def _whole_step(step: dict) -> list[str]:
    case = "galore, rank 64, projected backprop, alternating"
    aim = _of(step["aims"], aim="clock, of AdamW's", of=f"whole model: {case}")
    return [
        "GaLore's whole step with projected gradients at rank 64, of AdamW's (60M, CPU)",
        f"{aim['value']:.2f}",
        f"{aim['bound']:g}",
        VERDICTS[aim["met"]],
    ]


def _update(optimizer: dict) -> list[str]:
    aim = _of(optimizer["aims"], aim="normal step, optax.contrib.galore's (s)", of="galore (svd)")
    return [
        "GaLore's update between two refreshes, optax.contrib.galore's the aim (60M, CPU)",
        f"{milliseconds(aim['value'])} ms",
        f"{milliseconds(aim['bound'])} ms",
        VERDICTS[aim["met"]],
    ]


def _card(memory: dict) -> list[str]:
    rows = memory["card_rows"]
    normal, refresh = (
        _of(rows, weights="int8", rank=256, refresh=name) for name in ("none", "power")
    )
    return [
        f"memory of a 7B step, int8 weights, rank 256, compiled for one {memory['device']}",
        f"{normal['peak_bytes'] / 2**30:.2f} GiB; {refresh['peak_bytes'] / 2**30:.2f} with a refresh",
        f"{normal['bound_gib']:g} GiB",
        VERDICTS[normal["met"]],
    ]


def _first_aim(what: str, result: dict) -> list[str]:
    aim = result["aims"][0]
    return [what, f"{aim['value']:.3g}", f"{aim['bound']:.3g}", VERDICTS[aim["met"]]]


def _of(rows: list[dict], **values) -> dict:
    """The one row that has these values."""
    (found,) = (row for row in rows if all(row[name] == value for name, value in values.items()))
    return found


TABLES: dict[str, Callable[..., str]] = {
    "number": number,
    "headlines": headlines,
    "methods": methods,
    "adapters": adapters,
    "study": study,
    "compare": compare,
    "train": train,
    "optimizer_step": optimizer_step,
    "training_step_60M": training_step,
    "training_step_130M": training_step,
    "peer_training_step": peer_training_step,
    "data_parallel": data_parallel,
    "refresh_subspaces": refresh_subspaces,
    "memory_7b": memory_7b,
    "plans": plans,
    "kernels": kernels,
    "collectives": collectives,
    "any_function": any_function,
}


# Results that a table reads, where they are not the one of its own name.
READS = {
    "number": ("memory_7b",),
    "headlines": (
        "study",
        "training_step_60M",
        "optimizer_step",
        "peer_training_step",
        "memory_7b",
        "plans",
    ),
}


def pages(root: pathlib.Path = ROOT) -> list[pathlib.Path]:
    """The documents that tables may stand in."""
    return [root / "README.md", *sorted((root / "docs").rglob("*.md"))]


def render(text: str, results: pathlib.Path = RESULTS, page: str = "README.md") -> str:
    """A page's text with every table made anew from `results`.

    Raises:
      ValueError: for a marker without an end, a table nobody generates, or one whose result is
        missing.
    """
    for name in re.findall(r"<!-- begin:(\w+) -->", text):
        if name not in TABLES:
            raise ValueError(f"{page} names a table {name!r}; known ones are {', '.join(TABLES)}")
        paths = [results / f"{read}.json" for read in READS.get(name, (name,))]
        for path in paths:
            if not path.exists():
                raise ValueError(
                    f"the table {name!r} of {page} needs {path.name}, which is not committed; run "
                    "its command"
                )
        table = TABLES[name](*(documents.read(path, dict) for path in paths))
        pattern = rf"<!-- begin:{name} -->.*?<!-- end:{name} -->"
        blocks = re.findall(pattern, text, flags=re.DOTALL)
        if len(blocks) != 1:
            raise ValueError(
                f"the table {name!r} of {page} stands {len(blocks)} times between its markers; "
                "once is right"
            )
        block = f"<!-- begin:{name} -->\n{table}\n<!-- end:{name} -->"
        text = text.replace(blocks[0], block)
    return text


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit 1 if a page differs"
    )
    options = parser.parse_args()
    differing = []
    for path in pages():
        name, text = str(path.relative_to(ROOT)), path.read_text()
        new = render(text, page=name)
        if new == text:
            continue
        differing.append(name)
        if not options.check:
            outputs.write_text(path, new)
    if options.check and differing:
        differ = f"{', '.join(differing)} differ from the results"
        sys.exit(f"{differ}: run python -m experiments.reporting.tables")


if __name__ == "__main__":
    main()
