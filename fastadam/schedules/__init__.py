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

from .base import Schedule
from .curves import (
    constant,
    cosine,
    exponential,
    inverse_sqrt,
    linear,
    one_cycle,
    polynomial,
)
from .phases import chain, cosine_restarts, piecewise, warmup, warmup_stable_decay

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


# Users, pickles and the documentation know them by this module's name.
for _name in __all__:
    if _name != "Schedule":
        globals()[_name].__module__ = __name__
