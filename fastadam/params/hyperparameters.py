"""The hyperparameters of a group: their names, their ranges, their messages."""

from collections.abc import Callable, Mapping
from typing import Any, get_args

import numpy as np

from . import checks
from .types import Nonfinite, Schedule


def check_betas(value: Any, name: str) -> tuple[float, float]:
    """Return the two betas as floats in [0, 1), or raise."""
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise TypeError(f"{name} must be a pair of real numbers, got {value!r}")
    first, second = (
        checks.real(beta, f"{name}[{k}]", "in [0, 1)") for k, beta in enumerate(value)
    )
    return first, second


CHECKS: dict[str, Callable[[Any, str], Any]] = {
    "lr": checks.real,
    "betas": check_betas,
    "eps": checks.real,
    "weight_decay": checks.real,
    "decoupled_weight_decay": checks.flag,
    "maximize": checks.flag,
}
NAMES = tuple(CHECKS)
NONFINITE: tuple[Nonfinite, ...] = get_args(Nonfinite)


def check_options(options: Mapping[str, Any], label: str = "") -> dict[str, Any]:
    """Return a group's hyperparameters, checked and as plain floats and bools.

    Parameters
    ----------
    options : mapping
        With all of `NAMES`.
    label : str
        What to put before an option's name in messages.

    Raises
    ------
    TypeError
        For a value of the wrong kind.
    ValueError
        For a value out of range or NaN.
    """
    return {name: check(options[name], f"{label}{name}") for name, check in CHECKS.items()}


def check_fits(options: Mapping[str, Any], dtype: np.dtype[Any], label: str = "") -> None:
    """Refuse what the parameters' own type rounds to infinity, and an eps it rounds to 0.

    Raises
    ------
    ValueError
        The parameters would become infinite, or a zero gradient be divided by
        zero.
    """
    largest = float(np.finfo(dtype).max)
    for name in ("lr", "eps", "weight_decay"):
        if options[name] > largest:
            raise ValueError(
                f"{label}{name} must not exceed {largest:.4g}, the largest {dtype.name}, got"
                f" {options[name]!r}"
            )
    smallest = float(np.finfo(dtype).tiny) * float(np.finfo(dtype).eps)
    if 0.0 < options["eps"] <= smallest / 2:
        raise ValueError(f"{label}eps must not round to 0 in {dtype.name}, got {options['eps']!r}")


def check_schedule(value: object) -> Schedule | None:
    """Return the schedule, or raise TypeError if it cannot be called."""
    kind = "None or callable with a step"
    return None if value is None else checks.schedule(value, "schedule", kind)


def check_max_grad_norm(value: object) -> float | None:
    """Return the norm as a float > 0, which may be infinite, or None, or raise."""
    return checks.real_or_none(value, "max_grad_norm", "> 0")


def check_nonfinite(value: object) -> Nonfinite:
    """Return the name of what to do about gradients that are not finite, or raise."""
    return checks.choice(value, "nonfinite", NONFINITE)


def check_num_threads(value: object) -> int | None:
    """Return the number as an int >= 1, or None, or raise."""
    kind = "None or an integer"
    return None if value is None else checks.integer(value, "num_threads", 1, kind)


def check_ema_decay(value: object, name: str = "ema_decay") -> float | None:
    """Return the decay as a float in [0, 1), or None, or raise."""
    return checks.real_or_none(value, name, "in [0, 1)")
