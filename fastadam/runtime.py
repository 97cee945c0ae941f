"""Threads, forks and signals: what must not come in the middle of what."""

import _signal  # type: ignore[import-not-found]
import contextlib
import ctypes
import logging
import os
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

# Held by who runs kernels in several threads, writes arrays in more than one go, or imports Numba.
# One at a time: each takes all processors anyway, Numba's workqueue aborts the process where two
# come at once, and no fork then copies arrays that are half written, or modules half imported. Its
# owner may take it again, as the handler of a signal does.
alone = threading.RLock()


class _Reference(weakref.ref[Any]):
    """One of its own, whatever its object compares equal to, and if that has a hash or not."""

    __slots__ = ()
    __hash__ = object.__hash__
    __eq__ = object.__eq__


_owners: set[_Reference] = set()


def _gnu_openmp() -> Any:
    """Return GNU OpenMP, if this process has loaded the one that Numba's layer ``omp`` uses."""
    if sys.platform != "linux":  # elsewhere it is another OpenMP, which forks well
        return None
    with contextlib.suppress(OSError):
        return ctypes.CDLL("libgomp.so.1", mode=os.RTLD_NOLOAD)
    return None


def _rest(openmp: Any) -> bool:
    """Have GNU OpenMP end the threads of this thread, as before a fork; say if it has.

    In a forked child it would wait for them for ever. It starts new ones when
    they are next needed.
    """
    try:
        return openmp is None or openmp.omp_pause_resource_all(2) == 0  # 2: omp_pause_hard
    except AttributeError:  # before GCC 9
        return False


def _came_by_fork() -> bool:
    """Whether this process is another's copy (Linux), and not multiprocessing's forkserver's.

    That has imported what it has itself, and has forked before it used anything.
    """
    processes = sys.modules.get("multiprocessing.process")
    if processes is not None:
        method = getattr(processes.current_process(), "_start_method", None)
        if method == "forkserver":
            return False
    try:
        flags = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[6])
    except OSError:
        return False
    return bool(flags & 0x40)  # PF_FORKNOEXEC


# False in a child whose parent had used GNU OpenMP and not had it rest: forked before this was
# imported, by who used torch, or by C.
_openmp_works = _gnu_openmp() is None or not _came_by_fork()
_parallel_works = _openmp_works


class _Own(threading.local):
    """What a thread holds that is about to fork, and what will work in the child."""

    def __init__(self) -> None:
        self.held: list[Iterator[None]] = []
        self.openmp_works = self.parallel_works = False


_own = _Own()


def register(owner: Any) -> None:
    """Have ``owner._after_fork()`` called in forked children, as long as it lives."""
    # The set's own method: as Python exits, Python's own weak sets may be gone already.
    _owners.add(_Reference(owner, _owners.discard))


def parallel_works() -> bool:
    """Whether this process may run a kernel in several threads.

    Not the child of a process in which Numba has started its layer ``omp`` on GNU
    OpenMP: Numba ends a child that uses it. Nor one in which GNU OpenMP would
    wait for threads that were not forked with it.
    """
    return _parallel_works


# An exception out of a signal's handler calls for another try, but not without an end: near the
# limit of recursion each raises. Each signal may have been waiting once.
_TRIES = signal.NSIG

