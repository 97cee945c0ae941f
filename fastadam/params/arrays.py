"""Checks of one array on the CPU: can it be a parameter, or a parameter's gradient."""

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.ma import MaskedArray  # of NumPy itself imported when it is asked for

_TORCH = (
    "; fastadam.torch.Adam and AdamW take torch's parameters, and this class takes"
    " fastadam.torch.CPUParams(model.named_parameters()).arrays"
)
# What to do with a parameter of another library.
_HINTS = {
    "torch": _TORCH,
    "jax": "; JAX arrays cannot be updated in place",
    "jaxlib": "; JAX arrays cannot be updated in place",
}

# DLPack's name for the memory of the host.
_HOST = 1

DTYPES = (np.dtype(np.float32), np.dtype(np.float64))


def check_param(array: Any, label: str, *, any_order: bool = False) -> None:
    """Refuse what cannot be updated in place.

    With ``any_order``, the axes may lie in memory in any order.

    Raises
    ------
    TypeError
        If it is no NumPy array of float32 or float64 in native byte order.
    ValueError
        If it is read-only, unaligned, or neither C- nor Fortran-contiguous; with
        ``any_order``, if it has gaps or overlaps itself.
    """
    _check_kind(array, label)
    if array.dtype not in DTYPES:
        raise TypeError(
            f"{label}.dtype must be float32 or float64 in native byte order, got {array.dtype!r}"
        )
    if not array.flags.writeable:
        raise ValueError(f"{label} must be writable, got a read-only {_kind_of_memory(array)}")
    check_layout(array, label, any_order=any_order)


def take_grad(
    grad: Any, param: npt.NDArray[Any], label: str, writable: bool
) -> npt.NDArray[np.floating]:
    """Return a gradient as a plain array over its memory, or refuse it.

    It may be another library's array on the CPU, and read-only, or a NumPy
    scalar, which is what arithmetic on 0-d arrays returns.

    Raises
    ------
    TypeError
        If it is no array, or not of the parameter's dtype.
    ValueError
        If it differs from the parameter in shape or memory order, or is
        read-only and must be ``writable``.
    """
    array = as_plain(grad, label)
    check_alike(array, param, label, on_host=True)
    if not is_dense(array) or not is_dense(param):
        check_layout(array, label, param)
    check_order(array, param, label, _copy_like(param))
    if writable and (isinstance(grad, np.generic) or not array.flags.writeable):
        kind = "a NumPy scalar" if isinstance(grad, np.generic) else "a read-only array"
        raise ValueError(f"{label} must be writable for zero_grad=True, got {kind}")
    return array


class _Interface:
    """Gives NumPy an object's ``__array_interface__`` alone: other ways to read it would copy."""

    def __init__(self, owner: Any) -> None:
        self.owner, self.__array_interface__ = owner, owner.__array_interface__


def as_plain(grad: Any, label: str) -> npt.NDArray[Any]:
    """Return another library's array as a plain one over the same memory, without a copy.

    Raises
    ------
    TypeError
        If it is no array in the host's memory.
    """
    kind, name = type(grad), kind_of(grad)
    if isinstance(grad, np.ndarray) and not isinstance(grad, MaskedArray):
        plain: npt.NDArray[Any] = grad.view(np.ndarray)  # without what a subclass overrides
        return plain
    if isinstance(grad, np.generic):
        return np.asarray(grad)
    try:
        if not isinstance(grad, MaskedArray):
            if hasattr(kind, "__array_interface__"):
                return np.asarray(_Interface(grad))
            if hasattr(kind, "__dlpack__") and grad.__dlpack_device__()[0] == _HOST:
                return np.from_dlpack(grad)
    except Exception as error:  # whatever another library raises
        raise TypeError(
            f"{label} must be readable as a NumPy array without a copy, got {name}: {error}"
        ) from error
    raise TypeError(
        f"{label} must be a numpy.ndarray, or another library's array on the CPU, got {name}"
    )


def check_order(
    array: npt.NDArray[Any], param: npt.NDArray[Any], label: str, hint: str = ""
) -> None:
    """Refuse an array that is not of its parameter's memory order; ``hint`` ends the message."""
    if not same_order(array, param):
        order = "C order, as its parameter is"
        if not param.flags.c_contiguous:
            order = "Fortran order, as its parameter is"
        if not (param.flags.c_contiguous or param.flags.f_contiguous):
            order = f"memory as its parameter is, with strides {param.strides}"
        raise ValueError(
            f"{label} must be laid out in {order}, got strides {array.strides} for shape"
            f" {array.shape}{hint}"
        )


def same_order(array: npt.NDArray[Any], param: npt.NDArray[Any]) -> bool:
    """Whether an array's axes lie in memory as those of a parameter of its shape do."""
    if param.flags.c_contiguous:
        return array.flags.c_contiguous
    if param.flags.f_contiguous:
        return array.flags.f_contiguous
    return long_strides(array.shape, array.strides) == long_strides(param.shape, param.strides)


