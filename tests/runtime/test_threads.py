"""First use, forks, copies and signals, in the midst of one another."""

import copy
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest

import fastadam
from fastadam.runtime import undisturbed

pytestmark = pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")

# What every script below begins with. A step of so many elements is taken in several threads.
BEGIN = """
import os, signal, sys

def use(count=200_000):
    import numpy as np
    import fastadam
    param = np.ones(count)
    fastadam.Adam(param, lr=0.5).step(np.ones(count))
    assert abs(param - 0.5).max() < 1e-6, param

def in_child(function):
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            signal.alarm(40)  # ends a child that hangs
            function()
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0
"""
# Has a function called once, in the midst of the import of a module.
FINDER = """
def when_importing(module, during):
    class Finder:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name == module and Finder in sys.meta_path:
                sys.meta_path.remove(Finder)
                during()

    sys.meta_path.insert(0, Finder)
"""


def run(code, *options, begin=BEGIN, **env):
    """Run a script in a new process, which must end well; return what it prints."""
    done = subprocess.run(
        [sys.executable, *options, "-c", begin + textwrap.dedent(code)],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


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


@pytest.mark.full
def test_ctrl_c_while_numba_compiles(tmp_path):
    """An exception in the middle of it would leave Numba unusable."""
    code = """
        import signal, threading
        import numpy as np
        import fastadam

        # Which a shell's job in the background ignores.
        signal.signal(signal.SIGINT, signal.default_int_handler)
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


# --------------------------------------------------------------------- first use


def test_first_use_in_several_threads():
    code = """
        import threading
        import fastadam

        barrier, failed = threading.Barrier(4), []

        def first():
            barrier.wait()
            try:
                use(3)
            except BaseException as error:
                failed.append(error)

        threads = [threading.Thread(target=first) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        print(failed)
    """
    assert run(code) == "[]\n"


@needs_fork
@pytest.mark.parametrize(
    ("module", "first"),
    [
        ("numba.core.typing", "use(3)"),
        ("numpy.ma", "use(3)"),
        ("fastadam.checkpoint", "fastadam.load"),
        ("fastadam.schedules", "fastadam.schedules"),
    ],
)
def test_a_fork_during_the_first_use_of_another_thread(module, first):
    code = """
        import threading, time
        import fastadam

        importing, forking = threading.Event(), threading.Event()

        def during():
            importing.set()
            forking.wait()
            time.sleep(0.1)

        def first():
            FIRST

        when_importing("MODULE", during)
        thread = threading.Thread(target=first)
        thread.start()
        while thread.is_alive() and not importing.wait(0.1):
            pass  # older versions of NumPy have imported its part before
        forking.set()
        in_child(first)
        thread.join()
        first()
        print("done")
    """.replace("FIRST", first).replace("MODULE", module)
    assert run(code, begin=BEGIN + FINDER) == "done\n"


@pytest.mark.parametrize("module", ["llvmlite.binding", "numba.core.byteflow"])
def test_ctrl_c_during_first_use(module):
    """An exception in the middle of its import would leave Numba unusable."""
    code = """
        import fastadam

        # Which a shell's job in the background ignores.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        when_importing("MODULE", lambda: signal.raise_signal(signal.SIGINT))
        try:
            use(3)
        except KeyboardInterrupt:
            print("interrupted")
        use(3)
        print("done")
    """
    out = run(code.replace("MODULE", module), begin=BEGIN + FINDER)
    assert out == "interrupted\ndone\n"


# --------------------------------------------------------------------- embedding


def test_threading_first_imported_by_another_thread():
    """As in a program that embeds Python: `threading` then takes that for the main thread."""
    code = """
        import _thread
        assert "threading" not in sys.modules

        ended = _thread.allocate_lock()
        ended.acquire()

        def work():
            try:
                use()
                import threading
                assert threading.current_thread() is threading.main_thread()
                if hasattr(os, "fork"):
                    in_child(use)
                print("done", flush=True)
            finally:
                ended.release()

        _thread.start_new_thread(work, ())
        ended.acquire()
        os._exit(0)  # Python itself has trouble ending there
    """
    assert run(code) == "done\n"


def test_a_sub_interpreter():
    inner = """
        import warnings
        warnings.simplefilter("ignore")
        try:
            import numpy
        except ImportError:
            print("none", flush=True)
        else:
            use()
            print("done", flush=True)
    """
    code = """
        try:
            import _xxsubinterpreters as interpreters
        except ImportError:
            print("none")
        else:
            interpreters.run_string(interpreters.create(), os.environ["TEST_INNER"])
            sys.stdout.flush()
            os._exit(0)
    """
    out = run(code, TEST_INNER=BEGIN + textwrap.dedent(inner))
    if out == "none\n":
        pytest.skip("sub-interpreters cannot be had here, or NumPy not in them")
    assert out == "done\n"


@needs_fork
def test_near_the_limit_of_recursion():
    """No endless loop, no lock left behind, and each signal has its handler again."""
    code = """
        import inspect, threading
        import numba
        import fastadam
        from fastadam.runtime import undisturbed

        def handlers():
            return {number: signal.getsignal(number) for number in signal.valid_signals()}

        def climb(height, function):
            if height == 0:
                function()
            else:
                climb(height - 1, function)

        def put_off():
            with undisturbed():
                pass

        def fork():
            in_child(lambda: None)

        use()
        before = handlers()
        most = sys.getrecursionlimit() - len(inspect.stack())
        for function in (put_off, fork):
            reached = 0
            for left in range(50):
                try:
                    climb(most - left, function)
                    reached += 1
                except RecursionError:
                    pass
            assert 0 < reached < 50, reached
        assert handlers() == before
        others = [use, lambda: numba.njit(lambda x: x + 1)(1)]
        threads = [threading.Thread(target=each) for each in others]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        in_child(use)
        print("done")
    """
    assert run(code) == "done\n"


# -------------------------------------------------------------------- GNU OpenMP


@pytest.mark.skipif(sys.platform != "linux", reason="GNU OpenMP")
def test_first_import_in_the_child_of_a_process_that_has_used_torch(optional):
    optional("torch")
    code = """
        import torch
        torch.set_num_threads(2)
        torch.ones(5_000_000).mul_(2)
        in_child(lambda: (use(), in_child(use)))
        assert "fastadam" not in sys.modules
        use()
        print("done")
    """
    assert run(code, NUMBA_THREADING_LAYER="omp", NUMBA_NUM_THREADS="2") == "done\n"


@pytest.mark.skipif(sys.platform != "linux", reason="GNU OpenMP")
def test_who_came_by_a_fork():
    """Not a forkserver's children: they may use GNU OpenMP, which they have loaded themselves."""
    code = """
        import multiprocessing
        from fastadam.runtime import _came_by_fork

        assert not _came_by_fork()
        for method, forked in (("fork", True), ("forkserver", False), ("spawn", False)):
            with multiprocessing.get_context(method).Pool(1) as pool:
                assert pool.apply(_came_by_fork) == forked, method
        print("done")
    """
    assert run(code, "-W", "ignore") == "done\n"


# ------------------------------------------------------------------------ copies


class Meddler:
    """Does something in the midst of being copied or pickled."""

    def __init__(self, meddle):
        self.meddle = meddle

    def __call__(self, _step):
        return 1.0

    def __deepcopy__(self, memo):
        self.meddle()

    def __reduce__(self):
        self.meddle()
        return bool, ()


class Box:
    def __init__(self, data, grad):
        self.data, self.grad, self.beside = data, grad, None


def in_thread(function):
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()


def through_pickle(thing):
    return pickle.loads(pickle.dumps(thing))


duplicates = pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle])
between = "between two steps, got a step in the middle"


