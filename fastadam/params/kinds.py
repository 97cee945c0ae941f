"""What is an array, and is it on a CUDA device: told without importing anyone's library."""

from typing import Any

import numpy as np

_NUMPYS = (np.ndarray, np.generic)
# What an array has, that lives on a device or is another library's.
_INTERFACES = ("__cuda_array_interface__", "data_ptr", "__dlpack_device__", "__cuda_ndarray__")


def is_array(thing: Any) -> bool:
    """Whether something is one array, NumPy's or another library's, rather than many."""
    if isinstance(thing, np.ndarray):
        return True
    kind = type(thing)  # since an attribute of the thing itself may raise
    return any(hasattr(kind, name) for name in _INTERFACES)


def on_device(array: Any) -> bool:
    """Whether an array is on a CUDA device, told without what CUDA needs."""
    if isinstance(array, _NUMPYS) or not is_array(array):
        return False
    library = type(array).__module__.partition(".")[0]
    if library in ("jax", "jaxlib"):
        return False  # immutable, wherever it lies: the host's check says so
    if hasattr(type(array), "data_ptr"):
        return bool(getattr(array, "is_cuda", False))
    if hasattr(type(array), "__cuda_array_interface__"):
        return True
    if hasattr(type(array), "__dlpack_device__"):
        return int(array.__dlpack_device__()[0]) in (2, 13)  # kDLCUDA, kDLCUDAManaged
    return hasattr(type(array), "__cuda_ndarray__")  # as the CUDA simulator's arrays have alone


def check_together(array: Any, label: str, first: Any, first_label: str) -> None:
    """Refuse two parameters that live in different places.

    Each is what a backend has made of it, with ``device``, the number of its
    device; only one that is not where the other is may be as the user gave it.

    Raises
    ------
    ValueError
        If they do.
    """
    if on_device(array) and on_device(first):
        # An empty array, whose number is -1, may lie on any device.
        together = array.device == first.device or -1 in (array.device, first.device)
    else:
        together = on_device(array) == on_device(first)
    if together:
        return
    raise ValueError(
        f"{label} must be {_place(first)}, as {first_label} is, got one {_place(array)}"
    )


def _place(array: Any) -> str:
    if not on_device(array):
        return "in the host's memory"
    number = getattr(array, "device", None)
    return f"on CUDA device {max(number, 0)}" if isinstance(number, int) else "on a CUDA device"
