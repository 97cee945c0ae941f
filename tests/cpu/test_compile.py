"""`fastadam.compile`: all that a step needs is there before it, and nothing else has changed."""

import builtins
import functools
import math
import sys
import threading
import time

import numba
import numpy as np
import pytest
from tools import picture, way

import fastadam
from fastadam.cpu import kernels

TAIL = {"amsgrad": True, "max_grad_norm": 1.0, "nonfinite": "skip", "ema_decay": 0.5}


class Value:
    def __init__(self, data):
        self.data, self.grad = data, 1.0


@pytest.fixture
def made(monkeypatch):
    """The kernels made from here on, none of which has been compiled."""
    made = []

    def recording(factory):
        def make(*args, **options):
            made.append(factory.__wrapped__(*args, **options))
            return made[-1]

        return functools.cache(make)

    monkeypatch.setattr(kernels, "update_kernel", recording(kernels.update_kernel))
    monkeypatch.setattr(kernels, "sum_kernel", recording(kernels.sum_kernel))
    monkeypatch.setattr(kernels, "look_kernel", recording(kernels.look_kernel))
    return made


def compiled(made):
    """What each kernel has been compiled, or fetched from the cache, for."""
    return [list(kernel.signatures) for kernel in made]


def params_of(kind):
    dtypes = {"float32": ("f4",), "float64": ("f8",), "mixed": ("f4", "f8")}[kind]
    return [np.ones(n, dtypes[k % len(dtypes)]) for k, n in enumerate((3, 50, 0, 700))]


@pytest.mark.parametrize("zero_grad", [False, True])
@pytest.mark.parametrize("name", ["serial", "parallel"])
@pytest.mark.parametrize("kind", ["float32", "mixed"])
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": math.inf}, TAIL], ids=len)
def test_steps_compile_nothing_more(made, options, kind, name, zero_grad):
    params = params_of(kind)
    with way(name):
        opt = fastadam.Adam(params, **options)
        fastadam.compile(opt)
    before = compiled(made)
    norm = "max_grad_norm" in options
    largest = norm and (kind == "mixed" or "nonfinite" in options)
    # One that only looks at gradients, unless the update does so itself.
    look = norm or kind == "mixed" or name == "parallel"
    assert len(before) == look + len({p.dtype for p in params}) * (2 + norm + largest)
    assert all(before)
    for _ in range(2):
        opt.step([np.ones_like(p) for p in params], zero_grad=zero_grad)
    opt.step([None, *(np.ones_like(p) for p in params[1:])], zero_grad=zero_grad)
    assert compiled(made) == before


@pytest.mark.parametrize("options", [{}, TAIL], ids=["plain", "tail"])
def test_nor_do_the_optimizers_own_gradients(made, options):
    opt = fastadam.Adam([np.ones(5), np.ones(3)], **options)
    fastadam.compile(opt)
    before = compiled(made)
    opt.grads[0][:] = 1.0
    opt.step()
    opt.step(opt.grads, zero_grad=True)
    assert compiled(made) == before


@pytest.mark.parametrize("options", [{}, TAIL], ids=["plain", "tail"])
@pytest.mark.parametrize("name", ["serial", "parallel"])
@pytest.mark.parametrize("kind", ["float64", "mixed"])
def test_nothing_else_changes(rng, kind, name, options):
    params = params_of(kind)
    grads = [rng.standard_normal(p.shape).astype(p.dtype) for p in params]
    with way(name):
        opt = fastadam.Adam(params, **options)
        fastadam.compile(opt)
        assert not any(a.any() for n in (0, 1) for a in [opt.state[n]["exp_avg"]])
        opt.step(grads)
        before = picture(opt, params)
        fastadam.compile(opt)
        assert picture(opt, params) == before
        assert opt.step_count == 1
        opt.step(grads)
        twins = params_of(kind)
        other = fastadam.Adam(twins, **options)
        for _ in range(2):
            other.step(grads)
    assert picture(opt, params) == picture(other, twins)


@pytest.mark.parametrize("options", [{}, TAIL], ids=["plain", "tail"])
def test_progress_is_told(options):
    told = []
    fastadam.compile(
        fastadam.Adam(np.zeros(3), **options), progress=lambda *counts: told.append(counts)
    )
    assert [k for k, _ in told] == list(range(1, len(told) + 1))
    assert {n for _, n in told} == {len(told)}
    assert len(told) >= 2


