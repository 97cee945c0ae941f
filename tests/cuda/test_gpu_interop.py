"""The CUDA backend on a GPU with torch and CuPy: owners, streams and CUDA graphs.

Skipped where there is no GPU, and each test without the library that it needs.
"""

import gc
import os
import subprocess
import sys
import warnings
from pathlib import Path

import gpu_tools
import numpy as np
import pytest
from gpu_tools import MODES, Torch, Twins, attempt, bits, check_state, same_run, spin, spin_once

import fastadam
from fastadam import schedules

pytestmark = gpu_tools.needs_device()

SMALL = ((0,), (), (5,), (33, 9), [37], "F", (9_001,))
LIMITS = {"max_grad_norm": 0.5, "nonfinite": "skip"}


@pytest.fixture(params=["torch", "cupy"])
def lib(request):
    return gpu_tools.library(request.param)


@pytest.fixture
def torch():
    return gpu_tools.library("torch").torch


@pytest.fixture
def cupy():
    return gpu_tools.library("cupy").cupy


# Whose arrays.


@pytest.mark.parametrize("mode", MODES)
def test_same_bits(lib, mode):
    same_run(lib, ("f8", "f4"), mode, steps=60, every=20, shapes=SMALL)


def test_tensors_that_need_a_gradient(torch):
    lib = Torch(torch, requires_grad=True)
    same_run(lib, ("f4", "f8"), "everything", steps=30, every=10, shapes=SMALL)


@pytest.mark.parametrize("options", [{}, LIMITS], ids=["plain", "limits"])
def test_module_with_new_gradients_in_each_step(torch, options):
    """Fed with the gradients that torch computes, the CPU ends in the same bits."""
    torch.manual_seed(3)
    model = torch.nn.Sequential(
        torch.nn.Linear(17, 33), torch.nn.Tanh(), torch.nn.Linear(33, 5)
    ).cuda()
    params = list(model.parameters())
    twins = [param.detach().cpu().numpy().copy() for param in params]
    schedule = schedules.cosine(60)
    opt = fastadam.AdamW(params, schedule=schedule, **options)
    host = fastadam.AdamW(twins, schedule=schedule, **options)
    kept, places = [], set()
    for step in range(50):
        x = torch.randn(64, 17, device="cuda")
        y = model(x)
        (y[:, :4] if step % 4 else y).square().mean().backward()
        grads = [param.grad for param in params]
        if step % 7 == 6:
            grads[1] = None
        copies = [None if grad is None else grad.cpu().numpy() for grad in grads]
        found = opt.step(grads)
        assert repr(found) == repr(host.step(copies))
        places.add(params[0].grad.data_ptr())
        kept.append(params[0].grad if step % 3 == 0 else None)  # the next lies elsewhere
        model.zero_grad(set_to_none=True)
    assert len(places) > 1
    assert [bits(twin) for twin in twins] == [bits(p.detach().cpu().numpy()) for p in params]
    check_state(host, opt)


def test_a_moved_parameter_is_refused(torch):
    param = torch.nn.Parameter(torch.zeros(5, device="cuda"))
    grad = torch.ones(5, device="cuda")
    opt = fastadam.Adam([param])
    opt.step([grad])
    first = param.data
    before = first.clone()
    param.data = torch.zeros(5, device="cuda")
    with pytest.raises(ValueError, match=r"params\[0\] must keep the memory"):
        opt.step([grad])
    assert not param.any()
    assert torch.equal(first, before)
    assert opt.step_count == 1


def test_torch_refuses(torch):
    opt = fastadam.Adam([torch.zeros(4, 6, device="cuda")])
    grad = torch.ones(4, 6, device="cuda")
    opt.step([grad])
    with pytest.raises(TypeError, match="must be float32 or float64"):
        opt.step([grad.half()])
    with pytest.raises(ValueError, match="contiguous"):
        opt.step([torch.ones(4, 12, device="cuda")[:, ::2]])
    with pytest.raises(TypeError, match="CUDA device"):
        opt.step([grad.cpu()])
    with pytest.raises(ValueError, match="shape"):
        opt.step([torch.ones(24, device="cuda")])
    assert opt.step_count == 1


