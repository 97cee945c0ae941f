"""The results of steps on a CUDA device, which the host need not wait for."""

import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from ..params.arrays import address
from ..update.result import StepResult
from . import layout
from .compiler import driver

# What may be on its way at a time, in each direction.
SLOTS = 64


@StepResult.register
class PendingResult:
    """A `StepResult` that a device may still be working on: to read it waits for it.

    No tuple, since C code would read a tuple's items without asking.

    Parameters
    ----------
    read : callable
        Waits for the device.
    lasting : bool
        False for a step in a graph, which has a new result after each replay.
    """

    def __init__(self, read: Callable[[], StepResult], *, lasting: bool = True) -> None:
        self._read, self._lasting = read, lasting
        self.known: StepResult | None = None
        # Another thread's step may be about to use the slot again; a signal's handler not.
        self._lock = threading.RLock()

    def wait(self) -> StepResult:
        """Wait for the device, once, if the result lasts; return the result."""
        known = self.known
        if known is None:
            with self._lock:
                known = self.known or self._read()
                if self._lasting:
                    self.known = known
        return known

    def __getattr__(self, name: str) -> Any:
        return getattr(self.wait(), name)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.wait())

    def __getitem__(self, place: Any) -> Any:
        return self.wait()[place]

    def __len__(self) -> int:
        return len(StepResult._fields)

    def __eq__(self, other: object) -> bool:
        return self.wait() == (tuple(other) if isinstance(other, StepResult) else other)

    def __hash__(self) -> int:
        return hash(self.wait())

    def __reduce__(self) -> Any:
        return StepResult, tuple(self)

    def __repr__(self) -> str:
        return repr(self.wait())


class Ring:
    """Slots of words in memory that host and device share, to be used in turn.

    Whoever takes a slot must wait for its event, and record it after the slot's last use.
    """

    def __init__(self, words: int) -> None:
        self._slots = driver.pinned(max(words, 1), SLOTS)
        self._events: list[Any] = []
        self._next = 0

    def next_slot(self) -> tuple[npt.NDArray[np.float64], Any]:
        """Return a slot and its event."""
        place = self._next
        if place == len(self._events):
            self._events.append(driver.Event())
        self._next = (place + 1) % SLOTS
        return self._slots[place], self._events[place]


class Results:
    """The results of steps, written by the device to memory that the host reads."""

    def __init__(self, device: int) -> None:
        self._device, self._ring = device, Ring(layout.RESULT_SIZE)
        # By the address of its slot, what the user may still read.
        self._pending: dict[int, weakref.ref[PendingResult]] = {}
        self._in_graph = driver.pinned(layout.RESULT_SIZE, 1)[0]

    def expect(self, lr: float) -> tuple[int, Any, PendingResult]:
        """Return where the device is to write, an event to record after it, and the result.

        Waits only if all slots are of steps that have not been taken yet.
        """
        slot, event = self._ring.next_slot()
        place = address(slot)
        last = self._pending[place]() if place in self._pending else None
        if last is not None:
            last.wait()
        event.wait()

        def read() -> StepResult:
            # Whatever thread asks, a capture under way or not.
            with driver.context(self._device), driver.allowed_in_capture():
                event.wait()
            return _result(slot, lr)

        result = PendingResult(read)
        self._pending[place] = weakref.ref(result)
        return place, event, result

    def expect_replays(self, lr: float) -> tuple[int, PendingResult]:
        """Return the same for a step in a graph: of each replay, as soon as it is done."""
        slot, device = self._in_graph, self._device

        def read() -> StepResult:
            with driver.context(device):
                driver.synchronize_all()
            return _result(slot, lr)

        return address(slot), PendingResult(read, lasting=False)


def _result(slot: npt.NDArray[np.float64], lr: float) -> StepResult:
    skipped, count = bool(slot[layout.SKIPPED]), int(slot.view(np.int64)[layout.COUNT])
    return StepResult(count if skipped else count - 1, lr, float(slot[layout.NORM]), skipped)
