"""The CUDA backend on a GPU, with Numba's arrays: the CPU's bits, no leaks, no stray access.

Skipped where there is no GPU. `test_gpu_interop` goes on with other libraries' arrays.
"""

import gc
import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import gpu_tools
import numpy as np
import pytest
from gpu_tools import DTYPES, MODES, Twins, bits, check_state, same_run, spin, spin_once

import fastadam
from fastadam import schedules

pytestmark = gpu_tools.needs_device()

EVERYTHING = MODES["everything"][0]


@pytest.fixture
def lib():
    return gpu_tools.library("numba")


# The same bits as on the CPU.


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_same_bits_over_1000_steps(lib, mode, dtypes):
    same_run(lib, dtypes, mode, steps=1000, every=50)


@pytest.mark.parametrize("factor", [5e-324, 1e-300, 1e-170, 1e-140, 1e140, 1e170, 1e302])
@pytest.mark.parametrize("mode", ["measure", "clip", "everything"])
def test_same_bits_where_squares_are_scaled(lib, mode, factor):
    same_run(lib, ("f8",), mode, steps=30, every=10, factor=factor)


@pytest.mark.parametrize("factor", [1e-44, 1e-30, 1e20, 3e36])
@pytest.mark.parametrize("mode", ["measure", "clip", "everything"])
def test_same_bits_at_the_ends_of_float32(lib, mode, factor):
    same_run(lib, ("f8", "f4"), mode, steps=30, every=10, factor=factor)


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("mode", ["plain", "clip", "skip", "raise", "everything"])
def test_same_bits_with_nan_and_infinity(lib, mode, dtypes):
    same_run(lib, dtypes, mode, steps=30, every=5, bad={3, 4, 5, 11, 18, 29})


def test_thousands_of_arrays(lib):
    """More parts of a norm than are added at a time."""
    count = 8 * 1024 + 77
    rng = np.random.default_rng(3)
    start, total = rng.standard_normal(3 * count).astype("f4"), lib.put(np.zeros(3 * count, "f4"))
    lib.fill(total, start)
    grad = rng.standard_normal(3 * count).astype("f4")
    grads = lib.put(grad)
    cuts = [slice(3 * k, 3 * k + 3) for k in range(count)]
    host = fastadam.Adam([start[cut] for cut in cuts], max_grad_norm=0.5)
    device = fastadam.Adam([total[cut] for cut in cuts], max_grad_norm=0.5)
    for _ in range(3):
        found = device.step([grads[cut] for cut in cuts])
        assert repr(host.step([grad[cut] for cut in cuts])) == repr(found)
    assert bits(start) == bits(lib.get(total))
    check_state(host, device)


@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize("size", [8_191, 8_192, 8_193, 65_536, 65_537, 1_000_003, 9_000_001])
def test_sizes_around_chunks_and_parts(lib, size, dtype):
    mode = ({"max_grad_norm": 1.0, "ema_decay": 0.9}, {})
    same_run(lib, (dtype,), mode, steps=4, every=4, shapes=((size,), [size]))


def test_groups(lib):
    rng = np.random.default_rng(5)
    starts = [
        rng.standard_normal(n).astype(d) for n, d in ((300, "f4"), (41, "f8"), (9_000, "f4"))
    ]
    owners = [lib.put(start) for start in starts]

    def make(arrays):
        groups = [
            {"params": arrays[:1], "lr": 0.1, "weight_decay": 0.1},
            {"params": {"w": arrays[1]}, "maximize": True, "betas": (0.5, 0.6)},
        ]
        opt = fastadam.AdamW(groups, schedule=schedules.linear(30), max_grad_norm=1.0)
        opt.add_param_group({"params": arrays[2:], "eps": 1e-4})
        return opt

    host, device = make(starts), make(owners)
    for step in range(20):
        a, b, c = (rng.standard_normal(start.shape).astype(start.dtype) for start in starts)
        on_device = [lib.put(grad) for grad in (a, b, c)]
        host.param_groups[1]["lr"] = device.param_groups[1]["lr"] = 0.01 * step
        expected = host.step([[a], {"w": None if step % 3 else b}, [c]])
        found = device.step(
            [on_device[:1], {"w": None if step % 3 else on_device[1]}, on_device[2:]]
        )
        assert repr(expected) == repr(found)
    assert [bits(start) for start in starts] == [bits(lib.get(owner)) for owner in owners]
    check_state(host, device)


