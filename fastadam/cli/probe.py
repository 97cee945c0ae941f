"""What `fastadam info` looks up: versions, processor, threads, GPU, compile cache.

Each function returns one entry of `fastadam.cli.info.gather`, described there.
"""

from __future__ import annotations

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
from typing import Any

from fastadam.bench import driver, load

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


def versions() -> dict[str, Any]:
    """Return the versions of fastadam and of what it works with."""
    import fastadam

    optional = {}
    for name in OPTIONAL.split():
        try:
            optional[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "fastadam": fastadam.__version__,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("numpy", "numba", "llvmlite")},
        "optional": optional,
    }


def machine() -> dict[str, Any]:
    """Return what the system says of the processor."""
    cpus = os.cpu_count() or 1
    return {
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "cpu": _cpu_name(),
        "cpus": cpus,
        "cpus_allowed": len(_affinity() or range(cpus)),
        "cpu_quota": cpu_quota(),
    }


def busy_cpus(seconds: float = 0.3) -> float | None:
    """Return how many CPUs other processes keep busy, None where nothing tells.

    Linux counts what its CPUs do, and this process sleeps for a moment; where
    only the load of the last minute is known, it stands for that.
    """
    with load.Others() as others:
        time.sleep(seconds)
    if others.cpus is not None:
        return others.cpus
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):  # Windows has none; others may not tell
        return None


def _cpu_name() -> str:
    name = ""
    try:
        if sys.platform == "darwin":
            command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
            name = subprocess.run(command, capture_output=True, text=True, timeout=5).stdout  # noqa: S603
        elif sys.platform == "linux":
            text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
            found = re.search(r"^model name\s*:\s*(.*)$", text, re.MULTILINE)
            name = found[1] if found else ""
    except (OSError, subprocess.SubprocessError):
        pass
    return name.strip() or platform.processor() or "unknown"


def _affinity(task: int | str = 0) -> set[int]:
    try:
        return set(os.sched_getaffinity(int(task)))
    except (AttributeError, OSError):  # only Linux has it; a thread may be gone
        return set()


def cpu_quota(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> Any:
    """Return how many CPUs' worth of time the control groups grant, None for no limit."""
    quotas = []
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = root / controllers if controllers else root
        # Every group above can limit as well; a container may show only its own, at the root.
        folder = base / path.strip("/")
        for group in (folder, *folder.parents):
            quotas.append(_group_quota(group))
            if group == base:
                break
    return min((quota for quota in quotas if quota), default=None)


def _group_quota(group: Path) -> float | None:
    try:
        if (group / "cpu.max").exists():  # version 2: "50000 100000", or "max 100000"
            quota, period = (group / "cpu.max").read_text(encoding="utf-8").split()
        else:
            quota, period = (
                (group / f"cpu.cfs_{name}_us").read_text(encoding="utf-8")
                for name in ("quota", "period")
            )
        return int(quota) / int(period) if int(quota) > 0 else None
    except (OSError, ValueError):
        return None


def simd() -> dict[str, Any]:
    """Compile a loop as the kernels are compiled, and look at the machine code.

    The names of processor and features do not tell: LLVM prefers 256-bit
    vectors on some processors that have wider ones, and NUMBA_CPU_NAME alone
    leaves the host's features on.
    """
    from fastadam.cpu import intrinsics

    numba: Any = import_module("numba")
    if numba.config.DISABLE_JIT:
        summary = "none: NUMBA_DISABLE_JIT is set"
        return {**read_assembly(""), "summary": summary, "compiled_for": None}
    fma: Any = intrinsics.fma

    def loop(array: Any) -> None:
        for i in range(array.size):
            x = array[i]
            array[i] = fma(x, x, math.sqrt(x) / x)

    compiled = intrinsics.inline(loop)
    compiled.compile((numba.float32[::1],))
    (assembly,) = compiled.inspect_asm().values()
    target = import_module("numba.core.registry").cpu_target.target_context
    return {**read_assembly(assembly), "compiled_for": target.codegen().magic_tuple()[1]}


def read_assembly(assembly: str) -> dict[str, Any]:
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


def threads() -> dict[str, Any]:
    """Launch Numba's threads, and count those that come."""
    from fastadam.cpu import intrinsics, kernels

    np, numba = import_module("numpy"), import_module("numba")

    def who(out: Any) -> None:
        for i in numba.prange(out.size):
            out[i] = numba.get_thread_id()

    count, layer, error = numba.config.NUMBA_NUM_THREADS, None, None
    affinity, tasks, seen = _affinity(), _tasks(), set()
    try:
        # Not kept on disk: the digest of the kernels' sources does not cover this file.
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
    on_cpus = _affinity().union(*(_affinity(task) for task in _tasks() - tasks))
    return {
        "count": count,
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
        "main_bound": _affinity() < affinity,
        "parallel_from": kernels.SERIAL_BELOW,
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


def gpu() -> dict[str, Any]:
    """Return which GPUs there are, and whether a step can run on them."""
    reason, devices = cuda_devices()
    package = _cuda_package()
    lines = [driver.describe(device) for device in devices]
    if not devices:
        summary = f"{reason}; arrays on the CPU only"
    elif package is not None:
        summary = f"{'; '.join(lines)}; not used"
    else:
        summary = "; ".join(lines)
    return {
        "used": bool(devices) and package is None,
        "visible": [device["name"] for device in devices],
        "devices": devices,
        "package": package,
        "summary": summary,
    }


def cuda_devices() -> tuple[str, list[dict[str, Any]]]:
    """Ask the driver itself, so that no CUDA package is needed or imported."""
    return driver.ask()


def _cuda_package() -> str | None:
    """Return why what steps on a GPU need cannot be used, None if it can."""
    try:
        import_module("fastadam.cuda.launch")
    except ImportError as error:
        text = " ".join(str(error).split())
        _, colon, install = text.partition(": pip install ")
        absent = error.name == "numba_cuda" and colon
        return f"not installed: pip install {install}" if absent else f"does not work: {text}"
    except Exception as error:  # whatever a package of another version may raise
        return f"does not work: {type(error).__name__}: {' '.join(str(error).split())}"
    return None


def cache() -> dict[str, Any]:
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