def test_two_devices(torch):
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    params = [torch.zeros(3, device=f"cuda:{k}") for k in range(2)]
    with pytest.raises(ValueError, match="on CUDA device 1"):
        fastadam.Adam(params)
    opt = fastadam.Adam(params[1:], lr=1.0)
    opt.step([torch.ones(3, device="cuda:1")])  # while device 0 is the current one
    assert bool((params[1] < 0).all())
    with pytest.raises(ValueError, match="on CUDA device 1"):
        opt.step([torch.ones(3, device="cuda:0")])


def test_dlpack(torch):
    """An array that has nothing else."""

    class Plain:
        def __init__(self, tensor):
            self.tensor = tensor

        def __dlpack__(self, **options):
            return self.tensor.__dlpack__(**options)

        def __dlpack_device__(self):
            return self.tensor.__dlpack_device__()

    param, grad = (torch.full((3, 5), value, device="cuda") for value in (2.0, 1.0))
    twin = np.full((3, 5), 2.0, "f4")
    opt, host = fastadam.Adam([Plain(param)], **LIMITS), fastadam.Adam([twin], **LIMITS)
    for _ in range(3):
        found = opt.step([Plain(grad)])
        assert repr(found) == repr(host.step([np.ones((3, 5), "f4")]))
    assert bits(param.cpu().numpy()) == bits(twin)


def test_own_arrays_are_taken_by_torch(torch):
    param = torch.zeros(3, 4, device="cuda")
    opt = fastadam.Adam({"w": param}, ema_decay=0.5, lr=1.0)
    grad = torch.as_tensor(opt.grads["w"], device="cuda")
    grad += 1
    opt.step()
    average = torch.as_tensor(opt.ema_params["w"], device="cuda")
    assert torch.equal(average, param / 2)
    assert bool((param < 0).all())
    opt.step(zero_grad=True)
    assert not grad.any()


def test_own_arrays_are_taken_by_cupy(cupy):
    param = cupy.zeros((3, 4))
    opt = fastadam.Adam({"w": param}, lr=1.0)
    cupy.asarray(opt.grads["w"]).fill(1.0)
    opt.step(zero_grad=True)
    assert bits(param.get()) == bits(np.full((3, 4), param.get()[0, 0]))
    assert param.get()[0, 0] < 0
    assert not cupy.asarray(opt.grads["w"]).get().any()


# Streams.


def on_stream(lib):
    """Return a stream that waits for no other, its handle, and how to work on it."""
    if isinstance(lib, Torch):
        stream = lib.torch.cuda.Stream()
        return stream, stream.cuda_stream, lambda: lib.torch.cuda.stream(stream)
    stream = lib.cupy.cuda.Stream(non_blocking=True)
    return stream, stream.ptr, lambda: stream


def copy_on_device(lib, target, source):
    """Copy in the order of the current stream."""
    if isinstance(lib, Torch):
        target.copy_(source)
    else:
        target.data.copy_from_device_async(source.data, source.nbytes)


