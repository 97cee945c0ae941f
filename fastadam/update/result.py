"""What a step tells the user."""

import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple


class StepResult(NamedTuple):
    """What one call of `Adam.step` did.

    On a CUDA device, the norm and whether the step was skipped are on their way
    when `Adam.step` returns: to read them waits for them.

    Attributes
    ----------
    step : int
        The step of this call, counted from 0: what the schedule was asked
        for. A skipped step's number is the next one's again.
    lr : float
        The learning rate it used, per step: the first group's ``lr`` times
        the schedule's factor.
    grad_norm : float or None
        The global norm of the gradients, divided by ``grad_scale`` and not
        yet clipped; None where neither ``max_grad_norm`` nor ``nonfinite``
        asked for it.
    skipped : bool
        Whether nothing was updated or counted, since a gradient was not
        finite.

    Examples
    --------
    >>> import numpy as np, fastadam
    >>> opt = fastadam.Adam(np.zeros(2), lr=0.1, max_grad_norm=1.0)
    >>> opt.step(np.array([3.0, 4.0]))
    StepResult(step=0, lr=0.1, grad_norm=5.0, skipped=False)
    """

    step: int
    lr: float
    grad_norm: float | None = None
    skipped: bool = False


class Outcome:
    """What a step will have to tell, asked for when it is first read.

    Parameters
    ----------
    ask : callable
        Waits for the device.
    is_past : callable
        Whether there is nothing left to wait for.
    lasting : bool
        False for a step in a graph, of which each replay tells anew.
    """

    def __init__(
        self,
        ask: Callable[[], StepResult],
        is_past: Callable[[], bool] = lambda: False,
        *,
        lasting: bool = True,
    ) -> None:
        self._ask, self._is_past, self._lasting = ask, is_past, lasting
        self._known: StepResult | None = None
        # Another thread's step may be about to use the place again, a signal's handler not.
        self._lock = threading.RLock()

    def is_past(self) -> bool:
        """Whether it can be had without waiting."""
        return self._known is not None or self._is_past()

    def resolve(self) -> StepResult:
        """Wait for it, once, if it lasts."""
        known = self._known
        if known is not None:
            return known
        with self._lock:
            if self._known is not None:  # since this moment
                return self._known
            known = self._ask()
            if self._lasting:
                self._known = known
            return known


class PendingResult:
    """A `StepResult` that a device may still be working on: what is read is waited for."""

    # No tuple, whose items C code would read without asking, but taken for what it will be.
    __class__ = property(lambda _: StepResult)

    def __init__(self, outcome: Outcome) -> None:
        self._outcome = outcome

    def __getattr__(self, name: str) -> Any:
        return getattr(self._outcome.resolve(), name)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._outcome.resolve())

    def __getitem__(self, place: Any) -> Any:
        return self._outcome.resolve()[place]

    def __len__(self) -> int:
        return len(StepResult._fields)

    def __eq__(self, other: object) -> bool:
        return self._outcome.resolve() == (tuple(other) if isinstance(other, tuple) else other)

    def __hash__(self) -> int:
        return hash(self._outcome.resolve())

    def __reduce__(self) -> Any:
        return StepResult, tuple(self)

    def __repr__(self) -> str:
        return repr(self._outcome.resolve())
