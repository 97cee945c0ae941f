"""What the compilers make of the CUDA kernels, seen without a device: by the wheels alone.

Numba's PTX, and the machine code of the way that numba-cuda itself takes to a launch:
LTO-IR, linked by nvJitLink.
"""

import contextlib
import functools
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from itertools import pairwise
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

pytest.importorskip("numba_cuda", exc_type=ImportError)
nvjitlink = pytest.importorskip("cuda.bindings.nvjitlink", exc_type=ImportError)

from fastadam.cuda import compiler, kernels  # noqa: E402
from fastadam.cuda.compiler import cuda  # noqa: E402
from fastadam.cuda.intrinsics import load4, store4  # noqa: E402

pytestmark = pytest.mark.skipif(compiler.SIMULATED, reason="reads what is compiled")

F4, F8 = np.dtype("f4"), np.dtype("f8")
# What numba-cuda compiles for, on an A100 and on an H100.
AMPERE, HOPPER = (8, 0, ""), (9, 0, "a")
CAPABILITIES = pytest.mark.parametrize("cc", [AMPERE, HOPPER], ids=["sm_80", "sm_90a"])
DTYPES = pytest.mark.parametrize("dtype", [F4, F8], ids=["f4", "f8"])
OPTIONS = ("amsgrad", "average", "zero_grad")
EACH_OPTION = ((), *((name,) for name in OPTIONS), OPTIONS)
# Both of `l2 == 0` and its contrary, each with a loop over fours and one over the elements left.
BRANCHES = 2
# `update_elements` has 4 updates in a turn of the first loop; the second is unrolled to 4, or
# to 2 where the update is long, and has one more for what remains of it.
UPDATES = (4 + 5, 4 + 3)


def update_kernel(dtype, on):
    roles = {"amsgrad": "max_exp_avg_sq", "average": "ema"}
    kept = {"exp_avg", "exp_avg_sq"} | {role for name, role in roles.items() if name in on}
    return kernels.update_kernel(dtype, roles=frozenset(kept), zero_grad="zero_grad" in on)


KERNELS = {
    **{f"update {t.name} {'+'.join(on)}": update_kernel(t, on)
       for t in (F4, F8) for on in ((), OPTIONS)},
    **{f"sum {t.name}": kernels.sum_kernel(t) for t in (F4, F8)},
    "prepare": kernels.prepare_kernel(limited=False),
    "prepare limited": kernels.prepare_kernel(limited=True),
    "prepare scale": kernels.prepare_kernel(limited=True, only_scale=True),
}  # fmt: skip


@contextlib.contextmanager
def pretend(cc):
    """Device functions are compiled for the device in use: let there be one."""
    device = mock.Mock(compute_capability=cc[:2])
    with mock.patch("numba.cuda.dispatcher.get_current_device", return_value=device):
        yield


def tool(name):
    """Return the path of NVIDIA's tool, the wheel's if there is one."""
    spec = importlib.util.find_spec("nvidia")
    for root in spec.submodule_search_locations if spec else ():
        for path in sorted(Path(root).glob(f"*/bin/{name}*")):
            return str(path)
    path = shutil.which(name)
    if path is None:  # in the words that FASTADAM_TEST_REQUIRE=1 knows
        pytest.skip(f"could not import {name}: pip install 'fastadam[codegen]'")
    return path


@functools.cache
def ptx(kernel, cc):
    with pretend(cc):
        text, _ = cuda.compile_ptx(
            kernel.function, kernel.signature, cc=cc, launch_bounds=kernel.bounds
        )
    return text


