"""Numba's threading layers: what a process needs to use one, and whether it is there."""

import functools
import os
import subprocess
import sys
from pathlib import Path

LAYERS = {"omp": "omppool", "workqueue": "workqueue", "tbb": "tbbpool"}


def environment(layer):
    """Return what a process needs to use a layer."""
    # 2 threads do all that several do, on any machine. Those of OpenMP, if they have to wait,
    # are to leave the processors to the other processes here.
    env = {**os.environ, "NUMBA_THREADING_LAYER": layer, "NUMBA_NUM_THREADS": "2"}
    env["OMP_WAIT_POLICY"] = "passive"
    if layer == "tbb":  # where PyPI's tbb puts its library, the loader does not look
        folders = [str(Path(sys.prefix, "lib")), os.environ.get("LD_LIBRARY_PATH")]
        env["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, folders))
    return env


@functools.cache
def why_missing(layer):
    """Return why a layer cannot be imported, or nothing."""
    code = "from numba.np.ufunc import parallel;"
    code += "parallel._check_tbb_version_compatible();" if layer == "tbb" else ""
    code += f"import numba.np.ufunc.{LAYERS[layer]}"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(layer), capture_output=True, text=True
    )
    return done.stderr.strip().splitlines()[-1] if done.returncode else ""
