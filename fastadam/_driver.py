"""Memory, streams and events of a CUDA device, by way of numba-cuda's driver."""

import contextlib
import ctypes
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from cuda.core import LaunchConfig, launch
from numba import cuda
from numba.cuda.cudadrv.driver import binding, driver

Address = int


@functools.lru_cache(maxsize=64)
def stream_object(handle: int) -> Any:
    """Return what numba-cuda calls a stream, for another library's handle."""
    return cuda.external_stream(handle) if handle else 0


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
    """Return a context manager in which calls concern this device."""
    if int(binding.cuCtxGetCurrent()[1]) == _contexts.get(device):
        return _NOTHING
    gpu = cuda.gpus[device]
    _contexts[device] = int(gpu.get_primary_context().handle)
    return gpu


def address_of_buffer(buffer: Any) -> Address:
    """Return where a buffer of `allocate` lies."""
    return int(buffer.__cuda_array_interface__["data"][0] or 0)


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
    """Whether what is started on the stream goes into a graph, to be run later."""
    error, status = binding.cuStreamIsCapturing(stream)  # asked in every step
    if error != binding.CUresult.CUDA_SUCCESS:
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
    """Return the number of the device on which memory lies."""
    attribute = binding.CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
    return int(driver.cuPointerGetAttribute(attribute, address))


def multiprocessors(device: int) -> int:
    """Return how many the device has."""
    return int(cuda.gpus[device].MULTIPROCESSOR_COUNT)


class Event:
    """A point in a stream, to be waited for."""

    def __init__(self) -> None:
        self._event = cuda.event(timing=False)

    def record(self, stream: int) -> None:
        """Be the point after what has been started on the stream so far."""
        self._event.record(stream_object(stream))

    def hold(self, stream: int) -> None:
        """Let what is started on another stream from now on wait for the point."""
        self._event.wait(stream_object(stream))

    def recording(self, stream: int) -> Callable[[], object]:
        """Return a call that does so, and in which no signal is acted on."""
        return functools.partial(binding.cuEventRecord, int(self._event.handle), stream)

    def is_past(self) -> bool:
        """Whether the point has been reached."""
        return bool(self._event.query())

    def wait(self) -> None:
        """Wait until it has been."""
        self._event.synchronize()
