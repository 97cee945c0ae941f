"""The backend of arrays on a CUDA device: what `_backend.Backend` asks for."""

from typing import Any

import numpy as np
import numpy.typing as npt

from . import launch
from .arrays import DeviceArray, allocate, view
from .scalars import DeviceScalars as Scalars
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


def take_param(array: Any, label: str) -> DeviceArray:
    """Refuse what cannot be updated in place; see `_cuda_arrays.view`."""
    return view(array, label, writable=True)


def assign(target: DeviceArray, source: Any) -> None:
    """Write what another array holds, on the device or on the host."""
    if isinstance(source, np.ndarray):
        target.copy_from_host(source)
    else:
        places = target.address, source.address
        launch.at_once(target.device, launch.copy, *places, target.nbytes)


def writing(targets: list[DeviceArray], sources: list[Any]) -> list[tuple[Any, ...]]:
    """Return calls that write other arrays."""
    return [(assign, *pair) for pair in zip(targets, sources, strict=True)]


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
