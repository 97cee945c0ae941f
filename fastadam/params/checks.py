"""Checks of single arguments: each returns the value, or raises an error that names it.

A wrong type is a TypeError, a value out of range a ValueError; both messages
read ``name must be rule, got value``.
"""

import math
from collections.abc import Callable, Iterable
from numbers import Real
from operator import index
from typing import Any, Literal, TypeAlias, TypeVar

import numpy as np

_T = TypeVar("_T")

# What a real number may be asked to be, in the words of the message.
Rule: TypeAlias = Literal[
    "finite and >= 0", "finite and > 0", "finite and >= 1", "> 0", "in [0, 1)", "in (0, 1]"
]
_RULES: dict[Rule, Callable[[float], bool]] = {
    "finite and >= 0": lambda x: 0.0 <= x < math.inf,
    "finite and > 0": lambda x: 0.0 < x < math.inf,
    "finite and >= 1": lambda x: 1.0 <= x < math.inf,
    "> 0": lambda x: x > 0.0,
    "in [0, 1)": lambda x: 0.0 <= x < 1.0,
    "in (0, 1]": lambda x: 0.0 < x <= 1.0,
}


def is_real(value: object) -> bool:
    """Whether a value is a real number of Python's or NumPy's; a bool is none."""
    # What nearly all are first: to ask Real takes 0.3 us of each step with a schedule.
    return type(value) is float or (isinstance(value, Real) and not isinstance(value, bool))


def as_float(value: Any) -> float:
    """Return a real number as a float, inf for an integer that is too large for one."""
    try:
        return float(value)
    except OverflowError:
        return math.inf


def real(
    value: object, name: str, rule: Rule = "finite and >= 0", kind: str = "a real number"
) -> float:
    """Return a real number that keeps the rule, as a float."""
    if not is_real(value):
        raise TypeError(f"{name} must be {kind}, got {value!r}")
    number = as_float(value)
    if not _RULES[rule](number):  # NaN keeps none
        raise ValueError(f"{name} must be {rule}, got {value!r}")
    return number


def real_or_none(value: object, name: str, rule: Rule) -> float | None:
    """Return None, or a real number that keeps the rule, as a float."""
    return None if value is None else real(value, name, rule, "None or a real number")


def integer(value: Any, name: str, least: int = 0, kind: str = "an integer") -> int:
    """Return an integer of at least ``least`` as an int; NumPy's pass, a bool does not."""
    try:
        number = index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise TypeError(f"{name} must be {kind}, got {value!r}")
    if number < least:
        raise ValueError(f"{name} must be >= {least}, got {value!r}")
    return number


def flag(value: object, name: str) -> bool:
    """Return a bool, Python's or NumPy's, as Python's."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return bool(value)


def choice(value: object, name: str, choices: Iterable[_T]) -> _T:
    """Return the one of these strings that a value is."""
    if isinstance(value, str):
        for each in choices:
            if value == each:
                return each
    kind = ValueError if isinstance(value, str) else TypeError
    raise kind(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def schedule(
    value: object, name: str, kind: str = "callable with a step"
) -> Callable[[int], float]:
    """Return what can be called with a step, a function or an object."""
    # A class can be called too: schedule=cosine, meant to be cosine(num_steps).
    if not callable(value) or isinstance(value, type):
        raise TypeError(f"{name} must be {kind}, got {value!r}")
    return value


def several(value: object, name: str, check: Callable[[Any, str], _T]) -> tuple[_T, ...]:
    """Return a tuple of what `check` returns for each item."""
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise TypeError(f"{name} must be a sequence of numbers, got {value!r}")
    return tuple(check(item, f"{name}[{k}]") for k, item in enumerate(value))