def is_dense(array: npt.NDArray[Any]) -> bool:
    """Whether an array's elements fill its memory, with its axes in any order."""
    if array.flags.c_contiguous or array.flags.f_contiguous:
        return True
    return fills_memory(array.shape, array.strides, array.itemsize)


def fills_memory(shape: Sequence[int], strides: Sequence[int], itemsize: int) -> bool:
    """Whether elements of such strides leave no gap, the axes in any order."""
    size = itemsize
    for stride, length in sorted(long_strides(shape, strides)):
        if stride != size:
            return False
        size *= length
    return True


def long_strides(shape: Sequence[int], strides: Sequence[int]) -> list[tuple[int, int]]:
    """Return stride and length of each axis of more than one element; none of an empty array's."""
    if 0 in shape:
        return []
    pairs = zip(strides, shape, strict=True)
    return [(stride, length) for stride, length in pairs if length != 1]


def check_alike(grad: Any, param: Any, label: str, on_host: bool = False) -> None:
    """Refuse a gradient of another dtype or shape than its parameter's, on any device."""
    if grad.dtype != param.dtype:
        cast = f"; numpy.asarray(grad, numpy.{param.dtype.name}) makes such a copy"
        raise TypeError(
            f"{label}.dtype must be its parameter's, {param.dtype!r}, got {grad.dtype!r}"
            + (cast if on_host else "")
        )
    if grad.shape != param.shape:
        raise ValueError(f"{label}.shape must be its parameter's, {param.shape}, got {grad.shape}")


def _check_kind(array: Any, label: str) -> None:
    if not isinstance(array, np.ndarray) or isinstance(array, MaskedArray):
        raise TypeError(f"{label} must be a numpy.ndarray, got {kind_of(array)}{hint(array)}")


def kind_of(thing: Any) -> str:
    """Return the name of a thing's type, for a message."""
    kind = type(thing)
    module = "" if kind.__module__ == "builtins" else f"{kind.__module__}."
    return f"{module}{kind.__qualname__}"


def hint(thing: Any) -> str:
    """Return the end of a message: what to give instead of something that is no parameter."""
    if isinstance(thing, tuple) and len(thing) == 2 and isinstance(thing[0], str):
        return hint(thing[1]) or "; give pairs of name and array as a dict"
    if hasattr(type(thing), "named_parameters"):
        return _TORCH
    kind = kind_of(thing)
    if kind.startswith("fastadam.torch.") and kind.endswith(".CPUParams"):
        return "; give its .arrays"
    return _HINTS.get(kind.partition(".")[0], "")


def check_layout(
    array: npt.NDArray[Any],
    label: str,
    like: npt.NDArray[Any] | None = None,
    *,
    any_order: bool = False,
) -> None:
    """Refuse an array with gaps, or off the alignment of its elements."""
    if not (
        array.flags.c_contiguous or array.flags.f_contiguous or (any_order and is_dense(array))
    ):
        rule = "contiguous" if any_order else "contiguous, in C or Fortran order"
        raise ValueError(
            f"{label} must be {rule}, got strides"
            f" {array.strides} for shape {array.shape}{'' if like is None else _copy_like(like)}"
        )
    if not array.flags.aligned:
        raise ValueError(
            f"{label} must be aligned to its {array.itemsize}-byte elements, got an array at"
            f" an address that is not a multiple of it"
        )


def _copy_like(param: npt.NDArray[Any]) -> str:
    """Return the end of a message: how to copy a gradient into its parameter's memory order."""
    if not (param.flags.c_contiguous or param.flags.f_contiguous):
        return "; numpy.copyto(numpy.empty_like(param), grad) does so"
    make = "ascontiguousarray" if param.flags.c_contiguous else "asfortranarray"
    return f"; numpy.{make}(grad) makes such a copy"


def _kind_of_memory(array: npt.NDArray[Any]) -> str:
    """Return what kind of array a read-only one is, and what to do if that is known."""
    base: Any = array
    while isinstance(base, np.ndarray):
        if isinstance(base, np.memmap):
            return (
                "memory map, as joblib gives its workers large arrays:"
                " joblib.Parallel(max_nbytes=None) or (mmap_mode='c') gives each worker a copy"
            )
        base = base.base
    return "array"


def address(array: npt.NDArray[Any] | None) -> int:
    """Return the address of an array's first element, 0 for None."""
    return 0 if array is None else array.ctypes.data


# PyArray_Descr: PyObject_HEAD, type object; then kind, type, byte order (char each), one byte
# that floats have no use for, type number (int). The same in every NumPy.
DTYPE_MARK_OFFSET = object.__basicsize__ + 8


def dtype_mark(dtype: np.dtype[Any]) -> int:
    """Return eight bytes of a plain dtype, which are equal where the dtypes are.

    ``is`` does not tell: unpickling makes a second object for the same dtype.
    """
    return ctypes.c_int64.from_address(id(dtype) + DTYPE_MARK_OFFSET).value