def test_own_grads_and_averages(lib):
    twins = Twins(lib, ("f4", "f8"))
    host = fastadam.Adam(twins.params, **EVERYTHING)
    device = fastadam.Adam(twins.owners, **EVERYTHING)
    for _ in range(5):
        for mine, theirs, drawn in zip(host.grads, device.grads, twins.draw(), strict=True):
            mine[...] = drawn
            theirs.copy_from_host(drawn)
        assert repr(host.step(zero_grad=True)) == repr(device.step(zero_grad=True))
    assert not any(grad.copy_to_host().any() for grad in device.grads)
    for mine, theirs in zip(host.ema_params, device.ema_params, strict=True):
        assert bits(mine) == bits(theirs.copy_to_host())
    twins.check(host, device)


@pytest.mark.parametrize("way", ["host to device", "device to host", "device to device"])
def test_state_moves(lib, way):
    """A run that goes on elsewhere has the bits of one that stays."""
    stays, goes = Twins(lib, ("f4", "f8")), Twins(lib, ("f4", "f8"))
    source, target = way.split(" to ")
    host = fastadam.Adam(stays.params, **EVERYTHING)
    old = fastadam.Adam(goes.params if source == "host" else goes.owners, **EVERYTHING)

    def step(opt, grads, drawn):
        stays.fill(drawn)
        goes.fill(drawn)
        assert repr(host.step(stays.grads)) == repr(opt.step(grads))

    for _ in range(5):
        step(old, goes.grads if source == "host" else goes.owned_grads, stays.draw())
    starts = goes.params if source == "host" else [lib.get(owner) for owner in goes.owners]
    arrays = [np.array(start, order="K") for start in starts]
    if target == "device":
        arrays = [lib.put(array) for array in arrays]
    new = fastadam.Adam(arrays, **EVERYTHING)
    new.load_state_dict(old.state_dict())
    for _ in range(5):
        step(new, goes.grads if target == "host" else goes.owned_grads, stays.draw())
    for mine, theirs in zip(stays.params, arrays, strict=True):
        assert bits(mine) == bits(lib.get(theirs) if target == "device" else theirs)
    check_state(host, new)


def test_state_dict_is_in_the_hosts_memory(lib):
    opt = fastadam.Adam([lib.put(np.zeros(3))], ema_decay=0.5)
    opt.step([lib.put(np.ones(3))])
    state = opt.state_dict()["state"][0]
    assert {type(value) for name, value in state.items() if name != "step"} == {np.ndarray}


# When the device is waited for.


def test_a_step_does_not_wait():
    """It returns while a kernel that was started before it is still at work."""
    from numba import cuda

    stream = cuda.stream()
    start = np.linspace(-1.0, 1.0, 10_000)
    param, grad = cuda.to_device(start, stream=stream), cuda.to_device(start, stream=stream)
    opt = fastadam.Adam([param], max_grad_norm=0.5, nonfinite="skip", ema_decay=0.5)
    twin = start.copy()
    host = fastadam.Adam([twin], max_grad_norm=0.5, nonfinite="skip", ema_decay=0.5)
    for _ in range(3):
        assert repr(opt.step([grad])) == repr(host.step([start]))
    spin_once()
    past = cuda.event(timing=False)
    spin(int(stream.handle), 2_000)
    past.record(stream)
    results = [opt.step([grad]) for _ in range(5)]
    assert not past.query()
    for result in results:
        assert repr(result) == repr(host.step([start]))
    assert past.query()
    assert bits(twin) == bits(param.copy_to_host(stream=stream))


def test_results_outlive_their_slots(lib):
    """Hundreds of them, none read before the last step."""
    twins = Twins(lib, ("f4",), shapes=((100,),))
    options = {"max_grad_norm": 0.5, "nonfinite": "skip"}
    host = fastadam.Adam(twins.params, **options)
    device = fastadam.Adam(twins.owners, **options)
    pairs = []
    for step in range(300):
        drawn = twins.draw()
        if step % 7 == 2:
            drawn[0][step % 100] = np.nan
        twins.fill(drawn)
        pairs.append((host.step(twins.grads), device.step(twins.owned_grads)))
    assert [repr(a) for a, _ in pairs] == [repr(b) for _, b in pairs]
    twins.check(host, device)


# Refused.


def test_arrays_on_the_host(lib):
    param = lib.put(np.zeros(3))
    opt = fastadam.Adam([param])
    with pytest.raises(TypeError, match=r"grads\[0\] must be an array on a CUDA device"):
        opt.step([np.ones(3)])
    with pytest.raises(ValueError, match="in the host's memory"):
        fastadam.Adam([param, np.zeros(3)])
    assert opt.step_count == 0
    assert not lib.get(param).any()


def test_overlap(lib):
    buffer = lib.put(np.zeros(10))
    with pytest.raises(ValueError, match="memory"):
        fastadam.Adam([buffer[:6], buffer[5:]])
    opt = fastadam.Adam([buffer[:5]])
    with pytest.raises(ValueError, match="memory"):
        opt.step([buffer[4:9]])