@pytest.mark.parametrize("options", [{}, LIMITS], ids=["plain", "limits"])
def test_a_stream_in_use(lib, options):
    """What is late on the stream is waited for there, before and after the step."""
    rng = np.random.default_rng(1)
    start = rng.standard_normal(100_000).astype("f4")
    drawn = [rng.standard_normal(start.size).astype("f4") for _ in range(4)]
    param, grad, after = lib.put(start), lib.put(np.zeros_like(start)), lib.put(start)
    sources = [lib.put(array) for array in drawn]
    opt = fastadam.Adam([param], **options)
    twin = start.copy()
    host = fastadam.Adam([twin], **options)
    stream, handle, using = on_stream(lib)
    lib.synchronize()
    with using():
        opt.step([grad])  # compiles
    host.step([np.zeros_like(start)])
    spin_once()
    lib.synchronize()
    with using():
        for source, array in zip(sources, drawn, strict=True):
            spin(handle, 50)
            copy_on_device(lib, grad, source)
            found = opt.step([grad])
            copy_on_device(lib, after, param)
            expected = host.step([array])
    stream.synchronize()
    assert bits(lib.get(after)) == bits(twin)
    assert repr(found) == repr(expected)
    check_state(host, opt)


@pytest.mark.parametrize("late", ["params", "gradients"])
@pytest.mark.parametrize("owner", ["torch", "cupy"])
def test_gradients_of_another_library_on_another_stream(owner, late):
    """The step waits for the gradients; who writes to them next waits for the step."""
    lib, other = (gpu_tools.library(name) for name in ("torch", "cupy"))
    if owner == "cupy":
        lib, other = other, lib
    rng = np.random.default_rng(2)
    start = rng.standard_normal(100_000)
    drawn = [rng.standard_normal(start.size) for _ in range(3)]
    param, grad = lib.put(start), other.put(np.zeros_like(start))
    sources, garbage = [other.put(array) for array in drawn], other.put(np.full_like(start, 7.0))
    opt = fastadam.Adam([param], **LIMITS)
    twin = start.copy()
    host = fastadam.Adam([twin], **LIMITS)
    opt.step([grad])
    host.step([np.zeros_like(start)])
    spin_once()
    _, handle, using = on_stream(lib)
    _, other_handle, using_other = on_stream(other)
    lib.synchronize()
    with using(), using_other():
        for source, array in zip(sources, drawn, strict=True):
            spin(handle if late == "params" else other_handle, 50)
            copy_on_device(other, grad, source)
            opt.step([grad])
            copy_on_device(other, grad, garbage)
            host.step([array])
    lib.synchronize()
    assert bits(lib.get(param)) == bits(twin)
    check_state(host, opt)


def test_a_step_on_a_torch_stream_does_not_wait(torch):
    param, grad = (torch.ones(10_000, device="cuda") for _ in range(2))
    opt = fastadam.Adam([param], ema_decay=0.5, **LIMITS)
    assert not opt.step([grad]).skipped
    grads = [grad.clone() for _ in range(5)]
    spin_once()
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        opt.step([grad])
        spin(stream.cuda_stream, 2_000)
        past = stream.record_event()
        results = [opt.step([each]) for each in grads]
        assert not past.query()
    assert [result.step for result in results] == [2, 3, 4, 5, 6]
    assert past.query()


def test_torch_gradients_leak_nothing_over_10000_steps(torch):
    params = [torch.ones(n, device="cuda") for n in (1_000, 33)]
    opt = fastadam.Adam(params, **LIMITS)

    def steps(count):
        for _ in range(count):
            opt.step([torch.full_like(param, 0.5) for param in params])

    def memory():
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.mem_get_info()[0], torch.cuda.memory_allocated()

    steps(500)
    free, allocated = memory()
    steps(10_000)
    after = memory()
    assert free - after[0] <= 2**20
    assert after[1] <= allocated


# CUDA graphs.


def warm_up(torch, twins, host, opt, steps=3, **step_options):
    """Take steps on a side stream, as torch wants it before a capture."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(steps):
            twins.fill(twins.draw())
            host.step(twins.grads, **step_options)
            opt.step(twins.owned_grads, **step_options)
    torch.cuda.current_stream().wait_stream(side)


def capture(torch, opt, grads, **step_options):
    """Capture one step; return the graph and the result of whatever it has done last."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = opt.step(grads, **step_options)
    return graph, result


def both(twins, options):
    return fastadam.Adam(twins.params, **options), fastadam.Adam(twins.owners, **options)


