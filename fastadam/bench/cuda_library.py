"""A CUDA device for the comparison: whose arrays are used there, and how much memory is free."""

from __future__ import annotations

import gc
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from fastadam.bench import memory

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

__all__ = [
    "CupyLibrary",
    "NumbaLibrary",
    "TorchLibrary",
    "choose",
    "free_memory",
    "release",
    "synchronize",
    "too_large",
    "why_no_device",
]

# Libraries that keep freed memory for later, and how they give it back.
FREE: dict[str, Callable[[Any], object]] = {
    "torch": lambda torch: torch.cuda.empty_cache(),  # does nothing where there is no CUDA
    "cupy": lambda cupy: cupy.get_default_memory_pool().free_all_blocks(),
}


class TorchLibrary:
    """Tensors of torch.

    Raises
    ------
    ImportError
        If torch is not installed.
    RuntimeError
        If this build of torch finds no CUDA device.
    """

    name = "torch"
    device = "cuda"

    def __init__(self) -> None:
        self.torch = torch = import_module("torch")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise RuntimeError(f"this build of torch finds no CUDA device: {torch.__version__}")

    def upload(self, array: NDArray[Any]) -> Any:
        """Return a copy on the device."""
        return self.torch.from_numpy(array).to(self.device, copy=True)

    def wrap(self, array: Any) -> Any:
        """Return an array over the memory of another library's."""
        return self.torch.as_tensor(array, device=self.device)

    def copy_all(self, targets: Sequence[Any], sources: Sequence[Any]) -> None:
        """Copy each source to its target, on the device."""
        self.torch._foreach_copy_(targets, sources)

    def download(self, array: Any) -> NDArray[Any]:
        """Return a copy on the host."""
        copied: NDArray[Any] = array.detach().cpu().numpy()
        return copied


class CupyLibrary:
    """Arrays of CuPy.

    Raises
    ------
    ImportError
        If CuPy is not installed.
    RuntimeError
        If it finds no device.
    """

    name = "cupy"

    def __init__(self) -> None:
        self.cupy = cupy = import_module("cupy")
        if not cupy.cuda.runtime.getDeviceCount():
            raise RuntimeError(f"CuPy finds no CUDA device: {cupy.__version__}")

    def upload(self, array: NDArray[Any]) -> Any:
        """Return a copy on the device."""
        return self.cupy.array(array)

    def wrap(self, array: Any) -> Any:
        """Return an array over the memory of another library's."""
        return self.cupy.asarray(array)

    def copy_all(self, targets: Sequence[Any], sources: Sequence[Any]) -> None:
        """Copy each source to its target, on the device."""
        for target, source in zip(targets, sources, strict=True):
            self.cupy.copyto(target, source)

    def download(self, array: Any) -> NDArray[Any]:
        """Return a copy on the host."""
        copied: NDArray[Any] = self.cupy.asnumpy(array)
        return copied


class NumbaLibrary:
    """Numba's device arrays, which fastadam itself needs anyway."""

    name = "numba"

    def __init__(self) -> None:
        self.device = import_module("fastadam.cuda.launch")

    def upload(self, array: NDArray[Any]) -> Any:
        """Return a copy on the device."""
        return self.device.cuda.to_device(array)

    def wrap(self, array: Any) -> Any:
        """Return the array itself: it is copied by its address."""
        return array

    def copy_all(self, targets: Sequence[Any], sources: Sequence[Any]) -> None:
        """Copy each source to its target, on the device."""
        view = import_module("fastadam.cuda.arrays").view
        for pair in zip(targets, sources, strict=True):
            to, source = (view(array, "array", writable=False) for array in pair)
            self.device.copy(to.address, source.address, to.nbytes, 0)

    def download(self, array: Any) -> NDArray[Any]:
        """Return a copy on the host."""
        copied: NDArray[Any] = array.copy_to_host()
        return copied


def choose() -> TorchLibrary | CupyLibrary | NumbaLibrary:
    """Return the library whose arrays fastadam is measured on: the first that works.

    Returns
    -------
    TorchLibrary, CupyLibrary or NumbaLibrary
        In this order, since torch is what fastadam is compared with most.
    """
    if not import_module("fastadam.cuda.launch").SIMULATED:
        for make in (TorchLibrary, CupyLibrary):
            try:
                return make()
            except (ImportError, RuntimeError):
                continue
    return NumbaLibrary()


def synchronize() -> None:
    """Wait until the device has done all its work, whoever started it."""
    import_module("fastadam.cuda.launch").synchronize_all()


def free_memory() -> float:
    """Return the bytes that are free on the device.

    Returns
    -------
    float
        Infinity in Numba's CUDA simulator.
    """
    context = import_module("fastadam.cuda.launch").cuda.current_context()
    return float(context.get_memory_info()[0])


def release() -> None:
    """Give back to the device what finished contenders held, so that all can have it."""
    gc.collect()
    synchronize()
    for name, free in FREE.items():
        if name in sys.modules:
            free(sys.modules[name])
    # Numba frees memory when it needs some, or when much has come together.
    context = import_module("fastadam.cuda.launch").cuda.current_context()
    for holder in (context, getattr(context, "memory_manager", None)):
        waiting = getattr(holder, "deallocations", None)  # the simulator has none
        if waiting is not None:
            waiting.clear()


def too_large(needed: int, limit: int | None, free: float) -> str | None:
    """Return why a workload does not fit on the device, None if it does.

    Parameters
    ----------
    needed : int
        Bytes.
    limit : int or None
        Of ``--max-memory``.
    free : float
        Bytes that are free there.

    Returns
    -------
    str or None
        The reason.

    Examples
    --------
    >>> from fastadam.bench.cuda_library import too_large
    >>> too_large(2**31, None, free=2**31)
    'needs 2.0 GiB on the device, free are 2.0 GiB'
    """
    size = memory.format_bytes(needed)
    if limit is not None and needed > limit:
        return f"needs {size} on the device, --max-memory is {memory.format_bytes(limit)}"
    # A tenth for what libraries keep beside their arrays.
    if needed > 0.9 * free:
        return f"needs {size} on the device, free are {memory.format_bytes(free)}"
    return None


def why_no_device() -> str | None:
    """Return what is missing for a step on a CUDA device, None if nothing is.

    Returns
    -------
    str or None
        Names the package, the driver or the device.
    """
    from fastadam.bench import driver

    try:
        simulated = import_module("fastadam.cuda.launch").SIMULATED
    except ImportError as error:
        return " ".join(str(error).split())
    reason, devices = ("", [{}]) if simulated else driver.ask()
    return None if devices else reason
