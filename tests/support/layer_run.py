"""One cell of layers x uses: threads, forks, signals, torch. Run as ``layer_run.py CELL``.

Under NUMBA_THREADING_LAYER, each time in a process of its own: what fails here may kill the
process, or never end. A time limit is set from outside, whose SIGABRT shows where all threads are.
"""

import contextlib
import copy
import faulthandler
import functools
import hashlib
import inspect
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
import warnings
from pathlib import Path

import numba
import numpy as np

import fastadam

# Every count below is multiplied by this.
from fastadam.cpu import intrinsics, kernels

# Every count below is multiplied by this.
REPEAT = int(os.environ.get("FASTADAM_TEST_REPEAT", "1"))
STEPS, FORKS, INTERRUPTS = 50 * REPEAT, 20 * REPEAT, 40 * REPEAT

LARGE = kernels.SERIAL_BELOW + 4465  # in several threads, with a chunk that is not whole
TAIL = {"max_grad_norm": 1.0, "ema_decay": 0.9, "amsgrad": True, "weight_decay": 0.1}
KINDS = {
    "large": ([("f4", 3 * LARGE)], {}),
    "small": ([("f8", 1000)], {}),
    "mixed": ([("f4", LARGE), ("f8", LARGE)], {}),
    "clipped": ([("f4", LARGE)], {"max_grad_norm": 1.0}),
    "tail": ([("f4", LARGE), ("f8", LARGE)], TAIL),
}


@functools.cache
def draws(dtype, size, seed):
    """Return numbers that nobody may write to."""
    values = np.random.default_rng(seed).standard_normal(size, dtype)
    values.flags.writeable = False
    return values


class Task:
    """An optimizer of a kind, its parameters, and the gradients of all its steps."""

    def __init__(self, kind, seed=0, **options):
        arrays, own = KINDS[kind]
        self.kind, self.seed, self.options = kind, seed, options
        self.params = [draws(*array, seed).copy() for array in arrays]
        self.grads = [draws(*array, seed + 100) for array in arrays]
        self.opt = fastadam.Adam(self.params, lr=1e-3, **{**own, **options})

    def step(self, count=1):
        for _ in range(count):
            self.opt.step(self.grads)
        return self

    def digest(self):
        """Return one of every bit that a step writes."""
        state = self.opt.state
        counts = self.opt.step_count, *(state[k].pop("step") for k in range(len(self.params)))
        digest = hashlib.sha256(repr(counts).encode())
        for array in (*self.params, *(a for k in state for a in state[k].values())):
            digest.update(array)
        return digest.hexdigest()

    def check(self, what=""):
        """Be, bit for bit, where so many steps lead that are taken alone."""
        count = self.opt.step_count
        assert self.digest() == expected(self.kind, self.seed, count), (
            f"{self.kind} is at no whole step {count} {what}"
        )


_expected = {}


def expected(kind, seed, count):
    """Return the digest after so many steps; all of them on the way are kept."""
    if (kind, seed) not in _expected:
        task = Task(kind, seed)
        _expected[kind, seed] = task, [task.digest()]
    task, digests = _expected[kind, seed]
    while len(digests) <= count:
        digests.append(task.step().digest())
    return digests[count]


def check_layer():
    Task("large").step()
    layer, wanted = numba.threading_layer(), os.environ["NUMBA_THREADING_LAYER"]
    assert layer == wanted, f"the layer must be {wanted}, is {layer}"


def all_at_once(*functions):
    """Run each in a thread of its own, from a barrier on; raise what the first one raised."""
    barrier, errors = threading.Barrier(len(functions)), []

    def run(function):
        try:
            barrier.wait()
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@contextlib.contextmanager
def meanwhile(*functions, pause=0.0):
    """Have each called again and again in a thread of its own, for the time of a block."""
    stop, errors = threading.Event(), []

    def run(function):
        try:
            while not stop.wait(pause):
                function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]


