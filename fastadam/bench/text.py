"""Numbers, lines and tables for a terminal."""

from __future__ import annotations

import shutil
import sys
import textwrap
from typing import TYPE_CHECKING, NamedTuple, TextIO

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rich.console import Console

__all__ = ["Column", "column", "columns", "format_ratio", "format_seconds", "print_columns", "say"]
__all__ += ["split", "wrapped", "write"]


class Column(NamedTuple):
    """A heading of two lines and a cell per row, each with a style."""

    head: tuple[str, str]
    cells: list[tuple[str, str]]

    @property
    def width(self) -> int:
        """Characters, and two to the next column."""
        return max(len(text) for text in (*self.head, *(cell for cell, _ in self.cells))) + 2


def column(head: tuple[str, str], cells: Iterable[str]) -> Column:
    """Return a column without styles."""
    return Column(head, [(cell, "") for cell in cells])


def format_seconds(seconds: float, micro: str = "\N{MICRO SIGN}s") -> str:
    """Write a time in three digits and a unit; `micro` is that of a microsecond.

    Examples
    --------
    >>> from fastadam.bench.text import format_seconds
    >>> format_seconds(0.0538), format_seconds(1.2e-7)
    ('53.8 ms', '120 ns')
    """
    units = ((1.0, "s"), (1e3, "ms"), (1e6, micro))
    fitting = (pair for pair in units if seconds * pair[0] >= 0.9995)
    factor, unit = next(fitting, (1e9, "ns"))
    return f"{format_ratio(seconds * factor)} {unit}"


def format_ratio(ratio: float) -> str:
    """Write a number in three digits.

    Examples
    --------
    >>> from fastadam.bench.text import format_ratio
    >>> format_ratio(1.04), format_ratio(82.226), format_ratio(1234)
    ('1.04', '82.2', '1,234')
    """
    return f"{ratio:,.{2 if ratio < 9.995 else 1 if ratio < 99.95 else 0}f}"


def wrapped(text: str, width: int | None, indent: str = "") -> str:
    """Break lines between words, and nowhere else.

    Lines have `width` characters, or one word that is longer; None leaves all as
    it is. The lines that are added begin with `indent`.

    Examples
    --------
    >>> from fastadam.bench.text import wrapped
    >>> print(wrapped("two words, and more", 10, "  "))
    two words,
      and more
    """
    lines = []
    for line in text.split("\n"):
        if width is None or len(line) <= width:
            lines.append(line)
        else:
            lines += textwrap.wrap(
                line,
                width,
                subsequent_indent=indent,
                break_long_words=False,
                break_on_hyphens=False,
            )
    return "\n".join(lines)


def columns(stream: TextIO) -> int | None:
    """Return how many characters fit in a line.

    On a terminal, what COLUMNS says, or the terminal itself. None for a file
    or a pipe, whatever COLUMNS says: lines are not broken there.
    """
    return shutil.get_terminal_size().columns if stream.isatty() else None


def say(text: str) -> None:
    """Print in lines of whole words, even what the terminal's encoding lacks (as an escape)."""
    write(wrapped(text, columns(sys.stdout)))


def write(text: str) -> None:
    """Print as it is, such as JSON, to which a new line could do harm; else as `say`."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")


def split(fixed: Sequence[Column], columns: Sequence[Column], width: int) -> list[list[Column]]:
    """Share columns out to as many tables as they need, each with the fixed ones first."""
    room = width + 2 - sum(column.width for column in fixed)
    parts: list[list[Column]] = []
    left = 0
    for column in columns:
        if column.width > left:
            parts.append(list(fixed))
            left = room
        parts[-1].append(column)
        left -= column.width
    return parts


def print_columns(console: Console, columns: Sequence[Column]) -> None:
    """Print a table."""
    from rich import box
    from rich.segment import Segment, Segments
    from rich.table import Table
    from rich.text import Text

    # Between columns stand a blank of the padding and one of the box.
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)
    for place, column in enumerate(columns):
        head = Text("\n".join(column.head))
        table.add_column(head, justify="right" if place else "left", no_wrap=True)
    for row in zip(*(column.cells for column in columns), strict=True):
        table.add_row(*(Text(*cell) for cell in row))
    # rich fills all lines up to the same length.
    lines = Segment.split_lines(console.render(table))
    for line in lines:
        while line and not line[-1].text.strip():
            line.pop()
        console.print(Segments([*line, Segment.line()]), end="")
    console.print()