@pytest.mark.parametrize("dtypes", [("f4",), ("f8",), ("f8", "f4")], ids="+".join)
@pytest.mark.parametrize("mode", [name for name in MODES if name != "raise"])
def test_graph(torch, mode, dtypes):
    """Captured once, replayed with other gradients, learning rates and scales."""
    options, step_options = MODES[mode]
    step_options = {"zero_grad": step_options.get("zero_grad", False)}
    twins = Twins(Torch(torch), dtypes, SMALL)
    host, opt = both(twins, options)
    warm_up(torch, twins, host, opt, **step_options)
    graph, result = capture(torch, opt, twins.owned_grads, **step_options)
    twins.check(host, opt)  # to capture a step is not to take it
    for step in range(20):
        drawn = twins.draw()
        if step % 6 == 4 and options.get("nonfinite") == "skip":
            drawn[-1][step] = np.nan
        twins.fill(drawn)
        host.lr = opt.lr = 0.01 / (step + 1)
        host.param_groups[0]["weight_decay"] = opt.param_groups[0]["weight_decay"] = 0.01 * step
        opt.prepare_replay(grad_scale=1.0 + step)
        graph.replay()
        expected = host.step(twins.grads, grad_scale=1.0 + step, **step_options)
        if step % 5 == 4:
            twins.check(host, opt)
            if expected.grad_norm is not None:
                found = (result.step, result.grad_norm, result.skipped)
                assert repr(found) == repr((expected.step, expected.grad_norm, expected.skipped))
    assert opt.step_count == host.step_count
    twins.check(host, opt)


def test_graph_without_a_change(torch):
    """Nothing need be prepared where nothing changes; replays may follow one another."""
    twins = Twins(Torch(torch), ("f4",), SMALL)
    host, opt = both(twins, LIMITS)
    warm_up(torch, twins, host, opt)
    graph, _ = capture(torch, opt, twins.owned_grads)
    for _ in range(50):
        graph.replay()
        host.step(twins.grads)
    twins.check(host, opt)


@pytest.mark.parametrize("options", [{}, {**LIMITS, "schedule": schedules.linear(90)}])
def test_graph_and_other_steps_mixed(torch, options):
    """Also after more messages than there is room for; and gradients elsewhere in between."""
    twins = Twins(Torch(torch), ("f4", "f8"), SMALL)
    host, opt = both(twins, options)
    warm_up(torch, twins, host, opt)
    for step in range(70):
        host.lr = opt.lr = 0.01 + 1e-4 * step
        host.step(twins.grads)
        opt.step(twins.owned_grads)
    host.lr = opt.lr = 0.5
    graph, _ = capture(torch, opt, twins.owned_grads)
    grads, owned = twins.make(twins.draw())
    for step in range(20):
        host.lr = opt.lr = 0.01 * (step + 1)
        if step % 3 == 1:
            assert repr(host.step(grads)) == repr(opt.step(owned))
        else:
            opt.prepare_replay()
            graph.replay()
            host.step(twins.grads)
        assert opt.step_count == host.step_count
    twins.check(host, opt)
    loaded = opt.state_dict()
    opt.load_state_dict(loaded)
    opt.prepare_replay()
    graph.replay()
    host.step(twins.grads)
    twins.check(host, opt)


def test_two_graphs(torch):
    """Two, of the same gradients; a third of others is refused."""
    twins = Twins(Torch(torch), ("f4",), SMALL)
    host, opt = both(twins, {"max_grad_norm": 0.5, "schedule": schedules.linear(60)})
    warm_up(torch, twins, host, opt)
    warm_up(torch, twins, host, opt, zero_grad=True)
    first, _ = capture(torch, opt, twins.owned_grads)
    second, _ = capture(torch, opt, twins.owned_grads, zero_grad=True)
    for step in range(10):
        twins.fill(twins.draw())
        opt.prepare_replay()
        (first, second)[step % 2].replay()
        host.step(twins.grads, zero_grad=step % 2 == 1)
    twins.check(host, opt)
    others = [grad.clone() for grad in twins.owned_grads]
    with pytest.raises(RuntimeError, match="gradients must lie, for every CUDA graph"):
        refused_capture(torch, opt, others)
    twins.check(host, opt)


