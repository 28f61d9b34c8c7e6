"""What generated tables are made of: rows of Markdown, numbers in their units, aims."""


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A GitHub table.

    >>> print(markdown(["a", "b"], [["1", "2"]]))
    | a | b |
    |---|---|
    | 1 | 2 |
    """
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        "|" + "|".join(cell if cell == "---" else f" {cell} " for cell in line) + "|"
        for line in lines
    )


def mebibytes(count: float | None) -> str:
    """Two decimals, or a dash."""
    return "-" if count is None else f"{count / 2**20:.2f}"


def milliseconds(seconds: float | None) -> str:
    """Three figures, or a dash."""
    return "-" if seconds is None else f"{1000 * seconds:.3g}"


VERDICTS = {True: "met", False: "**missed**", None: "not measured"}


def aims(rows: list[dict], bound: str = "below") -> str:
    """Every aim with what was measured; the last column says whether it is met.

    Args:
      rows: `aim`, `of`, `value`, `bound`, `met`. An aim that ends in "(s)" is in seconds and shown
        in milliseconds, one that speaks of bytes is shown in megabytes.
      bound: header of the column of bounds.

    >>> print(
    ...     aims([{"aim": "a step (s)", "of": "adamw", "value": 0.2, "bound": 0.1, "met": False}])
    ... )
    | aim | of | measured | below | met or missed |
    |---|---|---|---|---|
    | a step | adamw | 200 ms | 100 ms | **missed** |
    """
    lines = []
    for row in rows:
        scale, unit = (
            (1e3, " ms")
            if "(s)" in row["aim"]
            else (1e-6, " MB")
            if "(bytes)" in row["aim"]
            else (1, "")
        )
        value = "-" if row["value"] is None else f"{scale * row['value']:.3g}{unit}"
        limit = f"{scale * row['bound']:.3g}{unit}"
        name = row["aim"].split(" (")[0]
        lines.append([name, row["of"] or "-", value, limit, VERDICTS[row["met"]]])
    return markdown(["aim", "of", "measured", bound, "met or missed"], lines)
