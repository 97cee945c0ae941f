"""Puts a `lazy_driver.Driver` below fastadam, in this process, and gives it arrays to work on.

The only file of these tests that knows how fastadam's CUDA package is divided.
"""

import contextlib
import functools
from types import SimpleNamespace
from unittest import mock

import numpy as np
from cuda.bindings import driver as real
from numba import cuda
from numba.cuda.cudadrv.driver import CudaAPIError
from ptx import Program

from fastadam.cuda import driver as fastadam_driver

# What numba-cuda compiles for on devices of these capabilities.
ARCHITECTURES = {(8, 0): (8, 0, ""), (9, 0): (9, 0, "a")}


class Binding:
    """A driver in the place of ``cuda.bindings.driver``: errors are returned, as there."""

    def __init__(self, driver):
        self._driver = driver

    def __getattr__(self, name):
        if not name.startswith("cu"):
            return getattr(real, name)
        return functools.partial(self._call, name)

    def _call(self, name, *arguments):
        error, result = self._driver.call(name, *arguments)
        returns = "return" in getattr(type(self._driver), name).__annotations__
        return (error, result) if returns else (error,)


class Raising(Binding):
    """The same in the place of numba-cuda's, which raises errors."""

    def _call(self, name, *arguments):
        error, result = self._driver.call(name, *arguments)
        if error:
            raise CudaAPIError(error, f"Call to {name} results in {error.name}")
        return result


class Device:
    """A driver's device, as numba-cuda shows one: entered, it is in use."""

    def __init__(self, driver):
        self._raising = Raising(driver)
        self.MULTIPROCESSOR_COUNT = driver.multiprocessors
        self.compute_capability = driver.capability
        self.get_primary_context = lambda: SimpleNamespace(handle=driver.context)

    def __enter__(self):
        self._raising.cuInit(0)
        self._raising.cuCtxPushCurrent(self.get_primary_context().handle)

    def __exit__(self, *_):
        self._raising.cuCtxPopCurrent()


@functools.cache
def program_of(compiled, capability):
    """Return what numba-cuda's linker makes of a kernel: the last text before ptxas."""
    (kernel,) = compiled.overloads.values()
    program = Program(kernel._codelibrary.get_lto_ptx(cc=ARCHITECTURES[capability]))
    program.kernel = compiled
    return program


@contextlib.contextmanager
def in_place(driver, program_of=program_of):
    """Let fastadam work with a driver, and with no other."""
    device = Device(driver)

    def launcher(compiled, _, blocks, threads, stream):
        program = program_of(compiled, driver.capability)

        def launch(*arguments):
            driver.launch(program, blocks, threads, arguments, stream)

        return lambda *arguments: functools.partial(launch, *arguments)

    free, used = fastadam_driver._free, [True]

    def free_if_used(*arguments):
        if used:  # what outlives the driver, as after an error, is not to ask the real one
            free(*arguments)

    names = {
        "fastadam.cuda.driver": {
            "_free": free_if_used,
            "binding": Binding(driver),
            "driver": Raising(driver),
            "cuda": SimpleNamespace(gpus={driver.number: device}, jit=cuda.jit),
            "launcher": launcher,
            "load_kernel": lambda compiled: program_of(compiled, driver.capability),
        },
        "numba.cuda.dispatcher": {"get_current_device": lambda: device},
        "numba.cuda.dispatcher._Kernel": {"bind": lambda _: None},
        "numba.cuda.cudadrv.devices": {"get_context": lambda: SimpleNamespace(device=device)},
    }
    with contextlib.ExitStack() as stack:
        for module, values in names.items():
            for name, value in values.items():
                stack.enter_context(mock.patch(f"{module}.{name}", value))
        stack.callback(used.clear)
        yield


class Array:
    """An array of the driver's memory."""

    def __init__(self, array, stream=None):
        self.array, self.stream = array, stream

    def __getitem__(self, place):
        return Array(self.array[place], self.stream)

    @property
    def __cuda_array_interface__(self):
        array = self.array
        return {
            "shape": array.shape,
            "typestr": array.dtype.str,
            "data": (array.ctypes.data if array.size else 0, False),
            "strides": None if array.flags.c_contiguous else array.strides,
            "stream": self.stream,
            "version": 3,
        }


class Arrays:
    """What makes, fills and reads them in the order of a stream, for `gpu_tools`."""

    def __init__(self, driver, stream=None):
        self.driver, self.stream = driver, stream

    def call(self, name, *arguments):
        """Call one of the driver's functions as a user's library does."""
        with Device(self.driver):
            return getattr(Raising(self.driver), name)(*arguments)

    def put(self, array):
        address = self.call("cuMemAlloc", max(array.nbytes, 1))
        order = "C" if array.flags.c_contiguous else "F"
        view = self.driver.memory.view(address, array.shape, array.dtype, order)
        owner = Array(view, self.stream)
        self.fill(owner, array)
        return owner

    def fill(self, owner, array):
        if owner.array.size:
            source = np.array(array, owner.array.dtype, order="K")
            places = owner.array.ctypes.data, source.ctypes.data
            self.call("cuMemcpyHtoDAsync", *places, source.nbytes, self.stream or 0)

    def get(self, owner):
        found = np.empty_like(owner.array, order="K")
        if found.size:
            places = found.ctypes.data, owner.array.ctypes.data
            self.call("cuMemcpyDtoHAsync", *places, found.nbytes, self.stream or 0)
        return found

    def synchronize(self):
        self.call("cuCtxSynchronize")
