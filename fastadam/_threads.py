"""Threads, forks and signals: what must not come in the middle of what."""

import contextlib
import os
import signal
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import repeat, starmap
from operator import call
from typing import Any

# Held by who runs kernels in several threads, or writes arrays in more than one go. One at a
# time: each takes all processors anyway, Numba's workqueue aborts the process where two come at
# once, and no fork then copies arrays that are half written. Its owner may take it again, as the
# handler of a signal does.
alone = threading.RLock()

_owners: set[weakref.ref[Any]] = set()
_held: list[Iterator[None]] = []
_openmp_is_lost = False


def register(owner: Any) -> None:
    """Have ``owner._after_fork()`` called in forked children, as long as it lives."""
    # The set's own method: as Python exits, Python's own weak sets may be gone already.
    _owners.add(weakref.ref(owner, _owners.discard))


def parallel_works() -> bool:
    """Whether this process may run a kernel in several threads.

    Not the child of a process that has used GNU OpenMP, which cannot start its
    threads anew: Numba ends a process that tries.
    """
    return not _openmp_is_lost


def in_one_go(calls: Iterable[tuple[Any, ...]]) -> None:
    """Make calls of C functions, each given as function and arguments.

    Not a line of Python is run in between, and so no signal's handler.
    """
    with alone:
        deque(starmap(call, calls), maxlen=0)


def emptying(values: list[Any]) -> Iterator[Any]:
    """Return an iterator in C, without an end, that takes the values out of a list."""
    values.reverse()
    return map(list.pop, repeat(values))


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Put the handlers of signals off until the end of this.

    For what an exception in the midst of it would break for good, as it does
    Numba's compiler.
    """
    put_off: dict[int, Callable[..., Any]] = {}
    came: list[tuple[Any, ...]] = []

    def restore() -> None:
        for number, handler in put_off.items():
            signal.signal(number, handler)

    try:
        if threading.current_thread() is threading.main_thread():
            for number in signal.valid_signals():
                handler = signal.getsignal(number)
                if callable(handler):
                    put_off[number] = handler
                    signal.signal(number, lambda *arguments: came.append(arguments))
        yield
    finally:
        with contextlib.ExitStack() as stack:  # each has its turn, though another raises
            for arguments in reversed(came):
                stack.callback(put_off[arguments[0]], *arguments)
            try:
                restore()
            except BaseException:  # from the first handlers that are back
                restore()
                raise


def _numbas_locks() -> list[Any]:
    """Return the locks of Numba and of LLVM, if they have been imported.

    What is inside of theirs: those take steps in Python, which a signal may end.
    """
    compiler, ffi = (
        sys.modules.get(name) for name in ("numba.core.compiler_lock", "llvmlite.binding.ffi")
    )
    if compiler is None or ffi is None:
        return []
    locks = [compiler.global_compiler_lock, getattr(ffi.lib, "_lock", contextlib.nullcontext())]
    return [getattr(lock, "_lock", lock) for lock in locks]


def _standstill() -> Iterator[None]:
    # In the order in which a first step takes them, since it compiles with the first one held.
    # LLVM's also where a compiled function is forgotten, in whatever thread that is.
    with contextlib.ExitStack() as stack, alone:
        for lock in _numbas_locks():
            stack.enter_context(lock)
        yield


def _before_fork() -> None:
    holding = False
    while not holding:
        # A signal's, of which Python would say that it is ignored, and then fork.
        with contextlib.suppress(BaseException):
            _held.append(_standstill())
            next(_held[-1])
            holding = True


def _in_child() -> None:
    global _openmp_is_lost
    numba = sys.modules.get("numba")
    if numba is not None and sys.platform == "linux":
        with contextlib.suppress(ValueError):  # no threads have been started
            _openmp_is_lost |= numba.threading_layer() == "omp"
    for reference in list(_owners):
        owner = reference()
        if owner is not None:
            owner._after_fork()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_held.clear, after_in_child=_in_child)