def make_kernels_anew():
    """Forget the kernels, load some from the cache, and have them step rightly."""
    kernels.update_kernel.cache_clear()
    kernels.sum_kernel.cache_clear()
    for kind, options in (("large", {}), ("tail", {}), ("small", {"amsgrad": True})):
        task = Task(kind, **options).step()
        if not options:
            task.check("after its kernels were made anew")
    zeroed = [grad.copy() for grad in task.grads]
    task.opt.step(zeroed, zero_grad=True)
    assert not np.any(zeroed)


def compile_something():
    """Hold Numba's compiler lock."""
    numba.njit(lambda x: x + 1)(1)


def new_optimizers():
    for kind in ("small", "mixed"):
        Task(kind).step().check("in a new optimizer")


# ------------------------------------------------------------------------ threads


def warm():
    """Compile what the cells need, so that their time limits can be short."""
    before = kernels.SERIAL_BELOW
    for serial_below in (before, 2**60):
        kernels.SERIAL_BELOW = serial_below
        make_kernels_anew()
        new_optimizers()
        for kind in KINDS:
            Task(kind).step()
            Task(kind, num_threads=1).step()  # as in a child that may not use several
        things = objects()
        set_grads(things)
        fastadam.from_objects(things, **TAIL).step()
    kernels.SERIAL_BELOW = before


def threads():
    """Optimizers of several threads, each as it would be alone."""
    check_layer()
    kinds = ("large", "small", "mixed", "clipped")
    tasks = [[Task(kind, seed) for kind in kinds] for seed in range(4)]
    wanted = [
        [Task(kind, seed).step(STEPS).digest() for kind in kinds] for seed in range(len(tasks))
    ]

    def run(own):
        for _ in range(STEPS):
            for task in own:
                task.step()

    def compile_anew():
        """Compile, and not load, a variant that nobody else here uses."""
        me, cache = threading.current_thread(), intrinsics.KernelCache

        def no_cache(*arguments, **options):
            if threading.current_thread() is me:
                raise OSError("no folder")
            return cache(*arguments, **options)

        intrinsics.KernelCache = no_cache
        try:
            task = Task("small", ema_decay=0.5)
            grads = [grad.copy() for grad in task.grads]
            task.opt.step(grads, zero_grad=True)
        finally:
            intrinsics.KernelCache = cache
        assert not np.any(grads)

    expected("small", 0, 1)
    expected("mixed", 0, 1)
    for kind in ("large", "tail"):
        expected(kind, 0, 1)
    with meanwhile(new_optimizers, make_kernels_anew, pause=0.01):
        all_at_once(*(functools.partial(run, own) for own in tasks), compile_anew)
    assert [[task.digest() for task in own] for own in tasks] == wanted


def shared():
    """One optimizer in several threads: a step is taken whole, or refused."""
    check_layer()
    for kind in KINDS:
        task, twin = Task(kind), Task(kind)
        done, states = [], []

        def step(task=task, done=done):
            while len(done) < 3 * STEPS:
                with refusing():
                    done.append(task.opt.step(task.grads).step)

        def look(task=task, done=done, states=states):
            while len(done) < 3 * STEPS and len(states) < STEPS // 5:
                with refusing():
                    states.append(task.opt.state_dict())
                time.sleep(0)

        all_at_once(step, step, step, look)
        assert sorted(done) == list(range(len(done))), f"{kind}: {sorted(done)}"
        assert task.opt.step_count == len(done)
        for state in sorted(states, key=lambda state: state["step_count"]):
            twin.step(state["step_count"] - twin.opt.step_count)
            check_equal(state, twin.opt.state_dict(), f"{kind}: state_dict during a step")
        twin.step(len(done) - twin.opt.step_count)
        assert task.digest() == twin.digest(), f"{kind} is at no whole step {len(done)}"


@contextlib.contextmanager
def refusing():
    try:
        yield
    except RuntimeError as error:
        assert "in the middle of its own step" in str(error), error  # noqa: PT017


