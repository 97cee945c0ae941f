"""The same bits: threads, paths, cuts, instruction sets, runs."""

import ast
import os
import platform
import subprocess
import sys
from pathlib import Path

import digest_run
import numba
import numpy as np
import pytest
from digest_run import DIGEST, FADING_DIGEST, MODES, TAIL_DIGEST, digest, fading_digest, trajectory
from processors import CPUS, supports

import fastadam
from fastadam.cpu import kernels


@pytest.mark.parametrize("pieces", [1, 100])
def test_stored_digest(pieces):
    assert digest(pieces) == DIGEST


def test_serial_and_parallel_path(monkeypatch):
    monkeypatch.setattr(kernels, "SERIAL_BELOW", 2**60)
    assert digest() == DIGEST
    monkeypatch.setattr(kernels, "SERIAL_BELOW", 0)
    assert digest() == DIGEST
    assert digest(pieces=37) == DIGEST


@pytest.mark.parametrize("serial_below", [2**60, 0], ids=["serial", "parallel"])
def test_digest_of_denormal_numbers(monkeypatch, serial_below):
    monkeypatch.setattr(kernels, "SERIAL_BELOW", serial_below)
    assert fading_digest() == FADING_DIGEST


def test_both_paths_are_taken(kernel_calls):
    """The digests above would prove nothing if one path served both."""
    small, large = np.ones(10), np.ones(kernels.SERIAL_BELOW)
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


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="x86-64 only")
@pytest.mark.parametrize(
    "cpu", [pytest.param(c, marks=() if c == "plain" else pytest.mark.full) for c in CPUS]
)
def test_instruction_sets(cpu, tmp_path):
    if not Path("/proc/cpuinfo").exists() or not supports(cpu):
        pytest.skip(f"no {cpu} on this processor")
    env = {**os.environ, **CPUS[cpu], "NUMBA_CACHE_DIR": str(tmp_path)}
    script = Path(digest_run.__file__)
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
