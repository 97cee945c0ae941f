"""Learning-rate schedules: closed-form functions of the step number.

A schedule is any callable ``schedule(step) -> factor``; the optimizer uses
``lr * factor``. Steps count from 0, the ``step()`` call about to be made.
Those here keep no state, can be compared, hashed, printed and pickled, and
give the same bits on every machine (`polynomial` has one exception). Past
its end, each holds its last value.

Making a schedule with a bad argument raises TypeError (wrong type) or
ValueError (out of range, NaN, infinite), and so does calling it with a bad
step. Factors are finite and never negative.
"""
# ruff: noqa: N801  (the field writes schedules as functions: cosine(1000))

import math
from bisect import bisect_right
from dataclasses import dataclass
from itertools import pairwise

from .base import (
    DECAYS,
    Base,
    Schedule,
    callable_schedule,
    half_cosine,
    mix,
    positive,
)
from .exact import power

__all__ = [
    "Schedule",
    "chain",
    "constant",
    "cosine",
    "cosine_restarts",
    "exponential",
    "inverse_sqrt",
    "linear",
    "one_cycle",
    "piecewise",
    "polynomial",
    "warmup",
    "warmup_stable_decay",
]


def __dir__() -> list[str]:
    return sorted(__all__)


@dataclass(frozen=True, slots=True)
class constant(Base):
    """Keep one factor at every step.

    Parameters
    ----------
    factor : float, default 1.0
        The factor, >= 0.

    Raises
    ------
    TypeError, ValueError
        For an argument of the wrong type, or out of its range.

    Examples
    --------
    >>> constant(0.5)(1000)
    0.5
    """

    factor: float = 1.0

    def _factor(self, step: int) -> float:  # noqa: ARG002
        return self.factor


@dataclass(frozen=True, slots=True)
class cosine(Base):
    """Fall from 1 to `final` along half a cosine wave.

    The factor is ``final + (1 - final) * c`` with
    ``c = 0.5 * (1 + cos(pi * step / num_steps))``, and `final` from
    ``step = num_steps`` on, where the bare formula would rise again.

    Parameters
    ----------
    num_steps : int
        Length in steps.
    final : float, default 0.0
        Factor at the end, >= 0.

    Raises
    ------
    TypeError, ValueError
        For an argument of the wrong type, or out of its range.

    References
    ----------
    Loshchilov and Hutter, SGDR, arXiv:1608.03983.

    Examples
    --------
    >>> schedule = cosine(1000)
    >>> schedule(0), schedule(500), schedule(1000)
    (1.0, 0.5, 0.0)
    """

    num_steps: int
    final: float = 0.0

    def _factor(self, step: int) -> float:
        if step >= self.num_steps:
            return self.final
        return mix(1.0, self.final, half_cosine(step / self.num_steps))


@dataclass(frozen=True, slots=True)
class linear(Base):
    """Go from `initial` to `final` along a straight line.

    The factor is ``final + (initial - final) * (1 - step / num_steps)``.

    Parameters
    ----------
    num_steps : int
        Length in steps; `final` is reached at ``step = num_steps``.
    initial, final : float, default 1.0 and 0.0
        Factors at the two ends, >= 0; either may be the larger.

    Raises
    ------
    TypeError, ValueError
        For an argument of the wrong type, or out of its range.

    Examples
    --------
    >>> schedule = linear(4)
    >>> [schedule(step) for step in range(6)]
    [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    """

    num_steps: int
    initial: float = 1.0
    final: float = 0.0

    def _factor(self, step: int) -> float:
        left = max(self.num_steps - step, 0)
        return mix(self.initial, self.final, left / self.num_steps)


@dataclass(frozen=True, slots=True)
class polynomial(Base):
    """Go from `initial` to `final` along a power of the steps left.

    The factor is ``final + (initial - final) * x**power`` with
    ``x = 1 - step / num_steps``. A `power` that is a multiple of one half
    gives the same bits everywhere; any other uses the C library's pow,
    whose last bit may differ between systems.

    Parameters
    ----------
    num_steps : int
        Length in steps; `final` is reached at ``step = num_steps``.
    power : float, default 1.0
        Exponent, > 0.
    initial, final : float, default 1.0 and 0.0
        Factors at the two ends, >= 0; either may be the larger.

    Raises
    ------
    TypeError, ValueError
        For an argument of the wrong type, or out of its range.

    Examples
    --------
    >>> polynomial(100, power=2)(50)
    0.25
    """

    num_steps: int
    power: float = 1.0
    initial: float = 1.0
    final: float = 0.0

    def _factor(self, step: int) -> float:
        if step >= self.num_steps:
            return self.final
        x = (self.num_steps - step) / self.num_steps
        if self.power.is_integer():
            x = power(x, int(self.power))
        elif (2.0 * self.power).is_integer():
            x = math.sqrt(power(x, int(2.0 * self.power)))
        else:
            x **= self.power
        return mix(self.initial, self.final, x)