def check_equal(found, wanted, what):
    """Compare two state_dicts, or parts of them, bit for bit."""
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys(), what
        for key, value in wanted.items():
            check_equal(found[key], value, f"{what}: {key}")
    elif isinstance(wanted, np.ndarray):
        same = np.array_equal(found.view(f"u{found.itemsize}"), wanted.view(f"u{wanted.itemsize}"))
        assert same, f"{what} differs"
    else:
        assert found == wanted, f"{what}: {found!r} is not {wanted!r}"


def copies():
    """Copies made beside a thread that steps: whole ones, or refused; the steps never are."""
    check_layer()
    ways = (
        lambda pair: copy.deepcopy(pair),
        lambda pair: copy.deepcopy(pair[::-1])[::-1],
        lambda pair: pickle.loads(pickle.dumps(pair[::-1]))[::-1],
    )
    for kind in ("large", "tail", "small"):
        task, twin, made = Task(kind), Task(kind), []

        def step(task=task):
            task.step()
            time.sleep(1e-3)

        with meanwhile(step):
            for way in ways:
                whole = 0
                for _ in range(2_000):
                    try:
                        made.append(way((task.params, task.opt)))
                        whole += 1
                    except RuntimeError as error:
                        assert "own step" in str(error) or "between two steps" in str(error), error  # noqa: PT017
                    if whole == 5:
                        break
        assert made, "no copy at all"
        for params, opt in sorted(made, key=lambda pair: pair[1].step_count):
            twin.step(opt.step_count - twin.opt.step_count)
            check_equal(opt.state_dict(), twin.opt.state_dict(), f"{kind}: a copy")
            check_equal(dict(enumerate(params)), dict(enumerate(twin.params)), f"{kind}: copied")


# -------------------------------------------------------------------------- forks


def in_child(function):
    """Fork; call a function in the child; fail if it fails, or if the child is killed."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            function()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    wait_for(pid)


def wait_for(pid):
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code == 0, f"a forked child ended with {code}"


def use(tasks):
    """Step what a child has inherited, and what it makes itself."""
    for task in tasks:
        task.check("right after the fork")
        task.step(2).check("in a child")
    Task("clipped").step(2).check("in a child's own optimizer")


def fork():
    """Children, and theirs, before and after the first step in several threads."""
    learn_from_a_child()
    in_child(check_layer)  # nothing has been launched yet
    tasks = [Task(kind) for kind in KINDS]
    in_child(functools.partial(use, tasks))
    check_layer()
    for task in tasks:
        task.step(2)
    in_child(lambda: (use(tasks), in_child(lambda: use(tasks)), use(tasks)))
    for task in tasks:
        task.step(2).check("after forks")

    # In the middle of a step, as a signal's handler may: the child goes its own way.
    task, *others = tasks
    task.opt.schedule = lambda _step: in_child(lambda: use(others)) or 1.0
    task.step()
    task.opt.schedule = None
    task.check("after a fork in the middle of a step")


def learn_from_a_child(count=12):
    """Have the expected digests without a step in this process."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    in_child(
        lambda: sender.send({kind: [expected(kind, 0, k) for k in range(count)] for kind in KINDS})
    )
    for kind, digests in receiver.recv().items():
        _expected[kind, 0] = None, digests


def with_torch():
    """Children of a process that uses torch on the CPU too: all of it works in them."""
    import torch

    torch.set_num_threads(2)  # of the GNU OpenMP that Numba's omp uses as well

    def use_torch():
        assert torch.ones(2_000_000).mul_(2).sum() == 4e6

    def in_the_child():
        use_torch()
        use(tasks)
        in_child(lambda: (use(tasks), use_torch()))
        use_torch()

    use_torch()
    learn_from_a_child()
    tasks = [Task(kind) for kind in KINDS]
    in_child(in_the_child)  # nothing has been launched yet
    check_layer()
    for task in tasks:
        task.step(2)
    in_child(in_the_child)
    use_torch()
    all_at_once(lambda: in_child(in_the_child))  # from a thread that has used neither
    by_multiprocessing("fork")
    for task in tasks:
        task.step(2).check("after forks")


