"""The backend of arrays on a CUDA device: what `backends.Backend` asks for."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..state.param_state import ParamState
from ..update.rows import Rows
from ..update.scalars import Scalars
from ..update.settings import Groups, Settings
from . import lists
from .arrays import DeviceArray, address, allocate, view
from .compiler import driver
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
    device = max(0, *(state.param.device for state in states))
    rows = Rows.of(states, address, steps)
    return Stepper(rows, scalars, Gradients(states, labels), step_count, device)


find_tables, take_lists = lists.find_tables, lists.take_lists


def make_list_stepper(
    given: tuple[Any, ...],
    writable: bool,  # noqa: ARG001
    groups: Groups,
) -> tuple[ListStepper, Settings]:
    """Return what takes steps of arrays that come with each, and its hyperparameters."""
    stepper = ListStepper(given, groups)
    return stepper, stepper.settings


def take_param(array: Any, label: str) -> DeviceArray:
    """Refuse what cannot be updated in place; see `arrays.view`."""
    return view(array, label, writable=True)


def assign(target: DeviceArray, source: Any) -> None:
    """Write what another array holds, on the device or on the host."""
    if isinstance(source, np.ndarray):
        target.copy_from_host(source)
    else:
        driver.copy_now(target.device, target.address, source.address, target.nbytes)


def to_host(array: Any) -> npt.NDArray[Any]:
    """Return a copy of the same memory order."""
    return view(array, "array", writable=False).copy_to_host()


def check_copyable() -> None:
    """Refuse to copy or pickle an optimizer.

    Raises
    ------
    TypeError
        Always.
    """
    raise TypeError(
        "an optimizer over arrays on a CUDA device cannot be copied or pickled: make a new one,"
        " and give it the state_dict() of this one, which is in the host's memory"
    )
