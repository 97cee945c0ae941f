"""The CUDA tests on a libcuda of our own, in a process of their own: see `libcuda_driver`."""

import os
import shutil
import sys
from pathlib import Path

import pytest
from tools import run_pytest

FOLDER = Path(__file__).parent
TESTS = FOLDER.parent
# Of the tests for a GPU: those that are short, and of the steps those that use most.
SHORT = "not test_gpu or test_overlap or on_the_host"
LONG = (
    "test_streams or (everything and both) or groups or own_grads or on_the_host or overlap"
    " or do_not_fit or does_not_wait or compile_leaves"
)


@pytest.fixture
def run(optional):
    optional("numba_cuda")
    optional("cuda.bindings.nvjitlink")
    if sys.platform != "linux" or shutil.which("gcc") is None:
        pytest.skip("no gcc to build a libcuda with")

    def run_files(names, chosen, at_least):
        folders = [FOLDER, TESTS / "support", TESTS.parent, os.environ.get("PYTHONPATH", "")]
        own = {"PYTHONPATH": os.pathsep.join(map(str, folders)), "NUMBA_ENABLE_CUDASIM": "0"}
        files, env = [FOLDER / name for name in names], {**os.environ, **own}
        plugin = ("-p", "libcuda_driver")
        run_pytest(files, chosen, at_least, TESTS.parent, env, *plugin, seconds=900)

    return run_files


def test_a_sample(run):
    run(["libcuda_cases.py", "test_gpu.py"], SHORT, 13)


@pytest.mark.full
def test_more_of_them(run):
    run(["test_streams.py", "test_gpu.py"], LONG, 38)
