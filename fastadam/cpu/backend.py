"""The backend of NumPy arrays: what `backends.Backend` asks for."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..params.arrays import address, check_param
from ..state.param_state import ParamState
from ..state.storage import allocate
from ..update.rows import Rows
from ..update.scalars import Scalars
from ..update.settings import Groups, Settings
from . import lists
from .gradients import Gradients
from .lists import ListStepper
from .stepper import Stepper

__all__ = [
    "allocate",
    "assign",
    "check_copyable",
    "find_tables",
    "make_list_stepper",
    "make_stepper",
    "take_lists",
    "take_param",
    "to_host",
]


def make_stepper(
    states: Sequence[ParamState],
    labels: Sequence[str],
    steps: npt.NDArray[np.int64],
    step_count: int,
    scalars: Scalars,
) -> Stepper:
    """Return what takes the steps of these parameters."""
    rows = Rows.of(states, address, steps)
    return Stepper(rows, scalars, Gradients(states, labels, rows), step_count)


def make_list_stepper(
    given: tuple[Any, ...], writable: bool, groups: Groups
) -> tuple[ListStepper, Settings]:
    """Return what takes steps of arrays that come with each, and its hyperparameters."""
    settings = Settings([param.dtype for param in given[0]], groups)
    return ListStepper(given, writable, settings), settings


find_tables, take_lists = lists.find_tables, lists.plain


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
