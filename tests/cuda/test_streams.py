"""Streams, graphs, threads, forks and memory, with a driver whose streams do nothing in time.

fastadam's own calls of the driver are all made; only the driver itself is another.
"""

import contextlib
import gc
import os
import sys
import threading
import traceback

import numpy as np
import pytest

pytest.importorskip("numba_cuda", exc_type=ImportError)
pytest.importorskip("cuda.bindings.nvjitlink", exc_type=ImportError)

from numba import config

if config.ENABLE_CUDASIM:
    pytest.skip("the simulator has no driver", allow_module_level=True)

from gpu_tools import MODES, Twins, bits, check_state
from in_place import Array, Arrays, in_place
from lazy_driver import GLOBAL, RELAXED, Driver

import fastadam
from fastadam import schedules

LIMITED = {"max_grad_norm": 1.0, "nonfinite": "skip"}
# Options of the optimizer, and of its step.
OPTIONS = pytest.mark.parametrize(
    ("options", "also"),
    [({}, {}), (LIMITED, {}), (MODES["everything"][0], {"zero_grad": True})],
    ids=["plain", "limited", "everything"],
)


@pytest.fixture
def driver():
    libcuda = sys.modules.get("libcuda_driver")
    driver = libcuda.DRIVER if libcuda else Driver()
    with contextlib.nullcontext() if libcuda else in_place(driver):
        yield driver
    assert not driver.failures


@pytest.fixture
def lib(driver):
    """What makes arrays on a stream that waits for no other."""
    return Arrays(driver, Arrays(driver).call("cuStreamCreate", 1))


def pair(twins, **options):
    """Return an optimizer on the host, and one on the device."""
    return (fastadam.Adam(arrays, **options) for arrays in (twins.params, twins.owners))


def raw(owners):
    """What the device's memory holds at this moment, whoever is to write there."""
    return [bits(owner.array) for owner in owners]


# Nobody waits.


@OPTIONS
def test_a_step_does_not_wait(driver, lib, options, also):
    """No kernel has run when it returns; all have when a result is read."""
    twins = Twins(lib, ("f4", "f8"), ((5,), (700,)))
    lib.synchronize()
    host, device = pair(twins, **options)
    before = raw(twins.owners)
    # A schedule is asked for a number that the step before has to tell, if it may be skipped.
    ahead = 1 if "schedule" in options else 5
    told = [device.step(twins.owned_grads, **also) for _ in range(ahead)]
    assert driver.launched
    assert raw(twins.owners) == before
    for theirs in told:
        assert repr(host.step(twins.grads, **also)) == repr(theirs)
    twins.check(host, device)


def test_a_schedule_waits_for_the_step_before_alone(lib):
    """It may be skipped, and so decides what the schedule is asked for."""
    twins = Twins(lib, ("f4", "f8"), ((5,), (700,)))
    host, device = pair(twins, **LIMITED, schedule=schedules.cosine(9))
    lib.synchronize()
    for step in range(4):
        before = [bits(param) for param in twins.params]
        if step == 1:
            bad = twins.draw()
            bad[1][3] = np.nan
            twins.fill(bad)
            lib.synchronize()
        host.step(twins.grads)
        device.step(twins.owned_grads)
        assert raw(twins.owners) == before
        if step == 1:
            twins.fill(twins.draw())
    assert device.step_count == host.step_count == 3
    twins.check(host, device)


def test_nothing_that_is_on_its_way_is_overwritten(lib):
    """Hyperparameters, addresses and results, of more steps than there are slots for."""
    twins = Twins(lib, ("f4",), ((9,),))
    host, device = pair(twins, max_grad_norm=1.0)
    sets = [(twins.grads, twins.owned_grads), *(twins.make(twins.draw()) for _ in range(2))]
    told = []
    for step in range(80):
        host.lr = device.lr = 0.01 * (step + 1)
        mine, theirs = sets[step % 3]
        told.append((host.step(mine), device.step(theirs)))
    for mine, theirs in told:
        assert repr(mine) == repr(theirs)
    twins.check(host, device)


# Several streams.


