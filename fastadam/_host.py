"""The backend of NumPy arrays: what `_backend.Backend` asks for."""

from typing import Any

import numpy.typing as npt

from ._arrays import check_param
from ._plan import Plan
from ._scalars import Scalars
from ._state import allocate

__all__ = ["Plan", "Scalars", "allocate", "assign", "check_copyable", "take_param", "to_host"]


def take_param(array: Any, label: str) -> npt.NDArray[Any]:
    """Refuse what cannot be updated in place; see `check_param`."""
    check_param(array, label)
    return array  # type: ignore[no-any-return]


def assign(target: npt.NDArray[Any], source: Any) -> None:
    """Write what another array holds."""
    target[...] = source


def to_host(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return a copy of the same memory order."""
    return array.copy("K")


def check_copyable() -> None:
    """Refuse nothing: NumPy's arrays can be copied and pickled."""
