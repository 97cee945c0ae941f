"""The files that a command writes: checked before the work, saved after it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastadam.cli import CommandError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

__all__ = ["check_files", "check_picture", "save"]

PICTURES = (".png", ".svg", ".pdf")


def check_picture(path: Path | None) -> None:
    """Refuse a ``--plot`` of an ending that Matplotlib would not know as a picture's.

    Parameters
    ----------
    path : pathlib.Path or None
        What ``--plot`` was given.

    Raises
    ------
    CommandError
        If it has another ending.
    """
    if path is not None and path.suffix.lower() not in PICTURES:
        raise CommandError(f"--plot must end in {', '.join(PICTURES)}, got {str(path)!r}")


def check_files(given: Mapping[str, Path | None]) -> None:
    """Refuse one file for two purposes.

    Parameters
    ----------
    given : mapping of str to pathlib.Path or None
        By option, in the order in which messages name them.

    Raises
    ------
    CommandError
        If two options have the same file.
    """
    taken: dict[Path, str] = {}
    for option, path in given.items():
        if path is not None:
            # The outputs are resolved already; an input that was read can be.
            other = taken.setdefault(path.resolve(), option)
            if other != option:
                raise CommandError(f"{option} must not be the file of {other}, got {str(path)!r}")


def save(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file.

    Parameters
    ----------
    path : pathlib.Path
        Where.
    write : callable
        ``write(path)`` does it.

    Raises
    ------
    CommandError
        If the system refuses.
    """
    try:
        write(path)
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error.strerror or error}", status=1) from error