def fork_busy():
    """Children of a process whose other threads are stepping and compiling."""
    check_layer()
    kinds, longest = ("large", "mixed", "tail"), 30
    for kind in (*kinds, "clipped"):
        expected(kind, 0, longest + 4)
    slots = {kind: Task(kind) for kind in kinds}

    def steps_of(kind):
        def run():
            task = slots[kind] = Task(kind)
            task.step(longest)
            task.check("beside forks")

        return run

    def in_the_child():
        use(list(slots.values()))
        if k in (0, 1):
            make_kernels_anew()

    others = compile_something, make_kernels_anew
    with meanwhile(*map(steps_of, kinds)), meanwhile(*others, pause=0.01):
        for k in range(FORKS):
            if k % 2:
                in_child(in_the_child)
            else:  # from another thread than the main one
                all_at_once(lambda: in_child(in_the_child))


def work(connection, tasks):
    """Step in a process of multiprocessing, to which tasks came by pickle or by fork."""
    with connection:
        for task in tasks:
            task.check("as it came to a process")
            task.step(3).check("in a process")
        Task("tail").step(2).check("in a process's own optimizer")
        connection.send((tasks, [task.digest() for task in tasks]))


def by_multiprocessing(method):
    """Two processes, which get optimizers in the middle of their way, and send them back."""
    check_layer()
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(["fastadam"])
    processes = []
    for kinds in (("large", "tail"), ("mixed", "clipped", "small")):
        tasks = [Task(kind).step(2) for kind in kinds]
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=work, args=(sender, tasks))
        process.start()
        sender.close()
        processes.append((process, receiver, tasks))
    for process, receiver, tasks in processes:
        with contextlib.suppress(EOFError):  # it ended without a word
            sent, digests = receiver.recv()
        process.join()
        assert process.exitcode == 0, f"a process ended with {process.exitcode}"
        assert digests == [task.step(3).digest() for task in tasks]
        for task in sent:
            task.step().check("as it came back")


# ------------------------------------------------------------------------ signals

PACKAGE = str(Path(fastadam.__file__).parent)


def inside(frame):
    """Whether a frame is the package's, or was called from it."""
    while frame is not None:
        if frame.f_code.co_filename.startswith(PACKAGE):
            return True
        frame = frame.f_back
    return False


def is_silent(frame):
    """Whether a call is reported before which no signal is handled.

    Numba reports its kernels, Python a generator that is closed.
    """
    compiled = (
        kernels.update_serial,
        kernels.update_parallel,
        kernels.measure_serial,
        kernels.measure_parallel,
        kernels.look_at,
    )
    names = {function.__name__ for function in compiled}
    return frame.f_code.co_name in names or frame.f_code.co_flags & inspect.CO_GENERATOR


class Interrupts:
    """Ctrl-C at random moments, but only in the package; at most one a block."""

    def __init__(self, longest):
        self.rng, self.longest, self.count = np.random.default_rng(7), longest, 0

    def handle(self, _signal, frame):
        if inside(frame):
            self.count += 1
            raise KeyboardInterrupt
        self.arm(20e-6)

    def arm(self, delay):
        signal.setitimer(signal.ITIMER_REAL, delay)

    def __iter__(self):
        """Give the function that runs another until an interrupt, or a good while."""
        signal.signal(signal.SIGALRM, self.handle)
        for _ in range(10 * INTERRUPTS):
            if self.count >= INTERRUPTS:
                break
            yield self.until_interrupt
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        assert self.count >= INTERRUPTS, f"only {self.count} interrupts"

    def until_interrupt(self, function):
        try:
            self.arm(float(self.rng.uniform(10e-6, self.longest)))
            for _ in range(100):
                function()
        except KeyboardInterrupt:
            pass
        finally:
            self.arm(0)


