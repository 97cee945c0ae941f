"""The CUDA backend without a device, in Numba's CUDA simulator, bit by bit as the CPU's."""

import os
from pathlib import Path

import pytest
from tools import run_pytest

CASES = Path(__file__).with_name("simulator_cases.py")
TESTS = CASES.parents[1]
# All of them take minutes: a sample here, and all in CI, which runs that file.
SAMPLE = (
    "test_options or test_denormal or (not_finite and f8+f4 and nan and skip)"
    " or test_lists_with_norms or test_lists_keep"
)
AT_LEAST = 18


@pytest.fixture
def environment(optional):
    optional("numba_cuda")
    folders = [str(TESTS / "support"), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]
    path = os.pathsep.join(folder for folder in folders if folder)
    return {**os.environ, "NUMBA_ENABLE_CUDASIM": "1", "PYTHONPATH": path}


def test_cases(environment):
    """Numba decides on the simulator when it is imported, so in a process of its own.

    All cases: ``NUMBA_ENABLE_CUDASIM=1 python -m pytest tests/cuda/simulator_cases.py``.
    """
    run_pytest([CASES], SAMPLE, AT_LEAST, TESTS.parent, environment, seconds=1800)
