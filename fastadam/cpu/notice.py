"""The message that says why the first step takes seconds: it is being compiled."""

import contextlib
import logging
import os
import sys
from pathlib import Path

_log = logging.getLogger("fastadam")
_announced = False


def compiling(folder: str | None) -> None:
    """Say once in a process that something is being compiled, and where it is kept.

    To the logger ``fastadam``, at level INFO, and on stderr if that is a
    terminal. With ``FASTADAM_QUIET=1`` in the environment, say nothing.

    Parameters
    ----------
    folder : str, optional
        Where the compiled code is kept, None if nowhere.
    """
    global _announced
    if _announced or os.environ.get("FASTADAM_QUIET", "0") not in ("", "0"):
        return
    _announced = True
    kept = f"once: the code is kept in {folder}"
    if folder is None or not _can_be_written(Path(folder)):
        kept = "in every process: the code cannot be kept"
        kept += ", no folder is writable" if folder is None else f" in {folder}, not writable"
        kept += " (NUMBA_CACHE_DIR can name another)"
    text = f"compiling for this processor, which takes some seconds, {kept}"
    # A log handler of the user's that raises, or a closed terminal, must not stop the compiler.
    with contextlib.suppress(Exception):
        _log.info(text)
    with contextlib.suppress(Exception):
        if sys.stderr.isatty():
            sys.stderr.write(f"fastadam: {text}\n")
            sys.stderr.flush()


def _can_be_written(folder: Path) -> bool:
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return os.access(existing, os.W_OK)
