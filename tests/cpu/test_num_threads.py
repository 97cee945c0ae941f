"""``num_threads``: kernels take no more, and not a bit depends on it."""

import copy
import os
import pickle
import subprocess
import sys
import threading

import numba
import numpy as np
import pytest
from layers import environment, why_missing

import fastadam
from fastadam import cpus
from fastadam.cpu import kernels, thread_choice

LARGE = kernels.SERIAL_BELOW + 5
MOST = numba.config.NUMBA_NUM_THREADS
KINDS = {
    "plain": ((np.float32,), {}),
    "mixed": ((np.float32, np.float64), {}),
    "tail": ((np.float32,), {"max_grad_norm": 1.0, "nonfinite": "skip", "ema_decay": 0.5}),
}


def make(num_threads=None, dtypes=(np.float32,), **options):
    params = [np.linspace(1, 2, LARGE, dtype=dtype) for dtype in dtypes]
    return fastadam.Adam(params, num_threads=num_threads, **options), params


def parallel(opt):
    return [context.parallel for context in opt._stepper.contexts]


@pytest.mark.parametrize("kind", KINDS)
def test_the_bits_are_the_same(kind):
    """Of optimizers that step in turn, each with a number of its own, one with several."""
    dtypes, options = KINDS[kind]
    made = [make(number, dtypes, **options) for number in (None, 1, 2, 1)]
    for step in range(4):
        made[-1][0].num_threads = 1 + step % 2
        for opt, params in made:
            opt.step([param[::-1].copy() for param in params])
    found = {
        (*(p.tobytes() for p in params), *(s["exp_avg_sq"].tobytes() for s in opt.state.values()))
        for opt, params in made
    }
    assert len(found) == 1


COUNT = """
import sys
import numpy as np, fastadam
from fastadam.cpu import kernels, layout, thread_choice

def took_part(opt):
    (context,) = opt._stepper.contexts
    done = context._cursors.reshape(-1, layout.CURSOR_BYTES // 8)[:, layout.DONE]
    count = int((done != 0).sum())
    done[:] = 0
    return count

def step(opt):
    thread_choice.balance[0] = 1e6  # as if several threads had saved time
    opt.step(grad)
    return took_part(opt)

grad = np.ones(20 * kernels.SERIAL_BELOW, np.float32)
three, two, one, default = (
    fastadam.Adam(np.ones_like(grad), num_threads=count) for count in (3, 2, 1, None)
)
counts = [step(opt) for opt in (three, two, one, default)]
two.num_threads, three.num_threads = 3, 1
step(two)  # the second step is timed in one thread
counts += [step(opt) for opt in (two, three)]
two.num_threads = None
print(*counts, step(two))
"""


