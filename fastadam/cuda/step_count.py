"""The optimizer's count of steps, where the device may know more than the host."""

import functools
from collections.abc import Callable

import numpy as np

from ..update.result import StepResult
from .compiler import driver
from .context import Context
from .results import PendingResult


class StepCount:
    """The optimizer's count of steps, as an array of one that is read by ``[0]``.

    The host counts along. After a step that may be skipped it waits for that step's result to
    know; and once a step is in a graph, for the device, which alone counts the replays.

    Parameters
    ----------
    count : int
        Steps so far.
    context : Context
        Where the device counts.
    device : int
        Which one.
    current_stream : callable
        Returns the stream of a step that is taken now.
    """

    def __init__(
        self, count: int, context: Context, device: int, current_stream: Callable[[], int]
    ) -> None:
        self._context, self._device, self._current_stream = context, device, current_stream
        # Known, or in the last step's result. Replaced as a whole: other threads may read it.
        self._last: int | PendingResult = count
        self.in_graph = False

    def __getitem__(self, place: int) -> int:
        if self.in_graph:
            with driver.context(self._device), driver.allowed_in_capture():
                # In a capture, the last one known: nobody knows when the step will be taken.
                if not driver.is_capturing(self._current_stream()):
                    self._last = int(self._context.read("step_count", 1)[0])
        last = self._last
        return last if isinstance(last, int) else _after(last.wait())

    def __setitem__(self, place: int, count: int) -> None:
        self._context.write("step_count", np.array([count]))
        self._last = count

    def counting(
        self, result: PendingResult | None = None, *, may_skip: bool = False
    ) -> Callable[[], object]:
        """Return a call that counts a step, of which ``result`` will tell if it was skipped.

        No signal is acted on in it.
        """
        last = self._last
        if isinstance(last, PendingResult) and last.known is not None:
            last = _after(last.known)
        if result is not None and (may_skip or isinstance(last, PendingResult)):
            last = result
        elif isinstance(last, int):
            last += 1
        return functools.partial(setattr, self, "_last", last)


def _after(result: StepResult) -> int:
    return result.step + (not result.skipped)
