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

if config.CACHE_DIR:  # a relative path must mean the same folder after os.chdir
    config.CACHE_DIR = str(Path(config.CACHE_DIR).absolute())


# Parts of the package that hold no code of kernels.
_WITHOUT_KERNELS = {"bench", "cli", "demo", "machine.py"}
# All of Numba's settings are part of the key, so that one which a later Numba adds is not
# forgotten; except those with one of these in their name, which change no machine code and
# differ between the processes of one machine.
_NOT_IN_KEY = ("CACHE", "CUDA", "THREAD", "GDB_BINARY")


def sources() -> list[tuple[str, Path]]:
    """Return every source file that may change a kernel: its place in the package, its path."""
    root = Path(sys.modules[__name__.partition(".")[0]].__path__[0])
    paths = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")}
    return sorted(
        (place, path)
        for place, path in paths.items()
        if place.partition("/")[0] not in _WITHOUT_KERNELS
    )


@functools.cache
def source_digest() -> str:
    """Return a digest of these source files.

    Raises
    ------
    FileNotFoundError
        If the source files cannot be read, as in a zip file.
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
    """Return those of Numba's settings that are part of the key, with their values of now."""
    return [
        (name, repr(value))
        for name, value in sorted(vars(config).items())
        if name.isupper() and not any(part in name for part in _NOT_IN_KEY)
    ]


class KernelCache(FunctionCache):  # type: ignore[misc]
    """Numba's cache, but with a key of all that matters, and one file for each key.

    Numba's own key knows only the file that holds the function. So it returns old
    machine code after an edit to another file, and cannot tell serial from parallel
    code of one function. Its index and its data are two files, which do not match
    if two processes write at once. Here the name of a file is the digest of
    everything that the code depends on; a file is written whole or not at all,
    and its checksum is verified before it is used.
    """

    def __init__(self, function: Callable[..., Any], variant: str) -> None:
        super().__init__(function)
        self._folder = Path(self.cache_path).absolute()
        parts = (function.__module__, function.__qualname__, variant, source_digest())
        self._depends_on = (*parts, numba.__version__, llvmlite.__version__, sys.version)

    def _path(self, signature: Any, codegen: Any) -> Path:
        key = repr((self._depends_on, str(signature), codegen.magic_tuple(), settings()))
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
        # With a full disk or a read-only folder the next process compiles again; no step fails.
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                temporary.write_bytes(hashlib.sha256(data).digest() + data)
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
