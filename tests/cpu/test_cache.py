"""The compile cache: hits, edits, writers at once, damage, folders that cannot be written."""

import json
import os
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from numba import config, types
from numba.core.dispatcher import Dispatcher

import fastadam
from fastadam.cpu import cache, kernels

ROLES = frozenset(["exp_avg", "exp_avg_sq"])
PLAIN = {"parallel": False, "roles": ROLES, "zero_grad": False, "nogil": False}
STEP = f"""
import json, os, sys
import numpy as np, fastadam
from fastadam.cpu import kernels
param = np.ones(8, np.dtype(os.environ.get("TEST_DTYPE", "float32")))
fastadam.Adam(param, lr=0.5).step(np.ones_like(param))
stats = kernels.update_kernel(param.dtype, **{PLAIN}).stats
hits, misses = sum(stats.cache_hits.values()), sum(stats.cache_misses.values())
print(json.dumps([hits, misses, round(float(param[0]), 6)]))
"""


# Damaged in three ways, and looked for again as by a new process.
DAMAGE = f"""
import json, os
from pathlib import Path
import numpy as np, fastadam
from fastadam.cpu import kernels
path = Path(os.environ["TEST_KERNEL"])
content = path.read_bytes()
hits = misses = 0
for damaged in (b"", content[:-100], content[:500] + bytes([content[500] ^ 1]) + content[501:]):
    path.write_bytes(damaged)
    kernels.update_kernel.cache_clear()
    param = np.ones(8, np.float32)
    fastadam.Adam(param, lr=0.5).step(np.ones_like(param))
    stats = kernels.update_kernel(param.dtype, **{PLAIN}).stats
    hits, misses = hits + sum(stats.cache_hits.values()), misses + sum(stats.cache_misses.values())
    assert path.read_bytes() != damaged
print(json.dumps([hits, misses, round(float(param[0]), 6)]))
"""


def start(tmp_path, code=STEP, **env):
    env = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "cache"), **env}
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=env,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    hits, misses, value = json.loads(out)
    return hits, misses, value


def run(tmp_path, **env):
    return finish(start(tmp_path, **env))


def kernel_files(tmp_path):
    return sorted((tmp_path / "cache").rglob("fastadam.update_serial-*.nbc"))


def test_second_process_is_served_and_damage_is_noticed(tmp_path):
    assert run(tmp_path) == (0, 1, 0.5)
    assert run(tmp_path) == (1, 0, 0.5)
    (kernel,) = kernel_files(tmp_path)
    assert finish(start(tmp_path, DAMAGE, TEST_KERNEL=str(kernel))) == (0, 3, 0.5)
    assert run(tmp_path) == (1, 0, 0.5)
    assert not [path for path in kernel_files(tmp_path) if path != kernel]


@pytest.mark.parametrize(
    ("source", "old", "new", "value"),
    [
        ("update/formula.py", "-step_size * exp_avg / denom", "step_size * exp_avg / denom", 1.5),
        pytest.param(
            *("cpu/kernels.py", "store(param, i, p, PARAM)", "store(param, i, p + p, PARAM)", 1.0),
            marks=pytest.mark.full,
        ),
        pytest.param(
            *(
                "cpu/intrinsics.py",
                "builder.fma(*args)",
                "builder.fma(args[0], args[1], args[1])",
                None,
            ),
            marks=pytest.mark.full,
        ),
    ],
)
def test_an_edit_is_never_served_stale(tmp_path, source, old, new, value):
    """A copy of the package, run, edited in one file with the same size and time, run again."""
    package = tmp_path / "fastadam"
    shutil.copytree(
        Path(fastadam.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__")
    )
    env = {"PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    assert run(tmp_path, **env) == (0, 1, 0.5)
    assert run(tmp_path, **env) == (1, 0, 0.5)
    path = package / source
    text, times = path.read_text(encoding="utf-8"), path.stat()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new), encoding="utf-8")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    hits, misses, found = run(tmp_path, **env)
    assert (hits, misses) == (0, 1)
    assert found != 0.5
    if value is not None:
        assert found == value


