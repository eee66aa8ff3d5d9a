"""Tables for people, JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from datetime import UTC, datetime

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.text import Text

__all__ = ["local_time", "one_line", "print_json", "print_table", "say", "table", "utc_time"]

# By the first word of a cell.
COLOURS = {
    "completed": "green",
    "compensated": "green",
    "failed": "red",
    "compensation": "red",
    "interrupted": "yellow",
    "unknown": "yellow",
    "left": "yellow",
}
# A column that may be cut off to let the table fit is at least so wide.
NARROW = 8


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, cut: Collection[str]) -> None:
    """Prints rows: aligned as plain text, or, to a terminal, in colours and within its width.

    Args:
        header: The names of the columns.
        rows: The cells.
        cut: The columns that are cut off where a terminal is too narrow; the others are short.
    """
    console = Console()
    for text in table(header, rows, cut=cut, console=console):
        if console.is_terminal:
            console.print(text, no_wrap=True, overflow="ellipsis")
        else:  # nothing is cut off where no person looks
            console.print(text, soft_wrap=True)


def table(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, cut: Collection[str], console: Console
) -> list[Text]:
    """Gives the lines of a table, as `print_table` prints them."""
    lines = [[*map(one_line, row)] for row in (header, *rows)]
    widths = [max(map(cell_len, column)) for column in zip(*lines, strict=True)]
    texts: list[Text] = []
    if console.is_terminal:
        fit(widths, [index for index, name in enumerate(header) if name in cut], console.width)
    for number, line in enumerate(lines):
        # As Text, so that nothing in a name is taken for rich's markup.
        cells = [
            Text(
                ellipsis(cell, width),
                "bold" if number == 0 else COLOURS.get(cell.partition(" ")[0], ""),
            )
            for cell, width in zip(line, widths, strict=True)
        ]
        text = Text("  ", no_wrap=True, overflow="ellipsis").join(cells)
        text.rstrip()
        texts.append(text)
    return texts


def fit(widths: list[int], cut: Sequence[int], available: int) -> None:
    """Makes the widest of some columns narrower, until the table fits or they cannot."""
    while sum(widths) + 2 * (len(widths) - 1) > available:
        widest = max(cut, key=lambda index: widths[index])
        if widths[widest] <= NARROW:
            return
        widths[widest] -= 1


def ellipsis(text: str, width: int) -> str:
    """Fills, or cuts, a text to a width on the screen."""
    return (
        set_cell_size(text, width) if cell_len(text) <= width else f"{set_cell_size(text, width - 1)}…"
    )


def one_line(text: str) -> str:
    """Keeps a name or a message from moving the cursor: it may hold anything."""
    return "".join(one if one.isprintable() else " " for one in text)


def say(text: str) -> None:
    print("\n".join(map(one_line, text.splitlines())))


def print_json(value: object) -> None:
    print(json.dumps(value, indent=2))


def utc_time(at: float | None) -> str | None:
    """Gives a time for programs."""
    return None if at is None else datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds")


def local_time(at: float | None) -> str:
    """Gives a time for people, where they are."""
    if at is None:
        return "-"
    return datetime.fromtimestamp(at).astimezone().isoformat(" ", "seconds")[:19]
