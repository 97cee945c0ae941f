"""Schedules that are one named curve, such as half a cosine."""
# ruff: noqa: N801  (the field writes schedules as functions: cosine(1000))

import math
from dataclasses import dataclass

from ..params import checks
from .base import Base, half_cosine, mix
from .exact import power


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
        checks.integer(self.warmup_steps, "warmup_steps", least=1)  # or there is no peak

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