@pytest.mark.parametrize("blocking", [0, 1], ids=["blocking", "not blocking"])
def test_gradients_of_another_stream(driver, lib, blocking):
    """They are waited for before the step; and who writes them next waits for the step."""
    other = Arrays(driver, lib.call("cuStreamCreate", 1 - blocking))
    start, grads = np.linspace(-1, 1, 300), np.random.default_rng(3).standard_normal((4, 300))
    param, grad = lib.put(start), other.put(np.zeros(300))
    host, device = fastadam.Adam([start]), fastadam.Adam([param])
    for values in grads:
        other.fill(grad, values)
        host.step([values])
        device.step([grad])
    other.fill(grad, np.full(300, np.nan))
    other.synchronize()
    assert bits(start) == bits(lib.get(param))


@pytest.mark.parametrize("named", [None, 1, 2], ids=["no stream", "default", "each thread's"])
def test_default_streams(driver, named):
    lib = Arrays(driver, named)
    twins = Twins(lib, ("f4",), ((40,),))
    host, device = pair(twins, **LIMITED)
    for _ in range(3):
        assert repr(host.step(twins.grads)) == repr(device.step(twins.owned_grads))
    twins.check(host, device)


def test_a_stream_is_asked_for_when_it_is_used(driver, lib):
    """An array that names no stream is of the default one: steps wait for what is done there."""
    start = np.linspace(-1, 1, 9)
    param, grad = lib.put(start), Array(lib.put(np.zeros(9)).array)
    host, device = fastadam.Adam([start]), fastadam.Adam([param])
    for k in range(3):
        Arrays(driver).fill(grad, np.full(9, k - 0.5))
        host.step([np.full(9, k - 0.5)])
        device.step([grad])
    assert bits(start) == bits(lib.get(param))


# Memory.


@OPTIONS
def test_memory_is_freed_when_an_optimizer_goes(driver, lib, options, also):
    """All of it, at once, in any thread; what is on its way is done before."""
    twins = Twins(lib, ("f4", "f8"), ((5,), (700,)))
    taken = set(driver.memory.sizes)
    host, device = pair(twins, **options)
    for _ in range(3):
        host.step(twins.grads, **also)
        device.step(twins.owned_grads, **also)
    assert set(driver.memory.sizes) > taken
    gone = [device]
    del device
    in_a_thread(gone.clear)
    assert set(driver.memory.sizes) == taken
    for mine, theirs in zip(twins.params, twins.owners, strict=True):
        assert bits(mine) == bits(lib.get(theirs))


def test_a_result_outlives_its_optimizer(driver, lib):
    taken = len(driver.memory.sizes) + 1
    grad = lib.put(np.full(4, 3.0, "f4"))
    result = fastadam.Adam([lib.put(np.ones(4, "f4"))], **LIMITED).step([grad])
    gc.collect()
    assert result.grad_norm == 6.0
    del result
    gc.collect()
    assert len(driver.memory.sizes) == taken + 1  # which is the parameter


# Threads.


