"""Facts about this machine: memory, CPUs, SIMD, threads, GPUs, compile cache.

`fastadam info` shows all of it, and `fastadam bench` saves some of it beside its
results. What is not in the standard library is imported where it is used.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from fastadam.cpus import (
    ROOT,
    affinity,
    control_groups,
    cpu_quota,
    cpus_allowed,
    default_threads,
    text_of,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = [
    "BUSY",
    "OtherProcesses",
    "busy_cpus",
    "compile_cache",
    "cuda_backend",
    "cuda_devices",
    "describe_gpu",
    "format_bytes",
    "gpu",
    "installed",
    "memory_available",
    "parallel_from",
    "processor",
    "simd",
    "threads",
    "too_busy",
    "versions",
]

OPTIONAL = (
    "autograd matplotlib rich torch jax scipy mpi4py cupy-cuda12x cupy-cuda13x numba-cuda tbb"
)
# Numba's threading layers: the module that holds it; whether a child forked after a parallel step
# has threads; whether several Python threads can be in parallel functions of the user's own.
LAYERS = {
    "tbb": ("tbbpool", True, True),
    "omp": ("omppool", sys.platform != "linux", True),  # on Linux, GNU OpenMP
    "workqueue": ("workqueue", True, False),
}
# CPUs kept busy by others that count: less may be the system's own housekeeping.
BUSY = 0.15
# Where Linux counts what its CPUs have done, and tells which NVIDIA driver is loaded.
CPU_TIMES, NVIDIA_VERSION = Path("/proc/stat"), Path("/sys/module/nvidia/version")
# Numbers of cuDeviceGetAttribute: major and minor compute capability, multiprocessors.
CUDA_ATTRIBUTES = (75, 76, 16)


def format_bytes(number: float) -> str:
    """Write a number of bytes for a person, in two or three digits.

    Examples
    --------
    >>> from fastadam.machine import format_bytes
    >>> format_bytes(1536), format_bytes(4.2 * 2**30)
    ('1.5 KiB', '4.2 GiB')
    """
    units = iter(("B", "KiB", "MiB"))
    unit = next(units)
    while number >= 1024 and unit != "GiB":
        number, unit = number / 1024, next(units, "GiB")
    return f"{number:.0f} {unit}" if number >= 100 or unit == "B" else f"{number:.1f} {unit}"


def installed(names: Iterable[str]) -> dict[str, str]:
    """Return the versions of those of these distributions that are installed."""
    found = {}
    for name in dict.fromkeys(names):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def versions() -> dict[str, Any]:
    """Return the versions of fastadam and of what it works with."""
    import fastadam

    return {
        "fastadam": fastadam.__version__,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("numpy", "numba", "llvmlite")},
        "optional": installed(OPTIONAL.split()),
    }


# Memory and CPUs


def memory_available(root: Path = ROOT) -> int | None:
    """Return the bytes that can be allocated without swapping, None if nothing tells.

    What the system has available, or less if a container's limit leaves less.
    """
    left = [_system_memory(root), *(_group_memory(g) for g in control_groups("memory", root))]
    return min((number for number in left if number is not None), default=None)


def _system_memory(root: Path) -> int | None:
    found = re.search(r"^MemAvailable:\s*(\d+) kB", text_of(root / "proc/meminfo"), re.MULTILINE)
    if found:
        return int(found[1]) * 1024
    try:  # not Linux: what is free, or, where that is not told, half of what there is
        page = os.sysconf("SC_PAGE_SIZE")
        if "SC_AVPHYS_PAGES" in os.sysconf_names:
            return page * os.sysconf("SC_AVPHYS_PAGES")
        return page * os.sysconf("SC_PHYS_PAGES") // 2
    except (AttributeError, OSError, ValueError):
        return None


def _group_memory(group: Path) -> int | None:
    if (group / "memory.max").exists():  # version 2
        limit, usage, unused = "memory.max", "memory.current", "inactive_file"
    else:
        limit, usage = "memory.limit_in_bytes", "memory.usage_in_bytes"
        unused = "total_inactive_file"
    try:
        left = int(text_of(group / limit)) - int(text_of(group / usage))
    except ValueError:  # "max": no limit
        return None
    # Files that nobody has read for a while are given up before anything fails.
    found = re.search(rf"^{unused} (\d+)$", text_of(group / "memory.stat"), re.MULTILINE)
    return max(0, left + (int(found[1]) if found else 0))


def processor() -> dict[str, Any]:
    """Return what the system says of the processor."""
    return {
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "cpu": _cpu_name(),
        "cpus": os.cpu_count() or 1,
        "cpus_allowed": cpus_allowed(),
        "cpu_quota": cpu_quota(),
    }


def _cpu_name() -> str:
    name = ""
    if sys.platform == "darwin":
        command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            name = subprocess.run(command, capture_output=True, text=True, timeout=5).stdout  # noqa: S603
    elif sys.platform == "linux":
        found = re.search(r"^model name\s*:\s*(.*)$", text_of(Path("/proc/cpuinfo")), re.MULTILINE)
        name = found[1] if found else ""
    return name.strip() or platform.processor() or "unknown"


class OtherProcesses:
    """Count the CPUs that other processes, or other virtual machines, keep busy.

    Attributes
    ----------
    cpus : float or None
        How many, on average over the ``with`` block, which must wait for the
        child processes that it starts; None where nothing tells.

    Examples
    --------
    >>> from fastadam.machine import OtherProcesses
    >>> with OtherProcesses() as others:
    ...     total = sum(range(1000))
    >>> others.cpus is None or others.cpus >= 0
    True
    """

    def __init__(self) -> None:
        self.cpus: float | None = None

    def __enter__(self) -> Self:
        self._before = self._sample()
        return self

    def __exit__(self, *_: object) -> None:
        now, (began, old, old_own) = self._sample(), self._before
        if now[1] is not None and old is not None and now[0] > began:
            self.cpus = max(0.0, now[1] - old - (now[2] - old_own)) / (now[0] - began)

    def _sample(self) -> tuple[float, float | None, float]:
        """Return seconds: now, all CPUs' busy time, that of this process and its children."""
        times = os.times()
        own = times.user + times.system + times.children_user + times.children_system
        try:
            # cpu user nice system idle iowait irq softirq steal
            numbers = [int(word) for word in text_of(CPU_TIMES).partition("\n")[0].split()[1:9]]
            user, nice, system, _, _, irq, softirq, steal = numbers
        except ValueError:
            return time.monotonic(), None, own
        busy = user + nice + system + irq + softirq + steal
        return time.monotonic(), busy / os.sysconf("SC_CLK_TCK"), own


