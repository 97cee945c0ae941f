"""A libcuda of our own, with which numba-cuda, cuda.core and fastadam work as with NVIDIA's.

A plugin of pytest, for a process of its own: ``pytest -p libcuda_driver``. The library is a few
lines of C, which return functions of a `lazy_driver.Driver` by name. It is loaded before
anything asks the system for a driver. What numba-cuda would link to machine code, it links to
PTX here.
"""

import ctypes
import functools
import inspect
import subprocess
import tempfile
from pathlib import Path

import gpu_tools
import lazy_driver
import pytest
from cuda.bindings import driver as real
from lazy_driver import Handle, Int
from ptx import Program

SOURCE = """
typedef int (*lookup_t)(const char *, void **);
static lookup_t lookup;
void use_lookup(lookup_t given) { lookup = given; }
int cuGetProcAddress_v2(const char *name, void **found, int version, unsigned long long flags,
                        int *status) {
    int error = lookup(name, found);
    if (status) *status = error != 0;
    return error;
}
"""
NAME = b"a device of the tests\0"
ATTRIBUTES = real.CUdevice_attribute
# Functions whose result is their last argument in C, not the first.
RESULT_LAST = {"cuStreamIsCapturing", "cuStreamEndCapture", "cuStreamGetFlags"}


def put(place, value, c_type=Handle):
    """Write a result where a caller wants it, if it does."""
    if place:
        c_type.from_address(place).value = value


class Driver(lazy_driver.Driver):
    """The same, and what libraries ask beside that; functions of ``c_`` take C's arguments."""

    def __init__(self, **options):
        super().__init__(**options)
        self.number = 0
        self.functions, self.programs = {}, {}

    # Devices.

    def cuDriverGetVersion(self) -> Int:
        return 13_000

    def cuDeviceGetCount(self) -> Int:
        return 1

    def cuDeviceGet(self, ordinal: Int) -> Int:
        return ordinal

    def c_cuDeviceGetName(self, name, size, device):
        ctypes.memmove(name, NAME, len(NAME))

    def c_cuDeviceGetUuid(self, uuid, device):
        ctypes.memset(uuid, 7, 16)

    def cuDeviceGetAttribute(self, attribute: Int, device: Int) -> Int:
        major, minor = self.capability
        return {
            ATTRIBUTES.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: major,
            ATTRIBUTES.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: minor,
            ATTRIBUTES.CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK: 1024,
            ATTRIBUTES.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: self.multiprocessors,
        }.get(attribute, 1)

    def cuDeviceTotalMem(self, device: Int) -> Handle:
        return self.memory.words.nbytes

    def c_cuMemGetInfo(self, free, total):
        put(free, self.memory.words.nbytes - sum(self.memory.sizes.values()))
        put(total, self.memory.words.nbytes)

    def c_cuGetErrorName(self, error: Int, name):
        put(name, ctypes.cast(NAME, ctypes.c_void_p).value)

    c_cuGetErrorString = c_cuGetErrorName

    # Contexts.

    def cuDevicePrimaryCtxRetain(self, device: Int) -> Handle:
        return self.context

    def c_cuThreadExchangeStreamCaptureMode(self, mode):
        put(mode, self.cuThreadExchangeStreamCaptureMode(Int.from_address(mode).value), Int)

    def cuCtxSetCurrent(self, context):
        del self.current[-1:]
        if context:
            self.current.append(context)

    def cuCtxGetDevice(self) -> Int:
        return self.number

    # Copies that wait, and streams.

    def cuMemcpyHtoD(self, target, source, size):
        self.cuMemcpyHtoDAsync(target, source, size, 0)
        self.cuStreamSynchronize(0)

    def cuMemcpyDtoH(self, target, source, size):
        self.cuMemcpyDtoHAsync(target, source, size, 0)

    def cuStreamGetFlags(self, stream) -> Int:
        return int(not self._stream(stream).blocking)

    def c_cuCtxGetStreamPriorityRange(self, least, greatest):
        put(least, 0, Int)
        put(greatest, 0, Int)

    def cuStreamCreateWithPriority(self, flags: Int, priority: Int) -> Handle:
        return self.cuStreamCreate(flags)

    def cuGraphInstantiateWithFlags(self, graph, flags) -> Handle:
        return graph

    def cuGraphDestroy(self, graph):
        """Do nothing: the executable one is the same."""

    cuGraphExecDestroy = cuGraphDestroy

    # Kernels: a library is a program, and so is the one kernel in it.

    def c_cuLibraryLoadData(self, library, code):
        handle = next(self.handles)
        self.programs[handle] = Program(ctypes.string_at(code).decode())
        put(library, handle)

    def cuLibraryUnload(self, library):
        del self.programs[library]

    def c_cuLibraryGetKernel(self, kernel, library, name):
        put(kernel, library)

    def cuKernelGetFunction(self, kernel) -> Handle:
        return kernel

    def cuKernelGetAttribute(self, attribute: Int, kernel, device: Int) -> Int:
        return 0

    def c_cuLaunchKernelEx(self, config, kernel, arguments):
        blocks, _, _, threads, *_ = (ctypes.c_uint32 * 7).from_address(config)
        program, stream = self.programs[kernel], Handle.from_address(config + 32).value
        places = (Handle * len(program.params)).from_address(arguments)
        values = [ctypes.c_int64.from_address(place).value for place in places]
        self.launch(program, blocks, threads, values, stream)

    def lookup(self, name, found):
        """Hand out a C function."""
        name = name.decode()
        if name not in self.functions:
            self.functions[name] = c_function(self, name)
        Handle.from_address(found).value = ctypes.cast(self.functions[name], ctypes.c_void_p).value
        return 0


