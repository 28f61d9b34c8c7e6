"""The dynamic code of 8 bits, in float64, for references of optimizers that store moments in it."""

import numpy as np


def dynamic(x, block, signed):
    """The nearest value of the dynamic code to each entry, over the largest of its block of a row."""
    book = [0.0, 1.0]
    for i in range(7):
        edges = np.linspace(0.1, 1, 2**i + 1 if signed else 2 ** (i + 1) + 1)
        middles = (edges[1:] + edges[:-1]) / 2 * 10.0 ** (i - 6)
        book += [*middles, *(-middles)] if signed else [*middles]
    book = np.sort(book)
    found = np.zeros_like(x)
    for i, row in enumerate(x):
        for start in range(0, row.size, block):
            own = slice(start, start + block)
            size = np.abs(row[own]).max()
            place = np.argmin(np.abs(book[:, None] - row[own] / size), axis=0)
            place -= (row[own] < 0) & (book[place] >= 0)  # a sign is never lost
            found[i, own] = size * book[place]
    return found
