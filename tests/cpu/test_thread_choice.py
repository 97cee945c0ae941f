"""One thread or several: what is chosen in a machine that is made up, and that kernels obey."""

from itertools import count

import numba
import numpy as np
import pytest

import fastadam
from fastadam.cpu import kernels, thread_choice

several, note = thread_choice.use_several.py_func, thread_choice.note.py_func
ELEMENTS = 100_000
SERIAL, PARALLEL, STALLED = 40_000, 22_000, 3_000_000  # nanoseconds a pass


@pytest.fixture(autouse=True)
def own_balance(monkeypatch):
    """An balance that other tests, and a busy machine, have not written to."""
    balance = np.zeros(1)
    monkeypatch.setattr(thread_choice, "balance", balance)
    return balance


def run(balance, passes, serial, parallel, state=None, *, waits=True):
    """Make passes that take as long as they are given; return the times, and how many threads."""
    state = thread_choice.new_state() if state is None else state
    times, chosen = [], []
    for step in range(passes):
        many = several(state, balance)
        took = (parallel if many else serial)(step)
        note(state, balance, many, ELEMENTS, took, took - PARALLEL if waits else 100)
        times.append(took)
        chosen.append(many)
    return np.array(times, dtype=float), np.array(chosen)


def always(time):
    return lambda _: time


def test_an_idle_machine_takes_several(own_balance):
    times, chosen = run(own_balance, 4096, always(SERIAL), always(PARALLEL))
    assert np.flatnonzero(~chosen).tolist() == [1, 7, 31, 127, 511, 2047]
    assert times.mean() < 1.01 * PARALLEL


@pytest.mark.parametrize("every", [1, 2, 130])
def test_a_busy_machine_costs_a_small_part(own_balance, every):
    """Stalls in each parallel pass, or in some: never much more than one thread needs."""
    passes = count()

    def parallel(_):
        return STALLED if next(passes) % every == 0 else PARALLEL

    times, chosen = run(own_balance, 4096, always(SERIAL), parallel)
    assert times[20:].mean() < 1.1 * SERIAL
    assert chosen.mean() < 0.5


def test_a_machine_that_becomes_idle_is_noticed(own_balance):
    state = thread_choice.new_state()
    run(own_balance, 2000, always(SERIAL), always(STALLED), state)
    _, chosen = run(own_balance, 3000, always(SERIAL), always(PARALLEL), state)
    assert chosen[1500:].mean() > 0.99


def test_one_that_becomes_busy_too(own_balance):
    state = thread_choice.new_state()
    run(own_balance, 1000, always(SERIAL), always(PARALLEL), state)
    _, chosen = run(own_balance, 100, always(SERIAL), always(STALLED), state)
    assert chosen.sum() <= 3


def test_a_short_interruption_changes_nothing(own_balance):
    state = thread_choice.new_state()
    run(own_balance, 1000, always(SERIAL), always(PARALLEL), state)
    _, chosen = run(
        own_balance, 1000, always(SERIAL), lambda k: STALLED if k == 500 else PARALLEL, state
    )
    assert chosen.mean() > 0.99


def test_a_pass_that_is_slow_without_waiting_changes_nothing(own_balance):
    """As one over denormal numbers."""
    state = thread_choice.new_state()
    run(own_balance, 100, always(SERIAL), always(PARALLEL), state)
    _, chosen = run(
        own_balance, 100, always(SERIAL), lambda k: 100 * STALLED if k == 5 else PARALLEL, state,
        waits=False,
    )  # fmt: skip
    assert chosen.mean() >= 0.99


def test_minutes_in_which_the_process_stood_still_do_not_count(own_balance):
    state = thread_choice.new_state()
    run(own_balance, 100, always(SERIAL), always(PARALLEL), state)
    _, chosen = run(
        own_balance, 10_000, always(SERIAL), lambda k: 10**12 if k == 5 else PARALLEL, state
    )
    assert chosen[-5000:].mean() > 0.99


def test_an_interrupted_measurement_is_made_again(own_balance):
    """The second pass took a hundred times as long: several threads seem a bargain until then."""
    state = thread_choice.new_state()
    serial = iter([100 * SERIAL])
    run(own_balance, 8192, lambda _: next(serial, SERIAL), always(STALLED), state)
    assert state[thread_choice.SERIAL] == pytest.approx(SERIAL / ELEMENTS)


def test_passes_over_few_of_the_elements_are_judged_by_what_they_do(own_balance):
    """Optimizers of which now one, now another half has gradients."""
    state, chosen = thread_choice.new_state(), []
    for step in range(1000):
        part = 0.1 if step % 2 else 1.0
        chosen.append(several(state, own_balance))
        took = part * (PARALLEL if chosen[-1] else SERIAL)
        note(state, own_balance, chosen[-1], part * ELEMENTS, took, 100)
    assert np.mean(chosen) > 0.99


@pytest.mark.skipif(numba.config.NUMBA_NUM_THREADS < 2, reason="one processor")
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}], ids=["plain", "clip"])
class TestKernels:
    def make(self, options):
        param = np.ones(kernels.SERIAL_BELOW + 5)
        opt = fastadam.Adam(param, **options)
        fastadam.compile(opt)
        return opt, param

    def test_they_obey(self, own_balance, options):
        """An overdrawn balance is paid into, by passes of one thread alone."""
        opt, param = self.make(options)
        own_balance[0] = -1e12
        for _ in range(3):
            opt.step(param.copy())
        assert own_balance[0] > -1e12
        (context,) = opt._stepper.contexts
        serial = [state[thread_choice.SERIAL] > 0.0 for state in context.choices]
        assert serial == [True, bool(options)]

    def test_numbas_own_count_of_threads_stays(self, own_balance, options):
        opt, param = self.make(options)
        before = numba.get_num_threads()
        for balance in (1e6, -1e12):
            own_balance[0] = balance
            opt.step(param.copy())
            assert numba.get_num_threads() == before

    def test_the_bits_are_the_same(self, own_balance, options):
        found = set()
        for balance in (1e6, -1e12):
            opt, param = self.make(options)
            for _ in range(5):
                own_balance[0] = balance
                result = opt.step(np.linspace(-1, 1, param.size))
            found.add((param.tobytes(), result))
        assert len(found) == 1

    def test_one_thread_is_no_choice(self, own_balance, options):
        """What was asked for with `numba.set_num_threads` is neither timed nor counted."""
        before = numba.get_num_threads()
        opt, param = self.make(options)
        numba.set_num_threads(1)
        try:
            for _ in range(3):
                opt.step(param.copy())
        finally:
            numba.set_num_threads(before)
        assert own_balance[0] == 0.0

    def test_few_elements_with_gradients_are_no_measure(self, own_balance, options):
        """Their time is that of a call, not of elements."""
        params = [np.ones(kernels.SERIAL_BELOW), np.ones(8)]
        opt = fastadam.Adam(params, **options)
        for _ in range(10):
            opt.step([None, np.ones(8)])
        (context,) = opt._stepper.contexts
        assert own_balance[0] == 0.0
        assert all(state[thread_choice.SERIAL] == 0.0 for state in context.choices)
