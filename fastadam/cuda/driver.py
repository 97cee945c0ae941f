"""Kernels, memory, streams and events of a CUDA device, by way of numba-cuda's driver."""

import contextlib
import ctypes
import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from cuda.core import LaunchConfig, Stream, launch
from numba import cuda
from numba.cuda.cudadrv.driver import CudaAPIError, binding, driver

SUCCESS = binding.CUresult.CUDA_SUCCESS
NOT_INITIALIZED = binding.CUresult.CUDA_ERROR_NOT_INITIALIZED


# Kernels.


def compile_kernel(function: Callable[..., Any], signature: Any, bounds: Any) -> Any:
    """Compile an entry point."""
    return cuda.jit(signature, launch_bounds=bounds)(function)


def compile_inline(function: Callable[..., Any]) -> Any:
    """Compile a function for use inside a kernel."""
    # Inlined by the compiler behind Numba: what is None has been pruned by then.
    return cuda.jit(device=True, forceinline=True)(function)


def load_kernel(compiled: Any) -> None:
    """Link a compiled kernel for the current device and load it there, if that is not done."""
    for kernel in compiled.overloads.values():
        kernel.bind()


@functools.lru_cache(maxsize=1024)  # streams come and go
def launcher(compiled: Any, device: int, blocks: int, threads: int, stream: int) -> Any:  # noqa: ARG001
    """Return what makes, of a kernel's int64 arguments, a call that starts it on this device.

    It is what numba-cuda's ``compiled[blocks, threads, stream](*arguments)`` comes to after
    it has looked at the arguments' types: a third of the time, and no Python, so that no
    signal's handler comes between two kernels of a step.
    """
    (kernel,) = compiled.overloads.values()
    function = kernel._codelibrary.get_cufunc().kernel
    config = LaunchConfig(grid=blocks, block=threads)
    start = functools.partial(
        functools.partial, launch, Stream.from_handle(stream), config, function
    )
    return lambda *arguments: start(*map(ctypes.c_int64, arguments))


# Contexts.

# The handles of the devices' contexts, which they have had since they were first asked for.
_contexts: dict[int, int] = {}
_NOTHING = contextlib.nullcontext()


def context(device: int) -> Any:
    """Return a context manager in which calls concern this device.

    Raises
    ------
    RuntimeError
        In a forked child.
    """
    error, current = binding.cuCtxGetCurrent()
    if error == NOT_INITIALIZED:
        _initialize()
    elif error == SUCCESS and int(current) == _contexts.get(device):
        return _NOTHING
    gpu = cuda.gpus[device]
    _contexts[device] = int(gpu.get_primary_context().handle)
    return gpu


def _initialize() -> None:
    """Initialize the driver, which only the child of a process that has done so cannot do."""
    if binding.cuInit(0)[0] == NOT_INITIALIZED:
        raise RuntimeError(
            "CUDA was initialised before the fork, and a forked process cannot use it: start"
            " processes with the method 'spawn'"
        )


def multiprocessors(device: int) -> int:
    """Return how many the device has."""
    return int(cuda.gpus[device].MULTIPROCESSOR_COUNT)


# Memory.


class Buffer:
    """Zeros on the current device, freed as soon as nothing refers to them.

    They come from the driver itself, which lets no one have them before all work on the
    device is done. numba-cuda frees its arrays in groups of ten, at any later time, and
    a memory manager that a user has given it may reuse them while a kernel is running.

    Attributes
    ----------
    address : int
        A multiple of 256.
    """

    def __init__(self, size: int) -> None:
        size = max(size, 1)
        try:
            place = driver.cuMemAlloc(size)
        except CudaAPIError as error:
            if error.code != binding.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
                raise
            with contextlib.suppress(AttributeError):  # some memory managers have no queue
                cuda.current_context().memory_manager.deallocations.clear()
            place = driver.cuMemAlloc(size)
        self.address = int(place)
        _free_with(self, binding.cuMemFree, place)
        driver.cuMemsetD8Async(self.address, 0, size, 0)
        driver.cuStreamSynchronize(0)


def pinned(columns: int, rows: int) -> npt.NDArray[np.float64]:
    """Return zeros, float64 or anything as wide, that device and host see at one address."""
    place = driver.cuMemHostAlloc(8 * columns * rows, 0)
    memory = (ctypes.c_double * (columns * rows)).from_address(int(place))
    _free_with(memory, binding.cuMemFreeHost, place)
    array: npt.NDArray[np.float64] = np.ctypeslib.as_array(memory).reshape(rows, columns)
    array[...] = 0.0
    return array


