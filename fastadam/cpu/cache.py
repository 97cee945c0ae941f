"""The compile cache: machine code on disk, served only where it fits."""

import contextlib
import functools
import hashlib
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite
import numba
from numba import config
from numba.core.caching import FunctionCache
from numba.core.serialize import dumps

if config.CACHE_DIR:  # relative to where the process is now, whatever chdir comes
    config.CACHE_DIR = str(Path(config.CACHE_DIR).absolute())


# Parts of the package from which no kernel is made.
_WITHOUT_KERNELS = {"bench", "cli", "demo", "machine.py"}
# Parts of the names of those of Numba's settings that are no part of the key: they change no
# machine code, and differ between processes of one machine. All others are, though many of them
# change none: so what a later Numba brings is not forgotten.
_NOT_IN_KEY = ("CACHE", "CUDA", "THREAD", "GDB_BINARY")


def sources() -> list[tuple[str, Path]]:
    """Return every source that the kernels may be made of: its place in the package, its path."""
    root = Path(sys.modules[__name__.partition(".")[0]].__path__[0])
    paths = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")}
    return sorted(
        (place, path)
        for place, path in paths.items()
        if place.partition("/")[0] not in _WITHOUT_KERNELS
    )


@functools.cache
def source_digest() -> str:
    """Return a digest of all these sources.

    Raises
    ------
    FileNotFoundError
        If the sources are not there to read, as in a zip file.
    """
    digest = hashlib.sha256()
    found = sources()
    if not found:
        raise FileNotFoundError("no sources")
    for place, path in found:
        source = path.read_bytes()
        digest.update(f"{place} {len(source)} ".encode() + source)
    return digest.hexdigest()


def settings() -> list[tuple[str, str]]:
    """Return Numba's settings, as they are now, that are part of the key."""
    return [
        (name, repr(value))
        for name, value in sorted(vars(config).items())
        if name.isupper() and not any(part in name for part in _NOT_IN_KEY)
    ]


class KernelCache(FunctionCache):  # type: ignore[misc]
    """Numba's cache with one file for each key, and a key of all that matters.

    Numba's own key is the source of the one file that holds the function: it
    serves old machine code after an edit to another file, and mixes up serial
    and parallel code of one function. Its index and data are two files, which
    processes that start at once can leave out of step. Here a file is named
    for the digest of everything that the code depends on, is written whole or
    not at all, and is checked before use.
    """

    def __init__(self, function: Callable[..., Any], variant: str) -> None:
        super().__init__(function)
        self._folder = Path(self.cache_path).absolute()
        what = (function.__module__, function.__qualname__, variant, source_digest())
        self._what = (*what, numba.__version__, llvmlite.__version__, sys.version)

    def _path(self, signature: Any, codegen: Any) -> Path:
        key = repr((self._what, str(signature), codegen.magic_tuple(), settings()))
        name = f"{self._py_func.__name__}-{hashlib.sha256(key.encode()).hexdigest()[:32]}"
        return self._folder / f"fastadam.{name}.nbc"

    def _load_overload(self, signature: Any, target_context: Any) -> Any:
        path = self._path(signature, target_context.codegen())
        try:
            content = path.read_bytes()
        except OSError:
            return None
        checksum, data = content[:32], content[32:]
        if hashlib.sha256(data).digest() != checksum:
            return None
        return self._impl.rebuild(target_context, pickle.loads(data))  # noqa: S301

    def _save_overload(self, signature: Any, result: Any) -> None:
        if not self._impl.check_cachable(result):
            return
        path = self._path(signature, result.codegen)
        data = dumps(self._impl.reduce(result))
        temporary = path.with_name(f"{path.name}.{os.getpid()}-{os.urandom(4).hex()}")
        # A full disk, or a folder gone read-only, costs time, not the step.
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                temporary.write_bytes(hashlib.sha256(data).digest() + data)
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
