"""The interpreter of PTX itself: what it computes, what it refuses, and what it would notice."""

import functools
import math
import re
from fractions import Fraction

import numpy as np
import pytest

pytest.importorskip("numba_cuda", exc_type=ImportError)
pytest.importorskip("cuda.bindings.nvjitlink", exc_type=ImportError)

from numba import config

if config.ENABLE_CUDASIM:
    pytest.skip("reads what is compiled", allow_module_level=True)

from gpu_tools import MODES, same_run
from in_place import Arrays, in_place, program_of
from lazy_driver import Driver
from numba.cuda.cudadrv.driver import CudaAPIError
from ptx import FMA, Program, UnknownPTXError
from ptx_memory import KernelError, Memory

# %rd3 is a word of each thread's own, of 64 threads at most.
KERNEL = """
.version 9.5
.target sm_90a
.visible .entry kernel(
    .param .u64 kernel_param_0
)
.maxntid 64, 1, 1
{
    .shared .align 8 .b8 shared_words[256];
    .reg .pred %p<9>;
    .reg .b32 %r<9>;
    .reg .b64 %rd<9>;
    .reg .f32 %f<9>;
    .reg .f64 %fd<9>;
    ld.param.u64 %rd1, [kernel_param_0];
    mov.u32 %r1, %tid.x;
    mul.wide.s32 %rd2, %r1, 4;
    add.s64 %rd3, %rd1, %rd2;
    setp.lt.s32 %p1, %r1, 1;
BODY
    ret;
}
"""


def launch(body, blocks=1, threads=64):
    """Run a kernel with 64 words of memory; return them."""
    memory = Memory(4096)
    address = memory.take(256)
    memory.view(address, 64, np.uint32)[...] = np.arange(64)
    Program(KERNEL.replace("BODY", body)).launch(memory, blocks, threads, [address])
    return memory.view(address, 64, np.uint32)


# Arithmetic.


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("div.s64 %rd5, -7, 2", -3),
        ("rem.s64 %rd5, -7, 2", -1),
        ("shr.s64 %rd5, -7, 70", -1),
        ("shr.u64 %rd5, -1, 63", 1),
        ("shr.u64 %rd5, -1, 64", 0),
        ("shl.b64 %rd5, 1, 63", -(2**63)),
        ("shl.b64 %rd5, 1, 64", 0),
        ("mul.lo.s64 %rd5, 4611686018427387904, 6", -(2**63)),
        ("mul.wide.s32 %rd5, 65536, -65536", -(2**32)),
        ("min.s64 %rd5, -1, 1", -1),
        ("max.u64 %rd5, -1, 1", -1),
        ("cvt.s64.s32 %rd5, -2", -2),
        ("selp.b64 %rd5, 3, 4, %p1", 3),
        ("mov.b64 %rd5, {7, 1}", 2**32 + 7),
        ("not.b64 %rd5, 5", -6),
    ],
)
def test_integers(instruction, expected):
    words = launch(f"{instruction};\nst.global.u64 [%rd1], %rd5;", threads=1)
    assert words[:2].view(np.int64)[0] == expected


@pytest.mark.parametrize(
    ("compared", "values", "expected"),
    [
        ("lt", "0f3F800000, 0f40000000", 1),
        ("lt", "0f3F800000, 0f7FC00000", 0),
        ("geu", "0f3F800000, 0f7FC00000", 1),
        ("ne", "0f7FC00000, 0f7FC00000", 0),
        ("neu", "0f7FC00000, 0f7FC00000", 1),
        ("nan", "0f3F800000, 0f7FC00000", 1),
        ("nan", "0f3F800000, 0f7F800000", 0),
    ],
)
def test_comparisons(compared, values, expected):
    words = launch(
        f"setp.{compared}.f32 %p2, {values};\nselp.b32 %r5, 1, 0, %p2;\n"
        "st.global.u32 [%rd1], %r5;",
        threads=1,
    )
    assert words[0] == expected


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_multiply_add_is_rounded_once(dtype, rng):
    """The result is a number than which none is nearer to the exact one."""
    a, b = (rng.standard_normal(500).astype(dtype) for _ in range(2))
    c = -a * b * dtype(1 + 1e-7) + rng.choice(np.array([0, 1e-30, 1e-9, 1], dtype), 500)
    found = FMA[np.dtype(dtype)](a, b, c)
    assert found.dtype == dtype
    for x, y, z, result in zip(a, b, c, found, strict=True):
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        off = abs(Fraction(float(result)) - exact)
        for other in (dtype(-math.inf), dtype(math.inf)):
            assert off <= abs(Fraction(float(np.nextafter(result, other))) - exact)


# What is refused.

UNKNOWN = [
    "add.ftz.f32 %f1, %f2, %f3",
    "add.rz.f32 %f1, %f2, %f3",
    "mad.rn.f32 %f1, %f2, %f3, %f4",
    "sqrt.approx.f32 %f1, %f2",
    "div.full.f32 %f1, %f2, %f3",
    "max.f32 %f1, %f2, %f3",
    "cvt.rzi.s32.f32 %r1, %f1",
    "cvt.f32.f64 %f1, %fd1",
    "add.f64 %f1, %f2, %f3",
    "add.s64 %rd5, %r1, 1",
    "atom.global.add.u32 %r5, [%rd3], 1",
    "ld.volatile.global.u32 %r5, [%rd3]",
    "ld.global.u16 %r5, [%rd3]",
    "ld.global.v4.f32 {%f1, %f2}, [%rd3]",
    "bar.sync 1",
    "call function",
    "mul.f32 %f1, %f2, %f3;\nneg.f32 %f4, %f1;\nadd.f32 %f5, %f4, %f3",
]


