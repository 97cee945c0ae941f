"""What NVIDIA's driver says of the GPUs, asked itself, without a CUDA package."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Any

from fastadam.bench.memory import format_bytes

__all__ = ["ask", "describe"]

# Numbers of cuDeviceGetAttribute.
MAJOR, MINOR, MULTIPROCESSORS = 75, 76, 16
# Where Linux tells which driver is loaded.
VERSION = Path("/sys/module/nvidia/version")


def ask() -> tuple[str, list[dict[str, Any]]]:
    """Ask which GPUs there are.

    Returns
    -------
    reason : str
        Why there is none, if there is none.
    devices : list of dict
        ``name``, ``compute_capability`` (str, such as "9.0"),
        ``memory_bytes``, ``multiprocessors`` (int), ``driver`` (str or None:
        its version), ``driver_cuda`` (str: the CUDA version it is for).
    """
    if sys.platform == "darwin":
        return "no CUDA on macOS", []
    library = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        cuda = ctypes.CDLL(library)
    except OSError:
        return f"no NVIDIA driver found ({library} could not be loaded)", []
    count, device = ctypes.c_int(), ctypes.c_int()
    status = cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count))
    if status:
        return f"the NVIDIA driver is there but finds no GPU (CUDA error {status})", []
    return "the NVIDIA driver shows no GPU", [
        _facts(cuda, device)
        for ordinal in range(count.value)
        if not cuda.cuDeviceGet(ctypes.byref(device), ordinal)
    ]


def _facts(cuda: Any, device: ctypes.c_int) -> dict[str, Any]:
    name, memory = ctypes.create_string_buffer(256), ctypes.c_size_t()
    version = ctypes.c_int()
    cuda.cuDeviceGetName(name, len(name), device)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    cuda.cuDriverGetVersion(ctypes.byref(version))
    numbers = []
    for attribute in (MAJOR, MINOR, MULTIPROCESSORS):
        number = ctypes.c_int()
        cuda.cuDeviceGetAttribute(ctypes.byref(number), attribute, device)
        numbers.append(number.value)
    try:
        driver = VERSION.read_text(encoding="utf-8").strip()
    except OSError:
        driver = None
    return {
        "name": name.value.decode(errors="replace"),
        "compute_capability": f"{numbers[0]}.{numbers[1]}",
        "memory_bytes": memory.value,
        "multiprocessors": numbers[2],
        "driver": driver,
        "driver_cuda": f"{version.value // 1000}.{version.value % 1000 // 10}",
    }


def describe(device: dict[str, Any]) -> str:
    """Return one line on a device.

    Parameters
    ----------
    device : dict
        Of `ask`.

    Returns
    -------
    str
        Its name, compute capability and memory.

    Examples
    --------
    >>> from fastadam.bench.driver import describe
    >>> describe({"name": "GPU A", "compute_capability": "9.0", "memory_bytes": 3 * 2**30})
    'GPU A, compute capability 9.0, 3.0 GiB'
    """
    memory = format_bytes(device["memory_bytes"])
    return f"{device['name']}, compute capability {device['compute_capability']}, {memory}"
