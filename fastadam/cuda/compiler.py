"""Compiling and starting CUDA kernels.

All that fastadam asks of numba-cuda is in this file and in `driver` and `intrinsics`. In
Numba's CUDA simulator, `simulator` is both of those.
"""

import functools
import importlib.util
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from numba import config

from ..runtime import signals_deferred
from ..update.formula import bind

EXTRAS = "pip install 'fastadam[cuda13]', or 'fastadam[cuda12]' for a driver of CUDA 12"
if importlib.util.find_spec("numba_cuda") is None:
    raise ImportError(f"arrays on a CUDA device need numba-cuda: {EXTRAS}", name="numba_cuda")

# After the check, since without numba-cuda Numba has an old `cuda` of its own.
from numba import cuda as cuda  # noqa: E402

SIMULATED = bool(config.ENABLE_CUDASIM)
if TYPE_CHECKING or not SIMULATED:
    from . import driver as driver
    from . import intrinsics as intrinsics
else:
    from . import simulator as driver

    intrinsics = driver

# The simulator's threads are Python's.
MAX_THREADS = 8 if SIMULATED else 1024

inline = driver.compile_inline


class Kernel:
    """An entry point of two int64, compiled when it is first needed.

    Parameters
    ----------
    function : callable
        What a thread does.
    bounds : int or tuple
        Threads in a block at most, and blocks on a multiprocessor at least:
        what the compiler may spend registers for.
    constants
        Take the place of the function's globals of those names.
    """

    signature = cuda.types.void(cuda.types.int64, cuda.types.int64)

    def __init__(self, function: Callable[..., Any], bounds: Any, **constants: Any) -> None:
        self.function, self.bounds = bind(function, **constants), bounds

    @functools.cached_property
    def compiled(self) -> Any:
        """What the compiler has made of it, for the device in use."""
        return driver.compile_kernel(self.function, self.signature, self.bounds)

    def load(self, device: int) -> None:
        """Compile it, and load it on a device, now."""
        with driver.context(device), driver.allowed_in_capture(), signals_deferred():
            driver.load_kernel(self.compiled)

    def call(
        self, device: int, blocks: int, threads: int, stream: int, *arguments: int
    ) -> Callable[[], object]:
        """Return a call that starts it on the current device."""
        launcher = driver.launcher(self.compiled, device, blocks, threads, stream)
        call: Callable[[], object] = launcher(*arguments)
        return call
