"""Threads, forks and signals: what must not happen in the middle of what."""

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

# Held while kernels run in several threads, while arrays are written one after another, and while
# Numba is imported. So these never overlap: each kernel uses all processors anyway, and Numba's
# workqueue aborts the process where two run at once. And a fork, which takes it as well, copies
# no arrays that are half written and no modules that are half imported. The thread that has it
# may take it again, as the handler of a signal does.
kernel_lock = threading.RLock()

# ----------------------------------------------------------------------------- signals

# After an exception from a signal's handler, something is tried again; but not for ever, since
# near the limit of recursion every try raises. Each signal may have been waiting once.
_TRIES = signal.NSIG

# As plain numbers, and with the functions of `_signal`: those of `signal` make an Enum of each
# result, and `signals_deferred` would take 90 us instead of 4.
_SIGNALS = [int(number) for number in signal.valid_signals()]


@contextlib.contextmanager
def signals_deferred() -> Iterator[None]:
    """Call no handler of a signal before the end of this; then call those that are due.

    For code in which an exception, as Ctrl-C raises one, would leave something
    half done: state that is half written, or Numba's compiler. Does nothing in
    a thread that runs no handlers.
    """
    handlers: dict[int, Callable[..., Any]] = {}
    due: list[tuple[Any, ...]] = []
    try:
        if _may_set_handlers():
            get = _signal.getsignal
            handlers = {number: found for number in _SIGNALS if callable(found := get(number))}
            for number in handlers:
                _signal.signal(number, lambda *arguments: due.append(arguments))
        yield
    finally:
        errors: list[BaseException] = []
        for _ in range(_TRIES):
            try:
                for number, handler in handlers.items():
                    _signal.signal(number, handler)
                break
            except BaseException as error:  # from the handlers that are already back
                errors.append(error)
        with contextlib.ExitStack() as stack:  # every handler is called, whatever others raise
            for arguments in reversed(due):
                stack.callback(handlers[arguments[0]], *arguments)
            if errors:
                raise errors[0]


def _may_set_handlers() -> bool:
    """Whether this is the main thread of the main interpreter, which alone runs handlers.

    `threading` takes another for the main thread if that imported it first.
    """
    try:
        _signal.signal(signal.SIGINT, None)  # always refused
    except ValueError:  # because of the thread
        return False
    except TypeError:  # because of the None
        pass
    return True


# ------------------------------------------------------------------------------ copies


class Unchanged:
    """The last part of a copy or a pickle of an optimizer; raises if a step came in between.

    So a copy made beside a thread that steps is a copy of one step, and neither
    thread waits for the other.

    Parameters
    ----------
    owner : object
        ``owner._version()`` returns something else after each step, and raises
        RuntimeError during one. ``owner._copies(memo)`` returns pairs of a value that
        steps change and of the copy that `copy.deepcopy` has made of it, perhaps
        before it came to the optimizer.
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


# --------------------------------------------------------------------------- GNU OpenMP


def _gnu_openmp() -> Any:
    """Return GNU OpenMP, which Numba's layer ``omp`` and torch use, if this process has it."""
    if sys.platform != "linux":  # elsewhere it is another OpenMP, which survives forks
        return None
    with contextlib.suppress(OSError):
        return ctypes.CDLL("libgomp.so.1", mode=os.RTLD_NOLOAD)
    return None


def _end_openmp_threads(openmp: Any) -> bool:
    """Have GNU OpenMP end the threads that it keeps for this thread; return whether it did.

    To be called before a fork: in the child, OpenMP would wait for them for ever.
    The parent gets new ones when it next needs them.
    """
    try:
        return openmp is None or openmp.omp_pause_resource_all(2) == 0  # 2: omp_pause_hard
    except AttributeError:  # before GCC 9
        return False


