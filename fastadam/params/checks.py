"""Checks of single arguments: the value, checked, or an error that names it."""

import math
from numbers import Real
from typing import Any

import numpy as np


def is_real(value: Any) -> bool:
    """Whether a value is a real number of Python's or NumPy's; a bool is none."""
    return isinstance(value, Real) and not isinstance(value, bool)


def real(value: Any, name: str, *, low: float = 0.0, open_low: bool = False) -> float:
    """Return a finite real number not under ``low`` as a float, or raise."""
    if not is_real(value):
        raise TypeError(f"{name} must be a real number, got {value!r}")
    number = as_float(value)
    in_range = number > low if open_low else number >= low
    if not (in_range and math.isfinite(number)):
        sign = ">" if open_low else ">="
        raise ValueError(f"{name} must be finite and {sign} {low:g}, got {value!r}")
    return number


def as_float(value: Any) -> float:
    """Return a real number as a float, inf for an integer that is too large for one."""
    try:
        return float(value)
    except OverflowError:
        return math.inf


def flag(value: Any, name: str) -> bool:
    """Return a bool, or raise TypeError."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return bool(value)
