"""Text for a terminal."""

from __future__ import annotations

import textwrap

__all__ = ["wrapped"]


def wrapped(text: str, width: int | None, indent: str = "") -> str:
    """Break lines between words, and nowhere else.

    Parameters
    ----------
    text : str
        One or more lines.
    width : int or None
        Characters for a line; a word may be longer. None leaves all as it is.
    indent : str
        What the lines that are added begin with.

    Returns
    -------
    str
        More lines.

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
