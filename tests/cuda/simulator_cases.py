"""The CUDA backend in Numba's CUDA simulator: `test_simulator.py` runs this in a process.

Directly: ``NUMBA_ENABLE_CUDASIM=1 python -m pytest tests/cuda/simulator_cases.py``.

The simulator rounds as a device does, so every bit is to be the CPU backend's. A block of its
threads is slow to start, and more so where they wait for each other: norms are taken of few.
"""

import _thread
import copy
import functools
import gc
import json
import math
import pickle
import signal
import sys
import types
import weakref
from itertools import cycle

import numpy as np
import pytest
from device_arrays import InterfaceArray, Slotted, Tensor, placed, pretend_torch
from numba import config
from oracle import Reference, clip_coefficient, global_norm

import fastadam
from fastadam import StepResult, functional
from fastadam.cuda import backend, compiler, kernels, results, stepper
from fastadam.cuda.arrays import DeviceArray, current_stream, view
from fastadam.cuda.compiler import cuda, intrinsics

assert config.ENABLE_CUDASIM, "NUMBA_ENABLE_CUDASIM=1 must be set"

FULL = {"amsgrad": True, "ema_decay": 0.75, "weight_decay": 0.1}
DTYPES = pytest.mark.parametrize("dtype", ["f4", "f8"])
KINDS = pytest.mark.parametrize("dtypes", [("f4",), ("f8",), ("f8", "f4")], ids="+".join)
# In elements: none of them, with that of its gradient, always a multiple of 16 bytes.
PARAM_OFFSETS, GRAD_OFFSETS = (0, 1, 2, 3, 0), (0, 0, 0, 3, 1, 2, 0)
LARGEST = {"f4": float(np.finfo("f4").max), "f8": float(np.finfo("f8").max)}


@pytest.fixture(autouse=True)
def few_blocks(monkeypatch):
    """A chunk is to be shared by 2 blocks, which are slow to start, not by 8."""
    monkeypatch.setattr(stepper, "MOST_HALVINGS", 1)


@pytest.fixture(params=[InterfaceArray, Tensor, Slotted], ids=lambda kind: kind.__name__)
def wrap(request, monkeypatch):
    if request.param is Tensor:
        pretend_torch(monkeypatch)
    return request.param


def each(function, tree):
    """Apply to every array of a container, or of groups."""
    if isinstance(tree, np.ndarray):
        return function(tree)
    if isinstance(tree, dict):
        return {name: each(function, value) for name, value in tree.items()}
    return [each(function, part) for part in tree] if isinstance(tree, list) else tree


def leaves(tree):
    found = []
    each(found.append, tree)
    return found


def bits(array):
    """The bytes; all NaN alike, whose sign and payload no two processors agree on."""
    array = np.array(array)
    array[np.isnan(array)] = np.nan
    return array.shape, array.dtype, array.tobytes(order="A")


def check_same(ours, theirs):
    for k, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert bits(a) == bits(b), f"array {k}: {a.ravel()[:8]}, not {b.ravel()[:8]}"


def check_same_state(ours, theirs):
    assert list(ours["state"]) == list(theirs["state"])
    assert ours["step_count"] == theirs["step_count"]
    assert ours["param_groups"] == theirs["param_groups"]
    for key, own in ours["state"].items():
        other = theirs["state"][key]
        assert list(own) == list(other)
        assert own["step"] == other["step"]
        names = [name for name in own if name != "step"]
        check_same([own[name] for name in names], [other[name] for name in names])
        assert all(own[n].flags.f_contiguous == other[n].flags.f_contiguous for n in names)


def attempt(call, *args, **options):
    """What became of a call, to be compared."""
    try:
        return repr(call(*args, **options))
    except FloatingPointError as error:
        return repr(error)


class Twins:
    """An optimizer over NumPy arrays and one over a device's; what is done to one, to both."""

    def __init__(self, params, wrap=InterfaceArray, offsets=(0,), cls=fastadam.Adam, **options):
        self.wrap, self.offsets = wrap, cycle(offsets)
        self.grad_offsets = cycle(GRAD_OFFSETS if len(offsets) > 1 else (0,))
        self.host = each(placed, params)
        self.device = each(lambda a: placed(a, next(self.offsets) * a.itemsize), params)
        self.cpu = cls(self.host, **options)
        self.cuda = cls(each(wrap, self.device), **options)

    def add_param_group(self, group):
        host, device = each(placed, group), each(placed, group)
        self.cpu.add_param_group(host)
        self.cuda.add_param_group(each(self.wrap, device))
        self.host, self.device = [self.host, host], [self.device, device]

    def step(self, grads, **options):
        """Take a step, and compare all that it has written and told."""
        host = each(placed, grads)
        device = each(lambda a: placed(a, next(self.grad_offsets) * a.itemsize), grads)
        told = attempt(self.cpu.step, host, **options)
        assert attempt(self.cuda.step, each(self.wrap, device), **options) == told
        check_same(leaves(self.device), leaves(self.host))
        check_same(leaves(device), leaves(host))
        return told

    def check(self):
        check_same_state(self.cuda.state_dict(), self.cpu.state_dict())


def draws(rng, shapes, dtypes=("f4",)):
    arrays = []
    for k, shape in enumerate(shapes):
        array = np.asarray(rng.standard_normal(shape), dtypes[k % len(dtypes)])
        arrays.append(array)
    return arrays


def like(rng, params):
    """Gradients for these, of the same memory order."""
    found = [np.asarray(rng.standard_normal(p.shape), p.dtype) for p in params]
    return [
        g if p.flags.c_contiguous else np.asfortranarray(g)
        for g, p in zip(found, params, strict=True)
    ]


# Lists of arrays, by `fastadam.functional`.


class Lists:
    """Lists over NumPy arrays and over a device's; what is done to one, to both."""

    def __init__(self, params, wrap=InterfaceArray):
        zeros = [np.zeros_like(p) for p in params]
        start = [params, *([placed(z) for z in zeros] for _ in range(3)), params]
        self.wrap, self.steps = wrap, [np.zeros(len(params), np.int64) for _ in range(2)]
        self.host, self.device = ([[placed(a) for a in some] for some in start] for _ in range(2))

    def step(self, grads, **options):
        options = {"ema_decay": 0.75, **options}
        told = []
        both = []
        for lists, wrap, steps in zip(
            (self.host, self.device), (lambda a: a, self.wrap), self.steps, strict=True
        ):
            own = [None if g is None else placed(g) for g in grads]
            wrapped = [[None if a is None else wrap(a) for a in some] for some in (own, *lists)]
            given = [wrapped[1], wrapped[0], *wrapped[2:]]
            told.append(attempt(functional.adam, *given, steps=steps, **options))
            both.append(own)
        assert told[0] == told[1]
        for ours, theirs in zip((*self.device, both[1]), (*self.host, both[0]), strict=True):
            check_same([a for a in ours if a is not None], [a for a in theirs if a is not None])
        assert [*self.steps[0]] == [*self.steps[1]]
        return told[0]


