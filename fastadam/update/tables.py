"""Where everything lies: the tables that a kernel reads, and the one that leads to them."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..cpu import thread_choice
from ..params.arrays import address, dtype_mark
from ..state.state_dict import ParamState

Integers = npt.NDArray[np.int64]

# The columns of the table of tensors, one row each. Addresses, 0 for none:
PARAM, GRAD, EXP_AVG, EXP_AVG_SQ, MAX_EXP_AVG_SQ, EMA = range(6)
# Elements; the group; the dtype, a place in `DTYPES`; steps so far; the row of scalars.
SIZE, GROUP, DTYPE, STEP, ROW = range(6, 11)
# id() of the parameter, and of an array of ours that has its shape; what NumPy says of its
# dtype; bytes; of the gradients that are looked at, the address, and the order of those.
OBJECT, MODEL, DTYPE_MARK, BYTES, FOUND, ORDER = range(11, 17)
TENSOR_COLUMNS = 17

# The columns of a table of chunks: which tensor, bytes from its start, elements.
CHUNK_TENSOR, CHUNK_OFFSET, CHUNK_SIZE = range(3)
CHUNK_COLUMNS = 3
# Elements in a chunk, the unit of work of a thread and of a sum: under 1 microsecond.
CHUNK = 8192
# The scalars of one step: what `_formula.step_scalars` returns.
SCALARS = 12
# The columns of a group's row of float64: the first arguments of `_formula.step_scalars`.
LR, BETA1, BETA2, EPS, L2, WEIGHT_DECAY, GRAD_FACTOR, ONE_MINUS_EMA_DECAY = range(8)
GROUP_COLUMNS = 8
# The ends of an interval of memory.
START, END = range(2)

# What a kernel is given the address of: for each dtype, where the tables lie and how long
# they are. The first are the same for all dtypes.
(
    TENSORS,
    TENSOR_COUNT,
    GROUPS,
    GROUP_COUNT,
    OWN_MEMORY,
    OWN_COUNT,
    NDARRAY,
    NONE,
    ODD,
    ODD_COUNT,
    STEP_COUNT,
    CHUNKS,
    CHUNK_COUNT,
    ROWS,
    SUMS,
    CURSORS,
    OWN_DTYPE,
    THREADS,
    WORK,
    UPDATE_CHOICE,
    SUM_CHOICE,
    BALANCE,
    WORTH_SEVERAL,
) = range(23)
CONTEXT_SIZE = 23

# A row to a thread, in a cache line of its own: its next chunk, and when it was done.
CURSOR_BYTES = 64
NEXT, DONE = range(2)


def tensor_table(
    states: Sequence[ParamState],
    dtypes: Sequence[np.dtype[np.floating]],
    address: Callable[[Any], int],
) -> Integers:
    """Return a row for each parameter; there are no gradients yet.

    ``address`` tells where an array lies, and 0 of None.
    """
    tensors = np.zeros((len(states), TENSOR_COLUMNS), dtype=np.int64)
    for row, state in zip(tensors, states, strict=True):
        row[PARAM] = address(state.param)
        row[EXP_AVG] = address(state.exp_avg)
        row[EXP_AVG_SQ] = address(state.exp_avg_sq)
        row[MAX_EXP_AVG_SQ] = address(state.max_exp_avg_sq)
        row[EMA] = address(state.ema)
        row[SIZE], row[GROUP] = state.param.size, state.group
        row[DTYPE] = dtypes.index(state.param.dtype)
        row[OBJECT], row[MODEL] = id(state.param), id(state.exp_avg)
        row[DTYPE_MARK] = dtype_mark(state.param.dtype)
        row[BYTES] = state.param.nbytes
    tensors[:, ORDER] = np.arange(len(states))
    return tensors


def chunk_table(members: Integers, sizes: Integers, itemsize: int) -> Integers:
    """Cut these rows of the table of tensors into chunks."""
    counts = -(-sizes // CHUNK)
    place = np.repeat(np.arange(sizes.size), counts)
    first = np.repeat(np.cumsum(counts) - counts, counts)
    start = (np.arange(place.size) - first) * CHUNK
    size = np.minimum(sizes[place] - start, CHUNK)
    return np.stack([members[place], start * itemsize, size], axis=1)


class Context:
    """What one kernel call needs, for the parameters of one dtype, behind one address.

    Parameters
    ----------
    shared : dict
        The values of the fields that all dtypes share.
    tensors : int64 array, shape (parameters, TENSOR_COLUMNS)
        Of all dtypes.
    own_dtype : int
        The place in the column ``DTYPE`` of those that are meant.
    dtype : dtype
        Theirs.
    step_count : int64 array, shape (1,)
        What a step adds 1 to.
    threads : int
        At most so many take part.
    serial_below : int
        With fewer elements, one does.
    """

    def __init__(
        self,
        shared: dict[int, int],
        tensors: Integers,
        own_dtype: int,
        dtype: np.dtype[np.floating],
        step_count: Integers,
        threads: int,
        serial_below: int,
    ) -> None:
        self.dtype = dtype
        members = np.flatnonzero(tensors[:, DTYPE] == own_dtype)
        sizes = tensors[members, SIZE]
        self.parallel = int(sizes.sum()) >= serial_below
        self.chunks = chunk_table(members, sizes, dtype.itemsize)
        self._rows = np.zeros((members.size, SCALARS), dtype=dtype)
        self.sums = np.zeros(len(self.chunks), dtype=np.float64)
        self._cursors = np.zeros(threads * CURSOR_BYTES // 8, dtype=np.int64)
        self._step_count = step_count
        self.fields = np.zeros(CONTEXT_SIZE, dtype=np.int64)
        for field, value in shared.items():
            self.fields[field] = value
        self.fields[CHUNKS], self.fields[CHUNK_COUNT] = address(self.chunks), len(self.chunks)
        self.fields[ROWS], self.fields[SUMS] = address(self._rows), address(self.sums)
        self.fields[CURSORS], self.fields[OWN_DTYPE] = address(self._cursors), own_dtype
        self.fields[STEP_COUNT], self.fields[THREADS] = address(step_count), threads
        self.choices = [thread_choice.new_state() for _ in range(2)]
        self.fields[[UPDATE_CHOICE, SUM_CHOICE]] = [address(each) for each in self.choices]
        self.fields[BALANCE] = address(thread_choice.balance)
        self.fields[WORTH_SEVERAL] = serial_below
        self.address = address(self.fields)
        # The same without a tensor or a chunk, to call a kernel on, even during a step: what
        # the kernel writes to is not the same.
        self._nothing = self.fields.copy()
        self._other_cursors = np.zeros_like(self._cursors)
        self._nothing[CURSORS] = address(self._other_cursors)
        self._nothing[[TENSOR_COUNT, CHUNK_COUNT]] = 0
        self._other_choice, self._other_balance = thread_choice.new_state(), np.zeros(1)
        self._nothing[[UPDATE_CHOICE, SUM_CHOICE]] = address(self._other_choice)
        self._nothing[BALANCE] = address(self._other_balance)
        self._uncounted = np.zeros(1, dtype=np.int64)
        self._nothing[STEP_COUNT] = address(self._uncounted)
        self.nothing = address(self._nothing)
