"""Threads, forks and signals: what must not come in the middle of what."""

import contextlib
import logging
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


class _Reference(weakref.ref[Any]):
    """One of its own, whatever its object compares equal to, and if that has a hash or not."""

    __slots__ = ()
    __hash__ = object.__hash__
    __eq__ = object.__eq__


_owners: set[_Reference] = set()
_parallel_works = True


class _Own(threading.local):
    """What a thread holds that is about to fork."""

    def __init__(self) -> None:
        self.held: list[Iterator[None]] = []


_own = _Own()


def register(owner: Any) -> None:
    """Have ``owner._after_fork()`` called in forked children, as long as it lives."""
    # The set's own method: as Python exits, Python's own weak sets may be gone already.
    _owners.add(_Reference(owner, _owners.discard))


def parallel_works() -> bool:
    """Whether this process may run a kernel in several threads.

    Not the child of a process that has used GNU OpenMP, which cannot start its
    threads anew: Numba ends a process that tries.
    """
    return _parallel_works


def in_one_go(calls: Iterable[tuple[Any, ...]]) -> None:
    """Make calls, each given as function and arguments.

    Where they are of functions in C, not a line of Python is run in between,
    and so no signal's handler.
    """
    with alone:
        deque(starmap(call, calls), maxlen=0)


def each_alone(calls: Iterable[tuple[Any, ...]]) -> None:
    """Make every call, whatever others raise: what `in_one_go` was kept from."""
    for function, *arguments in calls:
        with contextlib.suppress(BaseException):
            function(*arguments)


def emptying(values: list[Any]) -> Iterator[Any]:
    """Return an iterator in C, without an end, that takes the values out of a list.

    In their order; the list, which it reverses at once, is of no more use.
    """
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
        errors: list[BaseException] = []
        restored = False
        while not restored:
            try:
                restore()
                restored = True
            except BaseException as error:  # from the first handlers that are back
                errors.append(error)
        with contextlib.ExitStack() as stack:  # each has its turn, though another raises
            for arguments in reversed(came):
                stack.callback(put_off[arguments[0]], *arguments)
            if errors:
                raise errors[0]


def _numbas_locks() -> list[Any]:
    """Return the locks of Numba and of LLVM that have been imported, in the order they are taken.

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
        if lock is not None:
            locks.append(lock)
    return locks


def _standstill() -> Iterator[None]:
    # In this order, since a first step compiles with the first one held.
    with contextlib.ExitStack() as stack, alone:
        for lock in _numbas_locks():
            stack.enter_context(lock)
        yield


def _before_fork() -> None:
    held = _own.held
    while not held:
        # An exception, from a signal's handler, would only be printed, and the fork go on without
        # the locks: so, once more.
        with contextlib.suppress(BaseException):
            standstill = _standstill()
            next(standstill)
            held.append(standstill)


def _release() -> None:
    _own.held.clear()


def _in_child() -> None:
    global _parallel_works
    try:
        numba: Any = sys.modules.get("numba")
        # Without threads it is a ValueError, half imported an AttributeError.
        with contextlib.suppress(AttributeError, ValueError):
            if sys.platform == "linux" and numba.threading_layer() == "omp":
                _parallel_works = False
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