def test_gradients_that_do_not_fit(lib):
    opt = fastadam.Adam([lib.put(np.zeros((3, 4)))])
    opt.step([lib.put(np.ones((3, 4)))])
    with pytest.raises(TypeError, match="dtype"):
        opt.step([lib.put(np.ones((3, 4), "f4"))])
    with pytest.raises(ValueError, match="shape"):
        opt.step([lib.put(np.ones((4, 3)))])
    with pytest.raises(ValueError, match="Fortran order"):
        opt.step([lib.put(np.ones((3, 4), order="F"))])
    assert opt.step_count == 1


def test_two_devices(lib):
    from numba import cuda

    if len(cuda.gpus) < 2:
        pytest.skip("one CUDA device")
    arrays = []
    for gpu in range(2):
        with cuda.gpus[gpu]:
            arrays.append(lib.put(np.zeros(3)))
    with pytest.raises(ValueError, match="on CUDA device 1"):
        fastadam.Adam(arrays)
    opt = fastadam.Adam(arrays[1:])
    with pytest.raises(ValueError, match="on CUDA device 1, as its parameter is, got device 0"):
        opt.step(arrays[:1])


# Leaks and stray accesses.


def memory():
    """Return bytes free on the device and pages that this process has in memory."""
    from numba import cuda

    gc.collect()
    cuda.synchronize()
    context = cuda.current_context()
    context.deallocations.clear()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return context.get_memory_info().free, pages * os.sysconf("SC_PAGESIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is not told here")
def test_nothing_leaks_over_10000_steps(lib):
    """Gradients change, results are dropped or kept a while, hyperparameters move."""
    twins = Twins(lib, ("f4", "f8"))
    opt = fastadam.Adam(twins.owners, **EVERYTHING)
    sets = [twins.owned_grads, twins.make(twins.draw())[1]]
    kept = []

    def steps(count):
        for step in range(count):
            grads = sets[step % 2]
            if step % 10 == 0:
                grads = twins.make(twins.params)[1]  # of new arrays
            opt.lr = 1e-3 + 1e-6 * (step % 100)
            kept.append(opt.step(grads, zero_grad=step % 3 == 0))
            del kept[:-20]

    steps(1_000)
    free, resident = memory()
    steps(10_000)
    after = memory()
    assert free - after[0] <= 2**20
    assert after[1] - resident <= 8 * 2**20


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is not told here")
def test_optimizers_leave_nothing_behind(lib):
    twins = Twins(lib, ("f4",), shapes=((1_000_000,),))

    def make():
        opt = fastadam.Adam(twins.owners, **EVERYTHING)
        opt.step(twins.owned_grads)
        return opt.step_count

    assert [make() for _ in range(5)] == [1] * 5
    free = memory()[0]
    for _ in range(50):
        make()
    assert free - memory()[0] <= 8 * 2**20


def sanitizer():
    """Return where compute-sanitizer is, if anywhere."""
    folders = [os.environ.get("CUDA_HOME", "/usr/local/cuda"), "/usr/local/cuda"]
    path = os.pathsep.join([os.environ.get("PATH", ""), *(f"{each}/bin" for each in folders)])
    return shutil.which("compute-sanitizer", path=path)


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_sanitizer(tool):
    """No access out of bounds or misaligned, and no race, in any kernel."""
    found = sanitizer()
    if found is None:
        pytest.skip("no compute-sanitizer")
    root = Path(fastadam.__file__).parents[1]
    command = [found, "--tool", tool, "--error-exitcode", "9"]
    if tool == "memcheck":  # what the libraries ask the driver, and are denied, is no access
        command += ["--report-api-errors", "no"]
    run = subprocess.run(
        [*command, sys.executable, gpu_tools.__file__],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root / "tests")])},
        capture_output=True,
        text=True,
        timeout=540,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-5_000:] + run.stderr[-5_000:]
    assert "the same bits" in run.stdout


# Compiling.


def test_compile_leaves_nothing_to_compile(lib, monkeypatch):
    twins = Twins(lib, ("f8", "f4"), shapes=((7,), (9,)))
    opt = fastadam.Adam(twins.owners, **EVERYTHING)
    told = []
    fastadam.compile(opt, progress=lambda done, total: told.append((done, total)))
    assert told
    assert told[-1][0] == told[-1][1]
    from numba import cuda

    monkeypatch.setattr(cuda, "jit", None)
    for zero_grad, _ in itertools.product((False, True), range(2)):
        opt.step(twins.owned_grads, zero_grad=zero_grad)
    assert opt.step_count == 4
