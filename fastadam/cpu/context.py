"""What one kernel call needs, for the parameters of one dtype, behind one address."""

import numpy as np
import numpy.typing as npt

from ..params.arrays import address
from ..update import layout
from ..update.rows import Rows
from . import layout as field
from . import thread_choice


class Context:
    """The tables of one dtype, and where they are.

    Parameters
    ----------
    shared : dict
        The values of the fields that all dtypes share.
    rows : Rows
        Of all dtypes.
    own_dtype : int
        The place of the one that is meant.
    step_count : int64 array, shape (1,)
        What a step adds 1 to.
    most_threads : int
        So many there are.
    serial_below : int
        With fewer elements, one takes part.

    Attributes
    ----------
    address : int
        What a kernel is called with.
    chunks : int64 array, shape (chunks, CHUNK_COLUMNS)
    choices : list of float64 array
        What `thread_choice` knows of updates, and of sums.
    sums : float64 array, shape (chunks,)
        The sum of squares, or the largest magnitude, of each chunk's gradients.
    large : bool
        Whether there are enough elements for several threads, and to release the GIL.
    parallel : bool
        Whether several threads may take part.
    """

    def __init__(
        self,
        shared: dict[int, int],
        rows: Rows,
        own_dtype: int,
        step_count: npt.NDArray[np.int64],
        most_threads: int,
        serial_below: int,
    ) -> None:
        self.dtype = rows.dtypes[own_dtype]
        self.chunks = rows.chunks(own_dtype)
        self.large = int(self.chunks[:, layout.CHUNK_SIZE].sum()) >= serial_below
        self.parallel = False
        self.sums = np.zeros(len(self.chunks))
        self._scalars = np.zeros((len(rows.table), layout.SCALARS), self.dtype)
        self._cursors = np.zeros(most_threads * field.CURSOR_BYTES // 8, dtype=np.int64)
        self._step_count = step_count
        self.choices = [thread_choice.new_state() for _ in range(2)]
        self.fields = np.zeros(field.CONTEXT_SIZE, dtype=np.int64)
        own = {
            field.CHUNKS: address(self.chunks),
            field.CHUNK_COUNT: len(self.chunks),
            field.ROWS: address(self._scalars),
            field.SUMS: address(self.sums),
            field.OWN_DTYPE: own_dtype,
            field.STEP_COUNT: address(step_count),
            field.CURSORS: address(self._cursors),
            field.THREADS: 1,
            field.UPDATE_CHOICE: address(self.choices[0]),
            field.SUM_CHOICE: address(self.choices[1]),
            field.BALANCE: address(thread_choice.balance),
            field.WORTH_SEVERAL: serial_below,
        }
        for place, value in {**shared, **own}.items():
            self.fields[place] = value
        self.address = address(self.fields)

    def set_threads(self, threads: int, *, parallel: bool) -> None:
        """Have at most so many threads take part, if this process may use several at all."""
        self.fields[field.THREADS] = threads
        self.parallel = parallel and threads > 1 and self.large
