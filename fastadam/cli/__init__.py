"""The command line: ``fastadam <command>``.

Each command is one module with ``add_parser(subparsers)``, which sets
``run``, a function from the parsed arguments to an exit status. What a
command needs beyond the standard library, it imports when it runs.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from fastadam.bench.text import wrapped

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = [
    "CommandError",
    "columns",
    "counted",
    "in_rows",
    "main",
    "output_path",
    "printable",
    "require",
    "say",
    "whole_number",
    "wrapped",
    "write",
]


class CommandError(Exception):
    """A command cannot go on; the message is the one line that is shown.

    Parameters
    ----------
    message : str
        What is wrong, naming the argument, the rule and the value.
    status : int, default 2
        Exit status: 2 for a wrong request, 1 for work that failed.
    """

    def __init__(self, message: str, status: int = 2) -> None:
        super().__init__(message)
        self.status = status


class _Formatter(argparse.HelpFormatter):
    """Help in lines of whole words: argparse would also break at hyphens."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return wrapped(" ".join(text.split()), width).split("\n")

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        lines = self._split_lines(text, width - len(indent))
        return "\n".join(indent + line for line in lines)


class _Parser(argparse.ArgumentParser):
    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=_Formatter, **options)

    def error(self, message: str) -> NoReturn:
        # Without the usage, which argparse would print as well.
        _complain(f"{self.prog}: error: {message} (see {self.prog} --help)")
        self.exit(2)


def _build_parser() -> _Parser:
    # Imported here: the commands themselves import from this module.
    from fastadam import __version__
    from fastadam.cli import bench, info, inspect, train

    parser = _Parser(prog="fastadam", description="Adam on the arrays you own.")
    parser.add_argument("--version", action="version", version=f"fastadam {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="command")
    for command in (train, bench, info, inspect):
        command.add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments without the program's name; by default ``sys.argv[1:]``.

    Returns
    -------
    int
        Exit status: 0 if all went well, 1 if the work failed, 2 if the
        request was wrong, 130 if Ctrl-C stopped it.

    Examples
    --------
    >>> from fastadam.cli import main
    >>> main(["train", "--steps", "0"])
    2
    """
    prog = "fastadam"
    try:
        try:
            parser = _build_parser()
            args = parser.parse_args(argv)
        except SystemExit as stop:  # --help, --version, or an error that argparse found
            return int(stop.code or 0)
        if args.command is None:
            parser.print_help(sys.stderr)
            return 2
        prog = f"fastadam {args.command}"
        status: int = args.run(args)
        sys.stdout.flush()
    except CommandError as error:
        _complain(f"{prog}: error: {error}")
        return error.status
    except KeyboardInterrupt as stop:  # a command may add what is left of its work
        _complain("; ".join([f"{prog}: interrupted", *map(str, stop.args)]))
        return 130
    except BrokenPipeError:
        # The reader has left, as in `fastadam train | head -1`. Python flushes stdout once more
        # at exit; let that go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # the disk under stdout is full
        _complain(f"{prog}: error: {error.strerror or error}")
        return 1
    return status


def whole_number(least: int) -> Callable[[str], int]:
    """Make an argument type: whole numbers from `least` on.

    Parameters
    ----------
    least : int
        The smallest number that is accepted.

    Returns
    -------
    function of str to int
        Raises ``argparse.ArgumentTypeError`` for anything else.

    Examples
    --------
    >>> from fastadam.cli import whole_number
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

    Parameters
    ----------
    text : str
        A path, of a file that may exist, in a folder that must.

    Returns
    -------
    pathlib.Path
        Absolute, links followed.

    Raises
    ------
    argparse.ArgumentTypeError
        If it is a folder, is in none, or cannot be written.
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


def require(*packages: str, extra: str = "demo") -> None:
    """Import optional packages, or say how to get them.

    Parameters
    ----------
    *packages : str
        Names of packages.
    extra : str, default "demo"
        The extra of fastadam that they belong to.

    Raises
    ------
    CommandError
        If one is not installed.
    """
    for package in packages:
        try:
            importlib.import_module(package)
        except ModuleNotFoundError as error:
            raise CommandError(
                f'needs the package {error.name}: pip install "fastadam[{extra}]"'
            ) from error


def printable(text: str) -> str:
    r"""Escape what a terminal would obey and not show: control and format characters.

    Parameters
    ----------
    text : str
        From a file, say.

    Returns
    -------
    str
        One line.

    Examples
    --------
    >>> from fastadam.cli import printable
    >>> print(printable("red: " + chr(27) + "[31m"))
    red: \x1b[31m
    """
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def counted(number: int, noun: str) -> str:
    """Write a number and a noun, in the plural unless it is one.

    Parameters
    ----------
    number : int
        At least 0.
    noun : str
        In the singular.

    Returns
    -------
    str
        Such as ``"1 name"``.

    Examples
    --------
    >>> from fastadam.cli import counted
    >>> counted(1, "name"), counted(5163, "name"), counted(0, "name")
    ('1 name', '5,163 names', 'no names')
    """
    return f"{number or 'no':{',' if number else ''}} {noun}{'' if number == 1 else 's'}"


def columns(stream: TextIO) -> int | None:
    """Return how many characters fit in a line.

    Parameters
    ----------
    stream : text file
        Where to.

    Returns
    -------
    int or None
        On a terminal, what COLUMNS says, or the terminal itself; None for a
        file or a pipe, whatever COLUMNS says: lines are not broken there.
    """
    return shutil.get_terminal_size().columns if stream.isatty() else None


def in_rows(rows: Sequence[tuple[str, str]], width: int | None) -> list[str]:
    """Write keys and values in two columns.

    Parameters
    ----------
    rows : sequence of tuples of str
        Key and value.
    width : int or None
        As for `wrapped`.

    Returns
    -------
    list of str
        Lines.

    Examples
    --------
    >>> from fastadam.cli import in_rows
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


def _complain(text: str) -> None:
    """Print a line on standard error, on a terminal in as many as it takes."""
    print(wrapped(text, columns(sys.stderr)), file=sys.stderr)


def say(text: str) -> None:
    """Print in lines of whole words, even what the terminal's encoding lacks (as an escape).

    Parameters
    ----------
    text : str
        One or more lines.
    """
    write(wrapped(text, columns(sys.stdout)))


def write(text: str) -> None:
    """Print as it is, even what the terminal's encoding lacks (as an escape).

    Parameters
    ----------
    text : str
        One or more lines; such as JSON, to which a new line could do harm.
    """
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding))