def at_every_call(function):
    """Interrupt a function at its first call or return of a call, the second, until it ends.

    Before the body of a Python function and after the call of a C function, Python handles
    signals: this is every such moment in the package, but for those in loops and kernels.
    By a signal, whose handler may be put off. Yields after each interrupt.
    """

    def interrupt(_signal, _frame):
        raise KeyboardInterrupt

    signal.signal(signal.SIGALRM, interrupt)
    moment = 0
    while True:
        left = moment = moment + 1

        def trace(frame, event, _argument):
            nonlocal left
            if event == "c_return" or (event == "call" and not is_silent(frame)):
                if not inside(frame):
                    return
                left -= 1
                if left == 0:
                    signal.raise_signal(signal.SIGALRM)

        try:
            sys.setprofile(trace)
            function()
        except KeyboardInterrupt:
            pass
        finally:
            sys.setprofile(None)
        if left > 0:
            assert moment > 1
            return
        yield moment


def signals():
    """Whatever is interrupted, in whatever moment, is done or not done."""
    check_layer()
    failed = False
    for part in (
        interrupted_steps,
        interrupted_loads,
        interrupted_objects,
        interrupted_forks,
        steps_in_a_handler,
    ):
        try:
            part()
        except Exception:
            traceback.print_exc()
            failed = True
    assert not failed


def interrupted_steps():
    beside = Task("mixed", seed=1)
    with meanwhile(beside.step):  # hangs if an interrupt leaves a lock behind
        interrupt_steps()
    twin = Task("mixed", seed=1).step(beside.opt.step_count)
    assert beside.digest() == twin.digest()


def interrupt_steps():
    for kind, longest in (("tail", 2e-3), ("mixed", 1e-3), ("small", 1e-4)):
        task, twin = Task(kind).step(), Task(kind)

        def check(what, task=task, twin=twin):
            twin.step(task.opt.step_count - twin.opt.step_count)
            counts = {k: state["step"] for k, state in task.opt.state.items()}
            assert set(counts.values()) == {task.opt.step_count}, f"{what}: {counts}"
            check_equal(task.opt.state, twin.opt.state, what)
            check_equal(dict(enumerate(task.params)), dict(enumerate(twin.params)), what)

        for until_interrupt in Interrupts(longest):
            until_interrupt(task.step)
            check(f"{kind}, interrupted at random")
        for moment in at_every_call(task.step):
            check(f"{kind}, interrupted at call {moment}")
        task.step()
        check(f"{kind}, after interrupts")


def interrupted_loads():
    for kind, longest in (("tail", 3e-3), ("small", 1e-4)):
        task = Task(kind).step(2)
        old = task.opt.state_dict()
        task.opt.lr = 0.5
        task.opt.param_groups[0]["weight_decay"] = 0.25
        new = task.step(2).opt.state_dict()
        params = [param.copy() for param in task.params]
        turn = 0

        def load(task=task, old=old, new=new):
            nonlocal turn
            turn += 1
            task.opt.load_state_dict((old, new)[turn % 2])

        def check(what, task=task, old=old, new=new, params=params):
            found = task.opt.state_dict()
            whole = old if found["step_count"] == old["step_count"] else new
            check_equal(found, whole, what)
            check_equal(dict(enumerate(task.params)), dict(enumerate(params)), what)

        for until_interrupt in Interrupts(longest):
            until_interrupt(load)
            check(f"{kind}, load_state_dict interrupted at random")
        for moment in at_every_call(load):
            check(f"{kind}, load_state_dict interrupted at call {moment}")
        task.opt.load_state_dict(old)
        task.step().opt.load_state_dict(new)


class Value:
    """What `fastadam.from_objects` takes."""

    def __init__(self, data):
        self.data, self.grad = data, 0.0


