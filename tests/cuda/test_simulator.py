"""The CUDA backend without a device, in Numba's CUDA simulator, bit by bit as the CPU's."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

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
    options = ["-q", "-rf", "--tb=short", "-p", "no:cacheprovider", "-k", SAMPLE]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(CASES)],
        env=environment,
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    output = f"{done.stdout[-20_000:]}\n{done.stderr[-5_000:]}"
    if done.returncode:
        pytest.fail(output, pytrace=False)
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, output
    assert int(passed[1]) >= AT_LEAST, output
    assert "skipped" not in done.stdout, output