def busy_cpus(seconds: float = 0.3) -> float | None:
    """Return how many CPUs other processes keep busy, None where nothing tells.

    Linux counts what its CPUs do, and this process sleeps for a moment; where
    only the load of the last minute is known, it stands for that.
    """
    with OtherProcesses() as others:
        time.sleep(seconds)
    if others.cpus is not None:
        return others.cpus
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):  # Windows has none; others may not tell
        return None


def too_busy(others: float, needed: int) -> bool:
    """Return whether other processes keep CPUs busy that so many threads need.

    A thread that must share a CPU holds up all that wait for it.

    Examples
    --------
    >>> from fastadam.machine import too_busy
    >>> too_busy(1.0, 100_000), too_busy(1.0, 0)
    (True, False)
    """
    return needed > 0 and others > BUSY and others + needed > (os.cpu_count() or 1) + BUSY


# What Numba makes of it


def simd() -> dict[str, Any]:
    """Compile a loop as the kernels are compiled, and look at the machine code.

    The names of processor and features do not tell: LLVM prefers 256-bit
    vectors on some processors that have wider ones, and NUMBA_CPU_NAME alone
    leaves the host's features on.
    """
    import numba
    from numba.core.registry import cpu_target

    from fastadam.cpu import intrinsics

    if numba.config.DISABLE_JIT:
        summary = "none: NUMBA_DISABLE_JIT is set"
        return {**_read_assembly(""), "summary": summary, "compiled_for": None}
    fma: Any = intrinsics.fma

    def loop(array: Any) -> None:
        for i in range(array.size):
            x = array[i]
            array[i] = fma(x, x, math.sqrt(x) / x)

    compiled = intrinsics.inline(loop)
    compiled.compile((numba.float32[::1],))
    (assembly,) = compiled.inspect_asm().values()
    compiled_for = cpu_target.target_context.codegen().magic_tuple()[1]
    return {**_read_assembly(assembly), "compiled_for": compiled_for}


