"""Replace a file as a whole: a reader sees the old one or the new one, never a part."""

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

# A file is written in a folder beside its place, so that one rename moves it there.
_PREFIX, _SUFFIX = ".fastadam-", ".saving"


def replace(path: Path, write: Callable[[Path], None], keep: int) -> None:
    """Write a new file, and put it in the place of the one at ``path``.

    The file is flushed to disk before it is moved, and its folder after that. If a
    process is killed meanwhile, the next one removes what it left.

    Parameters
    ----------
    path : Path
        The file. Links are followed.
    write : callable
        ``write(path)`` writes the new file, at a path given to it.
    keep : int
        How many files to keep at most: this one, and earlier ones at `numbered`
        paths.

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
    with _errors_name(path), _work_folder(path.parent) as work:
        sample = path
        if not path.exists():
            sample = work / "sample"  # has the access rights of any new file of the user's
            sample.touch()
        new = work / "new"
        write(new)
        new.chmod(stat.S_IMODE(sample.stat().st_mode))
        _flush(new)
        _rotate(path, keep, work)
        new.replace(path)
        _flush_folder(path.parent)


@contextlib.contextmanager
def _errors_name(path: Path) -> Iterator[None]:
    """Have an OSError name the user's file, not the temporary one."""
    try:
        yield
    except OSError as error:
        if _SUFFIX not in str(error.filename):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def numbered(path: Path, number: int) -> Path:
    """Return the path of an earlier file; 1 is the one before the present."""
    return path.with_name(f"{path.stem}.{number}{path.suffix}")


def _rotate(path: Path, keep: int, work: Path) -> None:
    """Give the present file a second path, numbered 1; it also stays at its own all the time."""
    if keep == 1 or not _exists(path):
        return
    first = numbered(path, 1)
    # Another process that saves to this path may move any of these at any moment.
    with contextlib.suppress(FileNotFoundError):
        if first.samefile(path):
            return  # a process was killed at this point
    copy = work / "copy"  # made first, as there may be no space for it
    try:
        os.link(path, copy)
    except OSError:  # this file system has no links
        shutil.copy2(path, copy)
        _flush(copy)
    free = 1  # the first number that no file has, or the last number
    while free < keep - 1 and _exists(numbered(path, free)):
        free += 1
    for number in range(free, 1, -1):
        with contextlib.suppress(FileNotFoundError):
            numbered(path, number - 1).replace(numbered(path, number))
    copy.replace(first)


def _exists(path: Path) -> bool:
    """Whether a path exists; some versions of `Path.exists` say no after any error."""
    try:
        path.lstat()
    except FileNotFoundError:
        return False
    return True


@contextlib.contextmanager
def _work_folder(parent: Path) -> Iterator[Path]:
    """Make a folder, locked as long as this process uses it, and remove it."""
    while True:
        folder = Path(tempfile.mkdtemp(_SUFFIX, _PREFIX, parent))
        with _locked(folder, wait=True):
            if not folder.exists():  # another process removed it before it was locked
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
    """Lock a folder, and yield whether that worked; the system unlocks it if the process ends."""
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
