"""Arrays on a CUDA device: whose it is, where it lies, is it usable; and our own."""

import contextlib
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import as_strided

from ..params.arrays import DTYPES
from ..params.kinds import on_device
from ..state.storage import offsets
from .compiler import driver


class DeviceArray:
    """An array on a CUDA device, ours or the user's, in C or Fortran order.

    What can take any library's array, such as ``cupy.asarray``, ``torch.as_tensor``
    or ``numba.cuda.as_cuda_array``, makes an array over the same memory of it.

    Attributes
    ----------
    shape, dtype, order, size, nbytes
        As of a NumPy array; ``order`` is "C" or "F".
    address : int
        Where it lies.
    device : int
        On which device.
    owner : object
        What keeps the memory alive.
    """

    def __init__(
        self,
        owner: Any,
        address: int,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        order: str,
        device: int,
    ) -> None:
        self.owner, self.address, self.shape, self.dtype = owner, address, shape, dtype
        self.order, self.device = order, device
        self.size = math.prod(shape)
        self.nbytes = self.size * dtype.itemsize

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        shape, strides = self.shape, None
        if self.order == "F":
            strides = tuple(math.prod(shape[:k]) * self.dtype.itemsize for k in range(len(shape)))
        data, typestr = (self.address, False), self.dtype.str
        return {
            "shape": shape, "typestr": typestr, "data": data, "strides": strides, "version": 3,
        }  # fmt: skip

    def copy_to_host(self) -> npt.NDArray[Any]:
        """Return a copy in a NumPy array, once all work on the device is done."""
        array: npt.NDArray[Any] = np.empty(self.shape, self.dtype, order=self.order)  # type: ignore[call-overload]
        driver.copy_now(self.device, array.ctypes.data, self.address, self.nbytes)
        return array

    def copy_from_host(self, values: npt.ArrayLike) -> None:
        """Write values of the same shape, once all work on the device is done.

        Raises
        ------
        ValueError
            If the shape differs.
        """
        array = np.array(values, dtype=self.dtype, order=self.order)  # type: ignore[call-overload]
        if array.shape != self.shape:
            raise ValueError(f"values must have shape {self.shape}, got {array.shape}")
        driver.copy_now(self.device, self.address, array.ctypes.data, self.nbytes)

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("an array of no dimensions has no length")
        return self.shape[0]

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise TypeError("an array on a CUDA device must be copied: array.copy_to_host()")

    __reduce__ = __array__

    def __repr__(self) -> str:
        return f"DeviceArray(shape={self.shape}, dtype={self.dtype}, device={self.device})"


def address(array: DeviceArray) -> int:
    """Return where an array lies."""
    return array.address


def _check(
    kind: str, dtype: Any, shape: tuple[int, ...], strides: Any, place: int, label: str
) -> str:
    """Refuse what cannot be used where it lies; return its order."""
    if not place and 0 not in shape:
        raise ValueError(f"{label} must have memory of its own, got {kind} without any")
    if dtype not in DTYPES:
        raise TypeError(f"{label}.dtype must be float32 or float64, got {dtype}")
    # An array of NumPy's that has these strides, and is not read.
    flags = as_strided(np.empty(1, dtype), shape, strides).flags
    if strides is not None and not flags.forc:
        raise ValueError(
            f"{label} must be contiguous, in C or Fortran order, got strides {tuple(strides)} of"
            f" bytes for shape {shape} of {kind}"
        )
    if place % dtype.itemsize:
        raise ValueError(f"{label} must be aligned to its {dtype.itemsize}-byte elements")
    return "C" if strides is None or flags.c_contiguous else "F"


def _library(array: Any) -> str:
    """Return whose the array is, be it of a class that a user has derived."""
    names = [kind.__module__.partition(".")[0] for kind in type(array).__mro__]
    return next((name for name in names if name in ("torch", "cupy", "numba")), names[0])


