"""What the CUDA backend asks of the driver and of numba-cuda, with a driver that is a stub."""

import contextlib
import ctypes
import functools
import gc
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest

pytest.importorskip("numba_cuda", exc_type=ImportError)
pytest.importorskip("cuda.bindings.nvjitlink", exc_type=ImportError)

from fastadam.cuda import compiler, kernels
from fastadam.cuda.arrays import current_stream, stream_source, view

if compiler.SIMULATED:
    pytest.skip("the simulator has no driver", allow_module_level=True)

from cuda.bindings import driver as real
from numba.cuda.cudadrv import devicearray
from numba.cuda.cudadrv.driver import CudaAPIError, Stream

from fastadam.cuda import driver

RESULTS = real.CUresult
OK, NOT_INITIALIZED = RESULTS.CUDA_SUCCESS, RESULTS.CUDA_ERROR_NOT_INITIALIZED
OUT_OF_MEMORY = RESULTS.CUDA_ERROR_OUT_OF_MEMORY
RELAXED = real.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED


class Binding:
    """The functions of a driver: it notes each call, and answers as it is told to."""

    def __init__(self, **answers):
        self.calls, self.answers = [], answers

    def __getattr__(self, name):
        return functools.partial(self.call, name) if name.startswith("cu") else getattr(real, name)

    def call(self, name, *arguments):
        self.calls.append((name, *arguments))
        answer = self.answers.get(name, (OK, None))
        return answer(*arguments) if callable(answer) else answer

    def names(self):
        return [name for name, *_ in self.calls]


class Raising:
    """numba-cuda's driver: it raises what the other one returns as an error."""

    def __init__(self, binding):
        self.binding = binding

    def __getattr__(self, name):
        def call(*arguments):
            error, *values = getattr(self.binding, name)(*arguments)
            if error != OK:
                raise CudaAPIError(error, f"Call to {name} results in {error.name}")
            return values[0] if len(values) == 1 else tuple(values)

        return call


@pytest.fixture
def pretend(monkeypatch):
    """Return what puts another driver in the place of the real one."""

    def replace(**answers):
        binding = Binding(**answers)
        monkeypatch.setattr(driver, "binding", binding)
        monkeypatch.setattr(driver, "driver", Raising(binding))
        return binding

    return replace


@pytest.fixture
def gpu(monkeypatch):
    """A device of numba-cuda, the only one."""
    device = SimpleNamespace(get_primary_context=lambda: SimpleNamespace(handle=77))
    monkeypatch.setattr(driver, "cuda", SimpleNamespace(gpus=[device]))
    monkeypatch.setattr(driver, "_contexts", {})
    return device


# A driver that is not initialised.


def test_a_context_initialises_the_driver(pretend, gpu):
    """An empty array of another library is the first that CUDA hears of."""
    binding = pretend(cuCtxGetCurrent=(NOT_INITIALIZED, None))
    assert driver.context(0) is gpu
    assert binding.names() == ["cuCtxGetCurrent", "cuInit"]
    binding.answers["cuCtxGetCurrent"] = (OK, 77)
    assert driver.context(0) is not gpu  # which is in use already
    binding.answers["cuCtxGetCurrent"] = (OK, 78)
    assert driver.context(0) is gpu


def test_where_an_array_lies_initialises_the_driver(pretend):
    def device_of(*_):
        return (OK, 3) if "cuInit" in binding.names() else (NOT_INITIALIZED, None)

    binding = pretend(cuPointerGetAttribute=device_of)
    assert driver.device_of(4096) == 3
    binding.answers["cuPointerGetAttribute"] = (RESULTS.CUDA_ERROR_INVALID_VALUE, None)
    with pytest.raises(CudaAPIError, match="INVALID_VALUE"):
        driver.device_of(4096)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("call", [driver.context, driver.device_of])
def test_a_forked_child_is_told_so(pretend, call):
    refuse = (NOT_INITIALIZED, None)
    pretend(cuCtxGetCurrent=refuse, cuPointerGetAttribute=refuse, cuInit=(NOT_INITIALIZED,))
    with pytest.raises(RuntimeError, match=r"^CUDA was initialised before the fork, and a forked"):
        call(0)


# Memory.


def test_a_buffer_is_freed_as_soon_as_it_goes(pretend):
    """Not at any later time; in its own context, and whatever is being captured."""
    binding = pretend(
        cuMemAlloc=(OK, 4096), cuCtxGetCurrent=(OK, 77), cuThreadExchangeStreamCaptureMode=(OK, 5)
    )
    buffer = driver.Buffer(0)
    assert buffer.address == 4096
    assert binding.calls == [
        ("cuMemAlloc", 1),
        ("cuCtxGetCurrent",),
        ("cuMemsetD8Async", 4096, 0, 1, 0),
        ("cuStreamSynchronize", 0),
    ]
    binding.calls.clear()
    del buffer
    assert binding.calls == [
        ("cuCtxPushCurrent", 77),
        ("cuThreadExchangeStreamCaptureMode", RELAXED),
        ("cuMemFree", 4096),
        ("cuThreadExchangeStreamCaptureMode", 5),
        ("cuCtxPopCurrent",),
    ]


def test_pinned_memory_is_freed_with_its_last_view(pretend):
    memory = np.full(12, 7.0)
    binding = pretend(cuMemHostAlloc=(OK, memory.ctypes.data), cuCtxGetCurrent=(OK, 77))
    array = driver.pinned(4, 3)
    assert binding.calls[0] == ("cuMemHostAlloc", 96, 0)
    assert (array.shape, array.dtype) == ((3, 4), np.float64)
    row = array.view(np.int64)[1]
    row[2] = -1
    del array
    assert memory.tolist()[:6] + memory.tolist()[7:] == [0.0] * 11
    assert memory.view(np.int64)[6] == -1
    assert "cuMemFreeHost" not in binding.names()
    del row
    gc.collect()
    assert ("cuMemFreeHost", memory.ctypes.data) in binding.calls


