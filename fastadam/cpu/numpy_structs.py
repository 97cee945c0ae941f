"""Look at gradients without a trip through Python for each.

An attribute of an array costs Python 30 to 800 nanoseconds, the address most.
The C structure behind it is fixed by NumPy's binary interface, to which every
compiled extension is bound, so compiled code can look there itself: at every
array in every step, so that nothing has to be remembered and nothing goes
stale. What it does not find as expected, and no more, is left to the checks in Python.
"""

import ctypes
import functools
import pickle
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..params.arrays import DTYPE_MARK_OFFSET, address, dtype_mark
from ..update import layout
from . import intrinsics
from . import layout as field
from .intrinsics import peek, table

# PyArrayObject_fields on 64-bit machines: PyObject_HEAD, whose last member is the
# type; data, nd (int), dimensions, strides, base, descr, flags (int).
_HEAD = object.__basicsize__
TYPE, DATA, NDIM, DIMENSIONS, STRIDES = _HEAD - 8, _HEAD, _HEAD + 8, _HEAD + 16, _HEAD + 24
DESCR, _FLAGS = _HEAD + 40, _HEAD + 48
C, F, _ALIGNED, _WRITEABLE = 0x1, 0x2, 0x100, 0x400
# PyTupleObject: PyObject_HEAD, then its length; its items come last.
LENGTH, ITEMS = _HEAD, tuple.__basicsize__

_INT64, _INT32 = np.int64(0), np.int32(0)


@intrinsics.inline
def fits(array: Any, row: Any, writable: Any) -> Any:
    """Whether an array at ``id()`` is of the dtype, shape and layout that its row asks for."""
    needed = row[field.MEMORY_ORDER] | _ALIGNED | (_WRITEABLE if writable else 0)
    ndim = row[field.NDIM]
    if (
        peek(array + _FLAGS, _INT32) & needed != needed
        or peek(peek(array + DESCR, _INT64) + DTYPE_MARK_OFFSET, _INT64) != row[field.DTYPE_MARK]
        or peek(array + NDIM, _INT32) != ndim
    ):
        return False
    wanted, given = row[field.SHAPE], peek(array + DIMENSIONS, _INT64)
    for axis in range(ndim):
        if peek(wanted + 8 * axis, _INT64) != peek(given + 8 * axis, _INT64):
            return False
    if row[field.MEMORY_ORDER] == 0:
        itemsize, strides = row[field.ELEMENT] >> 11 & 31, peek(array + STRIDES, _INT64)
        for axis in range(ndim):
            step = peek(row[field.STRIDES] + 8 * axis, _INT64) * itemsize
            if peek(wanted + 8 * axis, _INT64) != 1 and peek(strides + 8 * axis, _INT64) != step:
                return False
    return True


@intrinsics.inline
def sort(seen: Any) -> None:
    """Bring the column ORDER into the order of the addresses in FOUND.

    Shell's sort: in place, and soon done where the order is that of the last step.
    """
    gap = 1
    while gap < seen.shape[0] // 3:
        gap = 3 * gap + 1
    while gap > 0:
        for i in range(gap, seen.shape[0]):
            moved, j = seen[i, field.ORDER], i
            found = seen[moved, field.FOUND]
            while j >= gap and seen[seen[j - gap, field.ORDER], field.FOUND] > found:
                seen[j, field.ORDER] = seen[j - gap, field.ORDER]
                j -= gap
            seen[j, field.ORDER] = moved
        gap //= 3


@intrinsics.inline
def are_apart(seen: Any, own: Any) -> Any:
    """Whether what was found shares no memory with itself or with ``own``, which is sorted."""
    sort(seen)
    end, k = 0, 0
    for i in range(seen.shape[0]):
        t = seen[i, field.ORDER]
        start = seen[t, field.FOUND]
        if start != 0 and seen[t, field.BYTES] != 0:
            if start < end:
                return False
            end = start + seen[t, field.BYTES]
            while k < own.shape[0] and own[k, field.END] <= start:
                k += 1
            if k < own.shape[0] and own[k, field.START] < end:
                return False
    return True


