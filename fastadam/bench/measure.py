"""Two contenders in turn, and what their times say.

Only the ratio of times taken side by side means anything on a machine that
others use as well: each round times both, in alternating order, and gives one
ratio. The median of the ratios is the result, unless they differ too much to
say anything.
"""

from __future__ import annotations

import contextlib
import gc
import math
import statistics
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from fastadam.bench.contenders import Contender

__all__ = ["CUDA_BURST", "Comparison", "Spread", "burst", "compare", "host_costs"]
__all__ += ["spread", "step_times"]

BURST = 5e-3  # seconds that a timed burst of steps should take
CUDA_BURST = 20e-3  # and on a device, which is waited for once at its end
WARM_UP = 1e-3  # seconds of untimed steps before it
# OpenMP's threads spin for a while after their last region, and would hold a core that the other
# contender needs. A turn begins with a rest.
REST = 5e-3
# Steps as long as this push everything else out of the caches by themselves: one warm-up will do.
LONG = 0.1
LEAST_ROUNDS = 5
# Seconds that a pair may take on one workload, the calibration aside.
BUDGET = 4.0
# Steps are tried for as long as this to find out how long an undisturbed one takes: a thread
# whose core is busy can hold up several in a row, by some milliseconds each.
CALIBRATION = 0.05
# Where the upper quartile is so much more than the lower, numbers say too little to be shown.
NOISY = 1.25
# A burst with refills between its steps takes longer than its timed part: limit both.
MOST_REFILLED = 200
# Calls in a row whose cost on the host is timed: so few that the device's queue, of some 1,000
# launches, cannot be full.
CALLS = 4
# Of `step_times`: before it times, and how many numbers the other work is about: in the first
# cache, and so few that no library takes more than one thread for them.
UNTIMED_STEPS, UNTIMED_SECONDS = 8, 0.03
WORK_NUMBERS = 1_000


class Spread(NamedTuple):
    """The middle of a list of numbers: half, a quarter and three quarters are below."""

    median: float
    q1: float
    q3: float

    @property
    def noisy(self) -> bool:
        """Whether the quartiles lie more than 25% apart."""
        return self.q3 > NOISY * self.q1


class Comparison(NamedTuple):
    """What `compare` found: seconds per step in each round, and steps in the last burst."""

    seconds: list[float]
    other_seconds: list[float]
    number: int
    other_number: int

    @property
    def ratios(self) -> list[float]:
        """The second contender's time over the first's, per round."""
        return [b / a for a, b in zip(self.seconds, self.other_seconds, strict=True)]


