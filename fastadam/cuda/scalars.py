"""A step's scalars where the host does not know how many steps have been skipped."""

import functools
import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from ..update.result import Outcome
from ..update.scalars import Scalars

# Counts of steps, and so tables, for which a schedule is asked at a time.
MOST_TABLES = 16


class StepCount:
    """The count of steps, as an array of one, waited for only where the device alone knows it."""

    def __init__(self, stepper: Any, count: int) -> None:
        self._stepper = weakref.proxy(stepper)  # whose memory is to go when the optimizer does
        self._known = np.array([count], dtype=np.int64)
        # Steps that may yet turn out to be skipped, oldest first; whether some are in a graph.
        self._pending: deque[Outcome] = deque()
        self.replayed = False
        # It may be asked in one thread while another takes steps.
        self._lock = threading.RLock()

    def counting(self, outcome: Outcome | None, *, may_skip: bool) -> Callable[[], object]:
        """Return a call that counts a step, or one that may be skipped.

        No signal is acted on in it.
        """
        with self._lock:
            while self._pending and self._pending[0].is_past():
                self._take_oldest()
            if outcome is None or not (may_skip or self._pending):
                return functools.partial(np.add, self._known, 1, self._known)
            return functools.partial(self._pending.append, outcome)

    def possible(self) -> list[int]:
        """Return the counts that are possible, waiting only where they are too many."""
        if self.replayed:
            return [self[0]]
        pending = self._pending
        with self._lock:
            if pending:
                with self._stepper.asking():
                    while pending and (pending[0].is_past() or len(pending) >= MOST_TABLES):
                        self._take_oldest()
            known = int(self._known[0])
            return list(range(known, known + len(pending) + 1))

    def _take_oldest(self) -> None:
        last = self._pending[0].resolve()
        self._known[0] = last.step + (not last.skipped)
        self._pending.popleft()

    def __getitem__(self, place: int) -> int:
        with self._lock:
            if self.replayed or self._pending:
                with self._stepper.asking():
                    self._ask()
            return int(self._known[0])

    def _ask(self) -> None:
        # Of a step that goes into a graph nobody knows its number.
        if self.replayed and not self._stepper.is_capturing():
            self._known[0] = self._stepper.read_count()
            self._pending.clear()
        while self._pending:
            self._take_oldest()

    def __setitem__(self, place: int, count: int) -> None:
        with self._lock:
            self._stepper.write_count(count)
            self._known[0] = count
            self._pending.clear()


class DeviceScalars(Scalars):
    """A table of the groups for each count of steps that is possible.

    Attributes
    ----------
    tables : list of float64 array, shape (groups, GROUP_COLUMNS)
        One for the first possible count, one for the next, and so on.
    first : int
        That count; 0 if it is the only one.
    lrs : list of float
        The first group's learning rate in each table.
    """

    tables: list[npt.NDArray[np.float64]]
    first: int
    lrs: list[float]

    def refresh(
        self, step_count: Any, schedule: Callable[[int], float] | None, grad_scale: float
    ) -> float:
        """Bring the tables up to date, as `Scalars.refresh`; return the last one's rate."""
        # Without a schedule, one table does for whatever count it is.
        possible = [0] if schedule is None else step_count.possible()
        self.first, self.tables, self.lrs = 0, [], []
        if len(possible) > 1:
            self.first = possible[0]
        for count in possible:
            self.lrs.append(super().refresh([count], schedule, grad_scale))
            self.tables.append(self.rows if len(possible) == 1 else self.rows.copy())
        return self.lrs[-1]

    def lr_of(self) -> Callable[[int], float]:
        """Return what tells the rate of a step by its number."""
        first, lrs = self.first, self.lrs
        return lambda step: lrs[min(max(step - first, 0), len(lrs) - 1)]
