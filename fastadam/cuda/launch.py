"""The only home of the cuda module: compiling, launching, memory, streams and primitives.

All that fastadam asks of numba-cuda is in this file and the two that it imports,
`_driver` and `_primitives`; what Numba's CUDA simulator has in their place is in
`_simulator`. Another package would be put in its place here.
"""

import functools
import importlib.util
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from numba import config

from ..runtime import undisturbed
from ..update.formula import bind

EXTRAS = "pip install 'fastadam[cuda13]', or 'fastadam[cuda12]' for a driver of CUDA 12"
if importlib.util.find_spec("numba_cuda") is None:
    raise ImportError(f"arrays on a CUDA device need numba-cuda: {EXTRAS}", name="numba_cuda")

# After the check, since without numba-cuda Numba has an old `cuda` of its own.
from numba import cuda  # noqa: E402

SIMULATED = bool(config.ENABLE_CUDASIM)
# Launches are remembered by their size and stream, up to so many.
MOST_LAUNCHERS = 64
# The simulator's threads are Python's.
MOST_THREADS = 8 if SIMULATED else 1024

float64 = cuda.types.float64  # for shared arrays


class Kernel:
    """An entry point whose arguments are all int64, compiled when it is first launched.

    Parameters
    ----------
    function : callable
        What a thread does.
    arguments : int
        How many it takes.
    bounds : int or tuple
        Threads in a block at most, and blocks on a multiprocessor at least:
        what the compiler may spend registers for.
    constants
        Take the place of the function's globals of those names.
    """

    def __init__(
        self, function: Callable[..., Any], arguments: int, bounds: Any, **constants: Any
    ) -> None:
        self.function = bind(function, **constants)
        self.arguments, self.bounds = arguments, bounds
        self._launchers: dict[tuple[int, int, int, int], Any] = {}

    @property
    def signature(self) -> Any:
        """What numba-cuda is told of the arguments."""
        return cuda.types.void(*[cuda.types.int64] * self.arguments)

    @functools.cached_property
    def compiled(self) -> Any:
        """The kernel for the device in use."""
        if SIMULATED:
            return cuda.jit(simulator.Quiet(self.function))
        with undisturbed():
            return cuda.jit(self.signature, launch_bounds=self.bounds)(self.function)

    def prepare(self) -> None:
        """Compile it, and load it on the current device, now."""
        with relaxed():
            compiled = self.compiled
            with undisturbed():
                load_kernel(compiled)

    def call(
        self, device: int, blocks: int, threads: int, stream: int, *arguments: int
    ) -> Callable[[], object]:
        """Return a call that starts it on the current device, if there is a block to start."""
        if not blocks:
            return _nothing
        make = self._launchers.get((device, blocks, threads, stream))
        if make is None:
            if len(self._launchers) == MOST_LAUNCHERS:  # streams come and go
                self._launchers.clear()
            with relaxed():
                make = launcher(self.compiled, blocks, threads, stream)
            self._launchers[device, blocks, threads, stream] = make
        call: Callable[[], object] = make(*arguments)
        return call


def _nothing() -> None:
    pass


def inline(function: Callable[..., Any]) -> Any:
    """Prepare a function for use inside a kernel."""
    if SIMULATED:
        return cuda.jit(simulator.Quiet(function), device=True)
    # By the compiler behind Numba: what is None has been pruned by then.
    return cuda.jit(device=True, forceinline=True)(function)


if TYPE_CHECKING:
    from . import simulator
if TYPE_CHECKING or not SIMULATED:
    from .driver import (
        Event,
        address_of_buffer,
        allocate,
        clear,
        context,
        copy,
        device_of,
        download,
        is_capturing,
        launcher,
        load_kernel,
        multiprocessors,
        pinned,
        relaxed,
        side_stream,
        synchronize,
        upload,
    )
    from .intrinsics import convert, fma, load, load4, mul, only_if, root, store, store4
else:
    from . import simulator
    from .simulator import (
        Event,
        address_of_buffer,
        allocate,
        clear,
        context,
        convert,
        copy,
        device_of,
        download,
        fma,
        is_capturing,
        launcher,
        load,
        load4,
        load_kernel,
        mul,
        multiprocessors,
        only_if,
        pinned,
        relaxed,
        root,
        side_stream,
        store,
        store4,
        synchronize,
        upload,
    )

__all__ = [
    "EXTRAS",
    "MOST_THREADS",
    "SIMULATED",
    "Event",
    "Kernel",
    "address_of_buffer",
    "allocate",
    "at_once",
    "clear",
    "context",
    "convert",
    "copy",
    "cuda",
    "device_of",
    "download",
    "float64",
    "fma",
    "inline",
    "is_capturing",
    "launcher",
    "load",
    "load4",
    "load_kernel",
    "mul",
    "multiprocessors",
    "only_if",
    "pinned",
    "relaxed",
    "root",
    "side_stream",
    "store",
    "store4",
    "synchronize",
    "synchronize_all",
    "upload",
]


def synchronize_all() -> None:
    """Wait until all work on the current device is done."""
    cuda.synchronize()


def at_once(
    device: int, copying: Callable[[int, int, int, int], None], target: int, source: int, size: int
) -> None:
    """Upload, download or copy bytes, once all work on a device is done; wait for them."""
    if size:
        with context(device):
            synchronize_all()
            copying(target, source, size, 0)
            synchronize(0)