@functools.cache
def machine_code(kernel, cc):
    """Return the disassembly, and what it uses: registers, and bytes of stack and local memory."""
    programs = [tool("nvdisasm"), tool("cuobjdump")]
    with pretend(cc):
        code, _ = cuda.compile(
            kernel.function,
            kernel.signature,
            device=False,
            abi="numba",
            output="ltoir",
            cc=cc,
            launch_bounds=kernel.bounds,
        )
    options = ["-arch=sm_{}{}{}".format(*cc), "-lto", "-O3"]
    handle = nvjitlink.create(len(options), options)
    nvjitlink.add_data(handle, nvjitlink.InputType.LTOIR, code, len(code), "kernel")
    nvjitlink.complete(handle)
    cubin = bytearray(nvjitlink.get_linked_cubin_size(handle))
    nvjitlink.get_linked_cubin(handle, cubin)
    nvjitlink.destroy(handle)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        sass, usage = (
            subprocess.run(
                [program, option, path], capture_output=True, text=True, check=True, timeout=300
            ).stdout
            for program, option in zip(programs, ("-c", "-res-usage"), strict=True)
        )
    used = {name: int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL")}
    return sass, used


def count(pattern, text):
    return len(re.findall(pattern, text))


def opcodes(pattern, sass):
    """Count instructions, whatever their predicates."""
    return count(rf"/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+ )?(?:{pattern})\b", sass)


def arithmetic(operation, kind, text):
    """Count one of PTX's, with or without a rounding that it names."""
    return count(rf"\b{operation}(?:\.rn)?\.{kind}\b", text)


@CAPABILITIES
def test_numba_compiles_for_these(cc):
    from numba.cuda.codegen import CUDACodeLibrary  # which the simulator has not

    library = CUDACodeLibrary(None, "name")
    context = mock.Mock(device=mock.Mock(compute_capability=cc[:2]))
    with mock.patch("numba.cuda.codegen.devices.get_context", return_value=context):
        assert library._ensure_cc(None) == cc


# What holds of every kernel.


@CAPABILITIES
@pytest.mark.parametrize("name", KERNELS)
def test_ptx_has_nothing_approximate(name, cc):
    """No call, no memory of a thread's own, no atomics; roots and quotients rounded correctly."""
    text = ptx(KERNELS[name], cc)
    assert ".target sm_{}{}{}\n".format(*cc) in text
    for word in ("call", r"\.local", "approx", r"\.ftz", r"div\.full", "rsqrt", "atom"):
        assert count(rf"(?<![\w%$]){word}\b", text) == 0, word
    assert not re.search(r"^\s*red\.", text, re.MULTILINE)
    for operation in ("sqrt", "div", "rcp"):
        every = count(rf"\b{operation}\.[\w.]*f(?:32|64)\b", text)
        assert every == count(rf"\b{operation}\.rn\.f(?:32|64)\b", text)


@CAPABILITIES
@pytest.mark.parametrize("name", KERNELS)
def test_no_product_is_left_to_be_fused(name, cc):
    """Only products without a rounding of their own may be: nothing is added to them."""
    text = ptx(KERNELS[name], cc)
    products, before = set(), None
    while products != before:  # and what they are moved to
        before = set(products)
        for target in re.findall(r"\bmul\.f(?:32|64)\s+(%\w+)", text):
            products.add(target)
        for target, source in re.findall(r"\b(?:mov|neg|abs)\.f(?:32|64)\s+(%\w+), (%\w+)", text):
            if source in products:
                products.add(target)
    for line in re.findall(r"\b(?:add|sub)\.f(?:32|64)\s+([^;]+);", text):
        assert products.isdisjoint(re.findall(r"%\w+", line)), line


@CAPABILITIES
@pytest.mark.parametrize("name", KERNELS)
def test_machine_code_needs_no_memory_of_its_own(name, cc):
    """No spills; only correctly rounded division and root are called, and int64 division."""
    sass, used = machine_code(KERNELS[name], cc)
    assert used["STACK"] == used["LOCAL"] == 0
    assert opcodes(r"LDL|STL|ATOM\w*|RED", sass) == 0
    allowed = re.compile(
        r"\$__internal_\d+_\$__cuda_sm\w+?_("
        r"sqrt_rn_f32_slowpath|div_rn_noftz_f32_slowpath|dsqrt_rn_f64\w*|div_rn_f64\w*"
        r"|dblrcp_rn_slowpath\w*|div_[su]64)\b"
    )
    divisions = 0
    for line in sass.splitlines():
        # Or to the next line, which is how threads find together before sm_90.
        if re.search(r"\bCALL\b", line) and not re.search(r"@!?U?P\d+ CALL.*\(\.L_x_\d+\)", line):
            target = allowed.search(line)
            assert target, line
            divisions += target[1] in ("div_s64", "div_u64")
    # To know how often an unrolled loop goes round, none of them inside a loop over elements.
    if not name.startswith("prepare"):
        assert divisions <= (BRANCHES if name.startswith("update") else 1)


# The update.


@CAPABILITIES
@pytest.mark.parametrize(
    ("dtype", "on", "most"),
    [(F4, (), 64), (F4, OPTIONS, 96), (F8, (), 128), (F8, OPTIONS, 136)],
    ids=["f4 plain", "f4 full", "f8 plain", "f8 full"],
)
def test_registers(dtype, on, most, cc):
    assert machine_code(update_kernel(dtype, on), cc)[1]["REG"] <= most


@CAPABILITIES
@pytest.mark.parametrize("on", [(), OPTIONS], ids=["plain", "full"])
def test_no_float64_in_float32(on, cc):
    kernel = update_kernel(F4, on)
    assert count(r"\.f64\b", ptx(kernel, cc)) == 0
    sass, _ = machine_code(kernel, cc)
    assert opcodes(r"D(?:FMA|MUL|ADD|SETP|MNMX)[\w.]*|F2F\.F64[\w.]*|F2F\.F32\.F64", sass) == 0
    assert opcodes("MUFU[.]RSQ64H|MUFU[.]RCP64H", sass) == 0


@pytest.mark.parametrize("on", EACH_OPTION, ids=lambda on: "+".join(on) or "plain")
@DTYPES
def test_arithmetic_is_the_formula_s(dtype, on):
    """Nothing was fused that is not written as fma, nothing that is was taken apart."""
    kind, text = f"f{8 * dtype.itemsize}", ptx(update_kernel(dtype, on), HOPPER)
    updates, with_l2 = updates_of(dtype, on)
    assert updates - with_l2 in UPDATES
    assert with_l2 in UPDATES
    # Both averages, the denominator and the parameter; L2, in one of the branches.
    fused = 4 + ("average" in on)
    assert arithmetic("fma", kind, text) == updates * fused + with_l2
    # The gradient by its factor and by the two 1 - beta, beta2 by the average, the step's size.
    assert arithmetic("mul", kind, text) == updates * 5
    # An average's distance from the parameter.
    added = arithmetic("sub", kind, text) + arithmetic("add", kind, text)
    assert added == updates * ("average" in on)
    for operation in ("sqrt", "div"):
        assert count(rf"{operation}\.rn\.{kind}", text) == updates


@CAPABILITIES
@pytest.mark.parametrize("on", EACH_OPTION, ids=lambda on: "+".join(on) or "plain")
@DTYPES
def test_no_branch_is_taken_for_a_small_number(dtype, on, cc):
    """What keeps denormal numbers out is comparisons and selections."""
    kind, text = f"f{8 * dtype.itemsize}", ptx(update_kernel(dtype, on), cc)
    updates, _ = updates_of(dtype, on)
    # Two moments; two for the maximum.
    selected = updates * (2 + 2 * ("amsgrad" in on))
    assert count(rf"\bselp\.{kind}\b", text) + count(rf"\bm(?:ax|in)\.{kind}\b", text) == selected
    compared = re.findall(rf"\bsetp\.\w+\.{kind}\s+(%p\d+),", text)
    branches = [name for name in compared if re.search(rf"@!?{name} bra\b", text)]
    assert len(branches) == 1  # whether there is L2
    sass, _ = machine_code(update_kernel(dtype, on), cc)
    assert opcodes(r"FSEL|[FD]MNMX", sass) >= selected * dtype.itemsize // 4


def updates_of(dtype, on):
    """Return how many updates there are in all, each with one root, and how many with L2."""
    kind, text = f"f{8 * dtype.itemsize}", ptx(update_kernel(dtype, on), HOPPER)
    updates = count(rf"sqrt\.rn\.{kind}", text)
    return updates, arithmetic("fma", kind, text) - updates * (4 + ("average" in on))


def wide_accesses(dtype, on):
    """Return how many loads and stores of 16 bytes a kernel must have."""
    arrays = 4 + ("amsgrad" in on) + ("average" in on)
    each = BRANCHES * 4 * dtype.itemsize // 16  # of 4 elements
    return each * arrays, each * (arrays - 1 + ("zero_grad" in on))


@pytest.mark.parametrize("on", EACH_OPTION, ids=lambda on: "+".join(on) or "plain")
@DTYPES
def test_accesses_of_16_bytes_in_ptx(dtype, on):
    text = ptx(update_kernel(dtype, on), HOPPER)
    vector = rf"global(?:\.\w+)*\.v{16 // dtype.itemsize}\.[fbu]{8 * dtype.itemsize}\b"
    assert (count(rf"\bld\.{vector}", text), count(rf"\bst\.{vector}", text)) == wide_accesses(
        dtype, on
    )


@CAPABILITIES
@pytest.mark.parametrize("on", [(), OPTIONS], ids=["plain", "full"])
@DTYPES
def test_accesses_of_16_bytes(dtype, on, cc):
    """Of each array once, and nothing of an option that is off; the rest are of one element."""
    sass, _ = machine_code(update_kernel(dtype, on), cc)
    loads, stores = wide_accesses(dtype, on)
    assert opcodes(r"LDG\.E(?:\.\w+)*\.128(?:\.\w+)*", sass) == loads
    assert opcodes(r"STG\.E(?:\.\w+)*\.128(?:\.\w+)*", sass) == stores
    # The second loop's updates; 4 elements in the first loop are 1 or 2 accesses.
    single, four = updates_of(dtype, on)[0] - BRANCHES * 4, BRANCHES * dtype.itemsize // 4
    elements, written = single * loads // four, single * stores // four
    # A skipped step's gradients are set to 0 by a loop of its own.
    written += "zero_grad" in on
    assert opcodes(r"STG[\w.]*", sass) == stores + written
    # Of the tables: 3 of the chunk, its place; 5 and 1 or 2 addresses; 11 or 12 scalars twice.
    tables = opcodes(r"LDG[\w.]*", sass) - loads - elements
    assert 0 < tables <= 45


# The sum, and what prepares the step.


@CAPABILITIES
@DTYPES
def test_sum_is_in_float64(dtype, cc):
    """One fma an element: those asked for at a time, and 5 of the loop over what remains."""
    kernel = kernels.sum_kernel(dtype)
    text = ptx(kernel, cc)
    elements = kernels.AHEAD + 5
    assert arithmetic("fma", "f64", text) == arithmetic("mul", "f64", text) == elements
    assert arithmetic("fma", "f32", text) == arithmetic("mul", "f32", text) == 0
    sass, used = machine_code(kernel, cc)
    assert used["REG"] <= 64
    loops = re.findall(r"^\.L_x_\d+:\n((?:(?!^\.L_x_).*\n)+)", sass, re.MULTILINE)
    loop = max(loops, key=lambda block: opcodes("DFMA", block[: block.find("BRA") + 1 or None]))
    first = re.search(r"\bDFMA\b", loop)
    assert opcodes("LDG[\\w.]*", loop[: first.start()]) >= 4  # on their way at once


PREPARES = [("prepare", 0), ("prepare limited", 1)]


@CAPABILITIES
@pytest.mark.parametrize(("name", "limited"), PREPARES)
def test_prepare_has_the_formula_s_arithmetic(name, limited, cc):
    """The bias corrections are differences that any other rounding would spoil."""
    text = ptx(KERNELS[name], cc)
    powers = 2  # of beta1, beta2: each has 2 fma in the product, 2 in the square
    assert arithmetic("fma", "f64", text) == 4 * powers + 1  # and the decoupled decay
    # Two products in the product, one in the square; the factor with the coefficient; the norm;
    # 4 of `ldexp`.
    assert count(r"\bmul\.rn\.f64", text) == 3 * powers + 1 + limited + 4
    # The first gradient that is not finite: in its own type. One of `frexp`, 3 by its power of 2.
    assert count(r"\bmul\.f64", text) == 4 + limited
    assert count(r"\bmul\.f32", text) == limited
    # A root of the second bias correction, one of the norm.
    assert count(r"sqrt\.rn\.f64", text) == 1 + limited
    assert arithmetic("fma", "f32", text) == 0
    # Scalars are written as float64, or rounded once to float32; the largest, and its factor.
    assert count(r"cvt\.rn\.f32\.f64", text) == 12 + 2 * limited


@CAPABILITIES
@pytest.mark.parametrize("name", ["prepare", "prepare limited", "prepare scale"])
def test_prepare_fits_a_multiprocessor(name, cc):
    assert machine_code(KERNELS[name], cc)[1]["REG"] * kernels.PREPARE_THREADS <= 65_536


# What is to come.


def copy4(source, target):
    a, b, c, d = load4(source, 0, HALF)
    store4(target, 0, a, b, c, d)


HALF = np.float16(0)


@CAPABILITIES
def test_primitives_take_float16(cc):
    """4 elements in one access of 8 bytes."""
    kernel = compiler.Kernel(copy4, 32, HALF=np.float16(0))
    sass, _ = machine_code(kernel, cc)
    assert opcodes(r"LDG\.E\.64(?:\.\w+)*", sass) == opcodes(r"LDG[\w.]*", sass) == 1
    assert opcodes(r"STG\.E\.64(?:\.\w+)*", sass) == opcodes(r"STG[\w.]*", sass) == 1


def test_counts_of_this_file_can_be_other_than_they_are():
    """The disassembly that is read is there, and another formula is another count."""
    counts = [
        arithmetic("fma", "f32", ptx(update_kernel(F4, on), HOPPER)) for on in ((), ("average",))
    ]
    assert [b - a for a, b in pairwise(counts)] == [updates_of(F4, ())[0]]
    assert opcodes("FFMA", machine_code(update_kernel(F4, ()), HOPPER)[0]) > counts[0]
    assert os.environ.get("NUMBA_ENABLE_CUDASIM", "0") in ("", "0")
