"""Memory for state: arrays side by side in one buffer, each aligned."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

# Bytes: a cache line, and the widest vector.
ALIGNMENT = 64


def offsets(sizes: Iterable[int], alignment: int = ALIGNMENT) -> tuple[list[int], int]:
    """Return where arrays of so many bytes begin in a buffer, each aligned, and its size.

    The buffer must begin at a multiple of ``alignment``.
    """
    starts, end = [], 0
    for size in sizes:
        starts.append(end)
        end += -(-size // alignment) * alignment
    return starts, end


def allocate(likes: Sequence[npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
    """Return zeros in the shape, dtype and memory order of each, side by side in one buffer.

    One buffer, so that small arrays too lie in huge pages, for which NumPy asks the
    system from 4 MiB on. The system hands out its pages when they are first touched:
    those of zeros, as moments are at first, by the thread that updates them.
    """
    starts, total = offsets(like.nbytes for like in likes)
    buffer = np.zeros(total + ALIGNMENT, dtype=np.uint8)
    buffer = buffer[-buffer.ctypes.data % ALIGNMENT :]
    arrays = []
    for like, start in zip(likes, starts, strict=True):
        order: Literal["C", "F"] = "C" if like.flags.c_contiguous else "F"
        part = buffer[start : start + like.nbytes].view(like.dtype)
        arrays.append(part.reshape(like.shape, order=order))
    return arrays
