"""Checkpoints: saved beside plain writes of as many bytes, and loaded."""

import os
import statistics
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np

import fastadam

from .common import need

BLOCK = 1 << 24


class Checkpoint:
    """Gigabytes only with FASTADAM_ASV_LARGE=1; in TMPDIR, which should be on a real disk."""

    param_names = ("megabytes",)
    params = ([64, 1024],)
    timeout = 600
    rounds = 7

    def setup(self, megabytes):
        need("this commit has no checkpoints", unless=hasattr(fastadam, "save"))
        need("safetensors is not installed", unless=find_spec("safetensors"))
        large = os.environ.get("FASTADAM_ASV_LARGE") == "1"
        need("FASTADAM_ASV_LARGE=1 includes it", unless=large or megabytes < 1024)
        self.folder = tempfile.TemporaryDirectory()  # removed with this object
        rng = np.random.default_rng(0)
        size = megabytes * (1 << 20) // (3 * 4 * 8)  # in 8 parameters, with two moments each
        self.params = [rng.random(size, dtype=np.float32) for _ in range(8)]
        self.opt = fastadam.Adam(self.params)
        self.opt.step([np.ones_like(param) for param in self.params])
        self.file, self.plain = (Path(self.folder.name) / name for name in ("ours", "plain"))
        self._save()

    def track_save_speed_of_plain_write(self, *_):
        """Interleaved, the median of the pairs: over 1 is faster than plain."""
        return statistics.median(plain / ours for plain, ours in self._times())

    def time_load(self, *_):
        fastadam.load(self.file, self.opt)

    def _save(self):
        fastadam.save(self.file, self.opt)

    def _arrays(self):
        states = self.opt.state.values()
        return [*self.params, *(state[n] for state in states for n in ("exp_avg", "exp_avg_sq"))]

    def _write(self):
        """As durable: to a file beside, flushed, renamed."""
        beside = self.plain.with_suffix(".new")
        with beside.open("wb", buffering=0) as file:
            for array in self._arrays():
                data = array.data.cast("B")
                for start in range(0, len(data), BLOCK):
                    file.write(data[start : start + BLOCK])
            os.fsync(file.fileno())
        beside.replace(self.plain)

    def _times(self):
        for turn in range(self.rounds):
            calls = (self._write, self._save)
            times = {}
            for call in calls if turn % 2 else reversed(calls):
                start = time.perf_counter()
                call()
                times[call] = time.perf_counter() - start
            yield [times[call] for call in calls]