@intrinsics.inline
def look(context: Any, grads: Any, writable: Any) -> Any:
    """Note where the gradients lie, if each is as it should be; say whether.

    Parameters
    ----------
    context : int
        Address of a `Context`.
    grads : int
        ``id()`` of a tuple with an array or None for every parameter, which
        the caller keeps alive.
    writable : bool
        Whether the gradients must be writable.

    Returns
    -------
    bool
        If false, some object is no plain array, does not pair with its
        parameter, or shares memory, or a parameter is not what it was. Then
        the column GRAD is as it was. The table ODD has the number of those
        that are to be looked at in Python, then their places.
    """
    fields = table(context, 1, field.CONTEXT_SIZE, _INT64)[0]
    count, changed, total = 0, False, fields[field.TENSOR_COUNT]
    tensors = table(fields[field.TENSORS], total, layout.TENSOR_COLUMNS, _INT64)
    seen = table(fields[field.SEEN], total, field.SEEN_COLUMNS, _INT64)
    odd = table(fields[field.ODD], 1, total + 1, _INT64)[0]
    for t in range(total):
        row = seen[t]
        param, grad, start = row[field.OBJECT], peek(grads + ITEMS + 8 * t, _INT64), 0
        usual = peek(param + DATA, _INT64) == tensors[t, layout.PARAM] and fits(param, row, True)
        if usual and grad != fields[field.NONE]:
            usual = peek(grad + TYPE, _INT64) == fields[field.NDARRAY] and fits(
                grad, row, writable
            )
            if usual:
                start = peek(grad + DATA, _INT64)
        if not usual:
            count += 1
            odd[count] = t
        row[field.FOUND] = start
        if tensors[t, layout.GRAD] != start:
            changed = True
    odd[0] = count
    return count == 0 and (not changed or accept(fields, tensors, seen))


@intrinsics.inline
def accept(fields: Any, tensors: Any, seen: Any) -> Any:
    """Take the addresses in the column FOUND for those of the gradients, if none overlap."""
    if not are_apart(seen, table(fields[field.OWN_MEMORY], fields[field.OWN_COUNT], 2, _INT64)):
        return False
    for t in range(tensors.shape[0]):
        tensors[t, layout.GRAD] = seen[t, field.FOUND]
    return True


def new_seen(arrays: Sequence[npt.NDArray[Any]]) -> tuple[npt.NDArray[np.int64], Any]:
    """Return the table SEEN for what must be as these arrays are, and the shapes it points to."""
    seen = np.zeros((len(arrays), field.SEEN_COLUMNS), dtype=np.int64)
    lengths = [length for array in arrays for length in array.shape]
    strides = [stride // array.itemsize for array in arrays for stride in array.strides]
    shapes = np.array([lengths, strides], dtype=np.int64)
    start = address(shapes)
    for k, (row, array) in enumerate(zip(seen, arrays, strict=True)):
        row[field.NDIM], row[field.SHAPE], row[field.STRIDES] = (
            array.ndim, start, start + 8 * len(lengths),
        )  # fmt: skip
        flags = array.flags
        row[field.MEMORY_ORDER] = C if flags.c_contiguous else F if flags.f_contiguous else 0
        row[field.DTYPE_MARK] = dtype_mark(array.dtype)
        # DLPack's code, 2 for a float, then bits, a byte each, then lanes.
        row[field.ELEMENT] = (2 if array.dtype.kind == "f" else 0) + 2048 * array.itemsize + 65536
        row[field.BYTES], row[field.ORDER] = array.nbytes, k
        start += 8 * array.ndim
    return seen, shapes


@functools.cache
def works() -> bool:
    """Whether the structures are the ones described here, tried on a few objects."""
    if np.dtype(np.intp).itemsize != 8:
        return False
    square = np.arange(6.0).reshape(2, 3)
    locked = np.zeros(3, dtype=np.float32)
    locked.flags.writeable = False
    samples = (np.zeros(()), np.zeros(4), square, square.T, square[:, :1], locked)
    if _peek(id(samples) + LENGTH) != 6 or _peek(id(samples) + ITEMS + 8) != id(samples[1]):
        return False
    # Other objects for a dtype, and another byte order.
    single = np.dtype(np.float32)
    same, other = pickle.loads(pickle.dumps(single)), single.newbyteorder()  # noqa: S301
    if dtype_mark(same) != dtype_mark(single) or dtype_mark(other) == dtype_mark(single):
        return False
    for array in samples:
        dimensions = _peek(id(array) + DIMENSIONS)
        shape = tuple(_peek(dimensions + 8 * axis) for axis in range(array.ndim))
        places = _peek(id(array) + STRIDES)
        strides = tuple(_peek(places + 8 * axis) for axis in range(array.ndim))
        flags = _peek(id(array) + _FLAGS) & (C | F | _ALIGNED | _WRITEABLE)
        found = (
            _peek(id(array) + TYPE),
            _peek(id(array) + DATA),
            _peek(id(array) + NDIM) & 0xFFFFFFFF,
            shape,
            strides,
            _peek(_peek(id(array) + DESCR) + DTYPE_MARK_OFFSET),
            flags,
        )
        expected = (
            id(np.ndarray),
            array.ctypes.data,
            array.ndim,
            array.shape,
            array.strides,
            dtype_mark(array.dtype),
            array.flags.num & (C | F | _ALIGNED | _WRITEABLE),
        )
        if found != expected:
            return False
    return True


def _peek(where: int) -> int:
    return ctypes.c_int64.from_address(where).value
