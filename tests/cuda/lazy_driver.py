"""A CUDA driver of our own, for tests without a GPU: its streams do nothing until someone waits.

So a test fails if memory is read, changed or freed too early, or if one stream does not wait
for another. Kernels are run by `ptx`. `in_place` puts such a driver below fastadam, and
`libcuda_driver` puts one below numba-cuda and all other libraries.
"""

import ctypes
import functools
import itertools
import os
import threading
from collections import deque

import numpy as np
from cuda.bindings import driver as real
from ptx_memory import KernelError, Memory

RESULTS = real.CUresult
GLOBAL = int(real.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_GLOBAL)
RELAXED = int(real.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED)
ORDINAL = int(real.CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL)
# Types of C, of what is not said to be a handle, an address or a size.
Handle, Int = ctypes.c_uint64, ctypes.c_int
# What can be asked while no device is in use.
ANYWHERE = (
    "cuInit", "cuCtx", "cuDevice", "cuDriver", "cuPointer", "cuThread", "cuGet", "cuLibrary",
    "cuMemFree", "cuEventQuery", "cuEventSynchronize", "cuEventDestroy",
)  # fmt: skip
# What no thread may do while a stream is captured, unless it is relaxed.
UNSAFE = {
    "cuMemAlloc", "cuMemFree", "cuMemHostAlloc", "cuMemFreeHost", "cuCtxSynchronize",
    "cuStreamSynchronize", "cuEventQuery", "cuEventSynchronize", "cuLibraryLoadData",
}  # fmt: skip
_numbers = itertools.count(1000)  # no real device has such a number


class Error(Exception):
    """An answer of the driver's other than success."""

    def __init__(self, name):
        super().__init__(name)
        self.code = getattr(RESULTS, f"CUDA_ERROR_{name}")


class Stream:
    """Work in order, and how much of it has been submitted and finished."""

    def __init__(self, *, blocking):
        self.blocking, self.queue, self.submitted, self.finished = blocking, deque(), 0, 0
        self.graph = self.mode = None

    def reach(self, count):
        """Do the work until so much is finished, and before it what it waits for."""
        while self.finished < count:
            run, after = self.queue.popleft()
            for other, point in after:
                other.reach(point)
            run()
            self.finished += 1


