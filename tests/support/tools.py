"""What several test files need: pictures of an optimizer, ways to run its kernels."""

import contextlib
import re
import subprocess
import sys

import numba
import numpy as np
import pytest

from fastadam.cpu import kernels

DTYPES = ("f4", "f8")


def flat(groups):
    return [array for group in groups for array in group]


def picture(opt, params):
    """Return every bit that a step may write, gradients aside."""
    state = opt.state_dict()
    arrays = [*params, *(a for s in state["state"].values() for a in s.values())]
    return [np.array(a).tobytes() for a in arrays], state["step_count"]


def full_picture(opt):
    """Return all there is of an optimizer: each bit, what it is set to, where its arrays lie."""
    opt = getattr(opt, "optimizer", opt)
    states = opt._groups.states
    held = [array for state in states for array in state.arrays(param=True).values()]
    groups = [
        # A step makes its own what is equal: a tuple of a list, a float of an int.
        {n: tuple(v) if isinstance(v, list) else v for n, v in group.items() if n != "params"}
        for group in opt.param_groups
    ]
    arrays = [tuple(map(id, group["params"])) for group in opt.param_groups]
    return {
        "bits": [array.tobytes() for array in held],
        "counts": (opt.step_count, opt._stepper.steps.tolist()),
        "groups": groups,
        "settings": (opt.schedule, opt.max_grad_norm, opt.nonfinite),
        "structure": (opt.ema_decay, opt.amsgrad, [state.key for state in states]),
        "defaults": {**opt._groups.defaults},
        "places": (arrays, [(id(array), array.ctypes.data) for array in held]),
    }


def load(opt, step, **moments):
    """Put every parameter, and the optimizer, after ``step`` steps, with these moments."""
    state = opt.state_dict()
    for own in state["state"].values():
        own["step"] = step
        for name, values in moments.items():
            own[name][...] = values
    state["step_count"] = step
    opt.load_state_dict(state)


@contextlib.contextmanager
def way(name):
    """Make and run optimizers in ``serial``, in ``parallel``, or so in 1 or 2 threads."""
    kind, _, count = name.partition("-")
    before = numba.get_num_threads()
    if count and int(count) > before:
        pytest.skip("one processor")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "SERIAL_BELOW", 2**60 if kind == "serial" else 0)
        try:
            if count:
                numba.set_num_threads(int(count))
            yield
        finally:
            numba.set_num_threads(before)


# The threads are counted when a step is taken, the path is chosen when an optimizer is made.
WAYS = ("serial", "parallel-1", "parallel-2")
PATHS = ("serial", "parallel")


def run_pytest(files, chosen, at_least, cwd, env, *options, seconds):
    """Run tests in a process of their own: so many must pass, and none be skipped."""
    usual = ["-q", "-rf", "--tb=short", "-p", "no:cacheprovider", "-k", chosen]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *usual, *options, *map(str, files)],
        env=env,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    output = f"{done.stdout[-20_000:]}\n{done.stderr[-5_000:]}"
    if done.returncode:
        pytest.fail(output, pytrace=False)
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, output
    assert int(passed[1]) >= at_least, output
    assert "skipped" not in done.stdout, output