def _read_assembly(assembly: str) -> dict[str, Any]:
    """Return what a loop of square roots and multiply-adds was compiled to."""
    # By square roots: a multiply-add without an instruction for it is a call, one at a time.
    roots = " ".join(re.findall(r"^\s*((?:v?sqrt[ps]s|fsqrt)[.\s].*)$", assembly, re.MULTILINE))
    fma = re.search(r"^\s*(vfmadd|fmadd|fmla|fmad)", assembly, re.MULTILINE) is not None
    kinds: tuple[tuple[str, str | None, int | None], ...] = (
        ("zmm", "AVX-512", 16),
        ("ymm", "AVX2" if fma else "AVX", 8),
        ("vsqrtps", "128-bit AVX", 4),
        ("sqrtps", "SSE2", 4),
        ("vsqrtss", "AVX", 1),
        ("sqrtss", "SSE2", 1),
        (r"\bz\d+\.s", "SVE", None),  # as wide as the processor has it
        (r"\.4s", "NEON", 4),
        ("", None, 1),
    )
    instructions, lanes = next(kind[1:] for kind in kinds if re.search(kind[0], roots))
    width = f", {lanes} float32 per instruction" if lanes else ""
    return {
        "summary": f"{instructions or 'no vectors'}{width},"
        f" {'FMA' if fma else 'no FMA instruction: exact but slow'}",
        "instructions": instructions,
        "float32_per_instruction": lanes,
        "fma": fma,
    }


def parallel_from() -> int:
    """Return from how many elements on a step takes several threads."""
    from fastadam.cpu import kernels

    return kernels.SERIAL_BELOW


def threads() -> dict[str, Any]:
    """Launch Numba's threads, and count those that come."""
    import numba
    import numpy as np

    from fastadam.cpu import intrinsics

    def who(out: Any) -> None:
        for i in numba.prange(out.size):
            out[i] = numba.get_thread_id()

    count, layer, error = numba.config.NUMBA_NUM_THREADS, None, None
    allowed, tasks, seen = affinity(), _tasks(), set()
    used, rule = default_threads()
    try:
        # Not kept on disk: the digest of the kernels' sources does not cover this function.
        launch = numba.njit(parallel=True, **intrinsics.FLAGS)(who)
        out = np.zeros(64 * count, dtype=np.int64)
        # TBB may leave so little work to fewer threads: each launch gives the rest a chance.
        for _ in range(50):
            launch(out)
            seen.update(out.tolist())
            if len(seen) >= count:
                break
        layer, count = numba.threading_layer(), numba.get_num_threads()
    except (ValueError, ImportError, RuntimeError) as problem:
        error = " ".join(str(problem).split())
    on_cpus = affinity().union(*(affinity(task) for task in _tasks() - tasks))
    return {
        "count": count,
        "used": used,
        "rule": rule,
        "layer": layer,
        "error": error,
        "layers": {
            name: {
                "available": _has_layer(name),
                "threads_after_fork": threads_after_fork,
                "concurrent_functions": concurrent_functions,
            }
            for name, (_, threads_after_fork, concurrent_functions) in LAYERS.items()
        },
        "seen": len(seen),
        "on_cpus": len(on_cpus) or None,
        "main_bound": affinity() < allowed,
        "parallel_from": parallel_from(),
    }


def _tasks() -> set[str]:
    try:
        return {path.name for path in Path("/proc/self/task").iterdir()}
    except OSError:
        return set()


def _has_layer(name: str) -> bool:
    try:
        if name == "tbb":
            import_module("numba.np.ufunc.parallel")._check_tbb_version_compatible()
        import_module(f"numba.np.ufunc.{LAYERS[name][0]}")
    except ImportError:
        return False
    return True


