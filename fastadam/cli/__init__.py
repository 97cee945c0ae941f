"""The command line: ``fastadam <command>``.

Each command is one module with ``add_parser(subparsers)``, which sets
``run``, a function from the parsed arguments to an exit status. What a
command needs beyond the standard library, it imports when it runs.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["CommandError", "main", "output_path", "printable", "require", "say", "whole_number"]


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


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        # One line, where argparse would print the usage as well.
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _build_parser() -> _Parser:
    # Imported here: the commands themselves import from this module.
    from fastadam import __version__
    from fastadam.cli import bench, info, inspect, train

    parser = _Parser(prog="fastadam", description="Adam on the arrays you own.")
    parser.add_argument("--version", action="version", version=f"fastadam {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="command", required=True)
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
            args = _build_parser().parse_args(argv)
        except SystemExit as stop:  # --help, --version, or an error that argparse found
            return int(stop.code or 0)
        prog = f"fastadam {args.command}"
        status: int = args.run(args)
        sys.stdout.flush()
    except CommandError as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt as stop:  # a command may add what is left of its work
        print("; ".join([f"{prog}: interrupted", *map(str, stop.args)]), file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader has left, as in `fastadam train | head -1`. Python flushes stdout once more
        # at exit; let that go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # the disk under stdout is full
        print(f"{prog}: error: {error.strerror or error}", file=sys.stderr)
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


def say(text: str) -> None:
    """Print, even what the terminal's encoding lacks (as an escape).

    Parameters
    ----------
    text : str
        One or more lines.
    """
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding))
