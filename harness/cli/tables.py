"""Tables for people: one line for each row. What does not fit into a terminal is cut; in a pipe nothing is, and there are no colours."""

import os
import shutil
import sys
from collections.abc import Collection, Sequence

import click

COLOURS = {
    "done": "green",
    "running": "green",
    "idle": "green",
    "failed": "red",
    "lost": "red",
    "down": "red",
    "stopped": "yellow",
    "held": "yellow",
    "unknown": "yellow",
}
"""Of cells that say no more than this."""
GAP = "  "
LAST_COLUMNS = 12
"""So much the last column keeps; the first, a name, is cut for it."""


def is_coloured() -> bool:
    """Whether stdout is a terminal whose owner wants colours (https://no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def printable(text: str) -> str:
    """With half of a surrogate pair, which models write by its escape and no terminal or file takes, as that escape again."""
    return text.encode("utf-8", "backslashreplace").decode()


def print_table(heading: Sequence[str], rows: Sequence[Sequence[str]], right: Collection[str] = ()) -> None:
    """Print to stdout; columns in `right` are set to the right."""
    is_terminal = sys.stdout.isatty()
    width = shutil.get_terminal_size().columns if is_terminal else None
    lines = render_table(heading, rows, right, width)
    coloured = is_coloured()
    for line in map(printable, lines):
        click.echo(_colour(line) if coloured else line)


def render_table(heading: Sequence[str], rows: Sequence[Sequence[str]], right: Collection[str], width: int | None) -> list[str]:
    """Lines of at most `width` characters, None for any number."""
    cells = [[cell.replace("\n", " ") for cell in row] for row in (heading, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(heading))]
    if width is not None:
        others = sum(widths[1:-1]) + len(GAP) * (len(widths) - 1)
        widths[0] = min(widths[0], max(len(heading[0]), width - others - min(widths[-1], LAST_COLUMNS)))
        widths[-1] = min(widths[-1], max(0, width - widths[0] - others))
    lines = []
    for row in cells:
        placed = [
            _cut(cell, size).rjust(size) if name in right else _cut(cell, size).ljust(size)
            for name, cell, size in zip(heading, row, widths, strict=True)
        ]
        lines.append(GAP.join(placed).rstrip()[:width])
    return lines


def _cut(cell: str, size: int) -> str:
    return cell if len(cell) <= size else cell[: max(0, size - 1)] + "…"[:size]


def _colour(line: str) -> str:
    """The first cell that is a word of COLOURS, in its colour."""
    for word in line.split(GAP):
        if word in COLOURS:
            return line.replace(f"{GAP}{word}", f"{GAP}{click.style(word, fg=COLOURS[word])}", 1)
    return line