def compile_cache() -> dict[str, Any]:
    """Return where compiled kernels are kept, and how many there are."""
    from fastadam.cpu import kernels

    folder = kernels.cache_folder()
    if folder is None:
        return {"folder": None, "writable": False, "kernels": 0, "bytes": 0}
    try:
        # What access rights say is not all: a file system can be read-only, or full.
        with tempfile.TemporaryFile(dir=folder):
            writable = True
    except OSError:
        writable = False
    sizes = []
    for path in Path(folder).glob("fastadam.*.nbc"):
        try:
            sizes.append(path.stat().st_size)
        except OSError:  # removed just now
            continue
    return {
        "folder": str(folder),
        "writable": writable,
        "kernels": len(sizes),
        "bytes": sum(sizes),
    }


# GPUs


def cuda_devices() -> tuple[str, list[dict[str, Any]]]:
    """Ask NVIDIA's driver itself which GPUs there are, without a CUDA package.

    Returns
    -------
    reason : str
        Why there is none, if there is none.
    devices : list of dict
        ``name``, ``compute_capability`` (str, such as "9.0"),
        ``memory_bytes``, ``multiprocessors`` (int), ``driver`` (str or None:
        its version), ``driver_cuda`` (str: the CUDA version it is for).
    """
    if sys.platform == "darwin":
        return "no CUDA on macOS", []
    library = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        cuda = ctypes.CDLL(library)
    except OSError:
        return f"no NVIDIA driver found ({library} could not be loaded)", []
    count, device = ctypes.c_int(), ctypes.c_int()
    status = cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count))
    if status:
        return f"the NVIDIA driver is there but finds no GPU (CUDA error {status})", []
    return "the NVIDIA driver shows no GPU", [
        _cuda_device(cuda, device)
        for ordinal in range(count.value)
        if not cuda.cuDeviceGet(ctypes.byref(device), ordinal)
    ]


def _cuda_device(cuda: Any, device: ctypes.c_int) -> dict[str, Any]:
    name, memory = ctypes.create_string_buffer(256), ctypes.c_size_t()
    version, number, numbers = ctypes.c_int(), ctypes.c_int(), []
    cuda.cuDeviceGetName(name, len(name), device)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    cuda.cuDriverGetVersion(ctypes.byref(version))
    for attribute in CUDA_ATTRIBUTES:
        cuda.cuDeviceGetAttribute(ctypes.byref(number), attribute, device)
        numbers.append(number.value)
    major, minor, multiprocessors = numbers
    return {
        "name": name.value.decode(errors="replace"),
        "compute_capability": f"{major}.{minor}",
        "memory_bytes": memory.value,
        "multiprocessors": multiprocessors,
        "driver": text_of(NVIDIA_VERSION).strip() or None,
        "driver_cuda": f"{version.value // 1000}.{version.value % 1000 // 10}",
    }


def describe_gpu(device: dict[str, Any]) -> str:
    """Return a device's name, compute capability and memory in one line.

    Examples
    --------
    >>> from fastadam.machine import describe_gpu
    >>> describe_gpu({"name": "GPU A", "compute_capability": "9.0", "memory_bytes": 3 * 2**30})
    'GPU A, compute capability 9.0, 3.0 GiB'
    """
    memory = format_bytes(device["memory_bytes"])
    return f"{device['name']}, compute capability {device['compute_capability']}, {memory}"


def cuda_backend() -> Any:
    """Import fastadam's functions for a CUDA device; fails where a package does not work."""
    from fastadam.cuda import compiler

    return compiler


def gpu() -> dict[str, Any]:
    """Return which GPUs there are, and whether a step can run on them."""
    reason, devices = cuda_devices()
    package = _cuda_package()
    summary = "; ".join(map(describe_gpu, devices)) or f"{reason}; arrays on the CPU only"
    if devices and package is not None:
        summary += "; not used"
    return {
        "used": bool(devices) and package is None,
        "visible": [device["name"] for device in devices],
        "devices": devices,
        "package": package,
        "summary": summary,
    }


def _cuda_package() -> str | None:
    """Return why what steps on a GPU need cannot be used, None if it can."""
    try:
        cuda_backend()
    except ImportError as error:
        text = " ".join(str(error).split())
        _, colon, install = text.partition(": pip install ")
        absent = error.name == "numba_cuda" and colon
        return f"not installed: pip install {install}" if absent else f"does not work: {text}"
    except Exception as error:  # whatever a package of another version may raise
        return f"does not work: {type(error).__name__}: {' '.join(str(error).split())}"
    return None
