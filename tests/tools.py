"""What several test files need: pictures of an optimizer, ways to run its kernels."""

import contextlib

import numba
import numpy as np
import pytest

from fastadam import _cpu


def flat(groups):
    return [array for group in groups for array in group]


def picture(opt, params):
    """Return every bit that a step may write, gradients aside."""
    state = opt.state_dict()
    arrays = [*params, *(a for s in state["state"].values() for a in s.values())]
    return [np.array(a).tobytes() for a in arrays], state["step_count"]


@contextlib.contextmanager
def way(name):
    """Make and run optimizers in ``serial``, in ``parallel``, or so in 1 or 2 threads."""
    kind, _, count = name.partition("-")
    before = numba.get_num_threads()
    if count and int(count) > before:
        pytest.skip("one processor")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_cpu, "SERIAL_BELOW", 2**60 if kind == "serial" else 0)
        try:
            if count:
                numba.set_num_threads(int(count))
            yield
        finally:
            numba.set_num_threads(before)


# The threads are counted when a step is taken, the path is chosen when an optimizer is made.
WAYS = ("serial", "parallel-1", "parallel-2")
PATHS = ("serial", "parallel")
