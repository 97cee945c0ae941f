"""Threads, forks and signals: what must not come in the middle of what."""

import contextlib
import os
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import repeat, starmap
from operator import call
from typing import Any

from numba import threading_layer
from numba.core.compiler_lock import global_compiler_lock

# Held by who runs kernels in several threads, or writes arrays in more than one go. One at a
# time: each takes all processors anyway, Numba's workqueue aborts the process where two come at
# once, and no fork then copies arrays that are half written. Its owner may take it again, as the
# handler of a signal does.
alone = threading.RLock()


_after_fork: set[weakref.WeakMethod[Callable[[], None]]] = set()
_held: list[Any] = []
_openmp_is_lost = False


def register(method: Callable[[], None]) -> None:
    """Have a method called in forked children, as long as its object lives."""
    _after_fork.add(weakref.WeakMethod(method, _after_fork.discard))


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


def _before_fork() -> None:
    # In the order in which a first step takes them, since it compiles with the first one held.
    for lock in (alone, global_compiler_lock):
        lock.acquire()
        _held.append(lock)


def _release() -> None:
    while _held:
        _held.pop().release()


def _in_child() -> None:
    global _openmp_is_lost
    with contextlib.suppress(ValueError):  # no threads have been started
        _openmp_is_lost |= sys.platform == "linux" and threading_layer() == "omp"
    for reference in list(_after_fork):
        method = reference()
        if method is not None:
            method()
    _release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_release, after_in_child=_in_child)