def objects(scalars=100, size=LARGE):
    arrays = [Value(draws(dtype, size, 0).copy()) for dtype in ("f4", "f8")]
    for value in arrays:
        value.grad = np.zeros_like(value.data)
    return [*(Value(float(x)) for x in draws("f8", scalars, 0)), *arrays]


def set_grads(things):
    for k, thing in enumerate(things):
        if isinstance(thing.data, float):
            thing.grad = 1.0 + k
        else:
            thing.grad[:] = draws(thing.data.dtype.str, thing.data.size, 100)


def interrupted_objects():
    for scalars, size in ((100, LARGE), (5, 10)):
        (things, opt), (others, twin) = (
            (own, fastadam.from_objects(own, **TAIL))
            for own in (objects(scalars, size), objects(scalars, size))
        )

        def step(things=things, opt=opt):
            set_grads(things)
            opt.step()

        def check(what, things=things, opt=opt, others=others, twin=twin):
            while twin.step_count < opt.step_count:
                set_grads(others)
                twin.step()
            check_equal(opt.state_dict(), twin.state_dict(), what)
            for k, (thing, other) in enumerate(zip(things, others, strict=True)):
                check_equal(thing.data, other.data, f"{what}: objects[{k}].data")

        step()
        check("from_objects")
        for until_interrupt in Interrupts(5e-3 if size == LARGE else 3e-4):
            until_interrupt(step)
            check("from_objects interrupted at random")
    set_grads(things)
    before = opt.step_count
    for moment in at_every_call(opt.step):
        what = f"from_objects interrupted at call {moment}"
        check(what)
        # Gradients are all used up, or all still there.
        left = {bool(np.any(thing.grad)) for thing in things}
        assert left == {opt.step_count == before}, (
            f"{what}: {opt.step_count - before} steps further, gradients left: {left}"
        )
        set_grads(things)
        before = opt.step_count


def interrupted_forks():
    """A fork is not kept from by Ctrl-C, which Python drops there, and leaves no lock behind."""
    if not hasattr(os, "fork"):
        return
    task = Task("tail").step()
    with quiet_unraisable():
        for _moment in at_every_call(lambda: in_child(lambda: None)):
            all_at_once(task.step)
            task.check("after an interrupted fork")


@contextlib.contextmanager
def quiet_unraisable():
    before, sys.unraisablehook = sys.unraisablehook, lambda *_: None
    try:
        yield
    finally:
        sys.unraisablehook = before


def steps_in_a_handler():
    """A handler that steps another optimizer, or forks, in the middle of a step."""
    task, other = Task("tail").step(), Task("mixed").step()
    handled = 0

    def handle(_signal, frame):
        nonlocal handled
        if inside(frame):
            handled += 1
            other.step()
            if handled % 10 == 0 and hasattr(os, "fork"):
                in_child(lambda: use([other]))

    signal.signal(signal.SIGALRM, handle)
    rng = np.random.default_rng(8)
    while handled < 20:
        signal.setitimer(signal.ITIMER_REAL, float(rng.uniform(10e-6, 1e-3)))
        while signal.getitimer(signal.ITIMER_REAL)[0]:
            task.step()
    for each in (task, other):
        each.check("beside the handler of a signal")


CELLS = {
    "warm": warm,
    "threads": threads,
    "shared": shared,
    "copies": copies,
    "fork": fork,
    "torch": with_torch,
    "fork-busy": fork_busy,
    "mp-fork": functools.partial(by_multiprocessing, "fork"),
    "mp-forkserver": functools.partial(by_multiprocessing, "forkserver"),
    "mp-spawn": functools.partial(by_multiprocessing, "spawn"),
    "signal": signals,
}

if __name__ == "__main__":
    faulthandler.enable()
    # Python 3.12 and later warn of every fork where there are threads.
    warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
    sys.setswitchinterval(2e-4)  # the more often threads take turns, the more is seen
    CELLS[sys.argv[1]]()
    print("ok")
