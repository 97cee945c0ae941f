"""Memory, streams and events of a CUDA device, by way of numba-cuda's driver."""

import contextlib
import ctypes
import functools
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from cuda.core import LaunchConfig, launch
from numba import cuda
from numba.cuda.cudadrv.driver import CudaAPIError, binding, driver

Address = int
SUCCESS = binding.CUresult.CUDA_SUCCESS
NOT_INITIALIZED = binding.CUresult.CUDA_ERROR_NOT_INITIALIZED


@functools.lru_cache(maxsize=64)
def stream_object(handle: int) -> Any:
    """Return what numba-cuda calls a stream, for another library's handle."""
    return cuda.external_stream(handle) if handle else 0


def load_kernel(compiled: Any) -> None:
    """Link a compiled kernel for the current device and load it there, if that is not done."""
    for kernel in compiled.overloads.values():
        kernel.bind()


def launcher(compiled: Any, blocks: int, threads: int, stream: int) -> Any:
    """Return what makes, of a kernel's int64 arguments, a call that starts it on this device."""
    with warnings.catch_warnings():  # of few blocks: if there is one, one is meant
        warnings.simplefilter("ignore")
        configured = compiled[blocks, threads, stream_object(stream)]
    try:
        # What numba-cuda comes to, once it has looked at the arguments' types: a third of
        # the time.
        (kernel,) = compiled.overloads.values()
        function = kernel._codelibrary.get_cufunc().kernel
        config = LaunchConfig(grid=configured.griddim, block=configured.blockdim)
        queue = configured.stream
    except (AttributeError, ValueError):  # in a version to come
        return functools.partial(functools.partial, configured)
    start = functools.partial(functools.partial, launch, queue, config, function)
    return lambda *arguments: start(*map(ctypes.c_int64, arguments))


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


class Buffer:
    """Bytes on the current device, freed as soon as nothing refers to them.

    They come from the driver itself, which lets no one have them before all work on the
    device is done. numba-cuda frees its arrays in groups of ten, at any later time, and
    a memory manager that a user has given it may reuse them while a kernel is running.
    """

    def __init__(self, size: int) -> None:
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


def allocate(size: int) -> Buffer:
    """Return a buffer of this many bytes on the current device."""
    return Buffer(max(size, 1))


def pinned(columns: int, rows: int) -> np.ndarray[Any, Any]:
    """Return zeros, float64 or anything as wide, that device and host see at one address."""
    place = driver.cuMemHostAlloc(8 * columns * rows, 0)
    memory = (ctypes.c_double * (columns * rows)).from_address(int(place))
    _free_with(memory, binding.cuMemFreeHost, place)
    array: np.ndarray[Any, Any] = np.ctypeslib.as_array(memory).reshape(rows, columns)
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
        with relaxed():
            free(resource)
        binding.cuCtxPopCurrent()


def address_of_buffer(buffer: Buffer) -> Address:
    """Return where a buffer of `allocate` lies."""
    return buffer.address


def clear(address: Address, size: int, stream: int) -> None:
    """Set bytes to 0, in the order of the stream."""
    driver.cuMemsetD8Async(address, 0, size, stream)


def copy(target: Address, source: Address, size: int, stream: int) -> None:
    """Copy bytes on the device, in the order of the stream."""
    driver.cuMemcpyDtoDAsync(target, source, size, stream)


def upload(target: Address, source: Address, size: int, stream: int) -> None:
    """Copy bytes to the device, in the order of the stream; the source must stay."""
    driver.cuMemcpyHtoDAsync(target, source, size, stream)


def download(target: Address, source: Address, size: int, stream: int) -> None:
    """Copy bytes to the host, in the order of the stream, and wait for them."""
    driver.cuMemcpyDtoHAsync(target, source, size, stream)
    driver.cuStreamSynchronize(stream)


def synchronize(stream: int) -> None:
    """Wait until what has been started on a stream is done."""
    driver.cuStreamSynchronize(stream)


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
def relaxed() -> Iterator[None]:
    """Allow this thread, while a stream is captured, what does not concern that stream."""
    mode = binding.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
    before = driver.cuThreadExchangeStreamCaptureMode(mode)
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


def device_of(address: Address) -> int:
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


def multiprocessors(device: int) -> int:
    """Return how many the device has."""
    return int(cuda.gpus[device].MULTIPROCESSOR_COUNT)


class Event:
    """A point in a stream, to be waited for."""

    def __init__(self) -> None:
        event = driver.cuEventCreate(int(binding.CUevent_flags.CU_EVENT_DISABLE_TIMING))
        self._event = int(event)
        _free_with(self, binding.cuEventDestroy, event)

    def record(self, stream: int) -> None:
        """Be the point after what has been started on the stream so far."""
        driver.cuEventRecord(self._event, stream)

    def hold(self, stream: int) -> None:
        """Let what is started on another stream from now on wait for the point."""
        driver.cuStreamWaitEvent(stream, self._event, 0)

    def recording(self, stream: int) -> Callable[[], object]:
        """Return a call that does so, and in which no signal is acted on."""
        return functools.partial(binding.cuEventRecord, self._event, stream)

    # To ask or to wait is refused, and spoils the graph, while any stream is captured.

    def is_past(self) -> bool:
        """Whether the point has been reached."""
        with relaxed():
            (error,) = binding.cuEventQuery(self._event)
            if error not in (SUCCESS, binding.CUresult.CUDA_ERROR_NOT_READY):
                driver.cuEventQuery(self._event)  # raises
        return bool(error == SUCCESS)

    def wait(self) -> None:
        """Wait until it has been."""
        with relaxed():
            driver.cuEventSynchronize(self._event)
