"""Steps beside busy processes: fastadam, in one thread too, and optimizers of torch in turn.

Each contender has a process of its own, since Numba's number of threads is one
for a process. They take turns in short slices, all beside the same spinning
processes. The *mean* of a step counts: the few steps that wait long for a
thread whose core is busy are what a user pays for, and the median hides them.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from fastadam.bench import peers
from fastadam.bench.child import WORKER, Child, ChildError
from fastadam.bench.session import Missing
from fastadam.cpus import cpus_allowed
from fastadam.machine import OtherProcesses

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

__all__ = ["CONTENDERS", "RATIOS", "SIZES", "TORCHS", "WORK", "Ratio", "Row", "Spinners"]
__all__ += ["UnderLoad", "expected_cpus", "geometric_mean", "measure", "ratio_of_means", "rows"]

OURS = ("fastadam", "fastadam-1")
# On torch's tensors, where torch is installed.
TORCHS = ("fastadam-torch", "torch-fused")
CONTENDERS = (*OURS, *TORCHS)
# Whose mean times are divided by whose.
RATIOS = (OURS, TORCHS[::-1])
SIZES = (100_000, 270_000, 1_000_000, 4_000_000)
# Seconds of other work between two steps: none, and what a small model's forward and backward
# pass would take.
WORK = (0.0, 3e-3)
# All rows are measured, and then once more in the reverse order; each time all contenders have
# six slices, in alternating order.
PASSES, ROUNDS = 2, 6
# Of a slice, at least: more than 256 steps of each contender and row in all.
STEPS, SECONDS = 22, 0.2


class Row(NamedTuple):
    """What is measured of every contender."""

    size: int  # elements of the one array
    work: float  # seconds of other work between two steps
    clipped: bool  # to a global norm of 1


class Ratio(NamedTuple):
    """A ratio of mean times, and its standard error."""

    value: float
    error: float

    @property
    def noisy(self) -> bool:
        """Whether it is too uncertain to say much: by more than a tenth of itself."""
        return self.error > 0.1 * self.value


@dataclass
class UnderLoad:
    """What came out."""

    # By row and contender: nanoseconds of each step, a list for each slice.
    times: dict[tuple[Row, str], list[list[int]]] = field(default_factory=dict)
    # By contender: on how many threads a large step runs; of fastadam, Numba's threading layer.
    threads: dict[str, int | None] = field(default_factory=dict)
    layer: str | None = None
    missing: list[Missing] = field(default_factory=list)
    # CPUs that the spinning processes, and processes of others, kept busy meanwhile.
    load: dict[Row, float] = field(default_factory=dict)
    other_cpus: float | None = None

    def nanoseconds(self, row: Row, contender: str) -> list[int]:
        """Return the time of each step, of all slices."""
        return list(itertools.chain(*self.times[row, contender]))

    def ratio(self, row: Row, pair: tuple[str, str] = OURS) -> Ratio | None:
        """Return the mean time of the first over that of the second, None without both."""
        both = [self.times[row, name] for name in pair if (row, name) in self.times]
        return ratio_of_means(*both) if len(both) == 2 else None


class Spinners:
    """Processes that keep CPUs busy during a ``with`` block.

    Examples
    --------
    >>> from fastadam.bench.load import Spinners
    >>> with Spinners(1) as spinners:
    ...     (seconds,) = spinners.cpu_seconds()
    >>> seconds > 0
    True
    """

    def __init__(self, number: int) -> None:
        self._children = [Child([*WORKER, "spin"]) for _ in range(number)]
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:  # ends those that run if another cannot be started
            for child in self._children:
                stack.enter_context(child)
            self.cpu_seconds()  # returns once they all spin
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def cpu_seconds(self) -> list[float]:
        """Ask each how much CPU time it has used; raise `ChildError` if one has ended."""
        return [float(child.ask(None)) for child in self._children]


def ratio_of_means(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> Ratio:
    """Return the mean of all steps over that of others, and how certain that is.

    Times come in slices: as many of each, taken side by side. The error is the
    jackknife's: how much the ratio moves as each pair of slices is left out in
    turn.

    Examples
    --------
    >>> from fastadam.bench.load import ratio_of_means
    >>> ratio_of_means([[3, 5], [4]], [[2, 2], [2, 2]])
    Ratio(value=2.0, error=0.0)
    """

    def ratio(which: Iterable[int]) -> float:
        places = list(which)
        means = [
            statistics.fmean(itertools.chain(*(slices[k] for k in places)))
            for slices in (ours, theirs)
        ]
        return means[0] / means[1]

    count = len(ours)
    value = ratio(range(count))
    if count < 2:
        return Ratio(value, 0.0)
    without = [ratio(k for k in range(count) if k != left_out) for left_out in range(count)]
    middle = statistics.fmean(without)
    squares = sum((one - middle) ** 2 for one in without)
    return Ratio(value, math.sqrt(squares * (count - 1) / count))


def geometric_mean(ratios: Sequence[Ratio]) -> Ratio:
    """Return the geometric mean of ratios with independent errors, and its standard error.

    Examples
    --------
    >>> from fastadam.bench.load import Ratio, geometric_mean
    >>> geometric_mean([Ratio(1.0, 0.0), Ratio(4.0, 0.0)])
    Ratio(value=2.0, error=0.0)
    """
    value = statistics.geometric_mean(one.value for one in ratios)
    relative = math.hypot(*(one.error / one.value for one in ratios)) / len(ratios)
    return Ratio(value, value * relative)


def rows(sizes: Sequence[int] = SIZES) -> list[Row]:
    """Return every size, in a bare loop and with other work, plain and clipped."""
    return [
        Row(size, work, clipped) for clipped in (False, True) for work in WORK for size in sizes
    ]


def measure(
    number: int,
    *,
    sizes: Sequence[int] = SIZES,
    dtype: str = "float32",
    beside: Sequence[str] = TORCHS,
    passes: int = PASSES,
    rounds: int = ROUNDS,
    steps: int = STEPS,
    seconds: float = SECONDS,
    on_turn: Callable[[int, int, Row, str], Any] = lambda _done, _all, _row, _contender: None,
) -> UnderLoad:
    """Measure steps beside spinning processes, which have ended when this returns.

    Those of `beside`, of `TORCHS`, take part if torch is installed. All rows are
    measured in `passes`, every other time in reverse order; in each, every
    contender has `rounds` slices of `steps` or more, for `seconds` or longer.
    `on_turn` is told of each slice: those done, all, and whose it is.

    Raises
    ------
    ChildError
        If a spinning process, or one of fastadam's, has ended.
    """
    found = UnderLoad()
    names = list(OURS)
    for name in beside:
        reason = peers.by_name(name).why_not(dtype, False)
        if reason is None:
            names.append(name)
        else:
            found.missing.append(Missing(name, None, reason))
    every = rows(sizes)
    total = passes * rounds * sum(len(_taking_part(names, row)) for row in every)
    done = 0
    with OtherProcesses() as others, ExitStack() as stack:
        children = {name: stack.enter_context(_child(name)) for name in names}
        for name in names:
            _first_steps(found, children, name, every, dtype)
        spinners = stack.enter_context(Spinners(number))
        orders = (every if turn % 2 == 0 else every[::-1] for turn in range(passes))
        for row in itertools.chain(*orders):
            taking_part = _taking_part(children, row)
            for name in taking_part:
                children[name].ask({"size": row.size, "clipped": row.clipped, "dtype": dtype})
            before, began = sum(spinners.cpu_seconds()), time.monotonic()
            for round_ in range(rounds):
                for name in taking_part if round_ % 2 == 0 else reversed(taking_part):
                    on_turn(done, total, row, name)
                    request = {"work": row.work, "steps": steps, "seconds": seconds}
                    times = children[name].ask(request)
                    found.times.setdefault((row, name), []).append(times)
                    done += 1
            busy = sum(spinners.cpu_seconds()) - before
            share = busy / (time.monotonic() - began) / passes
            found.load[row] = found.load.get(row, 0.0) + share
    found.other_cpus = others.cpus
    return found


def _taking_part(names: Iterable[str], row: Row) -> list[str]:
    # torch clips in passes of its own: that is measured by `--tail`.
    return [name for name in names if name in OURS or not row.clipped]


def _child(name: str) -> Child:
    alone = {"NUMBA_NUM_THREADS": "1"} if name == peers.ONE_THREAD.name else None
    return Child([*WORKER, "load", name], alone)


def _first_steps(
    found: UnderLoad, children: dict[str, Child], name: str, every: Sequence[Row], dtype: str
) -> None:
    """Import and compile before anything spins; let torch go if it does not work."""
    try:
        for clipped in (False, True) if name in OURS else (False,):
            for size in (min(row.size for row in every), max(row.size for row in every)):
                request = {"size": size, "clipped": clipped, "dtype": dtype}
                answer = children[name].ask(request)
                found.threads[name] = answer["threads"]
                if name == "fastadam":
                    found.layer = answer["layer"]
    except ChildError as error:
        if name in OURS:
            raise
        del children[name]
        found.missing.append(Missing(name, None, str(error)))


def expected_cpus(number: int, threads: int) -> float:
    """Return how many CPUs spinning processes should get beside a step's threads."""
    return number * min(1.0, cpus_allowed() / (number + threads)) if number else 0.0
