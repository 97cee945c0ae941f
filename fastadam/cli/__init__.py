"""The command line: ``fastadam <command>``.

Each command is a module with `HELP` and `DESCRIPTION`, `add_arguments(parser)`
and `run`, a function from the parsed arguments to an exit status. What a
command needs beyond the standard library, it imports when it runs.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from fastadam.cli.common import CommandError, complain, wrapped

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main"]


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
        complain(f"{self.prog}: error: {message} (see {self.prog} --help)")
        self.exit(2)


def _build_parser() -> _Parser:
    # Not sooner: they take longer to import than the rest of the package.
    from fastadam import __version__
    from fastadam.cli import bench, info, inspect, train

    parser = _Parser(prog="fastadam", description="Adam on the arrays you own.")
    parser.add_argument("--version", action="version", version=f"fastadam {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="command")
    for command in (train, bench, info, inspect):
        name = command.__name__.rpartition(".")[2]
        own = subparsers.add_parser(name, help=command.HELP, description=command.DESCRIPTION)
        command.add_arguments(own)
        own.set_defaults(run=command.run)
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
    with contextlib.ExitStack() as stack:
        for name in ("stdout", "stderr"):
            if getattr(sys, name) is None:  # closed before Python began: nobody reads it
                setattr(sys, name, stack.enter_context(Path(os.devnull).open("w")))
                stack.callback(setattr, sys, name, None)
        return _main(argv)


def _main(argv: Sequence[str] | None) -> int:
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
        complain(f"{prog}: error: {error}")
        return error.status
    except KeyboardInterrupt as stop:  # a command may add what is left of its work
        complain("; ".join([f"{prog}: interrupted", *map(str, stop.args)]))
        return 130
    except BrokenPipeError:
        # The reader has left, as in `fastadam train | head -1`. Python flushes stdout once more
        # at exit; let that go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # the disk under stdout is full
        complain(f"{prog}: error: {error.strerror or error}")
        return 1
    return status
