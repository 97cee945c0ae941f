"""What goes between the host and a CUDA device while steps are on their way."""

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from ..params.arrays import address
from ..update.result import Outcome, StepResult
from . import launch, layout

# Messages to the device, and results from it, that may be on their way at a time.
SLOTS = 64


class Mailbox:
    """Sends words of 8 bytes to the device in the order of a stream, without waiting for it."""

    def __init__(self, words: int) -> None:
        self._slots = launch.pinned(max(words, 1), SLOTS)
        self._events: list[Any] = []
        self._next = 0

    def send(self, words: npt.NDArray[Any], target: int, stream: int) -> None:
        """Copy the words; wait only if as many as there are slots are on their way."""
        place = self._next
        if place == len(self._events):
            self._events.append(launch.Event())
        else:
            self._events[place].wait()
        slot = self._slots[place]
        slot[: words.size] = words.view(np.float64)
        launch.upload(target, slot.ctypes.data, words.nbytes, stream)
        self._events[place].record(stream)
        self._next = (place + 1) % SLOTS


class Results:
    """What steps have to tell, written by the device to memory that the host reads."""

    def __init__(self, device: int) -> None:
        self._device = device
        # One more, for steps in a graph.
        self._slots = launch.pinned(layout.RESULT_SIZE, SLOTS + 1)
        self._events: list[Any] = []
        self._pending: list[Any] = []
        self._next = 0

    def expect(self, lr_of: Callable[[int], float]) -> tuple[int, Any, Outcome]:
        """Return a free slot, its event, and what will be in the one when the other is past.

        Waits only if all slots are of steps that have not been taken yet.
        """
        place = self._next
        self._next = (place + 1) % SLOTS
        if place == len(self._events):
            self._events.append(launch.Event())
            self._pending.append(lambda: None)
        else:
            pending = self._pending[place]()
            if pending is not None:  # the user may still ask it
                pending.resolve()
            self._events[place].wait()
        event = self._events[place]

        def ask() -> StepResult:
            with launch.context(self._device):  # whatever thread asks
                event.wait()
            return self.read(place, lr_of)

        def is_past() -> bool:
            with launch.context(self._device):
                return bool(event.is_past())

        outcome = Outcome(ask, is_past)
        self._pending[place] = weakref.ref(outcome)
        return place, event, outcome

    def address(self, slot: int) -> int:
        """Return where the device writes."""
        return address(self._slots[slot])

    def read(self, slot: int, lr_of: Callable[[int], float]) -> StepResult:
        """Return what a slot holds."""
        norm = self._slots[slot, layout.NORM]
        skipped = bool(self._slots[slot, layout.SKIPPED])
        count = int(self._slots.view(np.int64)[slot, layout.COUNT])
        step = count if skipped else count - 1
        return StepResult(step, lr_of(step), float(norm), skipped)
