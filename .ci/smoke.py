"""The installed wheel, with its required packages only, far from the checkout."""

import importlib.resources
import subprocess
import sys
from pathlib import Path

import numpy as np

import fastadam

assert "site-packages" in fastadam.__file__, fastadam.__file__
files = importlib.resources.files("fastadam")
assert (files / "py.typed").is_file()
assert (files / "demo" / "names.txt").is_file()

for dtype in (np.float32, np.float64):
    params = {"w": np.ones((300, 300), dtype), "b": np.ones(3, dtype)}
    options = {"max_grad_norm": 1.0, "nonfinite": "raise", "ema_decay": 0.9}
    opt = fastadam.AdamW(params, lr=0.1, schedule=fastadam.schedules.cosine(10), **options)
    fastadam.compile(opt)
    for _ in range(10):
        for name, array in params.items():
            opt.grads[name] += array
        assert opt.step(zero_grad=True).grad_norm > 1
    assert all((abs(array) < 1).all() for array in params.values())

command = Path(sys.executable).with_name("fastadam")
assert subprocess.run([command, "--version"], check=True).returncode == 0
assert subprocess.run([command, "info"], check=True).returncode == 0
# The demo's packages are absent here: one clear line, not a traceback.
for name, extra in (("train", "demo"), ("bench", "bench")):
    done = subprocess.run([command, name], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done
    assert f"fastadam[{extra}]" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