def spread(values: Sequence[float]) -> Spread:
    """Return median and quartiles, with linear interpolation as in `numpy.quantile`.

    Examples
    --------
    >>> from fastadam.bench.measure import spread
    >>> spread([1.0, 2.0, 3.0, 4.0, 50.0])
    Spread(median=3.0, q1=2.0, q3=4.0)
    """
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, q1, q3)


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Turn it off for a ``with`` block, unless it is off already."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def burst(
    contender: Contender,
    number: int,
    *,
    refill: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Time some steps, and return the seconds per step.

    With `refill`, the gradients are set back before every step, and each step
    is timed alone.
    """
    step, wait = contender.step, contender.wait
    with _no_garbage_collection():
        if refill:
            total = 0.0
            for _ in range(number):
                contender.refill()
                began = clock()
                step()
                wait()
                total += clock() - began
            return total / number
        began = clock()
        for _ in range(number):
            step()
        wait()
        return (clock() - began) / number


def compare(
    first: Contender,
    second: Contender,
    *,
    rounds: int,
    refill: bool = False,
    budget: float = BUDGET,
    burst_seconds: float = BURST,
    on_round: Callable[[int, int], Any] = lambda _done, _rounds: None,
) -> Comparison:
    """Let two contenders take turns.

    A turn is a rest, warm-up steps that are not timed (at least 2, or 1 if a
    step takes longer than 0.1 s) and a burst of as many steps as fit into
    `burst_seconds`, at least 1, when none is held up: the fastest burst so far
    says how many. Were it a slow one, the burst would be a step or two right
    after the rest, when the threads are slow to come, and stay so for all
    rounds: a wrong ratio, and every round would agree on it.

    Each has `rounds` turns, or fewer, but no fewer than 5, if they take longer
    than `budget` seconds. `refill` is as for `burst`. `on_round` is called with
    the rounds done and the rounds planned.
    """
    both = (first, second)
    fastest = [_calibrate(contender, burst_seconds, refill=refill) for contender in both]
    planned = [_plan(seconds, burst_seconds, refill=refill) for seconds in fastest]
    round_seconds = sum(
        REST + seconds * sum(plan) for seconds, plan in zip(fastest, planned, strict=True)
    )
    rounds = min(rounds, max(LEAST_ROUNDS, int(budget / round_seconds)))
    times: tuple[list[float], list[float]] = ([], [])
    ends = time.perf_counter() + budget
    on_round(0, rounds)
    for turn, order in enumerate(_turns(rounds, ends, time.perf_counter)):
        for which in order:
            number, warm_up = planned[which]
            time.sleep(REST)
            burst(both[which], warm_up, refill=refill)
            seconds = burst(both[which], number, refill=refill)
            times[which].append(seconds)
            fastest[which] = min(fastest[which], seconds)
            planned[which] = _plan(fastest[which], burst_seconds, refill=refill)
        on_round(turn + 1, rounds)
    return Comparison(*times, planned[0][0], planned[1][0])


def _turns(rounds: int, ends: float, clock: Callable[[], float]) -> Iterator[tuple[int, int]]:
    """Yield whose turn it is in each round, until the time is over."""
    for turn in range(rounds):
        if turn >= LEAST_ROUNDS and clock() > ends:
            return
        yield (0, 1) if turn % 2 == 0 else (1, 0)


def _plan(seconds: float, burst_seconds: float, *, refill: bool) -> tuple[int, int]:
    """Return how many steps of so many seconds are timed in a turn, and how many are not."""
    number = max(1, round(burst_seconds / seconds))
    warm_up = max(2, math.ceil(WARM_UP / seconds)) if seconds < LONG else 1
    if refill:
        number, warm_up = min(number, MOST_REFILLED), min(warm_up, MOST_REFILLED)
    return number, warm_up


def _calibrate(contender: Contender, burst_seconds: float, *, refill: bool) -> float:
    """Return about how many seconds a step takes that is compiled, cached and not held up."""
    burst(contender, 1, refill=refill)  # compiles, starts threads, touches the state's memory
    number, fastest = 1, math.inf
    while True:
        ends = time.perf_counter() + CALIBRATION
        tries = 0
        while tries < 1 or (fastest < LONG and time.perf_counter() < ends):
            fastest = min(fastest, burst(contender, number, refill=refill))
            tries += 1
        fastest = max(fastest, 1e-9)
        planned, _ = _plan(fastest, burst_seconds, refill=refill)
        if planned <= 4 * number:
            return fastest
        number = planned // 2


def host_costs(
    first: Contender,
    second: Contender,
    *,
    rounds: int,
    budget: float = BUDGET / 4,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[list[float], list[float]]:
    """Time the calls alone, of contenders whose steps run on a device later on.

    The device has nothing to do when a turn begins, and is not waited for
    within it. Both contenders are warm; rounds are as for `compare`. Returns
    the seconds per call of each, per round.
    """
    times: tuple[list[float], list[float]] = ([], [])
    ends = clock() + budget
    with _no_garbage_collection():
        for order in _turns(rounds, ends, clock):
            for which in order:
                contender = (first, second)[which]
                step = contender.step
                contender.wait()
                began = clock()
                for _ in range(CALLS):
                    step()
                times[which].append((clock() - began) / CALLS)
                contender.wait()
    return times


def step_times(
    step: Callable[[], object],
    *,
    work: float,
    steps: int,
    seconds: float,
    clock: Callable[[], int] = time.perf_counter_ns,
) -> list[int]:
    """Time each step of a loop; return nanoseconds.

    Before every step the loop does `work` seconds of other, numeric work in
    one thread. At least `steps` are timed, for at least `seconds`, after some
    that do not count: they bring the array into the caches again, wake the threads,
    and use up what the system owes a process that has slept.
    """
    pause = int(work * 1e9)
    numbers = np.linspace(0.1, 1.0, WORK_NUMBERS)
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

    with _no_garbage_collection():
        loop(UNTIMED_STEPS, UNTIMED_SECONDS)
        return loop(steps, seconds)
