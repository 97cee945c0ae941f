"""A backend's plain view of the parameters: one row of numbers for each, and no object."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..state.roles import NAMES, PARAM
from . import layout

Integers = npt.NDArray[np.int64]


class Rows:
    """Addresses, sizes, dtypes, groups and step counts of the parameters.

    Parameters
    ----------
    arrays : sequence of dict
        For each parameter, the address of every array by the name of its role:
        ``"param"``, ``"exp_avg"`` and so on.
    sizes : sequence of int
        Elements of each.
    dtypes : sequence of dtype
        Of each.
    groups : sequence of int
        The place of each one's group.
    steps : sequence of int
        Steps that each has had.

    Attributes
    ----------
    table : int64 array, shape (parameters, TENSOR_COLUMNS)
        The columns are those of `layout`. There are no gradients yet.
    dtypes : list of dtype
        Each once; the column ``DTYPE`` says which of them.
    roles : frozenset of str
        The names of the state's arrays that there are.
    """

    def __init__(
        self,
        arrays: Sequence[Mapping[str, int]],
        sizes: Sequence[int],
        dtypes: Sequence[np.dtype[Any]],
        groups: Sequence[int],
        steps: Sequence[int] | Integers,
    ) -> None:
        self.dtypes = list(dict.fromkeys(dtypes))
        self.roles = frozenset(arrays[0]) - {PARAM} if arrays else frozenset()
        self.table = table = np.zeros((len(arrays), layout.TENSOR_COLUMNS), dtype=np.int64)
        if not arrays:
            return
        table[:, layout.PARAM] = [each[PARAM] for each in arrays]
        for column, name in enumerate(NAMES, layout.EXP_AVG):
            if name in self.roles:
                table[:, column] = [each[name] for each in arrays]
        table[:, layout.SIZE] = sizes
        table[:, layout.GROUP] = groups
        table[:, layout.DTYPE] = [self.dtypes.index(dtype) for dtype in dtypes]
        table[:, layout.STEP] = steps

    @classmethod
    def of(
        cls, states: Iterable[Any], address: Callable[[Any], int], steps: Sequence[int] | Integers
    ) -> "Rows":
        """Return the rows of parameters and state; ``address`` tells where an array lies."""
        states = list(states)
        return cls(
            [{name: address(a) for name, a in s.arrays(param=True).items()} for s in states],
            [s.param.size for s in states],
            [s.param.dtype for s in states],
            [s.group for s in states],
            steps,
        )

    def chunks(self, own_dtype: int) -> Integers:
        """Cut the tensors of one dtype, a place in `dtypes`, into chunks; see `layout`."""
        members = np.flatnonzero(self.table[:, layout.DTYPE] == own_dtype)
        sizes = self.table[members, layout.SIZE]
        counts = -(-sizes // layout.CHUNK)
        place = np.repeat(np.arange(sizes.size), counts)
        first = np.repeat(np.cumsum(counts) - counts, counts)
        start = (np.arange(place.size) - first) * layout.CHUNK
        size = np.minimum(sizes[place] - start, layout.CHUNK)
        offset = start * self.dtypes[own_dtype].itemsize
        return np.stack([members[place], offset, size], axis=1)