def test_nothing_is_freed_without_the_context(pretend):
    """In a forked child, or when the context has been destroyed."""
    binding = pretend(cuMemAlloc=(OK, 4096), cuCtxGetCurrent=(OK, 77))
    buffer = driver.Buffer(5)
    binding.answers["cuCtxPushCurrent"] = (NOT_INITIALIZED,)
    binding.calls.clear()
    del buffer
    assert binding.names() == ["cuCtxPushCurrent"]


@pytest.mark.parametrize("has_queue", [True, False])
def test_what_numba_has_yet_to_free_makes_room(pretend, monkeypatch, has_queue):
    room = []
    manager = SimpleNamespace()
    if has_queue:
        manager.deallocations = SimpleNamespace(clear=lambda: room.append(True))
    context = SimpleNamespace(memory_manager=manager)
    monkeypatch.setattr(driver, "cuda", SimpleNamespace(current_context=lambda: context))
    pretend(
        cuMemAlloc=lambda _: (OK, 4096) if room else (OUT_OF_MEMORY, None), cuCtxGetCurrent=(OK, 7)
    )
    if has_queue:
        assert driver.Buffer(5).address == 4096
    else:
        with pytest.raises(CudaAPIError, match="OUT_OF_MEMORY"):
            driver.Buffer(5)


def test_events(pretend):
    binding = pretend(cuEventCreate=(OK, 64), cuCtxGetCurrent=(OK, 77))
    event = driver.Event()
    binding.calls.clear()
    event.record(5)
    event.block(6)
    event.recording(7)()
    event.wait()
    assert [call for call in binding.calls if call[0] != "cuThreadExchangeStreamCaptureMode"] == [
        ("cuEventRecord", 64, 5),
        ("cuStreamWaitEvent", 6, 64, 0),
        ("cuEventRecord", 64, 7),
        ("cuEventSynchronize", 64),
    ]
    binding.answers["cuEventSynchronize"] = (RESULTS.CUDA_ERROR_INVALID_CONTEXT,)
    with pytest.raises(CudaAPIError, match="INVALID_CONTEXT"):
        event.wait()
    del event
    assert ("cuEventDestroy", 64) in binding.calls


# Streams.


def test_whether_a_stream_is_captured(pretend):
    status = real.CUstreamCaptureStatus
    binding = pretend(cuStreamIsCapturing=(OK, status.CU_STREAM_CAPTURE_STATUS_NONE))
    assert not driver.is_capturing(5)
    binding.answers["cuStreamIsCapturing"] = (OK, status.CU_STREAM_CAPTURE_STATUS_ACTIVE)
    assert driver.is_capturing(5)
    binding.answers["cuStreamIsCapturing"] = (RESULTS.CUDA_ERROR_INVALID_CONTEXT, None)
    with pytest.raises(CudaAPIError, match="INVALID_CONTEXT"):
        driver.is_capturing(5)
    # The default stream's answer while a stream is captured that waits for it.
    binding.answers["cuStreamIsCapturing"] = (RESULTS.CUDA_ERROR_STREAM_CAPTURE_IMPLICIT, None)
    with pytest.raises(
        RuntimeError, match=r"^a step on CUDA's default stream cannot be taken whi"
    ):
        driver.is_capturing(0)


def numba_array(stream):
    """One of numba-cuda's arrays, at a place that nobody reads."""
    place = SimpleNamespace(device_ctypes_pointer=ctypes.c_void_p(4096))
    return devicearray.DeviceNDArray((3, 2), (8, 4), np.float32, stream=stream, gpu_data=place)


@pytest.mark.parametrize(("handle", "named"), [(None, None), (0, 0), (2, 2), (99, 99)])
def test_streams_of_numba_arrays(monkeypatch, handle, named):
    """Whatever the stream is, without a warning of numba-cuda's own."""
    monkeypatch.setattr(driver, "device_of", lambda _: 0)
    array = numba_array(0 if handle is None else Stream(real.CUstream(handle)))
    found = view(array, "params", writable=True)
    assert (found.address, found.shape, found.dtype, found.order) == (4096, (3, 2), "f4", "C")
    assert stream_source(found)() == named
    assert current_stream(found) == (named or 0)


# Several devices.


def test_each_device_has_its_kernels_loaded_before_a_step(pretend):
    """Not in the middle of a step: another kind of GPU needs a machine code of its own."""
    pretend(cuThreadExchangeStreamCaptureMode=(OK, 0))
    contexts = [mock.Mock(device=mock.Mock(id=k, compute_capability=(8 + k, 0))) for k in (0, 1)]
    kernel = compiler.Kernel(kernels.sum_squares, (kernels.SUM_THREADS, 4), FLOAT=np.float32)
    for k, expected in ((0, [1, 0]), (1, [1, 1]), (0, [1, 1])):
        device, current = ({"return_value": each} for each in (contexts[k].device, contexts[k]))
        with (
            mock.patch("numba.cuda.dispatcher.get_current_device", **device),
            mock.patch("numba.cuda.codegen.devices.get_context", **current),
            mock.patch("fastadam.cuda.driver.context", contextlib.nullcontext),
        ):
            kernel.load(k)
        assert [each.create_module_image.call_count for each in contexts] == expected
    codes = [each.create_module_image.call_args[0][0].code for each in contexts]
    assert codes[0] != codes[1]
