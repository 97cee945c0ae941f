"""What a user is told while the first compile keeps him waiting."""

import contextlib
import logging
import os
import sys
from pathlib import Path

_log = logging.getLogger("fastadam")
_told = False


def compiling(folder: str | None) -> None:
    """Say, once in a process, that something is being compiled, and whether it is kept.

    To the logger ``fastadam``, at level INFO, and on stderr where that is a
    terminal. Not at all with ``FASTADAM_QUIET=1`` in the environment.

    Parameters
    ----------
    folder : str, optional
        Where the compiled code is to be kept, None for nowhere.
    """
    global _told
    if _told or os.environ.get("FASTADAM_QUIET", "0") not in ("", "0"):
        return
    _told = True
    kept = f"once: the code is kept in {folder}"
    if folder is None or not _can_be_written(Path(folder)):
        kept = "in every process: the code cannot be kept"
        kept += ", no folder is writable" if folder is None else f" in {folder}, not writable"
        kept += " (NUMBA_CACHE_DIR can name another)"
    text = f"compiling for this processor, which takes some seconds, {kept}"
    # Neither a handler of the user's nor a closed terminal may stop the compiler.
    with contextlib.suppress(Exception):
        _log.info(text)
    with contextlib.suppress(Exception):
        if sys.stderr.isatty():
            sys.stderr.write(f"fastadam: {text}\n")
            sys.stderr.flush()


def _can_be_written(folder: Path) -> bool:
    there = next(path for path in (folder, *folder.parents) if path.exists())
    return os.access(there, os.W_OK)
