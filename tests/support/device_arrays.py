"""Stand-ins for arrays on a CUDA device, over the host's memory: for Numba's CUDA simulator."""

import sys
import types

import numpy as np


def placed(array, offset=0):
    """Return a copy, of the same memory order, that begins so many bytes after a cache line."""
    order = "C" if array.flags.c_contiguous else "F"
    buffer = np.zeros(array.nbytes + offset + 128, np.uint8)
    start = -buffer.ctypes.data % 64 + offset
    copy = buffer[start : start + array.nbytes].view(array.dtype).reshape(array.shape, order=order)
    copy[...] = array
    return copy


class Slotted:
    """What offers ``__cuda_array_interface__``, and no weak references."""

    __slots__ = ("array", "fields")

    def __init__(self, array, **fields):
        self.array, self.fields = array, fields

    @property
    def __cuda_array_interface__(self):
        array = self.array
        return {
            "shape": array.shape,
            "typestr": array.dtype.str,
            "data": (array.ctypes.data, not array.flags.writeable),
            "strides": None if array.flags.c_contiguous else array.strides,
            "version": 3,
            **self.fields,
        }


class InterfaceArray(Slotted):
    """The same with weak references, as of CuPy's arrays and Numba's."""


class _DType:
    def __init__(self, name):
        self.name = name

    def __repr__(self):
        return f"torch.{self.name}"


DTYPES = {name: _DType(name) for name in ("float16", "float32", "float64", "int64")}
DEVICE = types.SimpleNamespace(type="cuda", index=0)


class Tensor:
    """What looks like one of torch's: it has ``data_ptr``, and may come to lie elsewhere."""

    def __init__(self, array, is_cuda=True):
        self.array, self.is_cuda, self.device = array, is_cuda, DEVICE

    @property
    def shape(self):
        return self.array.shape

    @property
    def dtype(self):
        return DTYPES[self.array.dtype.name]

    def stride(self):
        return tuple(step // self.array.itemsize for step in self.array.strides)

    def data_ptr(self):
        return self.array.ctypes.data if self.array.size else 0

    def move(self):
        """Go to other memory, as ``tensor.data = tensor.clone()`` does."""
        self.array = placed(self.array)


def pretend_torch(monkeypatch, at_once=False):
    """Give the process a torch of which there is nothing but what asks where tensors lie."""
    calls = []

    def equal(tensors, places, which):
        calls.append(which)
        return all(tensors[k].data_ptr() == places[k] for k in which)

    names = {"_tensors_data_ptrs_at_indices_equal": equal} if at_once else {}
    module = types.ModuleType("torch")
    module._C = types.SimpleNamespace(**names)
    monkeypatch.setitem(sys.modules, "torch", module)
    return calls
