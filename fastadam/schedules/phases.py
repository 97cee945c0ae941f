"""Schedules of several parts, one after another: cycles, pieces, a warm-up before another."""
# ruff: noqa: N801  (the field writes schedules as functions: warmup(...))

import math
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from ..params import checks
from .base import DECAYS, Base, Decay, Schedule, half_cosine, mix


@dataclass(frozen=True, slots=True)
class warmup_stable_decay(Base):
    """Warm up linearly, stay at 1, decay at the end (WSD).

    The factor is ``(step + 1) / warmup_steps`` in the warm-up, then 1, and
    over the last `decay_steps` ``final + (1 - final) * d(x)``; x goes from
    0 to 1 at ``step = num_steps`` and d(x) is ``1 - x`` for "linear",
    ``0.5 * (1 + cos(pi * x))`` for "cosine", ``1 - sqrt(x)`` for "sqrt".

    Parameters
    ----------
    num_steps : int
        Whole length in steps, warm-up and decay included.
    warmup_steps, decay_steps : int
        Lengths of the two ends in steps; `warmup_steps` may be 0.
    final : float, default 0.0
        Factor at the end, >= 0.
    decay : {"linear", "cosine", "sqrt"}, default "linear"
        Shape of the decay.

    Raises
    ------
    ValueError
        If ``warmup_steps + decay_steps > num_steps``, among others.

    References
    ----------
    Hu et al., MiniCPM, arXiv:2404.06395; "sqrt": Hägele et al., Scaling
    Laws and Compute-Optimal Training, arXiv:2405.18392.

    Examples
    --------
    >>> schedule = warmup_stable_decay(100, 10, decay_steps=20)
    >>> schedule(0), schedule(50), schedule(90), schedule(100)
    (0.1, 1.0, 0.5, 0.0)
    """

    num_steps: int
    warmup_steps: int
    decay_steps: int
    final: float = 0.0
    decay: Decay = "linear"

    def __post_init__(self) -> None:
        Base.__post_init__(self)
        if self.warmup_steps + self.decay_steps > self.num_steps:
            raise ValueError(
                "warmup_steps + decay_steps must be at most num_steps, "
                f"got {self.warmup_steps} + {self.decay_steps} > {self.num_steps}"
            )

    def _factor(self, step: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if step >= self.num_steps:
            return self.final
        decayed = max(step - (self.num_steps - self.decay_steps), 0)
        return mix(1.0, self.final, DECAYS[self.decay](decayed / self.decay_steps))


@dataclass(frozen=True, slots=True)
class cosine_restarts(Base):
    """Repeat `cosine`, each cycle `multiplier` times as long (SGDR).

    Cycle k, from 0, has ``first_cycle_steps * multiplier**k`` steps. Its
    first step has factor 1, exactly; its last is still above `final`.

    Parameters
    ----------
    first_cycle_steps : int
        Length of the first cycle in steps.
    multiplier : int, default 1
        Length of each cycle over the one before.
    final : float, default 0.0
        Factor that each cycle falls to, >= 0.
    num_cycles : int, optional
        Number of cycles, after which the factor stays at `final`. By
        default they go on for ever.

    Raises
    ------
    TypeError, ValueError
        For an argument of the wrong type, or out of its range.

    References
    ----------
    Loshchilov and Hutter, SGDR, arXiv:1608.03983.

    Examples
    --------
    >>> schedule = cosine_restarts(10, multiplier=2)
    >>> schedule(0), schedule(5), schedule(10), schedule(20), schedule(30)
    (1.0, 0.5, 1.0, 0.5, 1.0)
    """

    first_cycle_steps: int
    multiplier: int = 1
    final: float = 0.0
    num_cycles: int | None = None

    def _factor(self, step: int) -> float:
        length, ratio = self.first_cycle_steps, self.multiplier
        if ratio == 1:
            cycle, step = divmod(step, length)
        else:
            # cycle k starts at length * (ratio**k - 1) / (ratio - 1), so k is the integer part
            # of log(bound) / log(ratio); the float logarithm may be one off, the integers not
            bound = step * (ratio - 1) // length + 1
            cycle = int(math.log(bound) / math.log(ratio))
            while ratio**cycle > bound:
                cycle -= 1
            while ratio ** (cycle + 1) <= bound:
                cycle += 1
            step -= length * (ratio**cycle - 1) // (ratio - 1)
            length *= ratio**cycle
        if self.num_cycles is not None and cycle >= self.num_cycles:
            return self.final
        return mix(1.0, self.final, half_cosine(step / length))


@dataclass(frozen=True, slots=True, init=False)
class piecewise(Base):
    """Hold one factor after another.

    The factor is ``factors[i]``, i being the number of boundaries <= step:
    a boundary is the first step of the new piece, as in PyTorch's
    MultiStepLR. Each factor stands alone; they are not multiplied up.

    Parameters
    ----------
    boundaries : sequence of int
        First step of each piece but the first: positive, increasing.
    factors : sequence of float
        One factor >= 0 per piece: one more than there are boundaries.

    Raises
    ------
    ValueError
        If the boundaries do not increase or the lengths do not match,
        among others.

    Examples
    --------
    >>> schedule = piecewise([100, 200], [1.0, 0.1, 0.01])
    >>> schedule(99), schedule(100), schedule(1000)
    (1.0, 0.1, 0.01)
    """

    boundaries: tuple[int, ...]
    factors: tuple[float, ...]

    def __init__(self, boundaries: Iterable[int], factors: Iterable[float]) -> None:
        object.__setattr__(self, "boundaries", boundaries)
        object.__setattr__(self, "factors", factors)
        self.__post_init__()  # makes tuples of them
        if any(a >= b for a, b in pairwise(self.boundaries)):
            raise ValueError(f"boundaries must be strictly increasing, got {self.boundaries}")
        if len(self.factors) != len(self.boundaries) + 1:
            raise ValueError(
                "factors must have one item more than boundaries, "
                f"got {len(self.factors)} factors and {len(self.boundaries)} boundaries"
            )

    def _factor(self, step: int) -> float:
        return self.factors[bisect_right(self.boundaries, step)]


@dataclass(frozen=True, slots=True)
class warmup(Base):
    """Rise linearly to the first factor of a schedule, then run it.

    The factor is ``(step + 1) / steps * schedule(0)`` for ``step < steps``
    (the first is not 0) and ``schedule(step - steps)`` from then on: the
    whole is `steps` longer than `schedule`.

    Parameters
    ----------
    schedule : callable
        The schedule to warm up to; it sees steps from 0.
    steps : int
        Length of the warm-up in steps.

    Raises
    ------
    TypeError, ValueError
        For an argument of the wrong type, or out of its range.

    Examples
    --------
    >>> schedule = warmup(cosine(900), steps=100)
    >>> schedule(0), schedule(99), schedule(100), schedule(550)
    (0.01, 1.0, 1.0, 0.5)
    """

    schedule: Schedule
    steps: int

    def _factor(self, step: int) -> float:
        if step < self.steps:
            return (step + 1) / self.steps * self.schedule(0)
        return self.schedule(step - self.steps)


@dataclass(frozen=True, slots=True, init=False, repr=False)
class chain(Base):
    """Run schedules one after the other, each from its own step 0.

    Parameters
    ----------
    *parts : (callable, int), ..., callable
        Pairs of a schedule and the number of steps it runs for, then one
        bare schedule, which goes on for ever.

    Raises
    ------
    TypeError
        If a part is not a pair, or the last is not a bare schedule.
    ValueError
        If a number of steps is not positive.

    Examples
    --------
    >>> rise = linear(10, initial=0.1, final=1.0)
    >>> schedule = chain((rise, 10), (constant(), 80), cosine(10))
    >>> schedule(0), schedule(10), schedule(95), schedule(100)
    (0.1, 1.0, 0.5, 0.0)
    """

    parts: tuple[tuple[Schedule, int], ...]
    last: Schedule

    def __init__(self, *parts: tuple[Schedule, int] | Schedule) -> None:
        if not parts:
            raise TypeError("chain must end with a schedule, got no arguments")
        pairs = []
        for i, part in enumerate(parts[:-1]):
            name = f"parts[{i}]"
            if not isinstance(part, tuple) or len(part) != 2:
                raise TypeError(f"{name} must be a pair (schedule, steps), got {part!r}")
            schedule, steps = part
            checked = checks.schedule(schedule, f"{name}[0]")
            pairs.append((checked, checks.integer(steps, f"{name}[1]", least=1)))
        object.__setattr__(self, "parts", tuple(pairs))
        last = checks.schedule(parts[-1], f"parts[{len(pairs)}]")
        object.__setattr__(self, "last", last)

    def __repr__(self) -> str:
        return f"chain({', '.join(map(repr, (*self.parts, self.last)))})"

    def _factor(self, step: int) -> float:
        for schedule, steps in self.parts:
            if step < steps:
                return schedule(step)
            step -= steps
        return self.last(step)
