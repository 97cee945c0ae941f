"""Whose arrays a contender keeps its numbers in, on the CPU or on a CUDA device.

Libraries are imported when a class is called.
"""

from __future__ import annotations

import gc
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np

from fastadam.machine import cuda_backend, cuda_devices, format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

__all__ = [
    "Arrays",
    "CupyArrays",
    "NumbaArrays",
    "NumpyArrays",
    "TorchArrays",
    "choose",
    "free_on_device",
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


class Arrays:
    """How arrays of a library are made from NumPy's, and copied."""

    on_host = False

    def upload(self, array: NDArray[Any]) -> Any:
        """Return a copy, where steps are taken."""
        raise NotImplementedError

    def download(self, array: Any) -> NDArray[Any]:
        """Return the array as one of NumPy: on the CPU itself, from a device a copy."""
        raise NotImplementedError

    def wrap(self, array: Any) -> Any:
        """Return an array of this library over the memory of one of fastadam's."""
        return array

    def source(self, array: NDArray[Any]) -> Any:
        """Return what `copy_all` copies from: on the CPU the array itself."""
        return array if self.on_host else self.upload(array)

    def copy_all(self, targets: Sequence[Any], sources: Sequence[Any]) -> None:
        """Copy each source to its target, from `source` to what `upload` or `wrap` gave."""
        for target, source in zip(targets, sources, strict=True):
            np.copyto(target, source)


class NumpyArrays(Arrays):
    """Arrays of NumPy."""

    on_host = True

    def upload(self, array: NDArray[Any]) -> Any:
        """Return a copy."""
        return array.copy()

    def download(self, array: Any) -> NDArray[Any]:
        """Return the array."""
        return np.asarray(array)


class TorchArrays(Arrays):
    """Tensors of torch; RuntimeError if a CUDA device is asked for and torch finds none."""

    CUDA = "cuda"  # torch's name of the device

    def __init__(self, device: str) -> None:
        self.torch = torch = import_module("torch")
        self.on_host, self.device = device == "cpu", self.CUDA if device == "cuda" else device
        if self.device == "cuda" and not torch.cuda.is_available():
            raise RuntimeError(f"this build of torch finds no CUDA device: {torch.__version__}")

    def upload(self, array: NDArray[Any]) -> Any:
        """Return a copy, where steps are taken."""
        return self.torch.from_numpy(array).to(self.device, copy=True)

    def download(self, array: Any) -> NDArray[Any]:
        """Return the array as one of NumPy."""
        found: NDArray[Any] = array.detach().cpu().numpy()
        return found

    def wrap(self, array: Any) -> Any:
        """Return a tensor over the memory of one of fastadam's arrays."""
        return self.torch.as_tensor(array, device=self.device)

    def copy_all(self, targets: Sequence[Any], sources: Sequence[Any]) -> None:
        """Copy each source to its target; on the CPU in one thread, as for all others there."""
        if self.on_host:
            super().copy_all([target.numpy() for target in targets], sources)
        else:
            self.torch._foreach_copy_(targets, sources)


class CupyArrays(Arrays):
    """Arrays of CuPy; RuntimeError if it finds no device."""

    def __init__(self) -> None:
        self.cupy = cupy = import_module("cupy")
        if not cupy.cuda.runtime.getDeviceCount():
            raise RuntimeError(f"CuPy finds no CUDA device: {cupy.__version__}")

    def upload(self, array: NDArray[Any]) -> Any:
        """Return a copy on the device."""
        return self.cupy.array(array)

    def download(self, array: Any) -> NDArray[Any]:
        """Return a copy on the host."""
        copied: NDArray[Any] = self.cupy.asnumpy(array)
        return copied

    def wrap(self, array: Any) -> Any:
        """Return an array over the memory of one of fastadam's."""
        return self.cupy.asarray(array)

    def copy_all(self, targets: Sequence[Any], sources: Sequence[Any]) -> None:
        """Copy each source to its target."""
        for target, source in zip(targets, sources, strict=True):
            self.cupy.copyto(target, source)


class NumbaArrays(Arrays):
    """Numba's device arrays, which fastadam itself needs anyway."""

    def __init__(self) -> None:
        self.backend = cuda_backend()

    def upload(self, array: NDArray[Any]) -> Any:
        """Return a copy on the device."""
        return self.backend.cuda.to_device(array)

    def download(self, array: Any) -> NDArray[Any]:
        """Return a copy on the host."""
        copied: NDArray[Any] = array.copy_to_host()
        return copied

    def copy_all(self, targets: Sequence[Any], sources: Sequence[Any]) -> None:
        """Copy each source to its target, by their addresses."""
        from fastadam.cuda.arrays import view

        for pair in zip(targets, sources, strict=True):
            to, source = (view(array, "array", writable=False) for array in pair)
            self.backend.driver.copy(to.address, source.address, to.nbytes, 0)


def choose(device: str) -> Arrays:
    """Return the arrays that fastadam is measured on.

    On a CUDA device those of the first library that works of torch, since
    fastadam is compared with it most, CuPy and Numba.
    """
    if device == "cpu":
        return NumpyArrays()
    if not cuda_backend().SIMULATED:
        for make in (lambda: TorchArrays("cuda"), CupyArrays):
            try:
                return make()
            except (ImportError, RuntimeError):
                continue
    return NumbaArrays()


# The device itself


def synchronize() -> None:
    """Wait until the device has done all its work, whoever started it."""
    cuda_backend().driver.synchronize_all()


def free_on_device() -> float:
    """Return the bytes that are free on the device, infinity in Numba's CUDA simulator."""
    return float(cuda_backend().cuda.current_context().get_memory_info()[0])


def release() -> None:
    """Give back to the device what finished contenders held, so that all can have it."""
    gc.collect()
    synchronize()
    for name, free in FREE.items():
        if name in sys.modules:
            free(sys.modules[name])
    # Numba frees memory when it needs some, or when much has come together.
    context = cuda_backend().cuda.current_context()
    for holder in (context, getattr(context, "memory_manager", None)):
        waiting = getattr(holder, "deallocations", None)  # the simulator has none
        if waiting is not None:
            waiting.clear()


def too_large(needed: int, limit: int | None, free: float | None, place: str = "") -> str | None:
    """Return why so many bytes do not fit, None if they do.

    `limit` is that of ``--max-memory``; `free` is None where nothing tells;
    `place` says where, if not on the host.

    Examples
    --------
    >>> from fastadam.bench.arrays import too_large
    >>> too_large(2**31, 2**30, None, "on the device")
    'needs 2.0 GiB on the device, --max-memory is 1.0 GiB'
    """
    needs = f"needs {format_bytes(needed)}{' ' if place else ''}{place}"
    if limit is not None and needed > limit:
        return f"{needs}, --max-memory is {format_bytes(limit)}"
    # A tenth for what comes with the arrays: libraries, threads, the system's tables.
    if free is not None and needed > 0.9 * free:
        return f"{needs}, {'free' if place else 'available'} are {format_bytes(free)}"
    return None


def why_no_device() -> str | None:
    """Return what is missing for a step on a CUDA device, None if nothing is."""
    try:
        simulated = cuda_backend().SIMULATED
    except ImportError as error:
        return " ".join(str(error).split())
    reason, devices = ("", [{}]) if simulated else cuda_devices()
    return None if devices else reason