@pytest.mark.parametrize("dtypes", [("f4",), ("f8", "f4")], ids="+".join)
def test_lists(rng, dtypes, wrap):
    params = draws(rng, [(3, 7), (4, 5), (), (0, 3)], dtypes)
    params[1] = np.asfortranarray(params[1])
    lists = Lists(params, wrap)
    functional._tables.clear()
    for step in range(4):
        grads = like(rng, params)
        if step == 1:
            grads[0] = grads[2] = None
        lists.step(grads, lr=0.1 * step, grad_scale=1.5, zero_grad=step == 2)
    assert len(functional._tables) == 2  # made once for each side
    # Counts that are written, hyperparameters for each.
    for steps in lists.steps:
        steps[...] = [7, 0, 2, 2]
    lrs = [0.1, 0.2, 0.3, 0.4]
    lists.step(like(rng, params), lr=lrs, weight_decay=[0.1, 0.0, 0.2, 0.0])
    assert lists.steps[1].tolist() == [8, 1, 3, 3]


@pytest.mark.parametrize("nonfinite", ["propagate", "skip", "raise"])
def test_lists_with_norms(rng, nonfinite):
    params = draws(rng, [(5,), (3,)])
    lists = Lists(params)
    for step in range(4):
        grads = like(rng, params)
        if step == 2:
            grads[1][1] = np.inf
        told = lists.step(grads, max_grad_norm=1.0, nonfinite=nonfinite, weight_decay=0.1)
        if nonfinite == "raise" and step == 2:
            assert "grads[1] must be finite" in told
    assert lists.steps[1].tolist() == [4 - (nonfinite != "propagate")] * 2


def test_counts_of_lists_may_be_floats_as_torch_keeps_them(rng):
    """On the host; hyperparameters by group beside them."""
    params = draws(rng, [(5,), (3,), (4,)])
    lists = Lists(params)
    lists.steps = [[np.array(n, "f4") for n in (7, 0, 2**24)] for _ in range(2)]
    for step in range(3):
        grads = like(rng, params)
        if step == 1:
            grads[1] = None
        lists.step(grads, lr=[0.1 * step, 0.2], groups=[1, 0, 1])
        lists.step(like(rng, params), max_grad_norm=0.5)
    for steps in lists.steps:
        assert [int(n) for n in steps] == [13, 5, 2**24]


def test_the_hosts_threads_have_no_part(rng):
    params = draws(rng, [(5,)])
    twins = Twins(params, num_threads=1)
    assert (twins.cpu.num_threads, twins.cuda.num_threads) == (1, None)
    twins.cuda.num_threads = 2
    assert twins.cuda.num_threads is None
    with pytest.raises(ValueError, match="num_threads must be >= 1, got 0"):
        twins.cuda.num_threads = 0
    Lists(params).step(like(rng, params), num_threads=1)


def test_lists_keep_nothing_and_check_everything(monkeypatch):
    pretend_torch(monkeypatch)
    functional._tables.clear()
    param, grad, exp_avg, exp_avg_sq = (Tensor(placed(np.ones(5, "f4"))) for _ in range(4))
    steps = np.zeros(1, np.int64)
    functional.adam([param], [grad], [exp_avg], [exp_avg_sq], steps=steps)
    param.move()  # found by its address
    functional.adam([param], [grad], [exp_avg], [exp_avg_sq], steps=steps)
    assert steps[0] == 2
    assert len(functional._tables) == 2
    before = bits(param.array)
    for state, error, message in [
        (np.ones(4, "f4"), ValueError, r"exp_avgs\[0\]\.shape must be its parameter's"),
        (np.ones(5, "f8"), TypeError, r"exp_avgs\[0\]\.dtype must be its parameter's"),
        (exp_avg_sq.array, ValueError, r"exp_avgs\[0\] and exp_avg_sqs\[0\] must not share mem"),
        (param.array, ValueError, r"params\[0\] and exp_avgs\[0\] must not share memory"),
    ]:
        with pytest.raises(error, match=message):
            functional.adam([param], [grad], [Tensor(state)], [exp_avg_sq], steps=steps)
    with pytest.raises(ValueError, match=r"grads\[0\] must not share memory with exp_avgs\[0\]"):
        functional.adam([param], [exp_avg], [exp_avg], [exp_avg_sq], steps=steps)
    assert bits(param.array) == before
    assert steps[0] == 2
    arrays = [weakref.ref(each) for each in (param, grad, exp_avg, exp_avg_sq)]
    del param, grad, exp_avg, exp_avg_sq, state
    gc.collect()
    assert not any(each() is not None for each in arrays)


# The update: sizes, alignments, options.


