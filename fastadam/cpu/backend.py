"""The backend of NumPy arrays: what `_backend.Backend` asks for."""

from collections.abc import Iterator
from itertools import repeat
from typing import Any

import numpy as np
import numpy.typing as npt

from ..params.arrays import check_param
from ..runtime import emptying
from ..state.state_dict import allocate
from ..update.scalars import Scalars
from .stepper import Plan

__all__ = [
    "Plan",
    "Scalars",
    "allocate",
    "assign",
    "check_copyable",
    "take_param",
    "to_host",
    "writing",
]


def take_param(array: Any, label: str) -> npt.NDArray[Any]:
    """Refuse what cannot be updated in place; see `check_param`."""
    check_param(array, label)
    return array  # type: ignore[no-any-return]


def assign(target: npt.NDArray[Any], source: Any) -> None:
    """Write what another array holds."""
    target[...] = source


def writing(targets: list[npt.NDArray[Any]], sources: list[Any]) -> Iterator[tuple[Any, ...]]:
    """Return calls, of functions in C, that write other arrays; each source is then let go."""
    return zip(repeat(np.ndarray.__setitem__), targets, repeat(...), emptying(sources))


def to_host(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return a copy of the same memory order."""
    return array.copy("K")


def check_copyable() -> None:
    """Refuse nothing: NumPy's arrays can be copied and pickled."""
