"""Signals that are put off, and what one of them must not break."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import weakref

import pytest

from fastadam._threads import emptying, in_one_go, undisturbed

pytestmark = pytest.mark.skipif(os.name == "nt", reason="POSIX signals")


class StopError(Exception):
    pass


@pytest.fixture
def handlers():
    """Handlers that note what came, of SIGINT and SIGTERM; the first raises."""
    came = []

    def stop(number, _):
        came.append(number)
        raise StopError

    before = [
        signal.signal(signal.SIGINT, stop),
        signal.signal(signal.SIGTERM, lambda number, _: came.append(number)),
    ]
    yield came, stop
    signal.signal(signal.SIGINT, before[0])
    signal.signal(signal.SIGTERM, before[1])


def test_handlers_wait_and_each_has_its_turn(handlers):
    came, stop = handlers

    @undisturbed()
    def work():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert not came

    with pytest.raises(StopError):
        work()
    assert came == [signal.SIGINT, signal.SIGTERM]
    assert signal.getsignal(signal.SIGINT) is stop


def test_one_in_another(handlers):
    came, stop = handlers

    @undisturbed()
    def work():
        with undisturbed():
            signal.raise_signal(signal.SIGINT)
        assert not came

    with pytest.raises(StopError):
        work()
    assert came == [signal.SIGINT]
    assert signal.getsignal(signal.SIGINT) is stop


def test_an_error_goes_through(handlers):
    _, stop = handlers
    with pytest.raises(ZeroDivisionError), undisturbed():
        1 / 0  # noqa: B018
    assert signal.getsignal(signal.SIGINT) is stop


def test_other_threads_put_nothing_off(handlers):
    """Only the main thread runs handlers, and only it may set them."""
    seen = []

    def work():
        with undisturbed():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [handlers[1]]


def test_a_source_is_let_go_as_it_is_taken():
    class Source:
        pass

    sources = [Source() for _ in range(3)]
    alive = [weakref.ref(source) for source in sources]
    taken = emptying(sources)
    counts = []

    def take(_):
        counts.append(sum(ref() is not None for ref in alive))

    in_one_go(zip([take] * 3, taken, strict=False))
    assert counts == [3, 2, 1]


@pytest.mark.full
def test_ctrl_c_while_numba_compiles(tmp_path):
    """An exception in the middle of it would leave Numba unusable."""
    code = """
        import signal, threading
        import numpy as np
        import fastadam

        params = [np.zeros(70_000), np.zeros(3, "f4")]
        grads = [np.ones_like(param) for param in params]
        opt = fastadam.Adam(params, max_grad_norm=1.0)
        fastadam.Adam(np.zeros(2))  # imports Numba
        done = threading.Event()

        def interrupt():
            while not done.wait(0.05):
                signal.raise_signal(signal.SIGINT)

        thread = threading.Thread(target=interrupt)
        thread.start()
        interrupts = 0
        while not opt.step_count:
            try:
                opt.step(grads)
            except KeyboardInterrupt:
                interrupts += 1
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        done.set()
        thread.join()
        opt.step(grads)
        print(interrupts > 0, opt.step_count, (params[0] < 0).all() and (params[1] < 0).all())
    """
    env = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("True 2 True\n", "")
