"""What the compiler made of the kernel: packed square roots and divisions, real fma."""

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numba import njit
from test_bits import CPUS

from fastadam import _cpu, _jit

pytestmark = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="reads x86-64 assembly"
)


def assembly(dtype, amsgrad, zero_grad, parallel):
    kernel = njit(parallel=parallel, **_jit.FLAGS)(_cpu.update_tensors)  # no cache: it has no text
    tensors, chunks = np.zeros((0, 10), np.int64), np.zeros((0, 3), np.int64)
    groups, scalars = np.zeros((0, 7)), np.zeros((0, 10), dtype)
    count, zero = np.zeros(1, np.int64), dtype(0) if zero_grad else None
    kernel(count, tensors, chunks, groups, scalars, amsgrad, zero)
    (signature,) = kernel.signatures
    return kernel.overloads[signature].library.get_asm_str()


def count(pattern, text):
    return len(re.findall(rf"^\s+v?{pattern}\b", text, re.MULTILINE))


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize(("amsgrad", "zero_grad"), [(None, False), (True, True)])
@pytest.mark.parametrize(("dtype", "kind"), [(np.float32, "s"), (np.float64, "d")])
def test_loops_are_vectorised(dtype, kind, amsgrad, zero_grad, parallel):
    """Both loops, without and with L2; scalar code is for remainders and the prologue only."""
    text = assembly(dtype, amsgrad, zero_grad, parallel)
    for operation in ("sqrt", "div"):
        packed = count(f"{operation}p{kind}", text)
        assert packed >= 2, f"{operation} is not packed"
        prologue = 1 if operation == "sqrt" else 2
        scalar = count(f"{operation}s{kind}", text) - (prologue if kind == "d" else 0)
        assert scalar <= packed, f"{scalar} scalar against {packed} packed {operation}"
    assert not re.search(r"\bv?gather|\bv?scatter", text)
    if kind == "s":  # nothing of the loop is widened to float64
        assert count("cvtps2pd", text) == 0


CHILD = """
import re
import numpy as np, test_machine_code as t
text = t.assembly(np.float32, None, False, False)
wide = set(re.findall(r"sqrtps.*([xyz])mm", text))
print(max(wide, default="none"), t.count(r"fn?madd\\d+ps", text), text.count("fmaf"))
"""


@pytest.mark.parametrize(
    ("cpu", "registers", "fused"),
    [("avx512", "z", True), ("avx2", "y", True), ("plain", "none", False)],
)
def test_fma_is_an_instruction_or_an_exact_call(cpu, registers, fused):
    """Where there is no instruction, the library's fma is called: slow, the same bits."""
    env = {**os.environ, **CPUS[cpu], "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(
        [sys.executable, "-c", CHILD], env=env, capture_output=True, text=True, check=True
    )
    wide, instructions, calls = done.stdout.split()
    assert wide == registers
    # Four of them to an element without L2, five with it.
    assert (int(instructions) >= 9, int(calls) > 0) == (fused, not fused)
