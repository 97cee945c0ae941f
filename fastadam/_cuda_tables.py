"""The tables of one optimizer on a CUDA device."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from . import _cuda, _cuda_layout, _device
from ._arrays import address
from ._cuda_arrays import DeviceArray
from ._state import ParamState
from ._tables import DTYPE, SIZE, STEP, chunk_table, tensor_table

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
            "tensors": np.ascontiguousarray(tensors[:, : _cuda_layout.COLUMNS]),
            "hyper0": np.zeros(hyper_words),
            "hyper1": np.zeros(hyper_words),
            "scale": np.ones(1),
            "step_count": np.array([step_count]),
            "is_double": np.array([dtype.itemsize > 4 for dtype in dtypes], np.int64),
            "grads0": np.zeros(len(states), np.int64),
            "grads1": np.zeros(len(states), np.int64),
            "rows": np.zeros(len(states) * _cuda_layout.ROW_BYTES, np.uint8),
        }
        self.chunk_counts, self.part_counts = [], []
        for k, dtype in enumerate(dtypes):
            members = np.flatnonzero(tensors[:, DTYPE] == k)
            chunks = chunk_table(members, tensors[members, SIZE], dtype.itemsize)
            self.chunk_counts.append(len(chunks))
            self.part_counts.append(-(-len(chunks) // _cuda.WARPS))
            parts[f"chunks{k}"] = chunks
            parts[f"sums{k}"] = np.zeros(self.part_counts[k])
            parts[f"maxima{k}"] = np.zeros(self.part_counts[k])
        contexts = np.zeros((2, len(dtypes), _cuda_layout.CONTEXT_SIZE), np.int64)
        parts["contexts"] = contexts

        offsets, end = {}, 0
        for name, part in parts.items():
            offsets[name], end = end, end + -(-part.nbytes // LINE) * LINE
        self._buffer = _device.allocate(end + LINE)
        base = _device.address_of_buffer(self._buffer)
        base += -base % LINE
        self.places = {name: base + offset for name, offset in offsets.items()}
        self._fill(contexts, groups)
        image = np.zeros(end, np.uint8)
        for name, part in parts.items():
            image[offsets[name] : offsets[name] + part.nbytes] = part.reshape(-1).view(np.uint8)
        _device.upload(base, address(image), end, 0)
        _device.synchronize(0)

    def _fill(self, contexts: npt.NDArray[np.int64], groups: int) -> None:
        """Tell each context where the tables are, and how long."""
        named = {
            _cuda_layout.TENSORS: "tensors",
            _cuda_layout.ROWS: "rows",
            _cuda_layout.SCALE: "scale",
            _cuda_layout.STEP_COUNT: "step_count",
            _cuda_layout.IS_DOUBLE: "is_double",
        }
        for field, name in named.items():
            contexts[:, :, field] = self.places[name]
        for graph in (EAGER, CAPTURED):
            contexts[graph, :, _cuda_layout.GRADS] = self.places[f"grads{graph}"]
            contexts[graph, :, _cuda_layout.HYPER] = self.places[f"hyper{graph}"]
        contexts[:, :, _cuda_layout.TENSOR_COUNT], contexts[:, :, _cuda_layout.GROUP_COUNT] = (
            self._count,
            groups,
        )
        contexts[:, :, _cuda_layout.CONTEXT_COUNT] = self._dtype_count
        for k in range(self._dtype_count):
            own = contexts[:, k]
            own[:, _cuda_layout.CHUNKS] = self.places[f"chunks{k}"]
            own[:, _cuda_layout.CHUNK_COUNT] = self.chunk_counts[k]
            own[:, _cuda_layout.SUMS] = self.places[f"sums{k}"]
            own[:, _cuda_layout.MAXIMA] = self.places[f"maxima{k}"]
            own[:, _cuda_layout.PART_COUNT] = self.part_counts[k]

    def context(self, graph: int, k: int) -> int:
        """Return the address of what a kernel is given: for a graph or not, and for a dtype."""
        return self.places["contexts"] + 8 * _cuda_layout.CONTEXT_SIZE * (
            graph * self._dtype_count + k
        )

    def read(self, name: str, words: int) -> npt.NDArray[np.int64]:
        """Return the int64 at the beginning of a table, once all work on the device is done."""
        found = np.empty(words, np.int64)
        with _device.context(self._device):
            _device.synchronize_all()
            _device.download(address(found), self.places[name], found.nbytes, 0)
        return found

    def write(self, name: str, words: npt.NDArray[np.int64]) -> None:
        """Set them, once all work on the device is done."""
        with _device.context(self._device):
            _device.synchronize_all()
            _device.upload(self.places[name], address(words), words.nbytes, 0)
            _device.synchronize(0)

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
        return self.read("tensors", self._count * _cuda_layout.COLUMNS).reshape(
            -1, _cuda_layout.COLUMNS
        )
