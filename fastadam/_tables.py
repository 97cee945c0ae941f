"""Where everything lies: tables of addresses and of chunks."""

from collections.abc import Sequence

import numpy as np

from ._arrays import address
from ._memory import Addresses
from ._state import ParamState

# The columns of a table of tensors. The first five hold addresses, 0 for none.
PARAM, GRAD, EXP_AVG, EXP_AVG_SQ, MAX_EXP_AVG_SQ, SIZE, GROUP, STEP, ROW = range(9)
# The columns of a table of chunks: which tensor, its first element, how many.
CHUNK_TENSOR, CHUNK_START, CHUNK_SIZE = range(3)
# Elements in a chunk, the unit of work of a thread: under 1 microsecond.
CHUNK = 8192
# The scalars of one step: what `_formula.step_scalars` returns.
SCALARS = 10


class Table:
    """What one kernel call reads: where every tensor of one dtype lies, cut into chunks."""

    def __init__(self, states: Sequence[ParamState], members: Sequence[int]) -> None:
        self.members = list(members)
        own = [states[k] for k in members]
        dtype = own[0].param.dtype
        self.tensors = np.zeros((len(own), ROW + 1), dtype=np.int64)
        for row, state in zip(self.tensors, own, strict=True):
            row[PARAM] = address(state.param)
            row[EXP_AVG] = address(state.exp_avg)
            row[EXP_AVG_SQ] = address(state.exp_avg_sq)
            row[MAX_EXP_AVG_SQ] = address(state.max_exp_avg_sq)
            row[SIZE], row[GROUP] = state.param.size, state.group
        self.chunks = cut(self.tensors[:, SIZE])
        self.scalars = np.zeros((len(own), SCALARS), dtype=dtype)
        self.zero = dtype.type(0)
        self.size = int(self.tensors[:, SIZE].sum())
        self.tried: set[tuple[bool, bool]] = set()  # options whose kernel has been compiled


def cut(sizes: Addresses) -> Addresses:
    """Cut tensors of these sizes into chunks; return rows of tensor, start, size."""
    counts = -(-sizes // CHUNK)
    tensor = np.repeat(np.arange(sizes.size), counts)
    first = np.repeat(np.cumsum(counts) - counts, counts)
    start = (np.arange(tensor.size) - first) * CHUNK
    return np.stack([tensor, start, np.minimum(sizes[tensor] - start, CHUNK)], axis=1)
