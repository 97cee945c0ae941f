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
    opt = fastadam.AdamW(params, lr=0.1, schedule=fastadam.schedules.cosine(10))
    for _ in range(10):
        opt.step({name: array.copy() for name, array in params.items()})
    assert all((abs(array) < 1).all() for array in params.values())

command = Path(sys.executable).with_name("fastadam")
assert subprocess.run([command, "--version"], check=True).returncode == 0
assert subprocess.run([command, "info"], check=True).returncode == 0
# The demo's packages are absent here: one clear line, not a traceback.
done = subprocess.run([command, "train"], capture_output=True, text=True, check=False)
assert done.returncode == 2, done
assert "fastadam[demo]" in done.stderr, done.stderr
assert "Traceback" not in done.stderr, done.stderr
