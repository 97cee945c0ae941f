"""The types of what a user gives, for mypy and pyright: no library of arrays is imported."""

from collections.abc import Callable, Iterator, Mapping, Sequence, ValuesView
from types import EllipsisType
from typing import Any, Literal, Protocol, TypeAlias, TypeVar


class Array(Protocol):
    """An array of any library: NumPy, torch, CuPy, JAX, Numba on a device.

    A str, a list and a float have no dtype, and so are no arrays: this is what
    makes ``Adam("abc")``, ``Adam({"w": "text"})`` and ``Adam([1.0])`` fail
    before they are run.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """The number of elements along each axis."""

    @property
    def dtype(self) -> Any:
        """What each element is."""


# Several of something: all of `Iterable` but a mapping, whose keys it would be.
_T = TypeVar("_T")
Several: TypeAlias = Sequence[_T] | Iterator[_T] | ValuesView[_T]

# A group: its "params", and hyperparameters. (No TypedDict: type checkers take
# `groups = [{"params": [w], "lr": 0.1}]` for a list of plain dicts.)
Group: TypeAlias = Mapping[str, Any]
Params: TypeAlias = Array | Several[Array | Group] | Mapping[str, Array]

# Gradients come in the container of their parameters, None where there is none.
_GroupGrads: TypeAlias = Several[Array | None] | Mapping[str, Array | None]
Grads: TypeAlias = Array | Several[Array | _GroupGrads | None] | Mapping[str, Array | None]
# What stands for "not given", since None is a gradient that there is not.
NotGiven: TypeAlias = EllipsisType

Betas: TypeAlias = tuple[float, float] | list[float]
Nonfinite: TypeAlias = Literal["propagate", "skip", "raise"]
Schedule: TypeAlias = Callable[[int], float]