def refused_capture(torch, opt, grads):
    scratch = torch.zeros(1, device="cuda")
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        scratch.add_(1)  # torch warns of an empty graph
        opt.step(grads)


def test_refused_in_a_graph(torch):
    twins = Twins(Torch(torch), ("f4",), SMALL)
    host, opt = both(twins, {"nonfinite": "raise"})
    with pytest.raises(RuntimeError, match="none captured"):
        opt.prepare_replay()
    warm_up(torch, twins, host, opt)
    with pytest.raises(RuntimeError, match="nonfinite='raise' waits for the device"):
        refused_capture(torch, opt, twins.owned_grads)
    twins.check(host, opt)
    opt.nonfinite = host.nonfinite = "skip"
    graph, _ = capture(torch, opt, twins.owned_grads)
    opt.nonfinite = "propagate"
    with pytest.raises(RuntimeError, match="must be on or off"):
        opt.prepare_replay()
    opt.nonfinite = "skip"
    opt.prepare_replay()
    graph.replay()
    host.step(twins.grads)
    twins.check(host, opt)


def test_graph_of_a_whole_iteration(torch):
    """Forward, backward and step in one graph; the CPU is fed the gradients it leaves."""
    torch.manual_seed(5)
    model = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.ReLU(), torch.nn.Linear(30, 1))
    model = model.cuda()
    params = list(model.parameters())
    x = torch.randn(32, 20, device="cuda")
    twins = [param.detach().cpu().numpy().copy() for param in params]
    options = {"max_grad_norm": 0.1, "weight_decay": 0.1}
    opt, host = fastadam.AdamW(params, **options), fastadam.AdamW(twins, **options)

    def feed():
        torch.cuda.synchronize()
        host.step([param.grad.cpu().numpy() for param in params])

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            model.zero_grad(set_to_none=True)
            model(x).square().mean().backward()
            opt.step([param.grad for param in params])
            feed()
    torch.cuda.current_stream().wait_stream(side)
    model.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model(x).square().mean().backward()
        opt.step([param.grad for param in params])
    for step in range(10):
        x.copy_(torch.randn_like(x))
        opt.lr = host.lr = 0.01 / (1 + step)
        opt.prepare_replay()
        graph.replay()
        feed()
    assert [bits(twin) for twin in twins] == [bits(p.detach().cpu().numpy()) for p in params]
    check_state(host, opt)


COMPILED_ONLY = """
import torch, fastadam
param, grad = torch.zeros(9, device="cuda"), torch.ones(9, device="cuda")
opt = fastadam.Adam([param], max_grad_norm=1.0)
fastadam.compile(opt)
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    opt.step([grad])
for _ in range(4):
    graph.replay()
print(opt.step_count, bool((param < 0).all()))
"""


@pytest.mark.usefixtures("torch")
def test_capture_after_compile_alone():
    """In a process of its own, where nothing has been launched before."""
    root = str(Path(fastadam.__file__).parents[1])
    run = subprocess.run(
        [sys.executable, "-c", COMPILED_ONLY],
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.stdout.split() == ["4", "True"], run.stdout + run.stderr


def test_no_warning_at_a_first_step(torch):
    """Numba-cuda warns of small grids unless told not to."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt = fastadam.Adam([torch.zeros(3, device="cuda")], amsgrad=True, ema_decay=0.5)
        opt.step([torch.ones(3, device="cuda")])
    assert attempt(opt, [torch.ones(3, device="cuda")], {}).step == 1
