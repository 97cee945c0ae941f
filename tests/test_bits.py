"""The same bits: threads, paths, cuts, instruction sets, runs."""

import ast
import os
import platform
import subprocess
import sys
from pathlib import Path

import numba
import numpy as np
import pytest
from digest_run import MODES, digest, fading_digest, trajectory

import fastadam
from fastadam import _cpu

# What every machine, processor and version must end in. If a change of the
# formula is meant, print(digest()) gives the new ones.
DIGEST = {
    "float32": "6778bbe08ac20ae9696894a2004f6fc4",
    "float64": "f1dc580fed602ec972509384ddc4a283",
}
# The same with all of the optimizer tail: print(tail_digest()).
TAIL_DIGEST = {
    "float32 tail": "197b2d979b2971b5652fe190674d5f5c",
    "float64 tail": "f119956e99290379bb4d6de8cc577ba7",
}
# The same with moments and gradients that become denormal: print(fading_digest()).
FADING_DIGEST = {
    "float32 fading": "1d6f80c4593ee058b0912cda561f0151",
    "float64 fading": "e5140c5d88f50f0fd4c46655b4abf6c7",
}


@pytest.mark.parametrize("pieces", [1, 100])
def test_stored_digest(pieces):
    assert digest(pieces) == DIGEST


def test_serial_and_parallel_path(monkeypatch):
    monkeypatch.setattr(_cpu, "SERIAL_BELOW", 2**60)
    assert digest() == DIGEST
    monkeypatch.setattr(_cpu, "SERIAL_BELOW", 0)
    assert digest() == DIGEST
    assert digest(pieces=37) == DIGEST


@pytest.mark.parametrize("serial_below", [2**60, 0], ids=["serial", "parallel"])
def test_digest_of_denormal_numbers(monkeypatch, serial_below):
    monkeypatch.setattr(_cpu, "SERIAL_BELOW", serial_below)
    assert fading_digest() == FADING_DIGEST


def test_both_paths_are_taken(kernel_calls):
    """The digests above would prove nothing if one path served both."""
    small, large = np.ones(10), np.ones(_cpu.SERIAL_BELOW)
    fastadam.Adam(small).step(small.copy())
    fastadam.Adam(large).step(large.copy())
    assert kernel_calls == [("update", "float64"), ("update", "float64", "parallel")]


def test_one_thread_and_two():
    threads = numba.get_num_threads()
    if threads < 2:
        pytest.skip("one processor")
    try:
        for count in (1, 2):
            numba.set_num_threads(count)
            assert digest() == DIGEST
    finally:
        numba.set_num_threads(threads)


# NUMBA_CPU_NAME alone leaves the host's own features on.
CPUS = {
    "avx512": {"NUMBA_CPU_NAME": "skylake-avx512", "NUMBA_CPU_FEATURES": "-prefer-256-bit"},
    "avx2": {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": ""},
    "plain": {"NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": ""},
}


def supports(cpu):
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8") if os.name == "posix" else ""
    return {"avx512": "avx512dq" in flags, "avx2": " avx2 " in flags, "plain": True}[cpu]


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="x86-64 only")
@pytest.mark.parametrize(
    "cpu", [pytest.param(c, marks=() if c == "plain" else pytest.mark.full) for c in CPUS]
)
def test_instruction_sets(cpu, tmp_path):
    if not Path("/proc/cpuinfo").exists() or not supports(cpu):
        pytest.skip(f"no {cpu} on this processor")
    env = {**os.environ, **CPUS[cpu], "NUMBA_CACHE_DIR": str(tmp_path)}
    script = Path(__file__).parent / "digest_run.py"
    done = subprocess.run(
        [sys.executable, str(script)], env=env, capture_output=True, text=True, check=True
    )
    assert ast.literal_eval(done.stdout) == {**DIGEST, **TAIL_DIGEST, **FADING_DIGEST}


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("size", [1, 15, 16, 17, 63, 64, 65, 300, 8191, 8192, 8193])
def test_vector_loop_and_its_remainder_agree(mode, size):
    """An element's bits do not depend on whether it fell to the vectors or to the rest."""
    alone = trajectory(np.float32, mode, pieces=size if size <= 300 else 3, size=size)
    assert trajectory(np.float32, mode, pieces=1, size=size) == alone