@pytest.mark.parametrize("instruction", UNKNOWN, ids=[text.split()[0] for text in UNKNOWN])
def test_what_is_not_known_is_refused(instruction):
    with pytest.raises(UnknownPTXError):
        launch(f"{instruction};")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("add.s64 %rd4, %rd1, 2;\nld.global.u32 %r5, [%rd4];", "a misaligned access of 4 bytes"),
        ("ld.global.v4.f32 {%f1, %f2, %f3, %f4}, [%rd3];", "a misaligned access of 16 bytes"),
        ("ld.global.u32 %r5, [%rd3+4];", "an access to memory that nobody has: ld.global.u32"),
        ("ld.global.u32 %r5, [%rd3+-100000];", "an access out of bounds"),
        ("ld.shared.f64 %fd1, [shared_words+256];", "an access out of bounds"),
        ("st.global.u32 [%rd1], %r1;", "a race of threads"),
        ("st.global.u32 [%rd3], %r1;\nld.global.u32 %r5, [%rd1];", "a race of threads"),
        ("@%p1 bar.sync 0;", "a barrier that not all threads of a block reach"),
        ("sub.s32 %r5, %r1, %r1;\ndiv.s32 %r5, %r1, %r5;", "an integer is divided by 0"),
    ],
)
def test_what_a_kernel_must_not_do(body, message):
    with pytest.raises(KernelError, match=message):
        launch(body)


def test_blocks_may_not_meet():
    """Nor one before a barrier and the other after it: a barrier is of a block's own threads."""
    write = "and.pred %p3, %p1, %p2;\n@%p3 st.global.u32 [%rd1], %r1;\nbar.sync 0;\n"
    first = "mov.u32 %r2, %ctaid.x;\nsetp.eq.s32 %p2, %r2, 0;\n" + write
    launch(first, blocks=2)
    with pytest.raises(KernelError, match="a race of blocks"):
        launch(first + "not.pred %p2, %p2;\n" + write, blocks=2)


def test_a_barrier_orders_threads():
    """Each writes a word; after a barrier, its neighbour's is read."""
    neighbour = "xor.b32 %r2, %r1, 1;\nmul.wide.s32 %rd4, %r2, 4;\nadd.s64 %rd4, %rd1, %rd4;"
    words = launch(
        f"{neighbour}\nst.global.u32 [%rd3], %r1;\nbar.sync 0;\nld.global.u32 %r5, [%rd4];"
        "\nbar.sync 0;\nst.global.u32 [%rd3], %r5;"
    )
    assert words.tolist() == [k ^ 1 for k in range(64)]


# What would be noticed in fastadam's own kernels.

MUTATIONS = {
    "a fused multiply-add taken apart": (
        "update",
        r"fma\.rn\.f32\s+(\S+), (\S+), (\S+), (\S+);",
        r"mul.rn.f32 \1, \2, \3;\nadd.rn.f32 \1, \1, \4;",
    ),
    "a quotient off by one unit": (
        "update",
        r"(div\.rn\.f32\s+(%f\d+), .*;)",
        r"\1\nadd.s32 \2, \2, 1;",
    ),
    "four elements that are not written": ("update", r"st\.global\.v4\.f32\s.*;", ""),
    "four elements from the next place": (
        "update",
        r"(ld\.global\.v4\.f32\s.*)\];",
        r"\1+4];",
    ),
    "a barrier less": ("sum_squares", r"bar\.sync\s+0;", ""),
    "half of a sum": ("sum_squares", r"add\.f64\s+(\S+), (\S+), (\S+);", r"mov.f64 \1, \2;"),
    "a count that is not written": ("prepare_step", r"st\.global\.u64\s.*;", ""),
    "a root off by one unit": (
        "prepare_step",
        r"(sqrt\.rn\.f64\s+(%fd\d+), .*;)",
        r"\1\nadd.s64 \2, \2, 1;",
    ),
}


def take_steps(lib):
    """In both branches of the update, four elements at a time and one."""
    options, step_options = MODES["everything"]
    for decay in (0.0, 0.1):
        mode = ({**options, "weight_decay": decay}, step_options)
        same_run(lib, ("f4",), mode, 2, 2, ((33, 9), [37]))


@pytest.mark.parametrize("mutation", [None, *MUTATIONS])
def test_other_instructions_are_noticed(mutation):
    """A step of a kernel with one instruction changed has other bits, or does what it must not."""
    kernel, pattern, other = MUTATIONS.get(mutation, ("no kernel", "", ""))
    mutants = []

    @functools.cache
    def mutated(compiled, capability):
        program = program_of(compiled, capability)
        if compiled.py_func.__name__ != kernel:
            return program
        text, count = re.subn(pattern, other, program.source, count=1)
        mutants.append(count)
        return Program(text)

    driver = Driver()
    with in_place(driver, mutated):
        if mutation is None:
            take_steps(Arrays(driver))
            return
        with pytest.raises((AssertionError, CudaAPIError)):
            take_steps(Arrays(driver))
    assert mutants == [1]
