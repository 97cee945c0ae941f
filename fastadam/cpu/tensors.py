"""Look at torch's tensors on the CPU without a trip through Python for each.

Asked from Python, where a tensor lies, its shape, dtype and strides cost 0.3 us, and a NumPy array
over its memory 1.2; by the C function of DLPack 1.3, which torch offers since 2.10, about 0.05.
"""

import ctypes
import sys
from typing import Any

import numpy as np

from ..params.arrays import DTYPE_MARK_OFFSET, DTYPES, address, dtype_mark
from . import intrinsics
from . import layout as field
from .intrinsics import call_at, peek, table
from .numpy_structs import DATA, DESCR, DIMENSIONS, NDIM, TYPE, C, F

_INT64, _INT32 = np.int64(0), np.int32(0)
# DLTensor: data; device type, device number; ndim (all int32); code, bits (a byte each), lanes
# (two); shape, strides, in elements, NULL for C order; bytes from data to the first element.
_DEVICE, _NDIM, _ELEMENT, _SHAPE, _STRIDES, _OFFSET, _SIZE = 8, 16, 20, 24, 32, 40, 48
_CPU = 1
# Code 2, float, then bits, a byte each, then 1 lane.
_SINGLE, _DOUBLE = 2 + (32 << 8) + (1 << 16), 2 + (64 << 8) + (1 << 16)
# DLPackExchangeAPI: its version, major and minor, an older one of it, and then functions.
_FROM_PYTHON = 16 + 3 * 8

# What `place_of` knows; see `field.KNOWN`.
known = np.zeros(field.KNOWN_SIZE + _SIZE // 8, dtype=np.int64)
known[field.KNOWN_NDARRAY] = id(np.ndarray)
known_at = address(known)
known[[field.KNOWN_SINGLE, field.KNOWN_DOUBLE]] = [dtype_mark(dtype) for dtype in DTYPES]
_kept: list[Any] = []


@intrinsics.inline
def _tensor_fits(tensor: Any, row: Any) -> Any:
    """Whether a DLTensor is of the dtype, shape and layout that its row of SEEN asks for."""
    element, ndim, order = row[field.ELEMENT], row[field.NDIM], row[field.MEMORY_ORDER]
    in_c = order != F
    if (
        peek(tensor + _ELEMENT, _INT32) != element
        or peek(tensor + _NDIM, _INT32) != ndim
        or (peek(tensor, _INT64) + peek(tensor + _OFFSET, _INT64)) % (element >> 11 & 31) != 0
    ):
        return False
    shape, strides, step = peek(tensor + _SHAPE, _INT64), peek(tensor + _STRIDES, _INT64), 1
    for k in range(ndim):
        axis = ndim - 1 - k if in_c else k
        length = peek(shape + 8 * axis, _INT64)
        if length != peek(row[field.SHAPE] + 8 * axis, _INT64):
            return False
        if order == 0:
            step = peek(row[field.STRIDES] + 8 * axis, _INT64)
        if strides == 0:
            if order != C:
                return False
        elif length != 1 and row[field.BYTES] != 0 and peek(strides + 8 * axis, _INT64) != step:
            return False
        step *= length
    return True


@intrinsics.inline
def describe(array: Any, known_at: Any) -> Any:
    """Return the address of a tensor's DLTensor; 0 if it is none of torch's on the CPU."""
    kind, known = peek(array + TYPE, _INT64), table(known_at, 1, field.KNOWN_SIZE, _INT64)[0]
    exchange, tensor = known[field.KNOWN_EXCHANGE], known_at + 8 * field.KNOWN_SIZE
    if exchange == 0 or not (
        kind == known[field.KNOWN_TENSOR] or kind == known[field.KNOWN_PARAMETER]
    ):
        return 0
    here = call_at(exchange, array, tensor) and peek(tensor + _DEVICE, _INT32) == _CPU
    return tensor if here else 0


@intrinsics.inline
def first_element(tensor: Any) -> Any:
    """Return where a DLTensor's elements lie."""
    return peek(tensor, _INT64) + peek(tensor + _OFFSET, _INT64)


@intrinsics.inline
def place_of(array: Any, row: Any, known_at: Any) -> Any:
    """Return where one of torch's lies; -1 if it is none, or not as its row of SEEN asks for."""
    tensor = describe(array, known_at)
    return first_element(tensor) if tensor != 0 and _tensor_fits(tensor, row) else -1


@intrinsics.inline
def scalar_of(array: Any, known_at: Any) -> Any:
    """Return where the one number of an array lies, and its bytes: 4 or 8, 0 if it is no float."""
    known = table(known_at, 1, field.KNOWN_SIZE, _INT64)[0]
    if peek(array + TYPE, _INT64) == known[field.KNOWN_NDARRAY]:
        mark = peek(peek(array + DESCR, _INT64) + DTYPE_MARK_OFFSET, _INT64)
        if peek(array + NDIM, _INT32) == 0:
            if mark == known[field.KNOWN_SINGLE]:
                return peek(array + DATA, _INT64), 4
            if mark == known[field.KNOWN_DOUBLE]:
                return peek(array + DATA, _INT64), 8
        return 0, 0
    tensor = describe(array, known_at)
    if tensor != 0 and peek(tensor + _NDIM, _INT32) == 0:
        element = peek(tensor + _ELEMENT, _INT32)
        if element in (_SINGLE, _DOUBLE):
            return first_element(tensor), 4 if element == _SINGLE else 8
    return 0, 0


@intrinsics.inline
def mark_of(array: Any, known_at: Any) -> Any:
    """Return where an array lies, 1 if it is empty; -1 if it is of no known kind."""
    known = table(known_at, 1, field.KNOWN_SIZE, _INT64)[0]
    if peek(array + TYPE, _INT64) == known[field.KNOWN_NDARRAY]:
        shape, ndim = peek(array + DIMENSIONS, _INT64), np.int64(peek(array + NDIM, _INT32))
        place = peek(array + DATA, _INT64)
    else:
        tensor = describe(array, known_at)
        if tensor == 0:
            return -1
        shape, ndim = peek(tensor + _SHAPE, _INT64), np.int64(peek(tensor + _NDIM, _INT32))
        place = first_element(tensor)
    for axis in range(ndim):
        if peek(shape + 8 * axis, _INT64) == 0:
            return 1
    return place


def meet_torch() -> bool:
    """Have torch's tensors known, if it has been imported since the last time; say whether."""
    torch = sys.modules.get("torch")
    if torch is None or known[field.KNOWN_EXCHANGE] != 0:
        return False
    capsule = getattr(getattr(torch, "Tensor", None), "__dlpack_c_exchange_api__", None)
    parameter = getattr(getattr(torch, "nn", None), "Parameter", None)
    if capsule is None or parameter is None:  # an older torch, or one half imported
        return False
    open_capsule = ctypes.pythonapi.PyCapsule_GetPointer
    open_capsule.restype, open_capsule.argtypes = (
        ctypes.c_void_p,
        [ctypes.py_object, ctypes.c_char_p],
    )
    at = open_capsule(capsule, b"dlpack_exchange_api")
    if ctypes.c_uint32.from_address(at).value != 1:  # of the major version all others are unlike
        return False
    _kept[:] = torch.Tensor, parameter
    known[field.KNOWN_TENSOR], known[field.KNOWN_PARAMETER] = map(id, _kept)
    known[field.KNOWN_EXCHANGE] = ctypes.c_int64.from_address(at + _FROM_PYTHON).value
    return bool(known[field.KNOWN_EXCHANGE] != 0)