class Driver:
    """The functions of ``cuda.bindings.driver``: they return their result, or raise `Error`.

    Parameters
    ----------
    capability : tuple of int
        Of the one device there is.
    multiprocessors : int
        That it has.
    size : int
        Bytes of its memory.

    Attributes
    ----------
    failures : list of str
        What has been refused, other than an event that is not past: a test ends with none.
    launched : list of Program
        The kernels, in the order in which they were started.
    """

    def __init__(self, capability=(9, 0), multiprocessors=2, size=1 << 24):
        self.capability, self.multiprocessors = capability, multiprocessors
        self.number, self.memory = next(_numbers), Memory(size)
        self.handles = itertools.count(self.number << 32, 64)
        self.legacy = Stream(blocking=True)
        self.context, self.streams, self.events, self.graphs = next(self.handles), {}, {}, {}
        self.failures, self.launched = [], []
        self.process, self.local, self.lock = None, threading.local(), threading.RLock()

    def call(self, name, *arguments, prefix=""):
        """Return the error and the result of a function of this name."""
        try:
            if name == "cuInit":
                self.cuInit(*arguments)
            elif self.process != os.getpid():
                raise Error("NOT_INITIALIZED")
            if not name.startswith(ANYWHERE) and not self.current:
                raise Error("INVALID_CONTEXT")
            if name in UNSAFE and self._is_forbidden():
                raise Error("STREAM_CAPTURE_UNSUPPORTED")
            with self.lock:
                return RESULTS.CUDA_SUCCESS, getattr(self, prefix + name)(*arguments)
        except Error as error:
            if error.code != RESULTS.CUDA_ERROR_NOT_READY:
                self.failures.append(f"{name}: {error}")
            return error.code, None
        except Exception as error:
            self.failures.append(f"{name}: {error!r}")
            return RESULTS.CUDA_ERROR_UNKNOWN, None

    # Contexts, of which each thread has a stack.

    @property
    def current(self):
        return self.local.__dict__.setdefault("contexts", [])

    def cuInit(self, flags: Int):
        if self.process not in (None, os.getpid()):
            raise Error("NOT_INITIALIZED")
        self.process = os.getpid()

    def cuCtxGetCurrent(self) -> Handle:
        return self.current[-1] if self.current else 0

    def cuCtxPushCurrent(self, context):
        self.current.append(context)

    def cuCtxPopCurrent(self) -> Handle:
        return self.current.pop()

    def cuCtxSynchronize(self):
        for stream in [self.legacy, *self.streams.values()]:
            stream.reach(stream.submitted)

    def cuThreadExchangeStreamCaptureMode(self, mode: Int) -> Int:
        before, self.local.mode = getattr(self.local, "mode", GLOBAL), int(mode)
        return before

    def _is_forbidden(self):
        captured = any(stream.mode == GLOBAL for stream in self.streams.values())
        return captured and getattr(self.local, "mode", GLOBAL) != RELAXED

    # Memory.

    def cuMemAlloc(self, size) -> Handle:
        try:
            return self.memory.take(size)
        except MemoryError:
            raise Error("OUT_OF_MEMORY") from None

    def cuMemHostAlloc(self, size, flags: Int) -> Handle:
        return self.cuMemAlloc(size)

    def cuMemFree(self, address):
        self.cuCtxSynchronize()  # as a device does
        self.memory.free(address)

    cuMemFreeHost = cuMemFree

    def cuPointerGetAttribute(self, attribute: Int, address) -> Int:
        if address not in self.memory:
            raise Error("INVALID_VALUE")
        if int(attribute) != ORDINAL:
            raise NotImplementedError(attribute)
        return self.number

    def _move(self, target, source, size):
        for address in (target, source):
            if address in self.memory:
                self.memory.check(address, size)
        ctypes.memmove(target, source, size)

    def cuMemsetD8Async(self, address, value, size, stream):
        def fill():
            self.memory.check(address, size)
            self.memory.view(address, size, np.uint8)[...] = value

        self._submit(stream, fill)

    def cuMemcpyAsync(self, target, source, size, stream):
        """Copy, from and to wherever the addresses are."""
        if target in self.memory:
            self.cuMemcpyHtoDAsync(target, source, size, stream)
        else:
            self.cuMemcpyDtoHAsync(target, source, size, stream)

    def cuMemcpyDtoDAsync(self, target, source, size, stream):
        self._submit(stream, functools.partial(self._move, target, source, size))

    def cuMemcpyHtoDAsync(self, target, source, size, stream):
        """Read memory that is not pinned now, pinned memory as late as possible."""
        if source in self.memory:
            self.cuMemcpyDtoDAsync(target, source, size, stream)
            return
        if self._stream(stream).graph is not None:
            raise KernelError("memory that is not pinned, in a graph")
        copy = np.empty(size, np.uint8)
        ctypes.memmove(copy.ctypes.data, source, size)
        self._submit(stream, lambda: self._move(target, copy.ctypes.data, size))

    def cuMemcpyDtoHAsync(self, target, source, size, stream):
        self.cuMemcpyDtoDAsync(target, source, size, stream)
        if target not in self.memory:
            self.cuStreamSynchronize(stream)

    # Streams.

    def _stream(self, handle):
        """Return a stream; not the default one, while one that waits for it is captured."""
        if handle in (0, 1):
            if any(each.graph is not None and each.blocking for each in self.streams.values()):
                raise Error("STREAM_CAPTURE_IMPLICIT")
            return self.legacy
        if handle == 2:  # each thread's own
            handle = -threading.get_ident()
            self.streams.setdefault(handle, Stream(blocking=True))
        return self.streams[handle]

    def _submit(self, handle, run=lambda: None, after=()):
        """Queue work; the default stream waits for all blocking ones, and these for it."""
        stream = self._stream(handle)
        if stream.graph is not None:
            stream.graph.append(run)
            return None
        others = self.streams.values() if stream is self.legacy else [self.legacy]
        waits = [(each, each.submitted) for each in others if stream.blocking and each.blocking]
        stream.queue.append((run, [*waits, *after]))
        stream.submitted += 1
        return stream, stream.submitted

    def cuStreamCreate(self, flags: Int) -> Handle:
        handle = next(self.handles)
        self.streams[handle] = Stream(blocking=not flags & 1)
        return handle

    def cuStreamDestroy(self, stream):
        self.cuStreamSynchronize(stream)
        del self.streams[stream]

    def cuStreamSynchronize(self, stream):
        point = self._submit(stream)
        if point is None:
            raise Error("STREAM_CAPTURE_UNSUPPORTED")
        point[0].reach(point[1])

    def cuStreamWaitEvent(self, stream, event, flags: Int):
        if self.events[event] is None:
            raise NotImplementedError("a stream that joins a capture")
        self._submit(stream, after=[self.events[event]])

    # Events: a point is a stream, and how much of its work is finished; None is in a graph.

    def cuEventCreate(self, flags: Int) -> Handle:
        handle = next(self.handles)
        self.events[handle] = self.legacy, 0
        return handle

    def cuEventDestroy(self, event):
        del self.events[event]

    def cuEventRecord(self, event, stream):
        self.events[event] = self._submit(stream)

    def _point(self, event):
        if self.events[event] is None:
            raise Error("CAPTURED_EVENT")
        return self.events[event]

    def cuEventQuery(self, event):
        stream, count = self._point(event)
        if stream.finished < count:
            raise Error("NOT_READY")

    def cuEventSynchronize(self, event):
        stream, count = self._point(event)
        stream.reach(count)

    # Graphs: a list of work.

    def cuStreamIsCapturing(self, stream) -> Int:
        return int(self._stream(stream).graph is not None)

    def cuStreamBeginCapture(self, stream, mode: Int):
        self._stream(stream).graph, self._stream(stream).mode = [], mode

    def cuStreamEndCapture(self, stream) -> Handle:
        captured, handle = self.streams[stream], next(self.handles)
        self.graphs[handle], captured.graph, captured.mode = captured.graph, None, None
        return handle

    def cuGraphInstantiate(self, graph, flags: Int) -> Handle:
        return graph

    def cuGraphLaunch(self, graph, stream):
        for run in self.graphs[graph]:
            self._submit(stream, run)

    # Kernels.

    def launch(self, program, blocks, threads, arguments, stream):
        """Start one."""
        run = functools.partial(program.launch, self.memory, blocks, threads, arguments)
        with self.lock:
            self.launched.append(program)
            self._submit(stream, run)