@dataclass(frozen=True, slots=True)
class exponential(Base):
    """Shrink by the same ratio at every step.

    The factor is ``max(decay_rate ** (step / decay_steps), final)``.

    Parameters
    ----------
    decay_rate : float
        Ratio per `decay_steps` steps, in (0, 1].
    decay_steps : int, default 1
        Number of steps to shrink by `decay_rate` once.
    final : float, default 0.0
        Lower bound, >= 0.
    staircase : bool, default False
        Shrink at multiples of `decay_steps` only, all at once.

    Raises
    ------
    TypeError, ValueError
        For an argument of the wrong type, or out of its range.

    Examples
    --------
    >>> exponential(0.5, decay_steps=10)(30)
    0.125
    """

    decay_rate: float
    decay_steps: int = 1
    final: float = 0.0
    staircase: bool = False

    def _factor(self, step: int) -> float:
        if self.staircase:
            return max(power(self.decay_rate, step // self.decay_steps), self.final)
        return max(power(self.decay_rate, step, self.decay_steps), self.final)


@dataclass(frozen=True, slots=True)
class inverse_sqrt(Base):
    """Warm up linearly to 1, then fall with the square root of the step.

    With ``t = step + 1``, the factor is
    ``min(t / warmup_steps, sqrt(warmup_steps / t))``: Noam's schedule with
    its peak scaled to 1, which is at ``step = warmup_steps - 1``.

    Parameters
    ----------
    warmup_steps : int
        Length of the warm-up in steps; the first factor is 1 over it.

    Raises
    ------
    TypeError, ValueError
        For an argument of the wrong type, or out of its range.

    References
    ----------
    Vaswani et al., Attention Is All You Need, arXiv:1706.03762.

    Examples
    --------
    >>> schedule = inverse_sqrt(4)
    >>> schedule(0), schedule(3), schedule(15)
    (0.25, 1.0, 0.5)
    """

    warmup_steps: int

    def __post_init__(self) -> None:
        Base.__post_init__(self)
        positive("warmup_steps", self.warmup_steps)  # there is no peak to fall from without one

    def _factor(self, step: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        return math.sqrt(self.warmup_steps / (step + 1))


@dataclass(frozen=True, slots=True)
class one_cycle(Base):
    """Rise to 1 and fall far below the start, both along half cosines.

    As PyTorch's OneCycleLR (cosine, two phases), as a factor on `max_lr`:
    from ``1 / div_factor`` up to 1 at step ``pct_start * num_steps - 1``,
    which may lie between two steps, and down to
    ``1 / (div_factor * final_div_factor)`` at step ``num_steps - 1``.
    Where PyTorch's peak would lie before step 0, it is at step 0.

    Parameters
    ----------
    num_steps : int
        Length in steps.
    pct_start : float, default 0.3
        Part of the steps spent rising, in [0, 1).
    div_factor : float, default 25.0
        Peak over first factor, >= 1.
    final_div_factor : float, default 1e4
        First factor over last factor, >= 1.

    Raises
    ------
    TypeError, ValueError
        For an argument of the wrong type, or out of its range.

    References
    ----------
    Smith and Topin, Super-Convergence, arXiv:1708.07120.

    Examples
    --------
    >>> schedule = one_cycle(10)
    >>> schedule(0), schedule(2), schedule(9)
    (0.04, 1.0, 4e-06)
    """

    num_steps: int
    pct_start: float = 0.3
    div_factor: float = 25.0
    final_div_factor: float = 1e4

    def _factor(self, step: int) -> float:
        end, final = self.num_steps - 1, 1.0 / (self.div_factor * self.final_div_factor)
        if step >= end:
            return final
        peak = max(self.pct_start * self.num_steps - 1.0, 0.0)
        if step < peak:
            return mix(1.0 / self.div_factor, 1.0, half_cosine(step / peak))
        return mix(1.0, final, half_cosine((step - peak) / (end - peak)))


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
    decay: str = "linear"

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


@dataclass(frozen=True, slots=True)
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

    def __post_init__(self) -> None:
        Base.__post_init__(self)
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
            pairs.append(
                (callable_schedule(f"{name}[0]", schedule), positive(f"{name}[1]", steps))
            )
        object.__setattr__(self, "parts", tuple(pairs))
        object.__setattr__(self, "last", callable_schedule(f"parts[{len(pairs)}]", parts[-1]))

    def __repr__(self) -> str:
        return f"chain({', '.join(map(repr, (*self.parts, self.last)))})"

    def _factor(self, step: int) -> float:
        for schedule, steps in self.parts:
            if step < steps:
                return schedule(step)
            step -= steps
        return self.last(step)
