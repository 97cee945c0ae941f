"""Torch and Numba may share the OpenMP library, and what one sets of it the other sees."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("torch", exc_type=ImportError)


def test_torch_keeps_its_threads():
    """Numba's OpenMP layer, when it starts, sets how many threads torch takes too.

    It starts once in a process, so this takes a new one.
    """
    code = """
import torch, fastadam.torch
torch.set_num_threads(1)
param = torch.nn.Parameter(torch.zeros(200_000))
optimizer = fastadam.torch.Adam([param])
param.grad = torch.ones(200_000)
for _ in range(3):
    optimizer.step()
    assert torch.get_num_threads() == 1, torch.get_num_threads()
"""
    env = {**os.environ, "NUMBA_NUM_THREADS": "3"}
    subprocess.run([sys.executable, "-c", code], env=env, check=True, timeout=120)
