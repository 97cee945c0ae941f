"""What a new process waits for: imports and the first step, each in a fresh interpreter."""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path


class Import:
    """fastadam's own share is the difference."""

    number = 1
    repeat = 10

    def timeraw_import_numba(self):
        return "import numba"

    def timeraw_import_fastadam(self):
        return "import fastadam"


PREPARE = """
import os
os.environ["NUMBA_CACHE_DIR"] = {folder!r}
import numpy as np
import fastadam
params, grads = np.zeros({size}, np.float32), np.ones({size}, np.float32)
opt = fastadam.Adam(params)
"""
STEP = "opt.step(grads)"


class FirstStep:
    """The first step after import and construction, in a cache folder of its own.

    1,000 elements take the serial kernel; 1,000,000 the parallel one, and
    start the threads.
    """

    param_names = ("size",)
    params = ([1_000, 1_000_000],)
    number = 1  # a second step in the same interpreter is not a first
    repeat = 5
    timeout = 300

    def setup(self, size):
        self.folder = tempfile.mkdtemp(prefix="fastadam-asv-")
        self.warm = str(Path(self.folder) / "warm")
        code = PREPARE.format(folder=self.warm, size=size) + "fastadam.compile(opt)"
        subprocess.run([sys.executable, "-c", code], check=True)

    def teardown(self, _):
        shutil.rmtree(self.folder)

    def timeraw_warm_cache(self, size):
        return STEP, PREPARE.format(folder=self.warm, size=size)

    def timeraw_empty_cache(self, size):
        # asv asks again for every sample: each compiles in a folder of its own.
        return STEP, PREPARE.format(folder=tempfile.mkdtemp(dir=self.folder), size=size)

    def timeraw_compile_warm_cache(self, size):
        return "fastadam.compile(opt)", PREPARE.format(folder=self.warm, size=size)
