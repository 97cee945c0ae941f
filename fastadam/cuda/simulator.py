"""What Numba's CUDA simulator leaves out, over the host's memory: for tests without a device.

A device's address is an address here. Arithmetic is rounded as on a device, the fused
multiply-add once, so that a simulated step has a real one's bits.
"""

import contextlib
import ctypes
import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from ..cpu import intrinsics

root = np  # whose sqrt leaves a number its type
_C_TYPES: dict[type, Any] = {
    np.float32: ctypes.c_float,
    np.float64: ctypes.c_double,
    np.int64: ctypes.c_int64,
    np.int32: ctypes.c_int32,
}


@functools.cache
def _fma() -> Any:
    return intrinsics.inline(lambda a, b, c: intrinsics.fma(a, b, c))


def fma(a: Any, b: Any, c: Any) -> Any:
    """``a*b + c``, rounded once."""
    kind = type(a)
    return kind(_fma()(a, kind(b), kind(c)))


class Quiet:
    """A function whose infinities and NaN are not warned of, as on a device."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self.__globals__ = function.__globals__  # where the simulator puts its `cuda`
        self.__name__ = function.__name__

    def __call__(self, *args: Any) -> Any:
        """Call it."""
        with np.errstate(all="ignore"):
            return self._function(*args)


def mul(a: Any, b: Any) -> Any:
    """``a*b``."""
    return a * b


def convert(value: Any, like: Any) -> Any:
    """Return the value in the type of ``like``, rounded once."""
    return type(like)(value)


def only_if(flag: Any, value: Any) -> Any:
    """Return ``value``, or None where ``flag`` is None."""
    return None if flag is None else value


def load(address: Any, index: Any, like: Any) -> Any:
    """As `_primitives.load`."""
    if address is None:
        return None
    kind = _C_TYPES[type(like)]
    place = int(address) + int(index) * ctypes.sizeof(kind)
    return type(like)(kind.from_address(place).value)


def store(address: Any, index: Any, value: Any) -> None:
    """As `_primitives.store`."""
    kind = _C_TYPES[type(value)]
    place = int(address) + int(index) * ctypes.sizeof(kind)
    kind.from_address(place).value = value.item()


def load4(address: Any, index: Any, like: Any) -> tuple[Any, ...]:
    """As `_primitives.load4`, alignment checked."""
    if address is None:
        return (None,) * 4
    _check_aligned(address, index, like)
    return tuple(load(address, index + k, like) for k in range(4))


def store4(address: Any, index: Any, *values: Any) -> None:
    """As `_primitives.store4`, alignment checked."""
    _check_aligned(address, index, values[0])
    for k, value in enumerate(values):
        store(address, index + k, value)


def _check_aligned(address: Any, index: Any, like: Any) -> None:
    if (int(address) + int(index) * like.itemsize) % 16:
        raise RuntimeError("misaligned access of 16 bytes")


def allocate(size: int) -> Any:
    """As in `_driver`."""
    return np.empty(max(size, 1), np.uint8)


def pinned(columns: int, rows: int) -> np.ndarray[Any, Any]:
    """As in `_driver`."""
    return np.zeros((rows, columns))


def load_kernel(compiled: Any) -> None:
    """Do nothing: there is nothing to link."""


def address_of_buffer(buffer: Any) -> int:
    """As in `_driver`."""
    return int(buffer.ctypes.data)


def context(device: int) -> Any:
    """There is one device."""
    return contextlib.nullcontext()


def clear(address: int, size: int, stream: int) -> None:
    """As in `_device`."""
    ctypes.memset(address, 0, size)


def copy(target: int, source: int, size: int, stream: int) -> None:
    """As in `_device`."""
    ctypes.memmove(target, source, size)


upload = download = copy


def synchronize(stream: int) -> None:
    """Do nothing: all is done already."""


def is_capturing(stream: int) -> bool:
    """There are no graphs."""
    return False


def relaxed() -> Any:
    """There are no graphs."""
    return contextlib.nullcontext()


def launcher(compiled: Any, blocks: int, threads: int, stream: int) -> Any:
    """As in `_driver`; a kernel here remembers one size only."""
    return lambda *arguments: lambda: compiled[blocks, threads](*arguments)


def side_stream(device: int) -> int:
    """There is one stream."""
    return 0


def device_of(address: int) -> int:
    """There is one device."""
    return 0


def multiprocessors(device: int) -> int:
    """Return a small number."""
    return 2


class Event:
    """A point that is reached as soon as it is set."""

    def record(self, stream: int) -> None:
        """As in `_device`."""

    def recording(self, stream: int) -> Callable[[], object]:
        """As in `_driver`."""
        return functools.partial(self.record, stream)

    def hold(self, stream: int) -> None:
        """As in `_device`."""

    def is_past(self) -> bool:
        """As in `_device`."""
        return True

    def wait(self) -> None:
        """As in `_device`."""