def in_a_thread(call):
    """Return what a call returns in a thread of its own."""
    found = []

    def run():
        try:
            found.append((call(), None))
        except BaseException as error:
            found.append((None, error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    result, error = found[0]
    if error is not None:
        raise error
    return result


def test_each_call_in_another_thread(lib):
    twins = Twins(lib, ("f4", "f8"), ((5,), (70,)))
    options = {**LIMITED, "schedule": schedules.cosine(9)}
    host = fastadam.Adam(twins.params, **options)
    device = in_a_thread(lambda: fastadam.Adam(twins.owners, **options))
    for _ in range(3):
        mine, theirs = host.step(twins.grads), in_a_thread(lambda: device.step(twins.owned_grads))
        assert in_a_thread(lambda told=theirs: repr(told)) == repr(mine)
        assert in_a_thread(lambda: device.step_count) == host.step_count
    in_a_thread(lambda: twins.check(host, device))


def test_the_count_can_be_asked_for_while_steps_are_taken(lib):
    twins = Twins(lib, ("f4",), ((1,),))
    device, done = fastadam.Adam(twins.owners, nonfinite="skip"), threading.Event()
    counts = []

    def ask():
        while not done.is_set():
            counts.append(device.step_count)

    thread = threading.Thread(target=ask)
    thread.start()
    for _ in range(12):
        device.step(twins.owned_grads)
    done.set()
    thread.join()
    assert device.step_count == 12
    assert counts == sorted(counts)


def test_two_optimizers_in_two_threads(lib):
    sets = [Twins(lib, ("f4",), ((300,),), seed=seed) for seed in (1, 2)]
    pairs = [tuple(pair(twins, **LIMITED)) for twins in sets]
    fastadam.compile(pairs[0][1])  # that they may meet in a step, not in the compiler

    def run(k):
        for _ in range(8):
            pairs[k][1].step(sets[k].owned_grads)

    threads = [threading.Thread(target=run, args=(k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for twins, (host, device) in zip(sets, pairs, strict=True):
        for _ in range(8):
            host.step(twins.grads)
        twins.check(host, device)


# Forks.


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
# Other tests have left threads, of which Python and JAX warn.
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning", "ignore:.*fork:RuntimeWarning")
def test_a_forked_child_is_told_so(lib):
    """Whatever it asks; what it drops is not freed twice; the parent goes on."""
    twins = Twins(lib, ("f4",), ((9,),))
    host, device = pair(twins, **LIMITED)
    result = device.step(twins.owned_grads)
    calls = [lambda: device.step(twins.owned_grads), lambda: result.grad_norm, device.state_dict,
             lambda: fastadam.Adam(twins.owners)]  # fmt: skip
    child = os.fork()
    if not child:
        with leaving():
            for call in calls:
                with pytest.raises(RuntimeError, match="CUDA was initialised before the fork"):
                    call()
            calls.clear()
            del device, result, call
            gc.collect()
    assert os.waitpid(child, 0)[1] == 0
    assert repr(host.step(twins.grads)) == repr(result)
    host.step(twins.grads)
    device.step(twins.owned_grads)
    twins.check(host, device)


@contextlib.contextmanager
def leaving():
    """End a forked child: with 0, or with 1 and the traceback."""
    try:
        yield
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


# Graphs.


class Graph:
    """What is started on a stream while it is captured, to be replayed there."""

    def __init__(self, lib, mode=GLOBAL):
        self.lib, self.mode = lib, mode

    def __enter__(self):
        self.lib.call("cuStreamBeginCapture", self.lib.stream, self.mode)
        return self

    def __exit__(self, *_):
        graph = self.lib.call("cuStreamEndCapture", self.lib.stream)
        self.graph = self.lib.call("cuGraphInstantiate", graph, 0)

    def replay(self):
        self.lib.call("cuGraphLaunch", self.graph, self.lib.stream)


@pytest.mark.parametrize("mode", [GLOBAL, RELAXED], ids=["global", "relaxed"])
@OPTIONS
def test_graph(lib, options, also, mode):
    """It reads the hyperparameters of each replay; other steps may be taken in between."""
    twins = Twins(lib, ("f4", "f8"), ((5,), (700,)))
    host, device = pair(twins, **options)

    def eager_step(absent=()):
        twins.fill(twins.draw())
        mine, theirs = (
            [None if k in absent else grad for k, grad in enumerate(grads)]
            for grads in (twins.grads, twins.owned_grads)
        )
        assert repr(host.step(mine, **also)) == repr(device.step(theirs, **also))

    eager_step()
    with Graph(lib, mode) as graph:
        result = device.step(twins.owned_grads, **also)
    twins.check(host, device)  # which is not to take it
    for replay in range(5):
        drawn = twins.draw()
        if options and replay == 3:
            drawn[1][7] = np.nan
        twins.fill(drawn)
        if replay == 2:
            host.lr = device.lr = 0.5
        told = host.step(twins.grads, grad_scale=2.0, **also)
        device.prepare_replay(grad_scale=2.0)
        graph.replay()
        if replay % 2:  # the others are not waited for
            assert device.step_count == host.step_count
        if options and replay % 2:
            assert repr(result.grad_norm) == repr(told.grad_norm)
            assert (result.step, result.skipped) == (told.step, told.skipped)
        if replay == 1:
            eager_step(absent={1})
    twins.check(host, device)
    eager_step(absent={0})
    twins.check(host, device)


def test_a_graph_goes_on_after_a_first_step_was_captured(lib):
    """Nothing has been compiled, sent or allocated when the capture begins."""
    twins = Twins(lib, ("f4",), ((9,),))
    host, device = pair(twins)
    with Graph(lib) as graph:
        device.step(twins.owned_grads)
    for _ in range(3):
        host.step(twins.grads)
        device.prepare_replay()
        graph.replay()
    twins.check(host, device)


@pytest.mark.parametrize("options", [{}, LIMITED], ids=["plain", "limited"])
def test_what_a_capture_does_not_forbid(driver, lib, options):
    """Another optimizer may step on its own stream, tell what it has done, and be dropped."""
    other = Arrays(driver, lib.call("cuStreamCreate", 1))
    captured, free = Twins(lib, ("f4",), ((9,),)), Twins(other, ("f4",), ((9,),))
    device = fastadam.Adam(captured.owners)
    host, beside = pair(free, **options)
    told = [beside.step(free.owned_grads)]
    with Graph(lib):
        device.step(captured.owned_grads)
        told.append(beside.step(free.owned_grads))
        assert [repr(each) for each in told] == [repr(host.step(free.grads)) for _ in told]
        told.clear()
        del beside
        gc.collect()
    assert bits(free.params[0]) == bits(other.get(free.owners[0]))


def test_a_step_on_the_default_stream_beside_a_capture(driver):
    lib = Arrays(driver, Arrays(driver).call("cuStreamCreate", 0))
    twins, default = Twins(lib, ("f4",), ((9,),)), Twins(Arrays(driver), ("f4",), ((9,),))
    host, device = pair(default)
    lib.synchronize()
    with Graph(lib), pytest.raises(RuntimeError, match="cannot be taken while a stream is captur"):
        device.step(default.owned_grads)
    driver.failures.clear()
    host.step(default.grads)
    device.step(default.owned_grads)
    default.check(host, device)
    del twins


def test_what_a_graph_cannot_be(driver, lib):
    twins = Twins(lib, ("f4",), ((9,),))
    host, device = pair(twins, nonfinite="raise")
    with pytest.raises(RuntimeError, match="prepare_replay needs a step in a CUDA graph, got non"):
        device.prepare_replay()
    with pytest.raises(RuntimeError, match="needs parameters on a CUDA device, got NumPy arrays"):
        host.prepare_replay()

    def refused(grads, message):
        launched = len(driver.launched)
        with Graph(lib), pytest.raises(RuntimeError, match=message):
            device.step(grads)
        assert len(driver.launched) == launched

    refused(twins.owned_grads, "nonfinite='raise' waits for the device")
    device.nonfinite = host.nonfinite = "propagate"
    others = Twins(Arrays(driver, lib.call("cuStreamCreate", 1)), ("f4",), ((9,),)).owned_grads
    refused(
        others, "a step in a CUDA graph needs parameters and gradients whose libraries work on"
    )
    with Graph(lib) as graph:
        device.step(twins.owned_grads)
    refused(twins.make(twins.grads)[1], "gradients must lie, for every CUDA graph")
    device.max_grad_norm = 1.0
    with pytest.raises(RuntimeError, match="must be on or off as when the CUDA graph was captur"):
        device.prepare_replay()
    device.max_grad_norm = None
    assert device.step_count == 0
    device.prepare_replay()
    graph.replay()
    host.step(twins.grads)
    twins.check(host, device)


def test_a_graph_of_gradients_that_name_no_stream(lib):
    """Eager steps wait for the default stream, where they may be in use; a graph need not."""
    twins = Twins(lib, ("f4",), ((9,),))
    host, device = pair(twins)
    grads = [Array(owner.array) for owner in twins.owned_grads]
    with Graph(lib) as graph:
        device.step(grads)
    graph.replay()
    host.step(twins.grads)
    twins.check(host, device)


# What the driver here would not let pass.


def test_who_reads_too_early_is_found_out(driver, lib, monkeypatch):
    """These tests can fail: without waiting, the bits are others."""
    twins = Twins(lib, ("f4",), ((9,),))
    host, device = pair(twins)
    device.step(twins.owned_grads)
    host.step(twins.grads)
    monkeypatch.setattr(driver, "cuStreamSynchronize", lambda _: None)
    with pytest.raises(AssertionError):
        check_state(host, device)
