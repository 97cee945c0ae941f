"""What the machine is asked, and made-up answers of other machines."""

import doctest
import os
import sys
import time

import pytest

from fastadam import machine
from fastadam.bench import load


def test_examples():
    assert doctest.testmod(machine).failed == 0


# Memory and CPUs


def fake_system(root, **files):
    (root / "proc/self").mkdir(parents=True)
    meminfo = "MemTotal: 9000 kB\nMemAvailable:    8000 kB\n"
    (root / "proc/meminfo").write_text(meminfo, "utf-8")
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")


def test_available(tmp_path):
    fake_system(tmp_path)
    assert machine.memory_available(tmp_path) == 8000 * 1024
    assert (machine.memory_available() or 1) > 0


@pytest.mark.parametrize("limit", [("5000000", 4_200_000), ("max", 8000 * 1024)])
def test_available_in_a_container(tmp_path, limit):
    text, left = limit
    group = "sys/fs/cgroup/a/"
    files = {
        "proc/self/cgroup": "0::/a/b\n",
        group + "memory.max": text,
        group + "memory.current": "1000000",
        group + "memory.stat": "anon 5\ninactive_file 200000\n",
    }
    fake_system(tmp_path, **files)
    assert machine.memory_available(tmp_path) == left


def test_available_in_an_old_container(tmp_path):
    group = "sys/fs/cgroup/memory/a/"
    files = {
        "proc/self/cgroup": "5:cpu,cpuacct:/a\n4:memory:/a\n",
        group + "memory.limit_in_bytes": "3000000",
        group + "memory.usage_in_bytes": "1000000",
    }
    fake_system(tmp_path, **files)
    assert machine.memory_available(tmp_path) == 2_000_000


def test_what_else_runs(tmp_path, monkeypatch):
    stat = tmp_path / "stat"
    monkeypatch.setattr(machine, "CPU_TIMES", stat)
    tick = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
    stat.write_text("cpu 100 0 50 9000 10 0 0 5 0 0\ncpu0 1 2 3\n", "utf-8")
    with machine.OtherProcesses() as others:
        time.sleep(0.1)
        stat.write_text(f"cpu {100 + 10 * tick} 0 50 9999 10 0 0 5 0 0\n", "utf-8")
    assert machine.too_busy(others.cpus, os.cpu_count() or 1)
    assert not machine.too_busy(0.1, 10_000)
    assert 10 < others.cpus <= 100  # 10 CPU seconds in a tenth of one, or a bit more
    monkeypatch.setattr(machine, "CPU_TIMES", tmp_path / "none")
    with machine.OtherProcesses() as others:
        pass
    assert others.cpus is None


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/stat")
def test_sees_processes_that_spin():
    with load.Spinners(1):
        assert machine.busy_cpus(0.5) > 0.2  # its share of a CPU, whatever else runs


def test_elsewhere_the_load_tells(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "CPU_TIMES", tmp_path / "none")
    monkeypatch.setattr(machine.os, "getloadavg", lambda: (1.5, 9.0, 9.0), raising=False)
    assert machine.busy_cpus(0.0) == 1.5
    monkeypatch.delattr(machine.os, "getloadavg")
    assert machine.busy_cpus(0.0) is None


# SIMD, cache and GPUs


@pytest.mark.parametrize(
    ("assembly", "summary"),
    [
        ("\tvsqrtps\t%zmm0, %zmm1\n\tvfmadd231ps\t%zmm0, %zmm1, %zmm2", "AVX-512, 16"),
        ("\tvsqrtps\t%ymm0, %ymm1\n\tcallq\t*%rax", "AVX, 8"),
        ("\tfsqrt\tv0.4s, v1.4s\n\tfmla\tv0.4s, v1.4s, v2.4s", "NEON, 4"),
        ("\tfsqrt.4s\tv0, v1\n\tfmla.4s\tv0, v1, v2", "NEON, 4"),  # as macOS writes it
        ("\tfsqrt\tz0.s, p0/m, z1.s\n\tfmad\tz0.s, p0/m, z1.s, z2.s", "SVE, FMA"),
        ("\tfsqrt\ts0, s1\n\tfmadd\ts0, s1, s2, s3", "no vectors, 1"),
    ],
)
def test_reads_assembly(assembly, summary):
    found = machine._read_assembly(assembly)
    assert found["summary"].startswith(summary)
    assert found["fma"] == ("callq" not in assembly)


def test_no_cache_folder(monkeypatch):

    from fastadam.cpu import kernels

    monkeypatch.setattr(kernels, "cache_folder", lambda: None)
    assert machine.compile_cache() == {"folder": None, "writable": False, "kernels": 0, "bytes": 0}


def test_counts_kernels(monkeypatch, tmp_path):

    from fastadam.cpu import kernels

    (tmp_path / "fastadam.update_serial-1.nbc").write_bytes(b"12345")
    (tmp_path / "other.nbc").write_bytes(b"1")
    monkeypatch.setattr(kernels, "cache_folder", lambda: str(tmp_path))
    found = machine.compile_cache()
    assert found == {"folder": str(tmp_path), "writable": True, "kernels": 1, "bytes": 5}


def test_driver_without_gpu(monkeypatch):
    class Driver:
        def cuInit(self, _):  # noqa: N802
            return 100

    monkeypatch.setattr(machine.sys, "platform", "linux")
    monkeypatch.setattr(machine.ctypes, "CDLL", lambda _: Driver())
    assert machine.cuda_devices() == (
        "the NVIDIA driver is there but finds no GPU (CUDA error 100)",
        [],
    )


@pytest.mark.parametrize(
    ("package", "used", "summary"),
    [
        (None, True, "GPU A, compute capability 9.0, 80.0 GiB"),
        ("not installed: x", False, "GPU A, compute capability 9.0, 80.0 GiB; not used"),
    ],
)
def test_gpu_is_named(monkeypatch, package, used, summary):
    device = {"name": "GPU A", "compute_capability": "9.0", "memory_bytes": 80 * 2**30}
    monkeypatch.setattr(machine, "cuda_devices", lambda: ("", [device]))
    monkeypatch.setattr(machine, "_cuda_package", lambda: package)
    found = machine.gpu()
    assert (found["used"], found["summary"]) == (used, summary)
    assert (found["visible"], found["package"]) == (["GPU A"], package)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            ImportError("need numba-cuda: pip install 'fastadam[cuda13]'", name="numba_cuda"),
            "not installed: pip install 'fastadam[cuda13]'",
        ),
        (ImportError("no cuda.bindings", name="cuda"), "does not work: no cuda.bindings"),
        (OSError("a library\nis bad"), "does not work: OSError: a library is bad"),
    ],
)
def test_cuda_package(monkeypatch, error, expected):
    def cuda_backend():
        raise error

    monkeypatch.setattr(machine, "cuda_backend", cuda_backend)
    assert machine._cuda_package() == expected
