"""Plain tables, which read the same on a terminal and in a file."""

from __future__ import annotations

from collections.abc import Sequence


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """The first column flush left, the others flush right; a head of two lines where it has a line feed."""
    lines = max(title.count("\n") for title in head) + 1
    titles = [("\n" * (lines - 1 - title.count("\n")) + title).split("\n") for title in head]
    above = [[title[line] for title in titles] for line in range(lines)]
    widths = [max(map(len, column)) for column in zip(*above, *rows, strict=True)]
    rule = ["─" * width for width in widths]
    for cells in (*above, rule, *rows):
        first = cells[0].ljust(widths[0])
        others = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        print("  ".join([first, *others]).rstrip())