def test_sources_of_any_name_in_any_folder(tmp_path):
    """But for the folders from which no kernel is made."""
    package = tmp_path / "fastadam"
    shutil.copytree(
        Path(fastadam.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__")
    )
    source = package / "cpu" / "moved.py"
    (package / "cpu" / "kernels.py").rename(source)
    (package / "cpu" / "kernels.py").write_text(
        "import sys; from . import moved; sys.modules[__name__] = moved"
    )
    env = {"PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    assert run(tmp_path, **env) == (0, 1, 0.5)
    (package / "cli" / "added.py").touch()
    assert run(tmp_path, **env) == (1, 0, 0.5)
    text = source.read_text(encoding="utf-8")
    assert text.count("store(param, i, p, PARAM)") == 1
    source.write_text(text.replace("store(param, i, p, PARAM)", "store(param, i, p + p, PARAM)"))
    assert run(tmp_path, **env) == (0, 1, 1.0)


def test_every_source_that_a_step_imports_is_in_the_key(tmp_path):
    code = """
import json, sys
import numpy as np, fastadam
param = np.ones(70_000)
fastadam.Adam(param, max_grad_norm=1.0).step(np.ones_like(param))
names = [name for name in sys.modules if name.partition(".")[0] == "fastadam"]
print(json.dumps([sys.modules[name].__file__ for name in names]))
"""
    process = start(tmp_path, code)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    imported = {Path(path).resolve() for path in json.loads(out)}
    assert len(imported) > 10
    assert imported <= {path.resolve() for _, path in cache.sources()}


# Numba's settings that change the machine code, or might, each with a value it may have.
CODE = {
    "BOUNDSCHECK": 1,
    "CPU_FEATURES": "+avx",
    "CPU_NAME": "generic",
    "DEBUGINFO_DEFAULT": 1,
    "DEBUG_ARRAY_OPT_RUNTIME": 1,
    "DEBUG_NRT": 1,
    "DEBUG_NRT_STACK_LIMIT": 9,
    "DIFF_IR": 1,
    "DISABLE_INTEL_SVML": 1,
    "ENABLE_AVX": 0,
    "ENABLE_PROFILING": 1,
    "EXTEND_VARIABLE_LIFETIMES": 1,
    "JIT_COVERAGE": 1,
    "LLVM_PASS_TIMINGS": 1,
    "LLVM_REFPRUNE_FLAGS": "",
    "LLVM_REFPRUNE_PASS": 0,
    "LOOP_VECTORIZE": 0,
    "NRT_STATS": 1,
    "OPT": 0,
    "PARFOR_MAX_TUPLE_SIZE": 9,
    "SLP_VECTORIZE": 1,
    "USE_LEGACY_TYPE_SYSTEM": 9,
    "USE_LLVMLITE_MEMORY_MANAGER": 1,
    "USING_SVML": 9,
}
# Those that change what is printed, kept or asked, or say what the machine is, or are CUDA's.
NO_CODE = """
    ALWAYS_WARN_UNINIT_VAR ANNOTATE CACHE_DIR CACHE_LOCATOR_CLASSES CHROME_TRACE COLOR_SCHEME
    CUDA_ARRAY_INTERFACE_SYNC CUDA_DEALLOCS_COUNT CUDA_DEALLOCS_RATIO CUDA_DEBUGINFO_DEFAULT
    CUDA_DEFAULT_PTX_CC CUDA_DRIVER CUDA_ENABLE_MINOR_VERSION_COMPATIBILITY CUDA_INCLUDE_PATH
    CUDA_LOG_API_ARGS CUDA_LOG_LEVEL CUDA_LOG_SIZE CUDA_LOW_OCCUPANCY_WARNINGS
    CUDA_MEMORY_MANAGER CUDA_PER_THREAD_DEFAULT_STREAM CUDA_USE_NVIDIA_BINDING
    CUDA_VERBOSE_JIT_LOG CUDA_WARN_ON_IMPLICIT_COPY DEBUG DEBUG_ARRAY_OPT DEBUG_ARRAY_OPT_STATS
    DEBUG_CACHE DEBUG_FRONTEND DEBUG_INLINE_CLOSURE DEBUG_JIT DEBUG_PRINT_AFTER
    DEBUG_PRINT_BEFORE DEBUG_PRINT_WRAP DEBUG_TYPEINFER DEVELOPER_MODE DISABLE_CUDA DISABLE_JIT
    DISABLE_PERFORMANCE_WARNINGS DISABLE_TYPEINFER_FAIL_CACHE DUMP_ASSEMBLY DUMP_BYTECODE
    DUMP_CFG DUMP_FUNC_OPT DUMP_IR DUMP_LLVM DUMP_OPTIMIZED DUMP_SSA ENABLE_CUDASIM
    ENABLE_SYS_MONITORING FORCE_CUDA_CC FULL_TRACEBACKS FUNCTION_CACHE_SIZE GDB_BINARY
    HIGHLIGHT_DUMPS HTML IS_32BITS IS_OSX IS_WIN32 MACHINE_BITS NUMBA_DEFAULT_NUM_THREADS
    NUMBA_NUM_THREADS PARALLEL_DIAGNOSTICS PYVERSION RUNNING_UNDER_PROFILER SHOW_HELP
    THREADING_LAYER THREADING_LAYER_PRIORITY TRACE _HAVE_YAML
"""


def path_now():
    kernel = kernels.look_kernel()
    return kernel._cache._path((types.int64, types.int64), kernel.targetctx.codegen())


def test_every_setting_of_numba_is_known():
    """A new one must be looked at: does it change the machine code, and is it in the key?"""
    assert not CODE.keys() & set(NO_CODE.split())
    found = {name for name in vars(config) if name.isupper()}
    cuda = {name for name in found if name.startswith("CUDA_")}  # numba-cuda adds its own
    assert found - cuda <= {*CODE, *NO_CODE.split()}


@pytest.mark.parametrize("name", CODE)
def test_a_setting_that_changes_the_code_changes_the_key(name, monkeypatch):
    before = path_now()
    monkeypatch.setattr(config, name, CODE[name], raising=False)
    assert path_now() != before


@pytest.mark.parametrize("name", ["NUMBA_NUM_THREADS", "THREADING_LAYER", "CACHE_DIR"])
def test_processes_that_differ_in_threads_share_the_cache(name, monkeypatch):
    before = path_now()
    monkeypatch.setattr(config, name, "other")
    assert path_now() == before


def test_slow_code_for_debugging_is_served_to_no_other_process(tmp_path):
    assert run(tmp_path, NUMBA_DEBUGINFO="1") == (0, 1, 0.5)
    assert run(tmp_path) == (0, 1, 0.5)


def test_processes_that_start_at_once(tmp_path):
    """Two dtypes compiled at once by four processes: each gets its own kernel, then and later."""
    dtypes = ["float32", "float64", "float32", "float64"]
    together = [start(tmp_path, TEST_DTYPE=dtype) for dtype in dtypes]
    assert [finish(process)[2] for process in together] == [0.5] * 4
    assert len(kernel_files(tmp_path)) == 2
    for dtype in dtypes[:2]:
        assert run(tmp_path, TEST_DTYPE=dtype) == (1, 0, 0.5)


def test_every_kernel_has_a_file_of_its_own(monkeypatch):
    """Dtypes, ways and options: what a kernel closes over is part of its key."""
    monkeypatch.setattr(Dispatcher, "compile", lambda *_: None)  # their keys are there before
    either = (False, True)
    ways = [{"parallel": False, "nogil": nogil} for nogil in either] + [{"parallel": True}]
    optional = [(), ("ema",), ("max_exp_avg_sq",), ("ema", "max_exp_avg_sq")]
    variants = [
        kernels.update_kernel.__wrapped__(
            np.dtype(dtype), roles=ROLES.union(more), zero_grad=zero_grad, **way
        )
        for dtype, way, more, zero_grad in product(("f4", "f8"), ways, optional, either)
    ]
    variants += [
        kernels.sum_kernel.__wrapped__(np.dtype(dtype), **way)
        for dtype, way in product(("f4", "f8"), ways)
    ]
    variants.append(kernels.look_kernel.__wrapped__())
    signature = (types.int64, types.int64)
    paths = [kernel._cache._path(signature, kernel.targetctx.codegen()) for kernel in variants]
    assert len(set(paths)) == len(variants) == 55


VARIANTS = """
import json
import numpy as np, fastadam
from fastadam.cpu import kernels
hits = misses = 0
values = []
cases = ("f4", None, False), ("f8", None, False), ("f4", 0.5, False), ("f4", None, True)
for dtype, ema, zero in cases:
    param, grad = np.zeros(8, dtype), np.ones(8, dtype)
    opt = fastadam.Adam(param, lr=0.5, ema_decay=ema)
    opt.step(grad, zero_grad=zero)
    values += [round(float(param[0]), 6), float(grad[0])]
    values += [] if ema is None else [round(float(opt.ema_params[0]), 6)]
    roles = frozenset(["exp_avg", "exp_avg_sq"] + ["ema"] * (ema is not None))
    options = {"parallel": False, "roles": roles, "zero_grad": zero, "nogil": False}
    kernel = kernels.update_kernel(param.dtype, **options)
    hits += sum(kernel.stats.cache_hits.values())
    misses += sum(kernel.stats.cache_misses.values())
print(json.dumps([hits, misses, values]))
"""


def test_variants_are_not_mixed_up(tmp_path):
    """Kernels of the same functions, from one process to the next."""
    values = [-0.5, 1, -0.5, 1, -0.5, 1, -0.25, -0.5, 0]
    assert finish(start(tmp_path, VARIANTS)) == (0, 4, values)
    assert finish(start(tmp_path, VARIANTS)) == (4, 0, values)


def test_no_folder_to_write_to(tmp_path):
    """Without a cache folder every process compiles, and works."""
    package = tmp_path / "fastadam"
    shutil.copytree(
        Path(fastadam.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__")
    )
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where folders would have to be")
    code = (
        "import os, numba.core.caching as c\n"
        "c._CacheLocator.ensure_cache_path = lambda self: (_ for _ in ()).throw(OSError())\n"
        + STEP
    )
    env = {"NUMBA_CACHE_DIR": str(blocked / "x"), "PYTHONPATH": str(tmp_path)}
    assert finish(start(tmp_path, code, **env))[2] == 0.5


def test_no_sources_no_cache(tmp_path):
    """From a zip file, whose sources cannot be digested, nothing is kept."""
    archive = shutil.make_archive(
        str(tmp_path / "packed"), "zip", Path(fastadam.__file__).parents[1], "fastadam"
    )
    env = {"PYTHONPATH": archive}
    for _ in range(2):
        assert run(tmp_path, **env) == (0, 1, 0.5)
    assert not kernel_files(tmp_path)


def test_a_relative_folder_stays_where_it_was(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    made = "opt = fastadam.Adam(param, lr=0.5); os.chdir('elsewhere'); opt.step"
    code = STEP.replace("fastadam.Adam(param, lr=0.5).step", made)
    assert finish(start(tmp_path, code, NUMBA_CACHE_DIR="cache")) == (0, 1, 0.5)
    assert len(kernel_files(tmp_path)) == 1
    assert not list((tmp_path / "elsewhere").iterdir())


def test_without_the_compiler_a_step_says_so(tmp_path):
    process = start(tmp_path, STEP, NUMBA_DISABLE_JIT="1")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "RuntimeError: NUMBA_DISABLE_JIT must be unset" in err
