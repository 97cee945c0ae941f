"""Who shares memory: intervals of bytes, and whether they overlap."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Addresses = npt.NDArray[np.int64]


class Memory:
    """The memory that an optimizer updates, as sorted, disjoint intervals of bytes.

    Parameters
    ----------
    labels, starts, sizes
        Of each array: its name in messages, its address, its bytes. Arrays
        of no bytes lie nowhere.

    Raises
    ------
    ValueError
        If two arrays share memory: each update would see the other's.

    Attributes
    ----------
    blocks : int64 array, shape (n, 2)
        The intervals, those that touch made one.
    """

    def __init__(self, labels: Sequence[str], starts: Addresses, sizes: Addresses) -> None:
        self._labels = labels
        self._order, self._starts, self._ends = _disjoint(labels, starts, sizes)
        first = np.ones(self._starts.size, dtype=bool)
        first[1:] = self._starts[1:] != self._ends[:-1]
        last = np.roll(first, -1)  # the next is a first one, or there is none
        self.blocks = np.stack([self._starts[first], self._ends[last]], axis=1)

    @classmethod
    def of(cls, arrays: Mapping[str, Any], address: Callable[[Any], int]) -> "Memory":
        """Return the memory of arrays by name; ``address`` tells where one lies."""
        starts = np.array([address(array) for array in arrays.values()], dtype=np.int64)
        sizes = np.array([array.nbytes for array in arrays.values()], dtype=np.int64)
        return cls(list(arrays), starts, sizes)

    def check_apart(self, labels: Sequence[str], starts: Addresses, sizes: Addresses) -> None:
        """Refuse arrays that share memory with these, or with one another."""
        order, starts, ends = _disjoint(labels, starts, sizes)
        # Both sides are disjoint: of the own intervals, those that begin before
        # the end of another, less those that end before its start, overlap it.
        first = np.searchsorted(self._ends, starts, side="right")
        last = np.searchsorted(self._starts, ends, side="left")
        for k in np.flatnonzero(first < last)[:1]:
            raise ValueError(
                f"{labels[order[k]]} must not share memory with"
                f" {self._labels[self._order[first[k]]]}, which the step writes"
            )


def _disjoint(
    labels: Sequence[str], starts: Addresses, sizes: Addresses
) -> tuple[Addresses, Addresses, Addresses]:
    """Return the intervals that are not empty in order of address; refuse overlaps."""
    order = np.argsort(starts, kind="stable")
    order = order[sizes[order] > 0]
    starts = starts[order]
    ends = starts + sizes[order]
    for k in np.flatnonzero(ends[:-1] > starts[1:])[:1]:
        one, other = sorted(order[k : k + 2])
        raise ValueError(f"{labels[one]} and {labels[other]} must not share memory")
    return order, starts, ends