def c_function(driver, name):
    """Return a C function of this name: of its result, an argument is the address."""
    prefix = "c_" if hasattr(driver, f"c_{name}") else ""
    method = getattr(driver, prefix + name, None)
    if method is None:
        missing = functools.partial(driver.call, name)  # which notes it
        return ctypes.CFUNCTYPE(Int)(lambda: int(missing()[0]))
    signature = inspect.signature(method)
    types = [
        Handle if each.annotation is each.empty else each.annotation
        for each in signature.parameters.values()
    ]
    result, last = signature.return_annotation, name in RESULT_LAST
    if result is signature.empty:
        run = functools.partial(driver.call, name, prefix=prefix)
        return ctypes.CFUNCTYPE(Int, *types)(lambda *arguments: int(run(*arguments)[0]))

    def call(*arguments):
        place, arguments = arguments[-last], arguments[:-1] if last else arguments[1:]
        error, value = driver.call(name, *arguments)
        if not error:
            put(place, value, result)
        return int(error)

    return ctypes.CFUNCTYPE(Int, *([*types, Handle] if last else [Handle, *types]))(call)


def load(driver):
    """Build the library and load it under the name by which everyone asks for it."""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "libcuda.c"), Path(folder, "libcuda.so.1")
        source.write_text(SOURCE)
        command = ["gcc", "-shared", "-fPIC", f"-Wl,-soname,{library.name}", "-o", library, source]
        subprocess.run(command, check=True)
        loaded = ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
    driver.lookup_function = ctypes.CFUNCTYPE(Int, ctypes.c_char_p, Handle)(driver.lookup)
    loaded.use_lookup(driver.lookup_function)


DRIVER = Driver(size=1 << 26)
load(DRIVER)

# Not before: numba-cuda looks for a driver when it is imported.
from cuda.core import ObjectCode  # noqa: E402
from numba.cuda.cudadrv.driver import _Linker  # noqa: E402

_Linker.complete = lambda linker: ObjectCode.from_ptx(linker.get_linked_ptx())

# The tests for a GPU take fewer steps here, with smaller arrays.

MOST_STEPS, MOST_ELEMENTS = 5, 8_201
same_run = gpu_tools.same_run


def shrunk(shapes):
    return [
        shape if shape == "F" else type(shape)(min(size, MOST_ELEMENTS) for size in shape)
        for shape in shapes
    ]


def short_run(lib, dtypes, mode, steps, every, shapes=gpu_tools.SHAPES, *others, **options):
    steps, every = min(steps, MOST_STEPS), min(every, 3)
    return same_run(lib, dtypes, mode, steps, every, shrunk(shapes), *others, **options)


gpu_tools.same_run, gpu_tools.has_device = short_run, lambda: True


@pytest.fixture(autouse=True)
def nothing_is_refused():
    DRIVER.failures.clear()
    yield
    assert not DRIVER.failures