def test_so_many_threads_take_part():
    """0 for the serial kernel, which counts none."""
    env = {**os.environ, "NUMBA_NUM_THREADS": "4"}
    done = subprocess.run(
        [sys.executable, "-c", COUNT], env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["3", "2", "0", "4", "3", "0", "4"]


@pytest.mark.parametrize("layer", ["omp", "tbb", "workqueue"])
def test_openmps_number_is_not_numbas(layer):
    """What torchrun sets makes no step serial, on any layer."""
    if why_missing(layer):
        pytest.skip(why_missing(layer))
    code = COUNT.partition("three, two")[0] + "print(step(fastadam.Adam(np.ones_like(grad))))"
    env = {**environment(layer), "OMP_NUM_THREADS": "1"}
    assert subprocess.check_output([sys.executable, "-c", code], env=env) == b"2\n"


def test_one_thread_starts_no_layer():
    code = """
import numba, numpy as np, fastadam
param = np.ones(1_000_000, np.float32)
for options in ({}, {"max_grad_norm": 1.0, "nonfinite": "raise"}):
    opt = fastadam.Adam(param, num_threads=1, **options)
    fastadam.compile(opt)
    opt.step(param.copy())
try:
    print(numba.threading_layer())
except ValueError:
    print("none")
"""
    assert subprocess.check_output([sys.executable, "-c", code]) == b"none\n"


def test_one_of_many_processes_starts_no_layer(monkeypatch):
    monkeypatch.setattr(cpus, "default_threads", lambda: cpus.Share(1, "a rule"))
    opt, _ = make()
    assert (opt.num_threads, parallel(opt)) == (1, [False])


def test_a_long_step_in_one_thread_releases_the_gil():
    """Another thread, which waits for the GIL, gets it in the middle of a step."""
    opt = fastadam.Adam(np.ones(4_000_000, np.float32), num_threads=1)
    grad = np.ones(4_000_000, np.float32)
    opt.step(grad)
    gate, during = threading.Lock(), []
    gate.acquire()
    waiting = threading.Thread(target=lambda: (gate.acquire(), during.append(inside)))
    waiting.start()
    before = sys.getswitchinterval()
    sys.setswitchinterval(1000)  # nobody has to give it up
    try:
        inside = True
        gate.release()
        for _ in range(1000):
            opt.step(grad)
            if during:
                break
        inside = False
    finally:
        sys.setswitchinterval(before)
        waiting.join()
    assert during == [True]


class TestProperty:
    def test_default(self):
        opt, _ = make()
        assert opt.num_threads == cpus.default_threads().threads
        opt.num_threads = 1
        opt.num_threads = None
        assert opt.num_threads == cpus.default_threads().threads

    def test_no_more_than_there_are(self):
        opt, _ = make(10**30)
        assert opt.num_threads == MOST
        opt.num_threads = MOST + 1
        assert opt.num_threads == MOST

    def test_numbers_of_numpys(self):
        opt, _ = make(np.int64(1))
        assert (opt.num_threads, type(opt.num_threads)) == (1, int)

    def test_it_stays_when_a_group_is_added(self):
        opt, _ = make(1)
        opt.add_param_group({"params": [np.ones(LARGE)]})
        assert (opt.num_threads, parallel(opt)) == (1, [False, False])

    @pytest.mark.parametrize("twin", [copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))])
    def test_copies_have_what_was_asked_for(self, twin, monkeypatch):
        """And the default of the process in which they are, where nothing was."""
        asked, free = make(1)[0], make()[0]
        monkeypatch.setattr(cpus, "default_threads", lambda: cpus.Share(MOST + 3, "a rule"))
        assert twin(asked).num_threads == 1
        assert twin(free).num_threads == MOST + 3

    def test_pickles_from_before_there_was_such_a_thing(self):
        kept = make(1)[0].__getstate__()
        del kept["_num_threads"]
        opt = fastadam.Adam.__new__(fastadam.Adam)
        opt.__setstate__(kept)
        assert opt.num_threads == cpus.default_threads().threads

    def test_objects(self):
        class Value:
            def __init__(self):
                self.data, self.grad = np.ones(LARGE), np.ones(LARGE)

        opt = fastadam.from_objects([Value()], num_threads=1)
        twin = copy.deepcopy(opt)
        opt.num_threads = None
        assert twin.num_threads == 1
        assert opt.num_threads == cpus.default_threads().threads

    def test_it_is_no_state(self):
        assert "num_threads" not in repr(make(1)[0].state_dict())

    def test_not_in_the_middle_of_a_step(self):
        def schedule(_):
            with pytest.raises(RuntimeError, match="middle of its own step"):
                opt.num_threads = 1
            return 1.0

        opt, params = make(schedule=schedule)
        opt.step([params[0].copy()])
        assert opt.num_threads == cpus.default_threads().threads


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (True, TypeError, "num_threads must be None or an integer, got True"),
        (2.0, TypeError, "num_threads must be None or an integer, got 2.0"),
        ("2", TypeError, "num_threads must be None or an integer, got '2'"),
        (0, ValueError, "num_threads must be >= 1, got 0"),
        (-1, ValueError, "num_threads must be >= 1, got -1"),
    ],
)
def test_bad_input(value, error, message):
    param = np.ones(2)
    opt = fastadam.Adam(param, num_threads=1)
    for refused in (
        lambda: fastadam.AdamW(param, num_threads=value),
        lambda: setattr(opt, "num_threads", value),
    ):
        with pytest.raises(error) as caught:
            refused()
        assert str(caught.value) == message
    assert opt.num_threads == 1


@pytest.mark.skipif(MOST < 2, reason="one processor")
def test_a_process_that_must_not_use_several_does_not(monkeypatch):
    """As a forked child, after its parent has used OpenMP."""
    from fastadam.cpu import stepper

    opt, params = make(2)
    assert parallel(opt) == [True]
    monkeypatch.setattr(stepper, "parallel_works", lambda: False)
    opt.num_threads = 2
    assert parallel(opt) == [False]
    thread_choice.balance[0] = 1e6
    assert opt.step([params[0].copy()]).step == 0
