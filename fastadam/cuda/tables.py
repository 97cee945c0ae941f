"""The tables of one optimizer on a CUDA device."""

from typing import Any

import numpy as np
import numpy.typing as npt

from ..params.arrays import address
from ..state.storage import offsets
from ..update.layout import STEP, TENSOR_COLUMNS
from ..update.rows import Rows
from . import kernels, launch, layout

# A step reads its gradients' addresses and its hyperparameters from one of two tables.
EAGER, CAPTURED = range(2)
# Tables begin with a cache line.
LINE = 128


class DeviceTables:
    """What the kernels read and write beside the arrays, in one buffer.

    Parameters
    ----------
    rows : Rows
        Where parameters and state are.
    step_count : int
        Steps of the optimizer.
    groups, hyper_words : int
        How many groups there are, and how long what is said of them may be.
    device : int
        Where the tables are made, and are the caller's to use.

    Attributes
    ----------
    places : dict
        The address of each table by name.
    chunk_counts, part_counts : list of int
        For each dtype, chunks, and parts of the norm.
    """

    def __init__(
        self,
        rows: Rows,
        step_count: int,
        groups: int,
        hyper_words: int,
        device: int,
    ) -> None:
        dtypes = rows.dtypes
        self._device, self._count, self._dtype_count = device, len(rows.table), len(dtypes)
        parts: dict[str, npt.NDArray[Any]] = {
            "tensors": rows.table,
            "hyper0": np.zeros(hyper_words),
            "hyper1": np.zeros(hyper_words),
            "scale": np.ones(1),
            "step_count": np.array([step_count]),
            "is_double": np.array([dtype.itemsize > 4 for dtype in dtypes], np.int64),
            "grads0": np.zeros(self._count, np.int64),
            "grads1": np.zeros(self._count, np.int64),
            "rows": np.zeros(self._count * layout.ROW_BYTES, np.uint8),
        }
        self.chunk_counts, self.part_counts = [], []
        for k in range(len(dtypes)):
            chunks = rows.chunks(k)
            self.chunk_counts.append(len(chunks))
            self.part_counts.append(-(-len(chunks) // kernels.WARPS))
            parts[f"chunks{k}"] = chunks
            parts[f"sums{k}"] = np.zeros(self.part_counts[k])
            parts[f"maxima{k}"] = np.zeros(self.part_counts[k])
        contexts = np.zeros((2, len(dtypes), layout.CONTEXT_SIZE), np.int64)
        parts["contexts"] = contexts

        starts, end = offsets((part.nbytes for part in parts.values()), LINE)
        self._buffer = launch.allocate(end + LINE)
        base = launch.address_of_buffer(self._buffer)
        base += -base % LINE
        self.places = {name: base + start for name, start in zip(parts, starts, strict=True)}
        self._fill(contexts, groups)
        image = np.zeros(end, np.uint8)
        for start, part in zip(starts, parts.values(), strict=True):
            image[start : start + part.nbytes] = part.reshape(-1).view(np.uint8)
        launch.upload(base, address(image), end, 0)
        launch.synchronize(0)

    def _fill(self, contexts: npt.NDArray[np.int64], groups: int) -> None:
        """Tell each context where the tables are, and how long."""
        named = {
            layout.TENSORS: "tensors",
            layout.ROWS: "rows",
            layout.SCALE: "scale",
            layout.STEP_COUNT: "step_count",
            layout.IS_DOUBLE: "is_double",
        }
        for field, name in named.items():
            contexts[:, :, field] = self.places[name]
        for graph in (EAGER, CAPTURED):
            contexts[graph, :, layout.GRADS] = self.places[f"grads{graph}"]
            contexts[graph, :, layout.HYPER] = self.places[f"hyper{graph}"]
        contexts[:, :, layout.TENSOR_COUNT] = self._count
        contexts[:, :, layout.GROUP_COUNT] = groups
        contexts[:, :, layout.CONTEXT_COUNT] = self._dtype_count
        for k in range(self._dtype_count):
            own = contexts[:, k]
            own[:, layout.CHUNKS] = self.places[f"chunks{k}"]
            own[:, layout.CHUNK_COUNT] = self.chunk_counts[k]
            own[:, layout.SUMS] = self.places[f"sums{k}"]
            own[:, layout.MAXIMA] = self.places[f"maxima{k}"]
            own[:, layout.PART_COUNT] = self.part_counts[k]

    def context(self, graph: int, k: int) -> int:
        """Return the address of what a kernel is given: for a graph or not, and for a dtype."""
        return self.places["contexts"] + 8 * layout.CONTEXT_SIZE * (graph * self._dtype_count + k)

    def read(self, name: str, words: int) -> npt.NDArray[np.int64]:
        """Return the int64 at the beginning of a table, once all work on the device is done."""
        found = np.empty(words, np.int64)
        source = self.places[name]
        launch.at_once(self._device, launch.download, address(found), source, found.nbytes)
        return found

    def write(self, name: str, words: npt.NDArray[np.int64]) -> None:
        """Set them, once all work on the device is done."""
        target = self.places[name]
        launch.at_once(self._device, launch.upload, target, address(words), words.nbytes)

    @property
    def steps(self) -> npt.NDArray[np.int64]:
        """Steps that each parameter has had."""
        return self._tensors()[:, STEP].copy()

    @steps.setter
    def steps(self, steps: npt.NDArray[np.int64]) -> None:
        tensors = self._tensors()
        tensors[:, STEP] = steps
        self.write("tensors", tensors)

    def _tensors(self) -> npt.NDArray[np.int64]:
        return self.read("tensors", self._count * TENSOR_COLUMNS).reshape(-1, TENSOR_COLUMNS)
