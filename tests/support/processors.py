"""Processors to compile for, and whether this one is one of them."""

import os
from pathlib import Path

# NUMBA_CPU_NAME alone leaves the host's own features on.
CPUS = {
    "avx512": {"NUMBA_CPU_NAME": "skylake-avx512", "NUMBA_CPU_FEATURES": "-prefer-256-bit"},
    "avx2": {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": ""},
    "plain": {"NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": ""},
}


def supports(cpu):
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8") if os.name == "posix" else ""
    return {"avx512": "avx512dq" in flags, "avx2": " avx2 " in flags, "plain": True}[cpu]
