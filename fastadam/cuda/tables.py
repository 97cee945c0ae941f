"""The tables of one optimizer on a CUDA device."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..params.arrays import address
from ..state.state_dict import ParamState
from ..update.tables import DTYPE, SIZE, STEP, chunk_table, tensor_table
from . import kernels, launch, layout
from .arrays import DeviceArray

# A step reads its gradients' addresses and its hyperparameters from one of two tables.
EAGER, CAPTURED = range(2)
# Tables begin with a cache line.
LINE = 128


def place_of(array: DeviceArray | None) -> int:
    """Return where an array lies, 0 for None."""
    return 0 if array is None else array.address


class DeviceTables:
    """What the kernels read and write beside the arrays, in one buffer.

    Parameters
    ----------
    states : sequence of ParamState
        The parameters.
    dtypes : sequence of dtype
        Theirs, each once.
    steps : int64 array
        Steps that each has had.
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
        states: Sequence[ParamState],
        dtypes: Sequence[np.dtype[Any]],
        steps: npt.NDArray[np.int64],
        step_count: int,
        groups: int,
        hyper_words: int,
        device: int,
    ) -> None:
        self._device, self._count, self._dtype_count = device, len(states), len(dtypes)
        tensors = tensor_table(states, dtypes, place_of)
        tensors[:, STEP] = steps
        parts: dict[str, npt.NDArray[Any]] = {
            "tensors": np.ascontiguousarray(tensors[:, : layout.COLUMNS]),
            "hyper0": np.zeros(hyper_words),
            "hyper1": np.zeros(hyper_words),
            "scale": np.ones(1),
            "step_count": np.array([step_count]),
            "is_double": np.array([dtype.itemsize > 4 for dtype in dtypes], np.int64),
            "grads0": np.zeros(len(states), np.int64),
            "grads1": np.zeros(len(states), np.int64),
            "rows": np.zeros(len(states) * layout.ROW_BYTES, np.uint8),
        }
        self.chunk_counts, self.part_counts = [], []
        for k, dtype in enumerate(dtypes):
            members = np.flatnonzero(tensors[:, DTYPE] == k)
            chunks = chunk_table(members, tensors[members, SIZE], dtype.itemsize)
            self.chunk_counts.append(len(chunks))
            self.part_counts.append(-(-len(chunks) // kernels.WARPS))
            parts[f"chunks{k}"] = chunks
            parts[f"sums{k}"] = np.zeros(self.part_counts[k])
            parts[f"maxima{k}"] = np.zeros(self.part_counts[k])
        contexts = np.zeros((2, len(dtypes), layout.CONTEXT_SIZE), np.int64)
        parts["contexts"] = contexts

        offsets, end = {}, 0
        for name, part in parts.items():
            offsets[name], end = end, end + -(-part.nbytes // LINE) * LINE
        self._buffer = launch.allocate(end + LINE)
        base = launch.address_of_buffer(self._buffer)
        base += -base % LINE
        self.places = {name: base + offset for name, offset in offsets.items()}
        self._fill(contexts, groups)
        image = np.zeros(end, np.uint8)
        for name, part in parts.items():
            image[offsets[name] : offsets[name] + part.nbytes] = part.reshape(-1).view(np.uint8)
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
        return self.read("tensors", self._count * layout.COLUMNS).reshape(-1, layout.COLUMNS)