def _is_forked_copy() -> bool:
    """Whether this process is a copy of another (Linux), but not of multiprocessing's forkserver.

    A forkserver's child has only what the forkserver imported itself, before it used any of it.
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


# False in a child whose parent had used GNU OpenMP without `_end_openmp_threads`: because it had
# not imported this module, or because C code forked.
_openmp_works = _gnu_openmp() is None or not _is_forked_copy()
_parallel_works = _openmp_works


def parallel_works() -> bool:
    """Whether this process may run a kernel in several threads.

    Not after a fork from a process in which Numba had started its layer ``omp`` on
    GNU OpenMP, since Numba ends a child that uses it; nor where GNU OpenMP would
    wait for threads that the child does not have.
    """
    return _parallel_works


def _threading_layer() -> str | None:
    """Return the threading layer that Numba has started, None before that."""
    numba: Any = sys.modules.get("numba")
    # ValueError before its threads are started, AttributeError while it is being imported.
    with contextlib.suppress(AttributeError, ValueError):
        layer: str = numba.threading_layer()
        return layer
    return None


# ------------------------------------------------------------------------------- forks


class _Reference(weakref.ref[Any]):
    """A weak reference that equals only itself, whether or not its object has a hash."""

    __slots__ = ()
    __hash__ = object.__hash__
    __eq__ = object.__eq__


_owners: set[_Reference] = set()


def register_after_fork(owner: Any) -> None:
    """Have ``owner._after_fork()`` called in forked children, as long as it lives."""
    # The set's own method: as Python exits, Python's own weak sets may be gone already.
    _owners.add(_Reference(owner, _owners.discard))


class _Fork(threading.local):
    """Of the fork that a thread is making: the locks that it holds, and what the child may use."""

    def __init__(self) -> None:
        self.locks: list[Any] = []
        self.openmp_works = self.parallel_works = False


_fork = _Fork()


def _locks_of_a_fork() -> list[Any]:
    """Return what a fork must hold, in the order in which a first step takes it.

    A child has only the thread that forked. If another thread has a lock at that
    moment, nobody in the child will ever release it. So beside our own lock a fork
    takes three of Numba and LLVM that are private: without the first a child
    hangs that compiles, or loads from the cache, while a thread of its parent compiled
    (the cells ``fork-busy`` of tests/whole/test_layers.py); without the second if a
    thread was just starting Numba's threads, without the third if one was in LLVM, as it
    is when a compiled function is deleted (the last tests on forks in tests/runtime).
    They are the locks inside Numba's own, which run Python code that a signal may end.
    """
    locks: list[Any] = [kernel_lock]
    for module, *names in (
        ("numba.core.compiler_lock", "global_compiler_lock", "_lock"),
        ("numba.np.ufunc.parallel", "_backend_init_thread_lock"),
        ("llvmlite.binding.ffi", "lib", "_lock", "_lock"),
    ):
        lock = sys.modules.get(module)
        for name in names:
            lock = getattr(lock, name, None)
        if lock is not None:
            locks.append(lock)
    return locks


def _before_fork() -> None:
    fork = _fork
    for _ in range(_TRIES):
        if fork.locks:
            break
        # Python would print an exception from a signal's handler, and fork without the locks.
        with contextlib.suppress(BaseException), signals_deferred():
            for lock in _locks_of_a_fork():
                lock.acquire()
                fork.locks.append(lock)
    with contextlib.suppress(BaseException):
        fork.openmp_works = _openmp_works and _end_openmp_threads(_gnu_openmp())
        layer = _threading_layer()
        works = fork.openmp_works if layer is None else layer != "omp" or sys.platform != "linux"
        fork.parallel_works = _parallel_works and works


def _release() -> None:
    with signals_deferred():
        while _fork.locks:
            _fork.locks.pop().release()
        _fork.openmp_works = _fork.parallel_works = False


def _in_child() -> None:
    global _openmp_works, _parallel_works
    _openmp_works, _parallel_works = _fork.openmp_works, _fork.parallel_works
    try:
        for reference in list(_owners):
            owner = reference()
            if owner is not None:
                owner._after_fork()
    finally:
        _release()


if hasattr(os, "register_at_fork"):
    # Python calls first what was registered last: so this must come after `logging`, whose lock
    # is taken before a fork too. Who has that one must not wait for the compiler, which may log.
    _ = logging
    os.register_at_fork(before=_before_fork, after_in_parent=_release, after_in_child=_in_child)
    # Once more, should a signal's handler raise before the first has begun.
    os.register_at_fork(after_in_parent=_release, after_in_child=_release)