def _free_with(owner: Any, free: Callable[[Any], Any], resource: Any) -> None:
    """Free what is of the current context, memory or an event, when an object goes."""
    finalizer = weakref.finalize(owner, _free, free, resource, driver.cuCtxGetCurrent())
    finalizer.atexit = False  # the driver frees what is left


def _free(free: Callable[[Any], Any], resource: Any, current: Any) -> None:
    """Free it, in whatever thread this is, and while any library captures a graph."""
    # In a forked child, or when the context is gone, there is nothing to free.
    if binding.cuCtxPushCurrent(current)[0] == SUCCESS:
        with allowed_in_capture():
            free(resource)
        binding.cuCtxPopCurrent()


def copy(target: int, source: int, size: int, stream: int) -> None:
    """Copy bytes in the order of the stream, from and to the device or the host.

    Memory of the host must be pinned, and stay, or the copy be waited for.
    """
    driver.cuMemcpyAsync(target, source, size, stream)


def copy_now(device: int, target: int, source: int, size: int) -> None:
    """Copy bytes, once all work on a device is done; wait for them."""
    if size:
        with context(device):
            synchronize_all()
            copy(target, source, size, 0)
            synchronize(0)


def device_of(address: int) -> int:
    """Return the number of the device on which memory lies.

    Raises
    ------
    RuntimeError
        In a forked child.
    """
    attribute = binding.CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
    error, device = binding.cuPointerGetAttribute(attribute, address)
    if error == NOT_INITIALIZED:
        _initialize()
    if error != SUCCESS:
        device = driver.cuPointerGetAttribute(attribute, address)  # raises, if it must
    return int(device)


# Streams.


def synchronize(stream: int) -> None:
    """Wait until what has been started on a stream is done."""
    driver.cuStreamSynchronize(stream)


def synchronize_all() -> None:
    """Wait until all work on the current device is done."""
    driver.cuCtxSynchronize()


def is_capturing(stream: int) -> bool:
    """Whether what is started on the stream goes into a graph, to be run later.

    Raises
    ------
    RuntimeError
        If nothing can be started on it now.
    """
    error, status = binding.cuStreamIsCapturing(stream)  # asked in every step
    if error == binding.CUresult.CUDA_ERROR_STREAM_CAPTURE_IMPLICIT:
        raise RuntimeError(
            "a step on CUDA's default stream cannot be taken while a stream is captured that"
            " waits for it: take it before or after the capture, or on the captured stream"
        )
    if error != SUCCESS:
        status = driver.cuStreamIsCapturing(stream)  # raises
    return int(status) != int(binding.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_NONE)


@contextlib.contextmanager
def allowed_in_capture() -> Iterator[None]:
    """Allow this thread, while a stream is captured, what does not concern that stream."""
    relaxed = binding.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
    before = driver.cuThreadExchangeStreamCaptureMode(relaxed)
    try:
        yield
    finally:
        driver.cuThreadExchangeStreamCaptureMode(before)


@functools.cache
def side_stream(device: int) -> int:
    """Return a stream that waits for no other, the same one each time."""
    with context(device):
        flags = binding.CUstream_flags.CU_STREAM_NON_BLOCKING
        return int(driver.cuStreamCreate(int(flags)))


class Event:
    """A point in a stream, to be waited for."""

    def __init__(self) -> None:
        event = driver.cuEventCreate(int(binding.CUevent_flags.CU_EVENT_DISABLE_TIMING))
        self._event = int(event)
        _free_with(self, binding.cuEventDestroy, event)

    def record(self, stream: int) -> None:
        """Be the point after what has been started on the stream so far."""
        driver.cuEventRecord(self._event, stream)

    def recording(self, stream: int) -> Callable[[], object]:
        """Return a call that does so, and in which no signal is acted on."""
        return functools.partial(binding.cuEventRecord, self._event, stream)

    def block(self, stream: int) -> None:
        """Let what is started on another stream from now on wait for the point."""
        driver.cuStreamWaitEvent(stream, self._event, 0)

    def wait(self) -> None:
        """Wait until the point has been reached; at once if none has been recorded."""
        # To wait is refused, and spoils the graph, while any stream is captured.
        with allowed_in_capture():
            driver.cuEventSynchronize(self._event)
