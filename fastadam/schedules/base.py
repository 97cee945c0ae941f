"""What all schedules share: checked fields, a checked step, and the curves between 1 and 0."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Literal, TypeAlias

from ..params import checks
from ..params.types import Schedule as Schedule
from .exact import cos_pi

Decay: TypeAlias = Literal["linear", "cosine", "sqrt"]


def mix(start: float, end: float, share: float) -> float:
    """Return `start` at share 1, exactly, and `end` at share 0."""
    return start if share == 1.0 else end + (start - end) * share


def half_cosine(x: float) -> float:
    """Fall from 1 at x = 0 to 0 at x = 1."""
    return 0.5 * (1.0 + cos_pi(x))


# From 1 at x = 0 to 0 at x = 1.
DECAYS: dict[Decay, Callable[[float], float]] = {
    "linear": lambda x: 1.0 - x,
    "cosine": half_cosine,
    "sqrt": lambda x: 1.0 - math.sqrt(x),
}

_positive = partial(checks.integer, least=1)
_at_least_one = partial(checks.real, rule="finite and >= 1")

# A field's name says what it may hold; what only one schedule asks for is in that schedule.
_FIELDS: dict[str, Callable[[Any, str], object]] = {
    "boundaries": lambda value, name: checks.several(value, name, _positive),
    "decay": lambda value, name: checks.choice(value, name, DECAYS),
    "decay_rate": partial(checks.real, rule="in (0, 1]"),
    "decay_steps": _positive,
    "div_factor": _at_least_one,
    "factor": checks.real,
    "factors": lambda value, name: checks.several(value, name, checks.real),
    "final": checks.real,
    "final_div_factor": _at_least_one,
    "first_cycle_steps": _positive,
    "initial": checks.real,
    "multiplier": _positive,
    "num_cycles": lambda value, name: None if value is None else _positive(value, name),
    "num_steps": _positive,
    "pct_start": partial(checks.real, rule="in [0, 1)"),
    "power": partial(checks.real, rule="finite and > 0"),
    "schedule": checks.schedule,
    "staircase": checks.flag,
    "steps": _positive,
    "warmup_steps": checks.integer,
}


class Base:
    """What every schedule here shares: a checked step, fields made plain int and float."""

    # Under a dataclass with slots, the names of its fields. Here the empty dict that torch's
    # LambdaLR saves and restores of every callable object.
    __slots__: ClassVar[tuple[str, ...]] = ("__dict__",)

    def __call__(self, step: int) -> float:
        """Return the factor on the learning rate.

        Parameters
        ----------
        step : int
            Number of steps already made, from 0; NumPy's integers pass.

        Returns
        -------
        float
            The factor, finite and >= 0.

        Raises
        ------
        TypeError
            If `step` is not an integer.
        ValueError
            If `step` is negative.
        """
        if type(step) is not int or step < 0:
            step = checks.integer(step, "step")
        return self._factor(step)

    def _factor(self, step: int) -> float:
        raise NotImplementedError

    def __post_init__(self) -> None:
        for name in self.__slots__:
            checked = _FIELDS[name](getattr(self, name), name)
            object.__setattr__(self, name, checked)  # frozen=True leaves no other way
