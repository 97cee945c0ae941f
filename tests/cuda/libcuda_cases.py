"""numba-cuda and cuda.core themselves, on the libcuda of `libcuda_driver`.

`test_libcuda` runs this. Directly, with these folders on the path:
``python -m pytest -p libcuda_driver libcuda_cases.py``.
"""

import functools
import gc
import os

import pytest
from cuda.bindings import driver as binding
from cuda.core import Device
from gpu_tools import Numba, Twins
from libcuda_driver import DRIVER
from numba import cuda
from test_streams import in_a_thread, leaving

import fastadam

LIMITED = {"max_grad_norm": 1.0, "nonfinite": "skip"}


class OnStream(Numba):
    """numba-cuda's arrays on one of its streams."""

    def __init__(self, stream):
        super().__init__()
        self.stream = stream

    def put(self, array):
        return self.cuda.to_device(array, stream=self.stream)

    def fill(self, owner, array):
        owner.copy_to_device(array, stream=self.stream)

    def get(self, owner):
        return owner.copy_to_host(stream=self.stream)


def pair(lib, **options):
    twins = Twins(lib, ("f4",), ((5,), (700,)))
    return twins, *(fastadam.Adam(arrays, **options) for arrays in (twins.params, twins.owners))


@functools.cache
def core_stream():
    return Device().create_stream()


def step(twins, host, device):
    twins.fill(twins.draw())
    return repr(host.step(twins.grads)), device.step(twins.owned_grads)


@pytest.mark.parametrize(
    "make",
    [
        cuda.stream,
        cuda.default_stream,
        cuda.per_thread_default_stream,
        lambda: cuda.external_stream(int(core_stream().handle)),
    ],
    ids=["numba", "default", "each thread's", "cuda.core"],
)
@pytest.mark.parametrize("options", [{}, LIMITED], ids=["plain", "limited"])
def test_streams(make, options):
    Device().set_current()
    twins, host, device = pair(OnStream(make()), **options)
    for mine, theirs in [step(twins, host, device) for _ in range(3)]:
        assert mine == repr(theirs)
    twins.check(host, device)


def test_graph():
    stream = cuda.stream()
    handle = int(stream.handle)
    twins, host, device = pair(OnStream(stream), **LIMITED)
    device.step(twins.owned_grads)
    host.step(twins.grads)
    with cuda.gpus[0]:
        mode = binding.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_GLOBAL
        assert not binding.cuStreamBeginCapture(handle, mode)[0]
        result = device.step(twins.owned_grads)
        error, graph = binding.cuStreamEndCapture(handle)
        assert not error
        error, graph = binding.cuGraphInstantiate(graph, 0)
        assert not error
        for lr in (0.1, 0.2, 0.3):
            twins.fill(twins.draw())
            host.lr = device.lr = lr
            device.prepare_replay()
            assert not binding.cuGraphLaunch(graph, handle)[0]
            told = host.step(twins.grads)
            assert result.grad_norm == told.grad_norm
    twins.check(host, device)


def test_each_call_in_another_thread():
    """Also in one that has asked nothing of CUDA before."""
    twins = Twins(Numba(), ("f4",), ((70,),))
    host = fastadam.Adam(twins.params, **LIMITED)
    devices = [in_a_thread(lambda: fastadam.Adam(twins.owners, **LIMITED))]
    for _ in range(2):
        theirs = in_a_thread(lambda: devices[0].step(twins.owned_grads))
        assert in_a_thread(lambda told=theirs: repr(told)) == repr(host.step(twins.grads))
    in_a_thread(lambda: twins.check(host, devices[0]))
    gc.collect()
    taken = len(DRIVER.memory.sizes)
    in_a_thread(devices.clear)
    assert len(DRIVER.memory.sizes) < taken


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_is_told_so():
    twins, host, device = pair(Numba(), **LIMITED)
    told = step(twins, host, device)
    child = os.fork()
    if not child:
        with leaving(), pytest.raises(RuntimeError, match="CUDA was initialised before the fork"):
            device.step(twins.owned_grads)
    assert os.waitpid(child, 0)[1] == 0
    assert told[0] == repr(told[1])
    twins.check(host, device)


def test_arrays_that_numba_frees_late():
    """Gradients dropped after each step, before it is taken."""
    twins, host, device = pair(Numba(), **LIMITED)
    for _ in range(15):
        drawn = twins.draw()
        host.step(drawn)
        device.step(twins.make(drawn)[1])
    twins.check(host, device)
