"""The child process of one contender of ``fastadam bench --load``.

``python -m fastadam.bench.load_worker NAME`` reads lines of JSON, answers each
by one, and sleeps in between:

``{"size": int, "clipped": bool, "dtype": str}``
    Makes an array and its optimizer, and takes the first steps. The answer:
    ``threads`` (int: on how many a large step may run) and ``layer`` (str or
    None: Numba's threading layer, if it has started one).
``{"work": seconds, "steps": int, "seconds": float}``
    Takes a slice of steps. The answer: nanoseconds, a list, one for each step.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from fastadam.bench.contenders import HYPERPARAMETERS, TAIL, FastAdam, TorchFused
from fastadam.bench.workloads import draw

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from fastadam.bench.contenders import Contender

__all__ = ["timed"]

# Before a slice is timed: its steps bring the array into the caches again, wake the threads, and
# use up what the system owes a process that has slept.
WARM_UP_STEPS, WARM_UP_SECONDS = 8, 0.03
# Numbers that the other work between two steps is about: in the first cache, and so few that no
# library takes more than one thread for them.
NUMBERS = 1_000


class Clipped(FastAdam):
    """A step with clipping, and nothing else of the tail."""

    def _make(self, params: Sequence[NDArray[Any]]) -> None:
        import fastadam

        self.params = [param.copy() for param in params]
        self.opt = fastadam.Adam(
            self.params, **HYPERPARAMETERS, max_grad_norm=TAIL["max_grad_norm"]
        )


def timed(
    step: Callable[[], object],
    *,
    work: float,
    steps: int,
    seconds: float,
    clock: Callable[[], int] = time.perf_counter_ns,
) -> list[int]:
    """Time each step of a loop that does other work between two steps.

    The first 8 steps, and those of the first 0.03 seconds, do not count.

    Parameters
    ----------
    step : callable
        Takes a step.
    work : float
        Seconds of other work before every step; it is numeric, in one thread.
    steps : int
        How many to time, at least.
    seconds : float
        For how long to time steps, at least.
    clock : callable
        Returns nanoseconds.

    Returns
    -------
    list of int
        Nanoseconds, one for each step.
    """
    pause = int(work * 1e9)
    numbers = np.linspace(0.1, 1.0, NUMBERS)
    out = np.empty_like(numbers)

    def loop(steps: int, seconds: float) -> list[int]:
        times: list[int] = []
        ends = clock() + int(seconds * 1e9)
        began = clock()
        while len(times) < steps or began < ends:
            if pause:
                resumes = clock() + pause
                while clock() < resumes:
                    np.sqrt(numbers, out=out)
            began = clock()
            step()
            times.append(clock() - began)
        return times

    collects = gc.isenabled()
    gc.disable()
    try:
        loop(WARM_UP_STEPS, WARM_UP_SECONDS)
        return loop(steps, seconds)
    finally:
        if collects:
            gc.enable()


def _layer() -> str | None:
    numba: Any = sys.modules.get("numba")
    try:
        layer: str = numba.threading_layer()
    except (AttributeError, ValueError):  # not imported, or no step in several threads yet
        return None
    return layer


def _main(name: str) -> None:
    # Answers have a stream of their own: what libraries print goes to stderr.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    contender: Contender | None = None
    for line in sys.stdin:
        request = json.loads(line)
        if "size" in request:
            contender = None  # gives its memory back
            params, grads = draw([(request["size"],)], request["dtype"])
            make: Any = FastAdam if name.startswith("fastadam") else TorchFused
            contender = (Clipped if request["clipped"] else make)(params, grads, False)
            del params, grads
            for _ in range(3):
                contender.step()
            gc.collect()
            answer: Any = {"threads": contender.threads(), "layer": _layer()}
        elif contender is not None:
            answer = timed(contender.step, **request)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    _main(sys.argv[1])