def view(array: Any, label: str, *, writable: bool) -> DeviceArray:
    """Return what is known of a user's array on a CUDA device.

    Raises
    ------
    TypeError
        If it is none, or not of float32 or float64.
    ValueError
        If it is neither C- nor Fortran-contiguous, unaligned, or read-only where
        ``writable`` is asked for.
    """
    if isinstance(array, DeviceArray):
        return array
    kind = f"{type(array).__module__}.{type(array).__qualname__}"
    if not on_device(array):
        raise TypeError(f"{label} must be an array on a CUDA device, got {kind}")
    read_only, device = False, None
    if has_data_ptr(array):
        # torch's: its interface refuses tensors that need a gradient.
        layout = str(getattr(array, "layout", "torch.strided"))
        if layout != "torch.strided":
            raise TypeError(f"{label} must be dense, got {kind} of layout {layout}")
        name = str(array.dtype).rpartition(".")[2]
        if name not in ("float32", "float64"):
            raise TypeError(f"{label}.dtype must be float32 or float64, got {array.dtype}")
        place, shape, dtype = array.data_ptr(), array.shape, np.dtype(name)
        strides = [step * dtype.itemsize for step in array.stride()]
        device = int(array.device.index or 0)
    elif hasattr(type(array), "device_ctypes_pointer"):
        # Numba's: its interface raises a DeprecationWarning for some of its own streams.
        place, shape = array.device_ctypes_pointer.value, array.shape
        strides, dtype = array.strides, array.dtype
    elif hasattr(type(array), "__cuda_array_interface__"):
        interface = array.__cuda_array_interface__
        (place, read_only), shape = interface["data"], interface["shape"]
        strides, dtype = interface.get("strides"), np.dtype(interface["typestr"])
        if interface.get("mask") is not None:
            raise TypeError(f"{label} must have no mask, got {kind}")
    elif hasattr(type(array), "__dlpack_device__"):
        from cuda.core.utils import StridedMemoryView

        memory = StridedMemoryView.from_dlpack(array, stream_ptr=-1)
        place, read_only, shape, dtype = memory.ptr, memory.readonly, memory.shape, memory.dtype
        strides = memory.strides and [step * dtype.itemsize for step in memory.strides]
    else:  # of Numba's simulator
        place, shape = array.ctypes.data, array.shape
        strides, dtype = array.strides, array.dtype
    place, shape = int(place or 0), tuple(shape)
    order = _check(kind, dtype, shape, strides, place, label)
    if read_only and writable:
        raise ValueError(f"{label} must be writable, got a read-only array")
    if device is None:
        device = driver.device_of(place) if place else -1
    return DeviceArray(array, place, shape, dtype, order, device)


def current_stream(array: DeviceArray) -> int:
    """Return the stream on which the library that an array is of would work on it now."""
    return stream_source(array)() or 0


def stream_source(array: DeviceArray) -> Callable[[], int | None]:
    """Return what returns that stream, at any time, without keeping the array.

    None is of arrays that name no stream: they are worked on in the default stream,
    or their owner has waited.
    """
    library, device = _library(array.owner), array.device
    if library == "torch":
        torch = sys.modules["torch"]
        return lambda: int(torch.cuda.current_stream(device).cuda_stream)
    if library == "cupy":
        cupy = sys.modules["cupy"]
        return lambda: int(cupy.cuda.get_current_stream().ptr)
    if library == "numba":
        named = getattr(array.owner, "stream", 0) or None
        named = getattr(named, "handle", None)  # the simulator's have none
    else:
        named = (getattr(array.owner, "__cuda_array_interface__", None) or {}).get("stream")
    stream = None if named is None else int(named)
    return lambda: stream


# The key of arrays of our own, on which whoever writes to them works.
OWN = "fastadam"


def stream_key(array: DeviceArray) -> Any:
    """Return what arrays have in common whose libraries work on one stream."""
    library = _library(array.owner)
    return library if library in ("torch", "cupy", OWN) else stream_source(array)()


def has_data_ptr(array: Any) -> bool:
    """Whether an array is a tensor, which may come to lie elsewhere."""
    return hasattr(type(array), "data_ptr")


def place_and_layout(array: Any) -> tuple[int, Any]:
    """Return where an array lies, and all else that decides whether it fits.

    If the latter cannot be told quickly, None.
    """
    if isinstance(array, DeviceArray):
        return array.address, (array.shape, array.order, array.dtype, array.device)
    if has_data_ptr(array):
        with contextlib.suppress(RuntimeError):  # sparse ones have no strides: `view` says so
            return array.data_ptr(), (array.shape, array.stride(), array.dtype, array.device)
    return 0, None


def allocate(likes: Sequence[DeviceArray]) -> list[DeviceArray]:
    """Return zeros in the shape, dtype and order of each, side by side in one buffer."""
    if not likes:
        return []
    device = max(0, *(like.device for like in likes))
    starts, size = offsets(like.nbytes for like in likes)
    with driver.context(device):
        buffer = driver.Buffer(size)
    return [
        DeviceArray(buffer, buffer.address + start, like.shape, like.dtype, like.order, device)
        for like, start in zip(likes, starts, strict=True)
    ]
