"""Memory, streams and events of a CUDA device, by way of numba-cuda's driver."""

import functools
from typing import Any

from numba import cuda
from numba.cuda.cudadrv.driver import binding, driver

Address = int


@functools.lru_cache(maxsize=64)
def stream_object(handle: int) -> Any:
    """Return what numba-cuda calls a stream, for another library's handle."""
    return cuda.external_stream(handle) if handle else 0


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
    status = driver.cuStreamIsCapturing(stream)
    return int(status) != int(binding.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_NONE)


def side_stream() -> int:
    """Return a new stream that waits for no other."""
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

    def is_past(self) -> bool:
        """Whether the point has been reached."""
        return bool(self._event.query())

    def wait(self) -> None:
        """Wait until it has been."""
        self._event.synchronize()
