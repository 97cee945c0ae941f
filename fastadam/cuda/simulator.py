"""What Numba's CUDA simulator leaves out, over the host's memory: for tests without a device.

It stands for `driver` and for `intrinsics`, whose docstrings hold for what has none here. A
device's address is an address here. Arithmetic is rounded as on a device, the fused
multiply-add once, so that a simulated step has a real one's bits. There is one device, and
each call has done its work when it returns: there are no streams and no graphs.
"""

import contextlib
import ctypes
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import cuda

from ..cpu import intrinsics
from ..state.storage import ALIGNMENT

# Intrinsics.

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


def mul(a: Any, b: Any) -> Any:
    """``a*b``."""
    return a * b


def convert(value: Any, like: Any) -> Any:
    """Return the value in the type of ``like``, rounded once."""
    return type(like)(value)


def only_if(flag: Any, value: Any) -> Any:
    """Return ``value``, or None where ``flag`` is None."""
    return None if flag is None else value


def _at(address: Any, index: Any, like: Any) -> Any:
    kind = _C_TYPES[type(like)]
    return kind.from_address(int(address) + int(index) * ctypes.sizeof(kind))


def load(address: Any, index: Any, like: Any) -> Any:
    """Read an element; None at an address of None."""
    return None if address is None else type(like)(_at(address, index, like).value)


def store(address: Any, index: Any, value: Any) -> None:
    """Write an element; nothing at an address of None."""
    if address is not None:
        _at(address, index, value).value = value.item()


def load4(address: Any, index: Any, like: Any) -> tuple[Any, ...]:
    """Read 4 elements, alignment checked."""
    _check_aligned(address, index, like)
    return tuple(load(address, index + k, like) for k in range(4))


def store4(address: Any, index: Any, *values: Any) -> None:
    """Write 4 elements, alignment checked."""
    _check_aligned(address, index, values[0])
    for k, value in enumerate(values):
        store(address, index + k, value)


def _check_aligned(address: Any, index: Any, like: Any) -> None:
    if address is not None and (int(address) + int(index) * like.itemsize) % 16:
        raise RuntimeError("misaligned access of 16 bytes")


# The driver.


class _Quiet:
    """A function whose infinities and NaN are not warned of, as on a device."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self.__globals__ = function.__globals__  # where the simulator puts its `cuda`
        self.__name__ = function.__name__

    def __call__(self, *args: Any) -> Any:
        with np.errstate(all="ignore"):
            return self._function(*args)


def compile_kernel(function: Callable[..., Any], signature: Any, bounds: Any) -> Any:
    """Return what Numba's simulator runs."""
    return cuda.jit(_Quiet(function))


def compile_inline(function: Callable[..., Any]) -> Any:
    """Return what Numba's simulator runs inside a kernel."""
    return cuda.jit(_Quiet(function), device=True)


def launcher(compiled: Any, device: int, blocks: int, threads: int, stream: int) -> Any:
    """Return what makes, of a kernel's arguments, a call that runs it."""
    return lambda *arguments: lambda: compiled[blocks, threads](*arguments)


class Buffer:
    """Zeros."""

    def __init__(self, size: int) -> None:
        self._bytes = np.zeros(size + ALIGNMENT, np.uint8)
        self.address = int(self._bytes.ctypes.data) + -self._bytes.ctypes.data % ALIGNMENT


def pinned(columns: int, rows: int) -> npt.NDArray[np.float64]:
    """Return zeros."""
    return np.zeros((rows, columns))


def copy(target: int, source: int, size: int, stream: int) -> None:
    """Copy bytes."""
    ctypes.memmove(target, source, size)


def copy_now(device: int, target: int, source: int, size: int) -> None:
    """Copy bytes."""
    ctypes.memmove(target, source, size)


def multiprocessors(device: int) -> int:
    """Return a small number."""
    return 2


def _zero(_: int) -> int:
    return 0


def _nothing(*_: Any) -> None:
    pass


device_of = side_stream = is_capturing = _zero
load_kernel = synchronize = synchronize_all = _nothing
context = allowed_in_capture = contextlib.nullcontext


class Event:
    """A point that is always reached."""

    record = block = wait = _nothing

    def recording(self, *_: int) -> Callable[[], object]:
        """Return a call that does nothing."""
        return _nothing
