"""What the kernels read and write beside the arrays: the tables of one optimizer."""

from typing import Any

import numpy as np
import numpy.typing as npt

from ..params.arrays import address
from ..state.storage import offsets
from ..update import layout
from ..update.rows import Rows
from . import kernels
from . import layout as field
from .compiler import driver
from .results import Ring

# A step reads its gradients' addresses and its hyperparameters from one of two tables.
EAGER, CAPTURED = range(2)
# Tables begin with a cache line.
LINE = 128


class Context:
    """The tables on the device, in one buffer, and what sends them what has changed.

    Parameters
    ----------
    rows : Rows
        Where parameters and state are.
    step_count : int
        Steps of the optimizer.
    hyper_words : int
        Words of 8 bytes of the hyperparameters.
    device : int
        Where the tables are made; it is in use.

    Attributes
    ----------
    chunk_counts, part_counts : list of int
        For each dtype, chunks, and parts of the norm.
    """

    def __init__(self, rows: Rows, step_count: int, hyper_words: int, device: int) -> None:
        self._device, self._count, self._dtype_count = device, len(rows.table), len(rows.dtypes)
        tables: dict[str, npt.NDArray[Any]] = {
            "tensors": rows.table,
            "step_count": np.array([step_count]),
            "scale": np.ones(1),
            "is_double": np.array([dtype.itemsize > 4 for dtype in rows.dtypes], np.int64),
            "rows": np.zeros(self._count * field.ROW_BYTES, np.uint8),
        }
        for graph in (EAGER, CAPTURED):
            tables[f"hyper{graph}"] = np.zeros(hyper_words)
            tables[f"grads{graph}"] = np.zeros(self._count, np.int64)
        self.chunk_counts, self.part_counts = [], []
        for k in range(self._dtype_count):
            tables[f"chunks{k}"] = chunks = rows.chunks(k)
            parts = -(-len(chunks) // kernels.WARPS)
            tables[f"sums{k}"], tables[f"largest{k}"] = np.zeros(parts), np.zeros(parts)
            self.chunk_counts.append(len(chunks))
            self.part_counts.append(parts)
        contexts = np.zeros((2, self._dtype_count, field.CONTEXT_SIZE), np.int64)
        tables["contexts"] = contexts

        starts, size = offsets((table.nbytes for table in tables.values()), LINE)
        self._buffer = driver.Buffer(size)
        base = self._buffer.address
        self._places = {name: base + start for name, start in zip(tables, starts, strict=True)}
        for graph in (EAGER, CAPTURED):
            for k in range(self._dtype_count):
                for place, value in self._fields(graph, k).items():
                    contexts[graph, k, place] = value
        image = np.zeros(size, np.uint8)
        for start, table in zip(starts, tables.values(), strict=True):
            image[start : start + table.nbytes] = table.reshape(-1).view(np.uint8)
        driver.copy(base, address(image), size, 0)
        driver.synchronize(0)
        self._uploads = Ring(max(hyper_words, self._count))
        # What has been sent to each table last.
        self._sent: dict[str, bytes] = {}

    def _fields(self, graph: int, k: int) -> dict[int, int]:
        """Return what a kernel is given, by the names of `layout`."""
        places = self._places
        return {
            field.TENSORS: places["tensors"],
            field.TENSOR_COUNT: self._count,
            field.GRADS: places[f"grads{graph}"],
            field.ROWS: places["rows"],
            field.HYPER: places[f"hyper{graph}"],
            field.SCALE: places["scale"],
            field.STEP_COUNT: places["step_count"],
            field.CHUNKS: places[f"chunks{k}"],
            field.CHUNK_COUNT: self.chunk_counts[k],
            field.SUMS: places[f"sums{k}"],
            field.LARGEST: places[f"largest{k}"],
            field.PART_COUNT: self.part_counts[k],
            field.IS_DOUBLE: places["is_double"],
            field.CONTEXT_COUNT: self._dtype_count,
        }

    def address(self, graph: int, k: int) -> int:
        """Return what a kernel is called with: for a graph or not, and for a dtype."""
        place = graph * self._dtype_count + k
        return self._places["contexts"] + 8 * field.CONTEXT_SIZE * place

    def send(self, name: str, words: npt.NDArray[Any], stream: int) -> None:
        """Write a table in the order of a stream, unless that is what it was sent last."""
        image = words.tobytes()
        if image != self._sent.get(name):
            self._sent[name] = b""  # until it is on its way
            slot, event = self._uploads.next_slot()
            event.wait()
            slot[: words.size] = words.view(np.float64)
            driver.copy(self._places[name], address(slot), words.nbytes, stream)
            event.record(stream)
            self._sent[name] = image

    def read(self, name: str, words: int) -> npt.NDArray[np.int64]:
        """Return the int64 at the beginning of a table, once all work on the device is done."""
        found = np.empty(words, np.int64)
        driver.copy_now(self._device, address(found), self._places[name], found.nbytes)
        return found

    def write(self, name: str, words: npt.NDArray[np.int64]) -> None:
        """Set them, once all work on the device is done."""
        driver.copy_now(self._device, self._places[name], address(words), words.nbytes)

    @property
    def steps(self) -> npt.NDArray[np.int64]:
        """Steps that each parameter has had."""
        return self._tensors()[:, layout.STEP].copy()

    @steps.setter
    def steps(self, steps: npt.NDArray[np.int64]) -> None:
        tensors = self._tensors()
        tensors[:, layout.STEP] = steps
        self.write("tensors", tensors)

    def _tensors(self) -> npt.NDArray[np.int64]:
        words = self._count * layout.TENSOR_COLUMNS
        return self.read("tensors", words).reshape(-1, layout.TENSOR_COLUMNS)