# As plain numbers, and with the functions of `_signal`: those of `signal` make an Enum of each
# result, and `undisturbed` would take 90 us in place of 6.
_SIGNALS = [int(number) for number in signal.valid_signals()]


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Put the handlers of signals off until the end of this.

    For what an exception in the midst of it would break for good, as it does
    Numba's compiler. Does nothing in a thread that runs no handlers.
    """
    put_off: dict[int, Callable[..., Any]] = {}
    came: list[tuple[Any, ...]] = []
    try:
        if _may_set_handlers():
            for number in _SIGNALS:
                handler = _signal.getsignal(number)
                if callable(handler):
                    put_off[number] = handler
                    _signal.signal(number, lambda *arguments: came.append(arguments))
        yield
    finally:
        errors: list[BaseException] = []
        for _ in range(_TRIES):
            try:
                for number, handler in put_off.items():
                    _signal.signal(number, handler)
                break
            except BaseException as error:  # from the first handlers that are back
                errors.append(error)
        with contextlib.ExitStack() as stack:  # each has its turn, though another raises
            for arguments in reversed(came):
                stack.callback(put_off[arguments[0]], *arguments)
            if errors:
                raise errors[0]


def _may_set_handlers() -> bool:
    """Whether this is the main thread of the main interpreter, which alone runs handlers.

    Not what `threading` calls the main thread: that is the one that imported it first.
    """
    try:
        _signal.signal(signal.SIGINT, None)  # refused in any thread
    except ValueError:  # for where it was called
        return False
    except TypeError:  # for what it was given
        pass
    return True


class Unchanged:
    """The last part of what is copied or pickled of an optimizer; refuses to be, after a step.

    So a copy is of one step, though it is made beside a thread that steps, and
    neither keeps the other waiting.

    Parameters
    ----------
    owner : object
        ``owner._version()`` is another after each step, and raises RuntimeError in
        the middle of one; ``owner._copies(memo)`` gives values, which steps change,
        and what `copy.deepcopy` has made of them, perhaps long before.
    """

    def __init__(self, owner: Any) -> None:
        self._owner, self._version = owner, owner._version()

    def _check(self, same: bool) -> None:
        if self._owner._version() != self._version or not same:
            raise RuntimeError(
                "an optimizer and its parameters must be copied or pickled between two steps,"
                " got a step in the middle"
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """Leave nothing in a copy."""
        self._check(all(_same_bits(*pair) for pair in self._owner._copies(memo)))

    def __reduce__(self) -> tuple[Any, ...]:
        """Leave False in a pickle."""
        self._check(True)
        return bool, ()


def _same_bits(value: Any, other: Any) -> bool:
    """Whether two arrays or floats are the same, NaN and the sign of 0 included."""
    a, b = np.asarray(value), np.asarray(other)
    bits = f"u{a.itemsize}"
    return a.dtype == b.dtype and np.array_equal(a.view(bits), b.view(bits))


def _numbas_locks() -> list[Any]:
    """Return the locks of Numba and of LLVM in the order they are taken, or what stands for them.

    What is inside of theirs: those take steps in Python, which a signal may end.
    """
    locks = []
    for module, *names in (
        ("numba.core.compiler_lock", "global_compiler_lock", "_lock"),
        ("numba.np.ufunc.parallel", "_backend_init_thread_lock"),
        # Also where a compiled function is forgotten, in whatever thread that is.
        ("llvmlite.binding.ffi", "lib", "_lock", "_lock"),
    ):
        lock = sys.modules.get(module)
        for name in names:
            lock = getattr(lock, name, None)
        locks.append(contextlib.nullcontext() if lock is None else lock)
    return locks


def _standstill() -> Iterator[None]:
    # In this order, since a first step compiles with the first one held. With plain statements:
    # between a lock's being taken and their knowing so comes no call that could fail.
    with alone:
        compiler, threads, llvm = _numbas_locks()
        with compiler, threads, llvm:
            yield


def _threading_layer() -> str | None:
    """Return the threading layer that Numba has started, if it has."""
    numba: Any = sys.modules.get("numba")
    # Without threads it is a ValueError, half imported an AttributeError.
    with contextlib.suppress(AttributeError, ValueError):
        layer: str = numba.threading_layer()
        return layer
    return None


def _before_fork() -> None:
    own = _own
    for _ in range(_TRIES):
        if own.held:
            break
        # An exception, from a signal's handler, would only be printed, and the fork go on without
        # the locks: so, once more.
        with contextlib.suppress(BaseException):
            standstill = _standstill()
            next(standstill)
            own.held.append(standstill)
    with contextlib.suppress(BaseException):
        own.openmp_works = _openmp_works and _rest(_gnu_openmp())
        layer = _threading_layer()
        works = own.openmp_works if layer is None else layer != "omp" or sys.platform != "linux"
        own.parallel_works = _parallel_works and works


def _release() -> None:
    _own.held.clear()
    _own.openmp_works = _own.parallel_works = False


def _in_child() -> None:
    global _openmp_works, _parallel_works
    _openmp_works, _parallel_works = _own.openmp_works, _own.parallel_works
    try:
        for reference in list(_owners):
            owner = reference()
            if owner is not None:
                owner._after_fork()
    finally:
        _release()


if hasattr(os, "register_at_fork"):
    # Python calls what is registered last first. With logging's lock, which it takes before a
    # fork, nobody must wait for the compiler, who may want to log.
    _ = logging
    os.register_at_fork(before=_before_fork, after_in_parent=_release, after_in_child=_in_child)
    # Again, should a signal's handler raise before the first has begun.
    os.register_at_fork(after_in_parent=_release, after_in_child=_release)
