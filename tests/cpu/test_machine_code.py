"""What the compiler made of the kernels: packed arithmetic, real fma, nothing of what is off."""

import functools
import inspect
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numba import get_num_threads, njit, types
from processors import CPUS, supports

from fastadam.cpu import intrinsics, kernels
from fastadam.update import formula

pytestmark = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="reads x86-64 assembly"
)

OPTIONS = ("AMSGRAD", "AVERAGE", "ZERO_GRAD")
EITHER = pytest.mark.parametrize(("dtype", "kind"), [(np.float32, "s"), (np.float64, "d")])


def assembly(function, parallel=False, **constants):
    """What a kernel becomes; all of its arguments are integers, addresses as a rule, but one."""
    names = inspect.signature(function).parameters
    arguments = [types.float64 if name in ("scale", "clip") else types.int64 for name in names]
    if parallel:
        # As `intrinsics.kernel` does: a symbol that is not there aborts the process.
        get_num_threads()
    bound = formula.bind(function, **constants)
    kernel = njit(parallel=parallel, nogil=parallel, **intrinsics.FLAGS)(
        bound
    )  # a cache has no text
    kernel.compile(tuple(arguments))
    (signature,) = kernel.signatures
    return kernel.overloads[signature].library.get_asm_str()


@functools.cache
def update_assembly(dtype, on=(), parallel=False):
    function = kernels.update_parallel if parallel else kernels.update_serial
    constants = {name: True if name in on else None for name in OPTIONS}
    return assembly(function, parallel, FLOAT=dtype, **constants)


def measure_assembly(dtype, parallel=False, largest=None):
    function = kernels.measure_parallel if parallel else kernels.measure_serial
    return assembly(function, parallel, FLOAT=dtype, LARGEST=largest)


def count(pattern, text):
    return len(re.findall(rf"^\s+v?{pattern}\b", text, re.MULTILINE))


def vector_loops(kind, text):
    """Of each loop that takes packed roots: the vectors read and written for one of them."""
    for block in re.split(r"^\.?L\w+:", text, flags=re.MULTILINE):
        roots = count(f"sqrtp{kind}", block)
        if roots:
            touching = [
                line
                for line in block.splitlines()
                if re.search(r"%[xyz]mm\d+", line)
                and re.search(r"\((?!%rsp|%rip)", line)
                # Constants for which there was no register left.
                and not re.search(r"\{1to|broadcast", line)
            ]
            written = sum(line.rstrip().endswith(")") for line in touching)
            yield (len(touching) - written) / roots, written / roots


@pytest.mark.parametrize("parallel", [False, True], ids=["serial", "parallel"])
@pytest.mark.parametrize("on", [(), OPTIONS], ids=["plain", "everything"])
@EITHER
def test_loops_are_vectorised(dtype, kind, on, parallel):
    """Both loops, without and with L2; scalar code is for remainders and the prologue only."""
    text = update_assembly(dtype, on, parallel)
    for operation in ("sqrt", "div"):
        packed = count(f"{operation}p{kind}", text)
        assert packed >= 2, f"{operation} is not packed"
        # In `step_scalars`, and in `thread_choice.note`.
        prologue = 1 if operation == "sqrt" else 2 + parallel
        scalar = count(f"{operation}s{kind}", text) - (prologue if kind == "d" else 0)
        assert scalar <= packed, f"{scalar} scalar against {packed} packed {operation}"
    assert not re.search(r"\bv?gather|\bv?scatter", text)
    if kind == "s":  # nothing of the loop is widened to float64
        assert count("cvtps2pd", text) == 0
        assert count("cvtss2sd", text) == 0


@pytest.mark.parametrize(
    ("on", "reads", "writes"),
    [
        ((), 4, 3),
        (("AMSGRAD",), 5, 4),
        (("AVERAGE",), 5, 4),
        (("ZERO_GRAD",), 4, 4),
        (OPTIONS, 6, 6),
    ],
    ids=lambda value: "+".join(value) or "plain" if isinstance(value, tuple) else None,
)
def test_each_array_is_read_and_written_once(on, reads, writes):
    """One pass over memory, and nothing in it of an option that is off."""
    kinds = [(np.float32, "s")]
    if on in ((), OPTIONS):  # what the compiler is asked for elsewhere too
        kinds.append((np.float64, "d"))
    for dtype, kind in kinds:
        loops = list(vector_loops(kind, update_assembly(dtype, on)))
        assert len(loops) >= 2  # without L2 and with it
        assert set(loops) == {(reads, writes)}


@pytest.mark.skipif(not supports("avx2"), reason="no fma on this processor")
@pytest.mark.parametrize("parallel", [False, True], ids=["serial", "parallel"])
@EITHER
def test_sum_is_vectorised(dtype, kind, parallel):
    """Packed float64, in at least four chains: none waits for the one before it."""
    text = measure_assembly(dtype, parallel)
    blocks = re.split(r"^\.?L\w+:", text, flags=re.MULTILINE)
    loop = max(blocks, key=lambda block: count(r"fmadd\d+pd", block))
    fused = re.findall(r"fmadd\d+pd.*%([xyz]mm\d+)$", loop, re.MULTILINE)
    assert len(set(fused)) >= 4
    assert count(r"fmadd\d+sd", text) <= len(fused) // 4  # what is left over
    assert count("cvtps2pd", loop) == (len(fused) if kind == "s" else 0)
    assert not re.search(r"\bv?gather|\bcall", loop)


@pytest.mark.parametrize("parallel", [False, True], ids=["serial", "parallel"])
@EITHER
def test_largest_is_vectorised(dtype, kind, parallel):
    """Packed magnitudes and maxima of integers: no comparison of floats, none by one."""
    text = measure_assembly(dtype, parallel, largest=True)
    blocks = re.split(r"^\.?L\w+:", text, flags=re.MULTILINE)
    loop = max(blocks, key=lambda block: count(f"mulp{kind}", block))
    products = count(f"mulp{kind}", loop)
    assert products >= 4
    maxima = count("pmaxu[dq]", loop) + count("blendvp[sd]", loop)
    assert maxima == products
    assert not re.search(r"\bv?gather|\bcall|u?comis", loop)


CHILD = """
import re
import numpy as np, test_machine_code as t
text = t.update_assembly(np.float32)
wide = set(re.findall(r"sqrtps.*([xyz])mm", text))
print(max(wide, default="none"), t.count(r"fn?madd\\d+ps", text), text.count("fmaf"))
"""


@pytest.mark.parametrize(
    ("cpu", "registers", "fused"),
    [("avx512", "z", True), ("avx2", "y", True), ("plain", "none", False)],
)
def test_fma_is_an_instruction_or_an_exact_call(cpu, registers, fused):
    """Where there is no instruction, the library's fma is called: slow, the same bits."""
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.with_name("support"))])
    env = {**os.environ, **CPUS[cpu], "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", CHILD], env=env, capture_output=True, text=True, check=True
    )
    wide, instructions, calls = done.stdout.split()
    assert wide == registers
    # Four of them to an element without L2, five with it.
    assert (int(instructions) >= 9, int(calls) > 0) == (fused, not fused)