@duplicates
@pytest.mark.parametrize("meddle", ["step", "load", "group"])
def test_a_copy_is_refused_in_whose_midst_another_thread_writes(duplicate, meddle):
    opt = fastadam.Adam(np.ones(3))
    opt.step(np.ones(3))
    saved = opt.state_dict()
    saved["state"][0]["exp_avg"] *= 2
    meddles = {
        "step": lambda: opt.step(np.ones(3)),
        "load": lambda: opt.load_state_dict(saved),
        "group": lambda: opt.add_param_group({"params": [np.ones(2)]}),
    }
    opt.schedule = Meddler(lambda: in_thread(meddles[meddle]))
    with pytest.raises(RuntimeError, match=between):
        duplicate(opt)
    opt.schedule = None
    twin = duplicate(opt)
    assert twin.step_count == opt.step_count
    np.testing.assert_array_equal(twin.state[0]["exp_avg"], opt.state[0]["exp_avg"])


def test_params_copied_a_step_before_the_optimizer():
    param = np.array([1.0, np.nan])
    opt = fastadam.Adam(param)
    step = Meddler(lambda: opt.step(np.ones(2)))
    with pytest.raises(RuntimeError, match=between):
        copy.deepcopy((param, step, opt))
    copied, _, twin = copy.deepcopy((opt, step, param))  # whole, and a step behind
    assert copied.step_count == opt.step_count - 1
    copied.step(np.ones(2))
    np.testing.assert_array_equal(twin, param)
    twin, copied = copy.deepcopy((param, opt))
    np.testing.assert_array_equal(twin, param)


@duplicates
def test_a_copy_is_refused_whose_objects_step_meanwhile(duplicate):
    boxes = [Box(1.0, 1.0), Box(np.ones(2), np.ones(2))]
    opt = fastadam.from_objects(boxes)
    boxes[0].beside = Meddler(opt.step)
    with pytest.raises(RuntimeError, match=between):
        duplicate(opt)
    with pytest.raises(RuntimeError, match=between):
        copy.deepcopy((boxes, opt))
    boxes[0].beside = None
    twins, copied = duplicate((boxes, opt))
    assert copied.step_count == opt.step_count == 2
    assert twins[0].data == boxes[0].data
    np.testing.assert_array_equal(twins[1].data, boxes[1].data)
