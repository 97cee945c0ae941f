"""Processes that share a machine, as torchrun starts them: a step of one beside the others."""

import os
import subprocess
import sys

from .common import need

# Waits for a line, so that all begin at once; then steps for a while, with other work between.
RANK = """
import sys, time
import numpy as np, numba, fastadam
threads, size, seconds, work = (float(word) for word in sys.argv[1:])
param = np.ones(int(size), np.float32)
grad = np.full_like(param, 0.5)
opt = fastadam.Adam(param, num_threads=int(threads) or None)
for _ in range(10):
    opt.step(grad)
print("ready", flush=True)
sys.stdin.readline()
now = time.perf_counter
times, end = [], now() + seconds
while now() < end:
    begin = now()
    opt.step(grad)
    times.append(now() - begin)
    while now() < begin + times[-1] + work:
        pass
print(sum(times) / len(times))
"""


def mean_step(ranks, threads, size, seconds=0.5, work=0.0):
    """Return the mean time of a step, in seconds, of all ranks; 0 threads are the default."""
    own = "NUMBA_NUM_THREADS"
    env = {name: value for name, value in os.environ.items() if name != own}
    env |= {"LOCAL_WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RANK, *map(str, (threads, size, seconds, work))]
    pipe = subprocess.PIPE
    children = [
        subprocess.Popen(command, env=env, stdin=pipe, stdout=pipe, text=True)
        for _ in range(ranks)
    ]
    try:
        for child in children:
            child.stdout.readline()
        for child in children:
            child.stdin.write("\n")
            child.stdin.flush()
        return sum(float(child.stdout.readline()) for child in children) / ranks
    finally:
        for child in children:
            child.kill()
            child.communicate()


class Ranks:
    """As many ranks as there are CPUs: each with its share of them, or each with all."""

    param_names = ("threads", "size", "work")
    params = (["share", "all"], [100_000, 1_000_000, 10_000_000], [0.0, 0.003])
    unit = "s"
    timeout = 300

    def track_mean_step(self, threads, size, work):
        """``work``: seconds of other work between two steps."""
        ranks = os.cpu_count() or 1
        need("one CPU alone", unless=ranks > 1)
        return mean_step(ranks, ranks if threads == "all" else 0, size, work=work)
