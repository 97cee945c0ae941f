"""What all schedules share: checked fields, a checked step, and the curves between 1 and 0."""

import math
from collections.abc import Callable, Iterable
from operator import index
from typing import ClassVar, TypeAlias, TypeVar

from ..params.checks import as_float, is_real
from .exact import cos_pi

Schedule: TypeAlias = Callable[[int], float]

_T = TypeVar("_T")


def integer(name: str, value: object, least: int = 0) -> int:
    """Return value as an int of at least `least`, 0 or 1; NumPy's integers pass, bool does not."""
    message = f"{name} must be a {'positive' if least else 'non-negative'} integer, got {value!r}"
    try:
        number = index(value)  # type: ignore[arg-type]  # the TypeError is the point
    except TypeError:
        raise TypeError(message) from None
    if isinstance(value, bool):
        raise TypeError(message)
    if number < least:
        raise ValueError(message)
    return number


def positive(name: str, value: object) -> int:
    """Return value as an int > 0; NumPy's integers pass, bool does not."""
    return integer(name, value, least=1)


def _real(
    name: str,
    value: object,
    rule: str = "a finite number >= 0",
    holds: Callable[[float], bool] = lambda x: x >= 0.0,
) -> float:
    message = f"{name} must be {rule}, got {value!r}"
    if not is_real(value):
        raise TypeError(message)
    number = as_float(value)
    if not (math.isfinite(number) and holds(number)):
        raise ValueError(message)
    return number


def _at_least_one(name: str, value: object) -> float:
    return _real(name, value, "a finite number >= 1", lambda x: x >= 1.0)


def _flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def _choice(name: str, value: object) -> str:
    message = f"{name} must be one of {', '.join(map(repr, DECAYS))}, got {value!r}"
    if not isinstance(value, str):
        raise TypeError(message)
    if value not in DECAYS:
        raise ValueError(message)
    return value


def callable_schedule(name: str, value: object) -> Schedule:
    """Return a callable that is no class, or raise TypeError."""
    if isinstance(value, type) or not callable(value):  # a type: warmup(cosine, 10)
        raise TypeError(f"{name} must be a callable schedule(step), got {value!r}")
    return value


def _several(name: str, value: object, check: Callable[[str, object], _T]) -> tuple[_T, ...]:
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise TypeError(f"{name} must be a sequence of numbers, got {value!r}")
    return tuple(check(f"{name}[{i}]", item) for i, item in enumerate(value))


# A field's name says what it may hold; what only one schedule asks for is in that schedule.
_FIELDS: dict[str, Callable[[str, object], object]] = {
    "boundaries": lambda name, value: _several(name, value, positive),
    "decay": _choice,
    "decay_rate": lambda name, value: _real(
        name, value, "a number in (0, 1]", lambda x: 0.0 < x <= 1.0
    ),
    "decay_steps": positive,
    "div_factor": _at_least_one,
    "factor": _real,
    "factors": lambda name, value: _several(name, value, _real),
    "final": _real,
    "final_div_factor": _at_least_one,
    "first_cycle_steps": positive,
    "initial": _real,
    "multiplier": positive,
    "num_cycles": lambda name, value: None if value is None else positive(name, value),
    "num_steps": positive,
    "pct_start": lambda name, value: _real(
        name, value, "a number in [0, 1)", lambda x: 0.0 <= x < 1.0
    ),
    "power": lambda name, value: _real(name, value, "a finite number > 0", lambda x: x > 0.0),
    "schedule": callable_schedule,
    "staircase": _flag,
    "steps": positive,
    "warmup_steps": integer,
}


def mix(start: float, end: float, share: float) -> float:
    """Return `start` at share 1, exactly, and `end` at share 0."""
    return start if share == 1.0 else end + (start - end) * share


def half_cosine(x: float) -> float:
    """Fall from 1 at x = 0 to 0 at x = 1."""
    return 0.5 * (1.0 + cos_pi(x))


# from 1 at x = 0 to 0 at x = 1
DECAYS: dict[str, Callable[[float], float]] = {
    "linear": lambda x: 1.0 - x,
    "cosine": half_cosine,
    "sqrt": lambda x: 1.0 - math.sqrt(x),
}


class Base:
    """What every schedule here shares: a checked step, fields made plain int and float."""

    # under a dataclass with slots, the names of its fields
    __slots__: ClassVar[tuple[str, ...]] = ()

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
            step = integer("step", step)
        return self._factor(step)

    def _factor(self, step: int) -> float:
        raise NotImplementedError

    def __post_init__(self) -> None:
        for name in self.__slots__:
            checked = _FIELDS[name](name, getattr(self, name))
            object.__setattr__(self, name, checked)  # the only way left by frozen=True
