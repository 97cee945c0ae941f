"""The hyperparameters of a group: their names, their ranges, their messages."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from . import checks

NAMES = ("lr", "betas", "eps", "weight_decay", "decoupled_weight_decay", "maximize")
NONFINITE = ("propagate", "skip", "raise")


def check_betas(value: Any, name: str) -> tuple[float, float]:
    """Return the two betas as floats in [0, 1), or raise."""
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise TypeError(f"{name} must be a pair of real numbers, got {value!r}")
    for k, beta in enumerate(value):
        if not checks.is_real(beta):
            raise TypeError(f"{name}[{k}] must be a real number, got {beta!r}")
        if not 0.0 <= checks.as_float(beta) < 1.0:
            raise ValueError(f"{name}[{k}] must be in [0, 1), got {beta!r}")
    return float(value[0]), float(value[1])


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
    return {
        "lr": checks.real(options["lr"], f"{label}lr"),
        "betas": check_betas(options["betas"], f"{label}betas"),
        "eps": checks.real(options["eps"], f"{label}eps"),
        "weight_decay": checks.real(options["weight_decay"], f"{label}weight_decay"),
        "decoupled_weight_decay": checks.flag(
            options["decoupled_weight_decay"], f"{label}decoupled_weight_decay"
        ),
        "maximize": checks.flag(options["maximize"], f"{label}maximize"),
    }


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


def check_schedule(schedule: Any) -> Callable[[int], float] | None:
    """Return the schedule, or raise TypeError if it cannot be called."""
    # A class can be called too: schedule=cosine, for cosine(num_steps).
    if schedule is not None and (not callable(schedule) or isinstance(schedule, type)):
        raise TypeError(f"schedule must be None or callable with a step, got {schedule!r}")
    return schedule


def check_max_grad_norm(value: Any) -> float | None:
    """Return the norm as a float > 0, which may be infinite, or None, or raise."""
    if value is None:
        return None
    if not checks.is_real(value):
        raise TypeError(f"max_grad_norm must be None or a real number, got {value!r}")
    number = checks.as_float(value)
    if not number > 0.0:
        raise ValueError(f"max_grad_norm must be > 0, got {value!r}")
    return number


def check_nonfinite(value: Any) -> str:
    """Return the name of what to do about gradients that are not finite, or raise."""
    if not isinstance(value, str) or value not in NONFINITE:
        kind = ValueError if isinstance(value, str) else TypeError
        raise kind(f"nonfinite must be one of {', '.join(map(repr, NONFINITE))}, got {value!r}")
    return value


def check_ema_decay(value: Any) -> float | None:
    """Return the decay as a float in [0, 1), or None, or raise."""
    if value is None:
        return None
    if not checks.is_real(value):
        raise TypeError(f"ema_decay must be None or a real number, got {value!r}")
    if not 0.0 <= checks.as_float(value) < 1.0:
        raise ValueError(f"ema_decay must be in [0, 1), got {value!r}")
    return float(value)