def test_nothing_to_compile():
    told = []
    fastadam.compile(fastadam.Adam([]), progress=lambda *counts: told.append(counts))
    assert told == []


def test_progress_that_raises_is_heard():
    opt = fastadam.Adam(np.zeros(3))
    with pytest.raises(ZeroDivisionError):
        fastadam.compile(opt, progress=lambda *_: 1 / 0)
    assert opt.step(np.ones(3)).step == 0


def test_bar(optional, capsys):
    optional("rich")
    opt = fastadam.Adam(np.zeros(3))
    fastadam.compile(opt, progress=True)
    assert opt.step_count == 0
    capsys.readouterr()  # whatever rich makes of no terminal


def test_bar_without_rich(monkeypatch):
    def without(name, *args, **kwargs):
        if name.startswith("rich"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    real = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"progress=True needs rich: pip install"):
        fastadam.compile(fastadam.Adam(np.zeros(3)), progress=True)


@pytest.mark.parametrize(("opt", "kind"), [(None, "NoneType"), ([], "list"), (fastadam, "module")])
def test_what_is_no_optimizer(opt, kind):
    with pytest.raises(TypeError, match=f"^opt must be an optimizer of fastadam's, got {kind}"):
        fastadam.compile(opt)


def test_of_objects(made):
    values = [Value(1.0), Value(np.ones(3)), Value(2.0)]
    opt = fastadam.from_objects(values, lr=0.5, **TAIL)
    fastadam.compile(opt)
    assert (opt.step_count, values[0].data, values[0].grad) == (0, 1.0, 1.0)
    before = compiled(made)
    opt.step()
    assert compiled(made) == before


def test_during_a_step_of_another_thread(rng):
    """Compiling again while a large step runs neither repeats nor loses a part of it."""
    params, twins = [np.zeros(400_000, np.float32)], [np.zeros(400_000, np.float32)]
    grads = [rng.standard_normal(400_000).astype(np.float32)]
    opt, other = fastadam.Adam(params), fastadam.Adam(twins)
    fastadam.compile(opt)
    if numba.threading_layer() == "workqueue":
        pytest.skip("a threading layer for one thread of Python's at a time")
    stop, refused = threading.Event(), []

    def meddle():
        while not stop.is_set():
            try:
                fastadam.compile(opt)
            except RuntimeError as error:
                refused.append(error)

    thread = threading.Thread(target=meddle)
    thread.start()
    taken = 0
    try:
        for _ in range(100):
            try:
                opt.step(grads)
            except RuntimeError:
                continue
            taken += 1
    finally:
        stop.set()
        thread.join()
    for _ in range(taken):
        other.step(grads)
    assert all("in the middle of its own step" in str(error) for error in refused)
    assert picture(opt, params) == picture(other, twins)


@pytest.fixture
def counting():
    """A thread that counts, and gives way each time: it goes on only where the GIL is free."""
    interval = sys.getswitchinterval()
    count, stop = [0], threading.Event()

    def run():
        while not stop.is_set():
            count[0] += 1
            time.sleep(0)

    thread = threading.Thread(target=run)
    sys.setswitchinterval(1000.0)  # nobody is made to give the GIL up
    thread.start()
    yield count
    stop.set()
    thread.join()
    sys.setswitchinterval(interval)


def test_a_large_step_lets_other_threads_run(counting):
    """Also while the norm is summed, and in each dtype."""
    params = [np.zeros(1_500_000, np.float32), np.zeros(200_000)]
    opt = fastadam.Adam(params, max_grad_norm=1.0, ema_decay=0.5)
    grads = [np.ones_like(param) for param in params]
    fastadam.compile(opt)
    for _ in range(50):
        before = counting[0]
        opt.step(grads)
        if counting[0] - before >= 20:
            return
    pytest.fail("nothing else ran during 50 steps")


@pytest.mark.parametrize("progress", ["yes", 1, None])
def test_progress_is_a_bool_or_callable(progress):
    with pytest.raises(TypeError, match="progress must be True, False or callable, got"):
        fastadam.compile(fastadam.Adam(np.zeros(2)), progress=progress)
