"""What README's tables are made of: rows of Markdown, and numbers in their units."""


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