@pytest.mark.parametrize(
    ("dtypes", "options"),
    [
        (("f4",), {}),
        (("f4",), FULL),
        (("f8",), FULL),
        (("f8", "f4"), {"decoupled_weight_decay": True, **FULL}),
    ],
    ids=["plain", "full", "double", "mixed"],
)
def test_sizes_0_to_300(rng, dtypes, options):
    """Hundreds of tensors at once, most of which begin anywhere."""
    params = draws(rng, range(301), dtypes)
    references = [Reference(p, **options) for p in params]
    twins = Twins(params, offsets=PARAM_OFFSETS, **options)
    for step in range(2):
        grads = like(rng, params)
        twins.step(grads, zero_grad=step == 1)
        for reference, grad in zip(references, grads, strict=True):
            reference.step(grad)
    twins.check()
    for param, reference in zip(twins.device, references, strict=True):
        rtol = 1e-4 if param.dtype == np.float32 else 1e-12
        np.testing.assert_allclose(param, reference.param, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("offset", [0, 4, 8, 12])
@DTYPES
def test_alignments(rng, dtype, offset):
    """Gradients at every place in 16 bytes, for parameters at one."""
    sizes = [n for n in (1, 3, 4, 5, 31, 33, 64) for _ in range(4)]
    params = draws(rng, sizes, (dtype,))
    device = [placed(p, offset // 4 * p.itemsize) for p in params]
    opt, cpu = fastadam.Adam(each(InterfaceArray, device)), fastadam.Adam(params)
    grads = like(rng, params)
    moved = [placed(g, k % 4 * g.itemsize) for k, g in enumerate(grads)]
    opt.step(each(InterfaceArray, moved))
    cpu.step(grads)
    check_same(device, params)
    check_same_state(opt.state_dict(), cpu.state_dict())


@pytest.mark.parametrize(
    "options",
    [
        {"amsgrad": True},
        {"ema_decay": 0.5},
        {"weight_decay": 0.1},
        {"weight_decay": 0.1, "decoupled_weight_decay": True},
        {"maximize": True, "lr": 0.1, "eps": 0.0},
        {"betas": (0.0, 0.0)},
        {"betas": (0.0, 0.999), "schedule": fastadam.schedules.cosine(5)},
        {"lr": 0.0},
    ],
    ids=lambda options: "+".join(options),
)
def test_options(rng, options):
    run_shapes(rng, ("f8", "f4"), InterfaceArray, options)


@KINDS
def test_kinds_of_array(rng, dtypes, wrap):
    run_shapes(rng, dtypes, wrap, FULL)


def run_shapes(rng, dtypes, wrap, options):
    """Over C and Fortran order, no dimension and none of any length, with gradients of None."""
    params = draws(rng, [(3, 7), (4, 5), (), (0, 3), (2, 3, 4)], dtypes)
    params[1] = np.asfortranarray(params[1])
    params[4] = np.asfortranarray(params[4])
    twins = Twins(params, wrap, **options)
    for step in range(3):
        grads = like(rng, params)
        if step == 1:
            grads[0] = grads[2] = None
        twins.step(grads, grad_scale=1.5, zero_grad=step == 2)
    twins.check()
    assert [state["step"] for state in twins.cuda.state.values()] == [2, 3, 2, 3, 3]


@pytest.mark.parametrize("halvings", range(4))
@DTYPES
def test_chunks_halved_give_the_same_bits(rng, monkeypatch, dtype, halvings):
    """Several blocks share a chunk, some of which then have nothing to do."""
    sizes = (1, 1023, 1025, 2049, 4099) if dtype == "f4" else (1, 1025, 2051)
    twins = Twins(draws(rng, sizes, (dtype,)), weight_decay=0.1)
    monkeypatch.setattr(twins.cuda._stepper, "_halvings", [halvings])
    twins.step(draws(rng, sizes, (dtype,)), zero_grad=True)
    twins.check()


@pytest.mark.parametrize("size", [8191, 8192, 8193])
def test_edges_of_chunks(rng, size):
    """With the norm, in both loops of the sum; the step is skipped, which only sums."""
    param = np.ones(size, "f4")
    twins = Twins(param, max_grad_norm=math.inf, nonfinite="skip")
    grad = draws(rng, [size])[0]
    twins.step(grad)
    grad[-1] = np.inf
    assert "skipped=True" in twins.step(grad, zero_grad=True)
    twins.check()


def test_groups_schedule_and_names(rng):
    groups = [
        {"params": {"w": np.ones((3, 4), "f4"), "b": np.ones((), "f8")}, "lr": 0.1},
        {"params": {"e": np.ones(9, "f8")}, "betas": (0.5, 0.99), "weight_decay": 0.1},
        {"params": {"n": np.ones(5, "f4")}, "eps": 1e-3, "maximize": True},
        {"params": {}},
    ]
    options = {"schedule": fastadam.schedules.cosine(7), "ema_decay": 0.5}
    twins = Twins(groups, cls=fastadam.AdamW, **options)
    for step in range(3):
        grads = [each(lambda a: like(rng, [a])[0], group["params"]) for group in groups]
        if step == 1:
            grads[0]["w"] = grads[2]["n"] = None
            twins.cuda.param_groups[1]["lr"] = twins.cpu.param_groups[1]["lr"] = 0.5
        twins.step(grads, grad_scale=3.0)
    twins.check()
    for mine, theirs in zip(twins.cuda.ema_params, twins.cpu.ema_params, strict=True):
        assert list(mine) == list(theirs)
        check_same([a.copy_to_host() for a in mine.values()], list(theirs.values()))
    arrays = [InterfaceArray(np.ones(3)), InterfaceArray(np.ones(3))]
    assert fastadam.Adam(arrays[:1]).step(arrays[1:]) == StepResult(0, 0.01)


def test_group_added_later(rng):
    twins = Twins([np.ones(5, "f4")], amsgrad=True, max_grad_norm=0.5)
    twins.step([np.ones(5, "f4")])
    twins.step([np.full(5, 0.5, "f4")])
    twins.add_param_group({"params": [np.ones(3, "f8"), np.ones(7, "f4")], "lr": 1.0})
    twins.step([[np.ones(5, "f4")], [rng.standard_normal(3), np.ones(7, "f4")]])
    twins.check()
    assert [state["step"] for state in twins.cuda.state.values()] == [3, 1, 1]
    with pytest.raises(ValueError, match=r"must be on CUDA device 0, as .* is, got one in the h"):
        twins.cuda.add_param_group({"params": [np.ones(3)]})


def test_no_arrays_or_only_empty_ones():
    twins = Twins([np.ones((0, 3), "f4"), np.ones(0)], max_grad_norm=1.0, nonfinite="skip")
    assert "grad_norm=0.0" in twins.step([np.ones((0, 3), "f4"), None])
    assert "step=1" in twins.step([None, np.ones(0)], zero_grad=True)
    twins.check()


def test_as_many_threads_as_on_a_device(rng, monkeypatch):
    """8 warps to a block of the sum, and other loops than those that 8 threads take."""
    monkeypatch.setattr(kernels, "MAX_THREADS", 40)
    monkeypatch.setattr(kernels, "PREPARE_THREADS", 40)
    monkeypatch.setattr(kernels, "WARPS", 8)
    monkeypatch.setattr(kernels, "SUM_THREADS", 256)
    kernels.sum_kernel.cache_clear()
    try:
        sizes = [0, 33, 1030, 1, 64, 95, 2, 31, 32, 600, 7]
        twins = Twins(draws(rng, sizes), max_grad_norm=1.0)
        assert kernels.sum_kernel(np.dtype("f4")).function.__globals__["WARPS"] == 8
        twins.step(draws(rng, sizes))
        twins.check()
    finally:
        kernels.sum_kernel.cache_clear()


# The norm.

NORM_SIZES = [1, 2, 31, 32, 33, 63, 65, 300, 511, 512, 513, 1025, 0, 4]


@KINDS
def test_norm_and_clipping(rng, dtypes):
    params = draws(rng, NORM_SIZES, dtypes)
    references = [Reference(p, **FULL) for p in params]
    twins = Twins(params, offsets=PARAM_OFFSETS, max_grad_norm=4.0, **FULL)
    grads = draws(rng, NORM_SIZES, dtypes)
    grads[3] = None
    norm = global_norm(grads) / 1.25
    told = twins.step(grads, grad_scale=1.25, zero_grad=True)
    assert float(told.partition("grad_norm=")[2].partition(",")[0]) == pytest.approx(norm, 1e-7)
    twins.check()
    for param, reference, grad in zip(twins.device, references, grads, strict=True):
        reference.step(grad, 1.25, clip_coefficient(norm, 4.0))
        rtol = 1e-4 if param.dtype == np.float32 else 1e-12
        np.testing.assert_allclose(param, reference.param, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("count", [1, 3, 4, 5, 11, 16, 23, 27, 31, 70, 91])
def test_pairs_of_parts(rng, monkeypatch, count):
    """More parts than one segment holds, as many arrays would give, and any number of segments."""
    monkeypatch.setattr(kernels, "SEGMENT", 4)
    parts = rng.standard_normal(count) * 10.0 ** rng.integers(-3, 3, count)
    expected = list(parts)
    while len(expected) > 1:  # pairs, and what has none
        pairs = zip(expected[::2], [*expected[1::2], None], strict=False)
        expected = [a if b is None else a + b for a, b in pairs]
    for largest in (False, True):
        found = run_reduce(parts, largest)
        assert found == (max(parts) if largest else expected[0])
    parts[count // 2] = np.nan
    assert math.isnan(run_reduce(parts, True))
    assert math.isnan(run_reduce(parts, False))


def run_reduce(parts, find_largest):
    def kernel(place, count, target, largest):
        values = cuda.shared.array(kernels.SEGMENT, kernels.float64)
        waiting = cuda.shared.array(16, kernels.float64)
        result = kernels.combine_all(place, count, values, waiting, largest)
        if cuda.threadIdx.x == 1:  # not only the first knows
            intrinsics.store(target, 0, result)

    result = np.zeros(1)
    arguments = [parts.ctypes.data, len(parts), result.ctypes.data, find_largest]
    compiler.Kernel(kernel, 8).call(0, 1, 3, 0, *arguments)()
    return result[0]


def test_no_parts():
    assert run_reduce(np.zeros(0), False) == run_reduce(np.zeros(0), True) == 0.0


@pytest.mark.parametrize("values", [[-0.0, 0.0], [-0.0, -0.0]])
@DTYPES
def test_norm_of_negative_zeros_is_zero(dtype, values):
    opt = fastadam.Adam(InterfaceArray(np.ones(2, dtype)), max_grad_norm=1.0)
    assert repr(float(opt.step(InterfaceArray(np.array(values, dtype))).grad_norm)) == "0.0"


EXTREMES = [
    [1e-200, 3e-200, -2e-200],  # squares that vanish
    [1e200, -3e200, 1.0],  # that are infinite
    [1.5e308, -1.5e308, 1e308],  # the norm is
    [1e300, 1e300, 0.0],
    [5e-324, 0.0, 5e-324],
    [1e-141, 1e-141, 2e-141],  # just about short of digits
    [1e-139, 1e-140, 0.0],
    [0.0, -0.0, 0.0],
    [np.nan, 1e200, np.inf],
    [-np.inf, 1e-200, 1.0],
]


@pytest.mark.parametrize("values", EXTREMES, ids=str)
@pytest.mark.parametrize("nonfinite", ["propagate", "skip"])
def test_extreme_gradients(values, nonfinite):
    twins = Twins(np.ones(3), max_grad_norm=1.0, nonfinite=nonfinite)
    twins.step(np.array(values), zero_grad=True)
    twins.check()


@pytest.mark.parametrize("values", EXTREMES[:5:2], ids=str)
def test_extreme_gradients_beside_others(values):
    twins = Twins([np.ones(3), np.ones(2, "f4")], max_grad_norm=1.0)
    twins.step([np.array(values), np.array([1e38, 3e-45], "f4")])
    twins.check()


# Of moments, gradients and parameters: denormal numbers, the smallest normal ones, those whose
# squares are denormal.
SIZES = {
    "f4": [0.0, 1e-45, 1e-42, 1.1e-38, 1.3e-38, 1e-36, 1e-33, 1e-21, 4e-19, 6e-19, 1e-8, 1.0],
    "f8": [0.0, 5e-324, 1e-320, 2.2e-308, 3e-308, 1e-305, 1e-170, 5e-154, 1e-153, 1e-8, 1.0],
}


@pytest.mark.parametrize(
    "options",
    [{"lr": 1e-3, "maximize": True}, {**FULL, "weight_decay": 1e-5}, {"max_grad_norm": 1e-6}],
    ids=lambda options: "+".join(options),
)
@DTYPES
def test_denormal_numbers(rng, dtype, options):
    """What the CPU's kernels take for 0 is 0 here."""
    sizes = np.array(SIZES[dtype] * 8, dtype)
    signs = rng.choice(np.array([-1, 1], dtype), sizes.size)
    twins = Twins(rng.permutation(sizes), **options)
    state = twins.cpu.state_dict()
    for name, values in state["state"][0].items():
        if name != "step":
            values[...] = rng.permutation(sizes) * (signs if name == "exp_avg" else 1)
    for opt in (twins.cpu, twins.cuda):
        opt.load_state_dict(state)
    for scale in (1.0, 2.0**20, 2.0**-20):
        twins.step(rng.permutation(sizes) * signs, grad_scale=scale)
    twins.check()
    tiny = np.finfo(dtype).tiny
    for name in ("exp_avg", "exp_avg_sq"):
        values = np.abs(twins.cuda.state_dict()["state"][0][name])
        assert not ((values > 0) & (values < tiny)).any()


@pytest.mark.parametrize("nonfinite", ["propagate", "raise"])
@pytest.mark.parametrize("scale", [0.6, 0.4, 3e-38, 8e37])
def test_gradients_that_the_scale_takes_out_of_range(nonfinite, scale):
    """In their own type: what is finite in float64 may not be in float32."""
    params = [np.ones(3, "f4"), np.ones(5)]
    grads = [np.array([LARGEST["f4"] / 2, 1.0, -2.0], "f4"), np.arange(5.0)]
    twins = Twins(params, nonfinite=nonfinite, max_grad_norm=10.0)
    twins.step(grads, grad_scale=scale)
    twins.check()


@pytest.mark.parametrize("nonfinite", ["propagate", "skip", "raise"])
@pytest.mark.parametrize(
    ("dtypes", "bad"),
    [(("f4",), math.nan), (("f8",), -math.inf), (("f8", "f4"), math.inf)],
    ids=["f4-nan", "f8-inf", "f8+f4+inf"],
)
def test_gradients_that_are_not_finite(dtypes, nonfinite, bad):
    params = [np.ones(n, dtypes[k % len(dtypes)]) for k, n in enumerate((5, 40))]
    twins = Twins(params, nonfinite=nonfinite, **FULL)
    grads = [np.full(p.shape, 0.5, p.dtype) for p in params]
    for where in ((1, 33), (0, 4), None):
        given = [g.copy() for g in grads]
        if where:
            given[where[0]][where[1]] = bad
        told = twins.step(given, zero_grad=where == (0, 4))
        if where:
            assert ("skipped=True" in told) == (nonfinite == "skip")
            assert ("FloatingPointError" in told) == (nonfinite == "raise")
    twins.check()
    assert twins.cuda.step_count == (3 if nonfinite == "propagate" else 1)


def test_steps_number_again_after_a_skip():
    twins = Twins(np.ones(3), nonfinite="skip", schedule=fastadam.schedules.cosine(9))
    good, bad = np.ones(3), np.full(3, np.nan)
    assert ["step=1" in twins.step(g) for g in (good, bad, bad, good)] == [False, True, True, True]
    twins.cuda.nonfinite = twins.cpu.nonfinite = "propagate"
    assert "step=2" in twins.step(good)
    twins.check()


# What a step tells.


@pytest.mark.parametrize("nonfinite", ["skip", "propagate"])
def test_results_outlive_their_slots(rng, monkeypatch, nonfinite):
    """Those kept are right, however many steps have followed, and those let go do no harm."""
    monkeypatch.setattr(results, "SLOTS", 4)
    twins = Twins(np.ones(5, "f4"), max_grad_norm=1.0, nonfinite=nonfinite)
    grads = draws(rng, [5] * 11)
    grads[6][2] = np.nan
    kept, expected = [], []
    for k, grad in enumerate(grads):
        result = twins.cuda.step(InterfaceArray(grad.copy()))
        told = twins.cpu.step(grad)
        if k % 5 != 3:
            kept.append(result)
            expected.append(told)
    assert repr(kept) == repr(expected)
    check_same([twins.device], [twins.host])


@pytest.fixture
def result():
    opt = fastadam.Adam(InterfaceArray(np.zeros(2)), lr=0.1, max_grad_norm=1.0)
    return opt.step(InterfaceArray(np.array([3.0, 4.0])))


class TestResult:
    EXPECTED = StepResult(0, 0.1, 5.0, False)

    def test_is_a_step_result(self, result):
        assert isinstance(result, StepResult)
        assert issubclass(type(result), StepResult)
        assert not isinstance(result, tuple)  # C code would read its items too early
        assert repr(result) == str(result) == repr(self.EXPECTED)
        assert (result.step, result.lr, result.grad_norm, result.skipped) == self.EXPECTED

    def test_is_a_tuple(self, result):
        step, *others = result
        assert [step, *others] == list(self.EXPECTED) == list(result)
        assert tuple(result) == self.EXPECTED
        assert len(result) == 4
        assert (result[0], result[-1], result[1:3]) == (0, False, (0.1, 5.0))
        assert 5.0 in result
        assert 7.0 not in result
        assert result._asdict() == self.EXPECTED._asdict()

    def test_compares(self, result):
        assert result == self.EXPECTED
        assert self.EXPECTED == result  # noqa: SIM300
        assert not result != self.EXPECTED  # noqa: SIM202
        assert result != StepResult(1, 0.1, 5.0, False)
        assert hash(result) == hash(self.EXPECTED)

    @pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
    def test_copies_are_plain(self, result, duplicate):
        other = duplicate(result)
        other = pickle.loads(other) if isinstance(other, bytes) else other
        assert type(other) is StepResult
        assert repr(other) == repr(self.EXPECTED)


# Gradients of our own, averages, state.


@KINDS
def test_own_gradients(rng, dtypes):
    params = {f"p{k}": p for k, p in enumerate(draws(rng, [(3, 5), (), (0,), (7,)], dtypes))}
    params["p0"] = np.asfortranarray(params["p0"])
    twins = Twins(params, max_grad_norm=1.0)
    with pytest.raises(ValueError, match=r"grads must be given, or opt\.grads be filled before"):
        twins.cuda.step()
    for step in range(3):
        for name, own in twins.cuda.grads.items():
            values = like(rng, [params[name]])[0]
            assert type(own) is DeviceArray
            assert (own.shape, own.dtype) == (values.shape, values.dtype)
            assert own.order == ("C" if values.flags.c_contiguous else "F") or values.size < 2
            own.copy_from_host(values)
            twins.cpu.grads[name][...] = values
            check_same([own.copy_to_host()], [values])
        zero_grad = step == 1
        told = repr(twins.cpu.step(zero_grad=zero_grad))
        if step < 2:
            assert repr(twins.cuda.step(zero_grad=zero_grad)) == told
        else:
            assert repr(twins.cuda.step(twins.cuda.grads)) == told
        check_same(leaves(twins.device), leaves(twins.host))
        for name, own in twins.cuda.grads.items():
            check_same([own.copy_to_host()], [twins.cpu.grads[name]])
    with pytest.raises(ValueError, match=r"values must have shape \(7,\), got \(3,\)"):
        twins.cuda.grads["p3"].copy_from_host(np.ones(3))
    with pytest.raises(TypeError, match="must stay the object it is"):
        twins.cuda.grads["p3"] = np.ones(7)
    with pytest.raises(TypeError, match=r"must be copied: array\.copy_to_host"):
        np.asarray(twins.cuda.grads["p3"])
    with pytest.raises(TypeError, match="no dimensions has no length"):
        len(twins.cuda.grads["p1"])
    assert len(twins.cuda.grads["p3"]) == 7
    assert repr(twins.cuda.grads["p3"]).startswith("DeviceArray(shape=(7,), dtype=float")


@pytest.mark.parametrize("there", [True, False], ids=["to the device", "from it"])
@KINDS
def test_state_travels(rng, dtypes, there):
    """Half the steps on one, half on the other: the bits of all of them on one."""
    options = {"nonfinite": "skip", **FULL}
    params = draws(rng, [(3, 5), (), (0,), (7,)], dtypes)
    params[0] = np.asfortranarray(params[0])
    grads = [like(rng, params) for _ in range(4)]
    whole = fastadam.Adam(first := [p.copy("A") for p in params], **options)
    for given in grads:
        whole.step(given)
    wraps = (lambda a: a, InterfaceArray) if there else (InterfaceArray, lambda a: a)
    state, after = None, [placed(p) for p in params]
    for k, wrap in enumerate(wraps):
        opt = fastadam.Adam(each(wrap, after), **options)
        if state is not None:
            opt.load_state_dict(state)
        for given in grads[2 * k : 2 * k + 2]:
            opt.step(each(wrap, given))
        state = opt.state_dict()
        assert all(type(a) is np.ndarray for a in leaves(state["state"]))
        state = pickle.loads(pickle.dumps(state))
    check_same(after, first)
    check_same_state(state, whole.state_dict())


@pytest.mark.parametrize("there", [False, True], ids=["to-the-device", "and-back"])
def test_checkpoints_travel(rng, tmp_path, there):
    """Saved on one and resumed on the other: the bits of steps on one alone."""
    pytest.importorskip("safetensors", exc_type=ImportError)
    options = {"schedule": fastadam.schedules.cosine(9), "nonfinite": "skip", **FULL}
    params = draws(rng, [(3, 5), (), (0,), (7,)], ("f4", "f8"))
    params[0] = np.asfortranarray(params[0])
    grads = [like(rng, params) for _ in range(4)]
    whole = fastadam.Adam(first := [p.copy("A") for p in params], **options)
    for given in grads:
        whole.step(given)
    wraps = (lambda a: a, InterfaceArray) if there else (InterfaceArray, lambda a: a)
    for k, wrap in enumerate(wraps):
        after = [placed(p + k) for p in params]
        opt = fastadam.Adam(each(wrap, after), **{**options, "schedule": None})
        opt.schedule = None if k else options["schedule"]
        if k:
            fastadam.load(tmp_path / "run.safetensors", opt)
        for given in grads[2 * k : 2 * k + 2]:
            opt.step(each(wrap, given))
        fastadam.save(tmp_path / "run.safetensors", opt)
    check_same(after, first)
    check_same_state(opt.state_dict(), whole.state_dict())


def test_an_interrupted_load_is_made_whole(tmp_path, monkeypatch):
    """Writing to a device takes Python: signals that come in between have to wait."""
    pytest.importorskip("safetensors", exc_type=ImportError)
    old = fastadam.Adam([InterfaceArray(np.ones(5)), InterfaceArray(np.ones(3))])
    old.step([InterfaceArray(np.ones(5)), InterfaceArray(np.ones(3))])
    fastadam.save(tmp_path / "run.safetensors", old)
    params = [np.zeros(5), np.zeros(3)]
    new = fastadam.Adam(each(InterfaceArray, params))
    assign, calls = backend.assign, []

    def interrupted(*pair):
        calls.append(pair)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        assign(*pair)

    monkeypatch.setattr(backend, "assign", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fastadam.load(tmp_path / "run.safetensors", new)
    check_same_state(new.state_dict(), old.state_dict())
    assert all(param.all() for param in params)


def test_state_of_device_arrays_can_be_loaded(rng):
    """Those of another optimizer, and an optimizer's own."""
    twins = Twins([np.ones(5, "f4"), np.ones((2, 3))], amsgrad=True)
    twins.step(draws(rng, [5, (2, 3)], ("f4", "f8")))
    live = {**twins.cuda.state_dict(), "state": twins.cuda.state}
    assert type(live["state"][0]["exp_avg"]) is DeviceArray
    for other in (
        fastadam.Adam([InterfaceArray(np.ones(5, "f4")), InterfaceArray(np.ones((2, 3)))],
                      amsgrad=True),
        fastadam.Adam([np.ones(5, "f4"), np.ones((2, 3))], amsgrad=True),
        twins.cuda,
    ):  # fmt: skip
        other.load_state_dict(live)
        check_same_state(other.state_dict(), twins.cpu.state_dict())
    # Each of the arrays by the other's name: none is overwritten before it is read.
    before = twins.cuda.state_dict()["state"][0]
    swapped = copy.copy(live["state"][0])
    swapped["exp_avg"], swapped["exp_avg_sq"] = swapped["exp_avg_sq"], swapped["exp_avg"]
    twins.cuda.load_state_dict({**live, "state": {0: swapped, 1: live["state"][1]}})
    after = twins.cuda.state_dict()["state"][0]
    check_same([after["exp_avg"], after["exp_avg_sq"]], [before["exp_avg_sq"], before["exp_avg"]])


def test_state_that_does_not_fit_changes_nothing():
    twins = Twins([np.ones(5, "f4")], ema_decay=0.5)
    twins.step([np.ones(5, "f4")])
    wrong = twins.cuda.state_dict()
    wrong["state"][0]["exp_avg"] = InterfaceArray(np.ones(4, "f4"))
    with pytest.raises((TypeError, ValueError, AttributeError)):
        twins.cuda.load_state_dict(wrong)
    wrong["state"][0]["exp_avg"] = np.ones(4, "f4")
    with pytest.raises(ValueError, match=r"\['exp_avg'\] is dtype\('float32'\) \(4,\), not"):
        twins.cuda.load_state_dict(wrong)
    twins.check()


def test_averages_are_live():
    twins = Twins([np.ones(2), np.ones(3, "f4")], ema_decay=0.75, lr=1.0, betas=(0.0, 0.0))
    average = twins.cuda.ema_params[0]
    assert average.copy_to_host().tolist() == [1.0, 1.0]
    twins.step([np.ones(2), None])
    np.testing.assert_allclose(average.copy_to_host(), 0.75)
    with pytest.raises(AttributeError, match="ema_params needs an optimizer made with ema_decay"):
        _ = fastadam.Adam(InterfaceArray(np.ones(2))).ema_params


# Addresses.


def test_the_same_objects_filled_anew(rng, wrap):
    """What a step knew of its gradients is not asked for again, and still true."""
    twins = Twins([np.ones(5, "f4"), np.ones(3, "f4")], wrap)
    grads = [placed(np.zeros(5, "f4")), placed(np.zeros(3, "f4"))]
    wrapped = each(wrap, grads)
    for step in range(4):
        for grad in grads:
            grad[...] = rng.standard_normal(grad.size)
        given = wrapped if step != 2 else [wrapped[0], None]
        twins.cpu.step([g.copy() if w is not None else None
                        for g, w in zip(grads, given, strict=True)])  # fmt: skip
        twins.cuda.step(given, zero_grad=step == 3)
        check_same(twins.device, twins.host)
    assert not any(grad.any() for grad in grads)
    twins.check()


@pytest.mark.parametrize("at_once", [False, True])
def test_gradients_that_have_moved_are_found(rng, monkeypatch, at_once):
    calls = pretend_torch(monkeypatch, at_once)
    twins = Twins([np.ones(5, "f4"), np.ones(3, "f4")], Tensor)
    grads = each(Tensor, draws(rng, [5, 3]))
    for step in range(3):
        if step == 1:
            old, grads[0].array = grads[0].array, placed(rng.standard_normal(5).astype("f4"))
            old[:] = np.nan
        twins.cpu.step([grad.array for grad in grads])
        twins.cuda.step(grads)
        check_same(twins.device, twins.host)
    assert bool(calls) == at_once


@pytest.mark.parametrize("at_once", [False, True])
def test_parameters_that_have_moved_are_refused(monkeypatch, at_once):
    pretend_torch(monkeypatch, at_once)
    tensors = [Tensor(np.ones(5, "f4")), Tensor(np.ones(3, "f4"))]
    opt = fastadam.Adam({"w": tensors[0], "b": tensors[1]}, max_grad_norm=1.0)
    grads = {"w": Tensor(np.ones(5, "f4")), "b": Tensor(np.ones(3, "f4"))}
    opt.step(grads)
    before = opt.state_dict()
    old = tensors[1].array
    tensors[1].move()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"params\['b'\] must keep the memory that it had"):
            opt.step(grads)
    check_same_state(opt.state_dict(), before)
    tensors[1].array = old
    assert opt.step(grads).step == 1


def test_gradient_shape_may_not_change_unseen(monkeypatch):
    pretend_torch(monkeypatch)
    opt = fastadam.Adam(Tensor(np.ones((2, 3), "f4")))
    for bad, message in (
        (np.ones((3, 2), "f4"), r"grads\.shape must be its parameter's, \(2, 3\), got \(3, 2\)"),
        (np.ones((2, 3), "f4", order="F"), "grads must be laid out in C order.* got Fortran"),
        (np.ones((2, 6), "f4")[:, ::2], "grads must be contiguous, in C or Fortran order"),
        (np.ones((2, 3)), r"grads\.dtype must be its parameter's, dtype\('float32'\)"),
        (np.ones((2, 3), "i8"), r"grads\.dtype must be float32 or float64, got torch\.int64"),
    ):
        opt.step(Tensor(np.ones((2, 3), "f4")))
        count = opt.step_count
        with pytest.raises((TypeError, ValueError), match=f"^{message}"):
            opt.step(Tensor(bad))
        assert opt.step_count == count


# Refused.


class OnlyLooksLikeJax:
    shape, dtype = (3,), np.dtype("f4")

    def __dlpack_device__(self):
        return 2, 0


OnlyLooksLikeJax.__module__ = "jaxlib._jax"


def read_only(array):
    array.flags.writeable = False
    return array


def unaligned(n):
    return np.zeros(4 * n + 1, np.uint8)[1:].view("f4")


I, N = InterfaceArray, np.ones  # noqa: E741
BAD_PARAMS = {
    "dtype": (lambda: [I(N(3, "f2"))], TypeError, r"params\[0\].dtype must be float32 or float64"),
    "integers": (lambda: [I(N(3, "i4"))], TypeError, r"params\[0\].dtype must be float32 or fl"),
    "order of bytes": (lambda: [I(N(3, ">f4"))], TypeError, r"params\[0\].dtype must be float32"),
    "strides": (lambda: [I(N(6)[::2])], ValueError, r"params\[0\] must be contiguous, in C or F"),
    "reversed": (lambda: [I(N(6)[::-1])], ValueError, r"params\[0\] must be contiguous"),
    "unaligned": (lambda: [I(unaligned(3))], ValueError, r"params\[0\] must be aligned to its 4"),
    "read-only": (lambda: [I(read_only(N(3)))], ValueError, r"params\[0\] must be writable, got"),
    "mask": (lambda: [I(N(3), mask=1)], TypeError, r"params\[0\] must have no mask, got device_"),
    "mixed": (
        lambda: [I(N(3)), N(3)],
        ValueError,
        r"params\[1\] must be on CUDA device 0, as params\[0\] is, got one in the host's memory",
    ),
    "mixed, host first": (
        lambda: [N(3), I(N(3))],
        ValueError,
        r"params\[1\] must be in the host's memory, as params\[0\] is, got one on a CUDA device",
    ),
    "jax": (lambda: [OnlyLooksLikeJax()], TypeError, r"params\[0\] must be a numpy.ndarray, got "),
    "on the host": (
        lambda: [Tensor(N(3), is_cuda=False)],
        TypeError,
        r"params\[0\] must be a numpy.ndarray, got device_arrays.Tensor",
    ),
    "overlap": (
        lambda: [I(a := N(8)), I(a[4:])],
        ValueError,
        r"params\[0\] and params\[1\] must not share memory",
    ),
    "twice": (lambda: [I(a := N(8)), I(a)], ValueError, r"must not share memory|is given twice"),
}


@pytest.mark.parametrize("case", BAD_PARAMS)
def test_bad_params(case):
    params, error, message = BAD_PARAMS[case]
    with pytest.raises(error, match=message):
        fastadam.Adam(params())


BAD_GRADS = {
    "dtype": (lambda _: I(N(4)), TypeError, r"grads\[1\].dtype must be its parameter's, dtype\("),
    "integers": (lambda _: I(N(4, "i4")), TypeError, r"grads\[1\].dtype must be float32 or"),
    "shape": (lambda _: I(N(5, "f4")), ValueError, r"grads\[1\].shape must be its .*\(4,\), got"),
    "strides": (lambda _: I(N(8, "f4")[::2]), ValueError, r"grads\[1\] must be contiguous"),
    "unaligned": (lambda _: I(unaligned(4)), ValueError, r"grads\[1\] must be aligned to its 4"),
    "NumPy": (lambda _: N(4, "f4"), TypeError, r"grads\[1\] must be an array on a CUDA device, g"),
    "number": (lambda _: 1.0, TypeError, r"grads\[1\] must be an array on a CUDA device, got bu"),
    "the parameter": (lambda p: I(p[1]), ValueError, r"grads\[1\] .*share.* params\[1\]"),
    "a neighbour": (lambda p: I(p[0][4:]), ValueError, r"grads\[1\] .*share.* params\[0\]"),
    "read-only": (
        lambda _: I(read_only(N(4, "f4"))),
        ValueError,
        r"grads\[1\] must be writable, got a read-only array",
    ),
    "jax": (lambda _: OnlyLooksLikeJax(), TypeError, r"grads\[1\] must be an array on a CUDA dev"),
}


@pytest.mark.parametrize("limits", [{}, {"max_grad_norm": 1.0}], ids=["plain", "limited"])
@pytest.mark.parametrize("case", BAD_GRADS)
def test_bad_grads_change_nothing(case, limits):
    make, error, message = BAD_GRADS[case]
    params = [np.ones(8, "f4"), np.ones(4, "f4")]
    opt = fastadam.Adam(each(InterfaceArray, params), ema_decay=0.5, amsgrad=True, **limits)
    good = [np.ones(8, "f4"), np.ones(4, "f4")]
    opt.step(each(InterfaceArray, good))
    state, before = opt.state_dict(), [p.copy() for p in params]
    for _ in range(2):
        with pytest.raises(error, match=message):
            opt.step([InterfaceArray(good[0]), make(params)], zero_grad=True)
        check_same(params, before)
        check_same_state(opt.state_dict(), state)
        assert good[0].all()
    assert opt.step(each(InterfaceArray, good)).step == 1


def test_read_only_gradients_are_good_to_read():
    twins = Twins([np.ones(3)])
    twins.cuda.step([InterfaceArray(grad := read_only(np.ones(3)))])
    twins.cpu.step([np.ones(3)])
    check_same(twins.device, twins.host)
    same = InterfaceArray(grad)
    twins.cuda.step([same])
    with pytest.raises(ValueError, match=r"grads\[0\] must be writable"):
        twins.cuda.step([same], zero_grad=True)
    assert grad.all()


def test_gradients_are_looked_at_once(monkeypatch):
    """In steps that only read them too, after one that wrote to them."""
    twins = Twins([np.ones(3), np.ones(4, "f4")])
    grads = [InterfaceArray(np.ones(3)), InterfaceArray(np.ones(4, "f4"))]
    twins.cuda.step(grads, zero_grad=True)
    monkeypatch.setattr("fastadam.cuda.gradients.view", None)
    for zero_grad in (False, True, False):
        twins.cuda.step(grads, zero_grad=zero_grad)
    with pytest.raises(TypeError):
        twins.cuda.step([grads[0], InterfaceArray(np.ones(4, "f4"))])
    assert twins.cuda.step_count == 4


def test_gradient_order():
    opt = fastadam.Adam(InterfaceArray(np.ones((2, 3), order="F")))
    with pytest.raises(ValueError, match=r"^grads must be laid out in Fortran order, .* C order$"):
        opt.step(InterfaceArray(np.ones((2, 3))))


def test_device_gradient_for_a_numpy_parameter():
    opt = fastadam.Adam([np.ones(3)])
    with pytest.raises(TypeError, match=r"^grads\[0\] must be a .*, got device_arrays"):
        opt.step([InterfaceArray(np.ones(3))])
    assert opt.step_count == 0


@pytest.mark.parametrize("duplicate", [pickle.dumps, copy.deepcopy, copy.copy])
def test_optimizers_are_not_copied(duplicate):
    opt = fastadam.Adam(InterfaceArray(np.ones(3)), ema_decay=0.5)
    with pytest.raises(TypeError, match=r"cannot be copied or pickled: make a new|use copy\.deep"):
        duplicate(opt)
    assert opt.step(InterfaceArray(np.ones(3))).step == 0


def test_bad_hyperparameters_change_nothing():
    twins = Twins([np.ones(3)], max_grad_norm=1.0)
    twins.step([np.ones(3)])
    grad = [InterfaceArray(np.ones(3))]
    with pytest.raises(ValueError, match="grad_scale must be finite and > 0, got 0"):
        twins.cuda.step(grad, grad_scale=0)
    twins.cuda.param_groups[0]["lr"] = -1.0
    with pytest.raises(
        ValueError, match=r"param_groups\[0\]\.lr must be finite and >= 0, got -1\.0"
    ):
        twins.cuda.step(grad)
    twins.cuda.param_groups[0]["lr"] = 0.01
    twins.cuda.schedule = lambda _: math.nan
    with pytest.raises(ValueError, match="schedule"):
        twins.cuda.step(grad)
    check_same(twins.device, twins.host)
    twins.check()


# Compiling.


@pytest.mark.parametrize("limits", [{}, {"max_grad_norm": 1.0}], ids=["plain", "limited"])
def test_compile(limits):
    twins = Twins([np.ones(3), np.ones(4, "f4")], **limits)
    told = []
    fastadam.compile(twins.cuda, progress=lambda done, total: told.append((done, total)))
    assert told == [(k + 1, told[-1][1]) for k in range(told[-1][1])]
    assert twins.cuda.step_count == 0
    twins.check()
    twins.step([np.ones(3), np.ones(4, "f4")])


def test_repr():
    opt = fastadam.Adam(InterfaceArray(np.ones(3, "f4")))
    assert repr(opt).startswith("Adam(1 parameter, 3 elements of float32, step_count=0, ")


def test_told_as_json(result):
    assert json.loads(json.dumps(list(result))) == [0, 0.1, 5.0, False]


def test_a_signal_does_not_come_between_the_calls_of_a_step():
    done = []
    calls = [_thread.interrupt_main, functools.partial(done.append, 1)]
    with pytest.raises(KeyboardInterrupt):
        stepper.call_all(calls)
    assert done == [1]


def test_what_cannot_be_compiled_changes_nothing(rng, monkeypatch):
    twins = Twins(np.ones(5, "f4"), max_grad_norm=1.0)
    twins.step(draws(rng, [5])[0])

    def refuse(kernel, _):
        if kernel.function.__name__ == "update":
            raise RuntimeError("no compiler")

    monkeypatch.setattr(compiler.Kernel, "load", refuse)
    with pytest.raises(RuntimeError, match="no compiler"):
        twins.cuda.step(InterfaceArray(np.ones(5, "f4")), zero_grad=True)
    twins.check()


def test_steps_are_counted_though_skipping_is_switched_off(rng):
    twins = Twins(np.ones(5, "f4"), nonfinite="skip", schedule=fastadam.schedules.cosine(9))
    for mode in ("skip", "propagate", "propagate", "skip"):
        twins.cpu.nonfinite = twins.cuda.nonfinite = mode
        twins.cpu.max_grad_norm = twins.cuda.max_grad_norm = 1.0
        twins.step(draws(rng, [5])[0])
    assert twins.cuda.step_count == twins.cuda.state[0]["step"] == 4
    twins.check()


def test_an_optimizer_goes_with_its_last_reference():
    opt = fastadam.Adam(InterfaceArray(np.ones(2)), nonfinite="skip")
    opt.step(InterfaceArray(np.ones(2)))
    gone = weakref.ref(opt._stepper)
    gc.disable()
    try:
        del opt
        assert gone() is None
    finally:
        gc.enable()


class Without(Tensor):
    """A tensor that wraps others, and has no memory of its own."""

    def data_ptr(self):
        return 0


def test_tensors_without_memory_are_refused(monkeypatch):
    pretend_torch(monkeypatch)
    with pytest.raises(ValueError, match=r"params must have memory of its own, got .*Without"):
        fastadam.Adam(Without(np.ones(2)))
    param = Tensor(np.ones(2))
    opt = fastadam.Adam(param)
    good = Tensor(np.ones(2))
    opt.step(good)
    for grad in (Without(np.ones(2)), good):
        good.data_ptr = lambda: 0  # its storage has been freed
        with pytest.raises(ValueError, match="grads must have memory of its own"):
            opt.step(grad)
    assert opt.step_count == 1


def test_sparse_tensors_are_refused(monkeypatch):
    pretend_torch(monkeypatch)

    def refuse():
        raise RuntimeError("sparse tensors do not have strides")

    opt = fastadam.Adam(Tensor(np.ones(2)))
    grad = Tensor(np.ones(2))
    grad.stride, grad.layout = refuse, "torch.sparse_coo"
    with pytest.raises(TypeError, match=r"grads must be dense, got .* of layout torch.sparse_coo"):
        opt.step(grad)


def test_whose_stream_it_is_is_told_of_derived_classes_too(monkeypatch):
    pretend_torch(monkeypatch)
    stream = types.SimpleNamespace(cuda_stream=7)
    sys.modules["torch"].cuda = types.SimpleNamespace(current_stream=lambda _: stream)
    base = type("Parameter", (Tensor,), {"__module__": "torch.nn.parameter"})
    derived = type("Mine", (base,), {"__module__": "__main__"})
    assert current_stream(view(derived(np.ones(2)), "params", writable=True)) == 7


def test_tensors_can_be_loaded_as_state(monkeypatch):
    pretend_torch(monkeypatch)
    twins = Twins([np.ones(3, "f4")], wrap=Tensor)
    twins.step([np.ones(3, "f4")])
    state = twins.cuda.state_dict()
    for name in ("exp_avg", "exp_avg_sq"):
        state["state"][0][name] = Tensor(state["state"][0][name])
    twins.cpu.load_state_dict(state)
    twins.cuda.load_state_dict(state)
    twins.step([np.ones(3, "f4")])
    twins.check()
    state["state"][0]["exp_avg"] = Tensor(np.ones(4, "f4"))
    with pytest.raises(ValueError, match=r"\['exp_avg'\] is dtype\('float32'\) \(4,\)"):
        twins.cuda.load_state_dict(state)


@pytest.mark.parametrize("order", [1, -1])
def test_an_empty_device_array_goes_with_no_numpy_array(order):
    empty = InterfaceArray(np.zeros(0), data=(0, False))
    with pytest.raises(ValueError, match=r"must be (in the host's memory|on CUDA device 0), as"):
        fastadam.Adam([empty, np.zeros(3)][::order])
