"""What the commands share: errors, types of arguments, lines on a terminal, files to write."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastadam.bench.text import columns, say, wrapped, write

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

__all__ = [
    "CommandError",
    "check_files",
    "check_picture",
    "columns",
    "complain",
    "counted",
    "in_rows",
    "output_path",
    "printable",
    "progress_bar",
    "require",
    "save",
    "say",
    "whole_number",
    "wrapped",
    "write",
]

PICTURES = (".png", ".svg", ".pdf")


class CommandError(Exception):
    """A command cannot go on.

    Parameters
    ----------
    message : str
        The one line that is shown, naming the argument, the rule and the
        value.
    status : int, default 2
        Exit status: 2 for a wrong request, 1 for work that failed.
    """

    def __init__(self, message: str, status: int = 2) -> None:
        super().__init__(message)
        self.status = status


# Types of arguments


def whole_number(least: int) -> Callable[[str], int]:
    """Make an argument type: whole numbers from `least` on.

    Examples
    --------
    >>> from fastadam.cli.common import whole_number
    >>> whole_number(1)("1000")
    1000
    """

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least:
            raise argparse.ArgumentTypeError(
                f"must be a whole number, at least {least}, got {text!r}"
            )
        return number

    return parse


def output_path(text: str) -> Path:
    """Argument type: a file that can be written, told before the work and not after it.

    The file may exist, its folder must. The path returned is absolute.
    """
    try:
        path = Path(text).resolve()
        if path.is_dir():
            raise argparse.ArgumentTypeError(f"must be a file, got the folder {text!r}")
        if not path.parent.is_dir():
            raise argparse.ArgumentTypeError(f"must be in a folder that exists, got {text!r}")
        writable = os.access(path if path.exists() else path.parent, os.W_OK)
    except (OSError, RuntimeError) as error:  # a name too long, links in a circle, no access
        raise argparse.ArgumentTypeError(f"must be a path that can be used: {error}") from None
    if not writable:
        raise argparse.ArgumentTypeError(f"must be writable, got {text!r}")
    return path


# Checks before the work, and files after it; all raise CommandError


def require(*packages: str, extra: str = "demo") -> None:
    """Import optional packages, or say which extra of fastadam brings them."""
    for package in packages:
        try:
            importlib.import_module(package)
        except ModuleNotFoundError as error:
            raise CommandError(
                f'needs the package {error.name}: pip install "fastadam[{extra}]"'
            ) from error


def check_picture(path: Path | None) -> None:
    """Refuse a ``--plot`` of an ending that Matplotlib would not know as a picture's."""
    if path is not None and path.suffix.lower() not in PICTURES:
        raise CommandError(f"--plot must end in {', '.join(PICTURES)}, got {str(path)!r}")


def check_files(given: Mapping[str, Path | None]) -> None:
    """Refuse one file for two options; messages name them in the order given."""
    taken: dict[Path, str] = {}
    for option, path in given.items():
        if path is not None:
            # The outputs are resolved already; an input that was read can be.
            other = taken.setdefault(path.resolve(), option)
            if other != option:
                raise CommandError(f"{option} must not be the file of {other}, got {str(path)!r}")


def save(path: Path, content: str | Callable[[Path], object]) -> None:
    """Write a text to a file, or call what writes to it."""
    try:
        if isinstance(content, str):
            path.write_text(content + "\n", encoding="utf-8")
        else:
            content(path)
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error.strerror or error}", status=1) from error


# Lines


def printable(text: str) -> str:
    r"""Escape what a terminal would obey and not show: control and format characters.

    Examples
    --------
    >>> from fastadam.cli.common import printable
    >>> print(printable("red: " + chr(27) + "[31m"))
    red: \x1b[31m
    """
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def counted(number: int, noun: str) -> str:
    """Write a number and a noun, in the plural unless it is one.

    Examples
    --------
    >>> from fastadam.cli.common import counted
    >>> counted(1, "name"), counted(5163, "name"), counted(0, "name")
    ('1 name', '5,163 names', 'no names')
    """
    return f"{number or 'no':{',' if number else ''}} {noun}{'' if number == 1 else 's'}"


def in_rows(rows: Sequence[tuple[str, str]], width: int | None) -> list[str]:
    """Write keys and values in two columns of lines; `width` is as for `wrapped`.

    Examples
    --------
    >>> from fastadam.cli.common import in_rows
    >>> for line in in_rows([("key", "a long value"), ("", "x")], 11):
    ...     print(line)
    key  a long
         value
         x
    """
    indent = max(len(key) for key, _ in rows) + 2
    lines = []
    for key, value in rows:
        parts = wrapped(value, None if width is None else max(1, width - indent)).split("\n")
        lines.append(f"{key:<{indent}}{parts[0]}")
        lines += [" " * indent + part for part in parts[1:]]
    return lines


def complain(text: str) -> None:
    """Print a line on standard error, on a terminal in as many as it takes."""
    print(wrapped(text, columns(sys.stderr)), file=sys.stderr)


def progress_bar(width: int, *others: Any, **options: Any) -> Any:
    """Make a progress bar of rich's, with other columns of rich's beside it.

    On stderr, and only where someone looks: what goes to a file is the result alone.
    """
    from rich import progress
    from rich.console import Console

    console = Console(stderr=True)
    parts = (progress.BarColumn(bar_width=width), *others)
    return progress.Progress(*parts, console=console, disable=not console.is_terminal, **options)
