"""Files that are replaced whole: a reader sees the old one or the new one, never a part."""

import contextlib
import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

fcntl: Any = None
with contextlib.suppress(ImportError):  # Windows has none
    fcntl = import_module("fcntl")

# Where a file is written: a folder beside it, so that moving it into place is one rename.
_PREFIX, _SUFFIX = ".fastadam-", ".saving"


def replace(path: Path, write: Callable[[Path], None], keep: int) -> None:
    """Have a file written, and put it in the place of the one at ``path``.

    It is flushed to disk before it is moved, and the folder after. What a
    process that was killed meanwhile has left is removed by the next one.

    Parameters
    ----------
    path : Path
        The file. Links are followed.
    write : callable
        ``write(path)`` writes the new file, at a path given to it.
    keep : int
        How many files there are then to be at most: this one, and those it
        was before, at `numbered` paths.

    Raises
    ------
    OSError
        If the system refuses. The file at ``path`` is then as it was.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        raise FileExistsError(errno.EEXIST, "there is a folder, or what is no file", str(path))
    if not path.parent.exists():
        raise FileNotFoundError(errno.ENOENT, "there is no such folder", str(path.parent))
    _sweep(path.parent)
    with _speaking_of(path), _work_folder(path.parent) as work:
        sample = path
        if not path.exists():
            sample = work / "sample"  # of the access rights that the user's files have
            sample.touch()
        new = work / "new"
        write(new)
        new.chmod(stat.S_IMODE(sample.stat().st_mode))
        _flush(new)
        _rotate(path, keep, work)
        new.replace(path)
        _flush_folder(path.parent)


@contextlib.contextmanager
def _speaking_of(path: Path) -> Iterator[None]:
    """Have errors name the file that was asked for, not one that nobody knows."""
    try:
        yield
    except OSError as error:
        if _SUFFIX not in str(error.filename):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def numbered(path: Path, number: int) -> Path:
    """Return where the file is kept that was at ``path`` so many files ago."""
    return path.with_name(f"{path.stem}.{number}{path.suffix}")


def _rotate(path: Path, keep: int, work: Path) -> None:
    """Keep the present file at another path as well; at every moment it is at its own."""
    if keep == 1 or not _exists(path):
        return
    first = numbered(path, 1)
    # Where another process saves to this path too, it may have moved any of these.
    with contextlib.suppress(FileNotFoundError):
        if first.samefile(path):
            return  # the last: killed at this point
    copy = work / "copy"  # first, as there may be no space for it
    try:
        os.link(path, copy)
    except OSError:  # this file system has no links
        shutil.copy2(path, copy)
        _flush(copy)
    free = 1  # of the places for older files, or the last
    while free < keep - 1 and _exists(numbered(path, free)):
        free += 1
    for number in range(free, 1, -1):
        with contextlib.suppress(FileNotFoundError):
            numbered(path, number - 1).replace(numbered(path, number))
    copy.replace(first)


def _exists(path: Path) -> bool:
    """Whether there is anything; some versions of `Path.exists` take any error for a no."""
    try:
        path.lstat()
    except FileNotFoundError:
        return False
    return True


@contextlib.contextmanager
def _work_folder(parent: Path) -> Iterator[Path]:
    """Make a folder that is this process's as long as it runs, and remove it."""
    while True:
        folder = Path(tempfile.mkdtemp(_SUFFIX, _PREFIX, parent))
        with _locked(folder, wait=True):
            if not folder.exists():  # taken for a dead process's before it was locked
                continue
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
            return


def _sweep(parent: Path) -> None:
    """Remove the folders of processes that were killed."""
    for folder in parent.glob(f"{_PREFIX}*{_SUFFIX}"):
        with contextlib.suppress(OSError), _locked(folder, wait=False) as locked:
            if locked:
                shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path, *, wait: bool) -> Iterator[bool]:
    """Lock a folder, which the system undoes at a process's end; tell whether it could be."""
    try:
        descriptor = -1 if fcntl is None else os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except (FileNotFoundError, NotADirectoryError):  # another has removed it
        descriptor = -1
    if descriptor < 0:
        yield False
        return
    try:
        locked = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError:  # another has it, or this file system has no locks
            locked = False
        yield locked
    finally:
        os.close(descriptor)


def _flush(path: Path) -> None:
    with path.open("rb+" if os.name == "nt" else "rb") as file:
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    if os.name == "nt":  # folders cannot be opened
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems
            raise
    finally:
        os.close(descriptor)
