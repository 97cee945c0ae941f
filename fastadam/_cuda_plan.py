"""What stands between the facade and a CUDA device: tables there, and the launches."""

import contextlib
import math
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from . import _cuda, _device
from ._arrays import address
from ._cuda_arrays import DeviceArray, current_stream, has_data_ptr, view
from ._cuda_grads import Grads, lie_at
from ._cuda_scalars import MOST_TABLES, DeviceScalars
from ._limits import find_nonfinite
from ._memory import Memory
from ._result import Outcome, PendingResult, StepResult
from ._state import ParamState
from ._tables import DTYPE, SIZE, STEP, chunk_table, tensor_table

# Messages to the device, and results from it, that may be on their way at a time.
SLOTS = 64
# A step is compiled to read its gradients' addresses from one of two tables.
EAGER, CAPTURED = range(2)
# Blocks for each multiprocessor that are worth halving chunks for, and how often.
BLOCKS_EACH, MOST_HALVINGS = 8, 3


def place_of(array: DeviceArray | None) -> int:
    """Return where an array lies, 0 for None."""
    return 0 if array is None else array.address


class Mailbox:
    """Sends words of 8 bytes to the device in the order of a stream, without waiting for it."""

    def __init__(self, words: int) -> None:
        self._slots = _device.pinned(max(words, 1), SLOTS)
        self._events: list[Any] = []
        self._next = 0

    def send(self, words: npt.NDArray[Any], target: int, stream: int) -> None:
        """Copy the words; wait only if as many as there are slots are on their way."""
        place = self._next
        if place == len(self._events):
            self._events.append(_device.Event())
        else:
            self._events[place].wait()
        slot = self._slots[place]
        slot[: words.size] = words.view(np.float64)
        _device.upload(target, slot.ctypes.data, words.nbytes, stream)
        self._events[place].record(stream)
        self._next = (place + 1) % SLOTS


class Results:
    """What steps have to tell, written by the device to memory that the host reads."""

    def __init__(self) -> None:
        # One more, for steps in a graph.
        self._slots = _device.pinned(_cuda.RESULT_SIZE, SLOTS + 1)
        self._events: list[Any] = []
        self._pending: list[Any] = []
        self._next = 0

    def slot(self) -> int:
        """Return a free slot, waiting only if all are of steps not yet taken."""
        place = self._next
        self._next = (place + 1) % SLOTS
        if place == len(self._events):
            self._events.append(_device.Event())
            self._pending.append(lambda: None)
        else:
            pending = self._pending[place]()
            if pending is not None:  # the user may still ask it
                pending.resolve()
            self._events[place].wait()
        return place

    def address(self, slot: int) -> int:
        """Return where the device writes."""
        return address(self._slots[slot])

    def expect(self, slot: int, stream: int, lr_of: Callable[[int], float]) -> Outcome:
        """Return what will be in a slot, once the stream has come as far as it is now."""
        event = self._events[slot]
        event.record(stream)

        def ask() -> StepResult:
            event.wait()
            return self.read(slot, lr_of)

        outcome = Outcome(ask, event.is_past)
        self._pending[slot] = weakref.ref(outcome)
        return outcome

    def read(self, slot: int, lr_of: Callable[[int], float]) -> StepResult:
        """Return what a slot holds."""
        norm, skipped = self._slots[slot, _cuda.NORM], bool(self._slots[slot, _cuda.SKIPPED])
        count = int(self._slots.view(np.int64)[slot, _cuda.COUNT])
        step = count if skipped else count - 1
        return StepResult(step, lr_of(step), float(norm), skipped)


class StepCount:
    """The count of steps, as an array of one, waited for only where the device alone knows it."""

    def __init__(self, plan: "Plan", count: int) -> None:
        self._plan, self._known = plan, count
        # Steps that may yet turn out to be skipped, oldest first; whether some are in a graph.
        self._pending: deque[Outcome] = deque()
        self.replayed = False

    def add(self, outcome: Outcome | None) -> None:
        """Count a step, or one that may be skipped."""
        if outcome is None:
            self._known += 1
        else:
            while self._pending and self._pending[0].is_past():
                self._take_oldest()
            self._pending.append(outcome)

    def possible(self) -> list[int]:
        """Return the counts that are possible, waiting only where they are too many."""
        if self.replayed:
            return [self[0]]
        pending = self._pending
        while pending and (pending[0].is_past() or len(pending) >= MOST_TABLES):
            self._take_oldest()
        return list(range(self._known, self._known + len(pending) + 1))

    def _take_oldest(self) -> None:
        last = self._pending[0].resolve()
        self._known = last.step + (not last.skipped)
        self._pending.popleft()

    def __getitem__(self, place: int) -> int:
        # Of a step that goes into a graph nobody knows its number.
        if self.replayed and not self._plan.is_capturing():
            self._known = self._plan.read_count()
        while self._pending:
            self._take_oldest()
        return self._known

    def __setitem__(self, place: int, count: int) -> None:
        self._plan.write_count(count)
        self._known = count
        self._pending.clear()


class Plan:
    """Where parameters and gradients lie on a device, and how a step is started there.

    Parameters, and what they are good for, are those of the CPU's `_plan.Plan`.

    Raises
    ------
    ValueError
        If parameters share memory.
    """

    def __init__(
        self,
        states: Sequence[ParamState],
        labels: Sequence[str],
        steps: npt.NDArray[np.int64],
        step_count: int,
        scalars: DeviceScalars,
    ) -> None:
        self._states, self._labels, self._scalars = states, labels, scalars
        self._params: list[DeviceArray] = [state.param for state in states]
        self.device = max(0, *(param.device for param in self._params))
        arrays: list[tuple[str, DeviceArray]] = [(state.label, state.param) for state in states]
        for state in states:
            arrays += [(f"{state.label}.{n}", array) for n, array in state.arrays().items()]
        starts = np.array([array.address for _, array in arrays], dtype=np.int64)
        nbytes = np.array([array.nbytes for _, array in arrays], dtype=np.int64)
        self._memory = Memory([label for label, _ in arrays], starts, nbytes)
        self.dtypes = list(dict.fromkeys(state.param.dtype for state in states))
        self._amsgrad = any(state.max_exp_avg_sq is not None for state in states)
        self._average = any(state.ema is not None for state in states)
        with _device.context(self.device):
            self._lay_out(steps, step_count)
        self.step_count = StepCount(self, step_count)
        self._grads = Grads(self._params, labels, self._memory)
        owners = [param.owner for param in self._params]
        self._tensor_params = [owner for owner in owners if has_data_ptr(owner)]
        self._tensor_places = [tensor.data_ptr() for tensor in self._tensor_params]
        # What the device has been sent: hyperparameters, addresses; those of the graphs.
        self._sent_hyper = b""
        self._sent_places = np.zeros(len(states), dtype=np.int64)
        self._graph_places = np.zeros(len(states), dtype=np.int64)
        self._graph_limited = False

    def _lay_out(self, steps: npt.NDArray[np.int64], step_count: int) -> None:
        """Make the tables on the device."""
        count = len(self._states)
        tensors = tensor_table(self._states, self.dtypes, place_of)
        tensors[:, STEP] = steps
        own = np.ascontiguousarray(tensors[:, : _cuda.COLUMNS])
        groups = self._scalars.rows
        self._hyper = np.zeros(_cuda.HYPER_TABLES + MOST_TABLES * groups.size)
        chunks = []
        for k, dtype in enumerate(self.dtypes):
            members = np.flatnonzero(tensors[:, DTYPE] == k)
            chunks.append(chunk_table(members, tensors[members, SIZE], dtype.itemsize))
        self._chunk_counts = [len(table) for table in chunks]
        self._part_counts = [-(-each // _cuda.WARPS) for each in self._chunk_counts]

        parts: dict[str, npt.NDArray[Any]] = {
            "tensors": own,
            "hyper": self._hyper,
            "scale": np.ones(1),
            "step_count": np.array([step_count]),
            "is_double": np.array([dtype.itemsize > 4 for dtype in self.dtypes], np.int64),
            "grads0": np.zeros(count, np.int64),
            "grads1": np.zeros(count, np.int64),
            "rows": np.zeros(count * _cuda.ROW_BYTES, np.uint8),
        }
        for k, table in enumerate(chunks):
            parts[f"chunks{k}"] = table
            parts[f"sums{k}"] = np.zeros(self._part_counts[k])
            parts[f"maxima{k}"] = np.zeros(self._part_counts[k])
        contexts = np.zeros((2, len(chunks), _cuda.CONTEXT_SIZE), np.int64)
        parts["contexts"] = contexts
        offsets, end = {}, 0
        for name, part in parts.items():
            offsets[name], end = end, end + -(-part.nbytes // 128) * 128
        self._buffer = _device.allocate(end + 128)
        base = _device.address_of_buffer(self._buffer)
        base += -base % 128
        places = self._places = {name: base + offset for name, offset in offsets.items()}
        for graph in (EAGER, CAPTURED):
            for k in range(len(chunks)):
                fields = contexts[graph, k]
                fields[_cuda.TENSORS], fields[_cuda.TENSOR_COUNT] = places["tensors"], count
                fields[_cuda.GRADS] = places[f"grads{graph}"]
                fields[_cuda.ROWS], fields[_cuda.SCALE] = places["rows"], places["scale"]
                fields[_cuda.HYPER], fields[_cuda.GROUP_COUNT] = places["hyper"], len(groups)
                fields[_cuda.STEP_COUNT] = places["step_count"]
                fields[_cuda.IS_DOUBLE] = places["is_double"]
                fields[_cuda.CHUNKS] = places[f"chunks{k}"]
                fields[_cuda.CHUNK_COUNT] = self._chunk_counts[k]
                fields[_cuda.SUMS], fields[_cuda.MAXIMA] = places[f"sums{k}"], places[f"maxima{k}"]
                fields[_cuda.PART_COUNT] = self._part_counts[k]
                fields[_cuda.CONTEXT_COUNT] = len(chunks)
        image = np.zeros(end, np.uint8)
        for name, part in parts.items():
            image[offsets[name] : offsets[name] + part.nbytes] = part.reshape(-1).view(np.uint8)
        _device.upload(base, image.ctypes.data, end, 0)
        _device.synchronize(0)

        enough = BLOCKS_EACH * _device.multiprocessors(self.device)
        self._halvings = [
            sum(each << k < enough for k in range(MOST_HALVINGS)) for each in self._chunk_counts
        ]
        most = max(count, *self._part_counts)
        self._settle_threads = min(1024 if most > 256 else 256, _device.MOST_THREADS)
        self._hyper_mail = Mailbox(self._hyper.size)
        self._grad_mail = Mailbox(count)
        self._results = Results()
        self._side = _device.side_stream()
        self._order = _device.Event()

    # What the facade reads and writes.

    @property
    def steps(self) -> npt.NDArray[np.int64]:
        """Steps that each parameter has had, in the order of the parameters."""
        return self._tensors()[:, STEP].copy()

    @steps.setter
    def steps(self, steps: npt.NDArray[np.int64]) -> None:
        tensors = self._tensors()
        tensors[:, STEP] = steps
        self._write("tensors", tensors)

    def _tensors(self) -> npt.NDArray[np.int64]:
        return self._read("tensors", len(self._states) * _cuda.COLUMNS).reshape(-1, _cuda.COLUMNS)

    def _read(self, name: str, words: int) -> npt.NDArray[np.int64]:
        found = np.empty(words, np.int64)
        with _device.context(self.device):
            _device.synchronize_all()
            _device.download(address(found), self._places[name], found.nbytes, 0)
        return found

    def _write(self, name: str, words: npt.NDArray[np.int64]) -> None:
        with _device.context(self.device):
            _device.synchronize_all()
            _device.upload(self._places[name], address(words), words.nbytes, 0)
            _device.synchronize(0)

    def is_capturing(self) -> bool:
        """Whether a step taken now would go into a graph."""
        with _device.context(self.device):
            return _device.is_capturing(current_stream(self._params[0]))

    def read_count(self) -> int:
        """Return the device's own count of steps, once all its work is done."""
        return int(self._read("step_count", 1)[0])

    def write_count(self, count: int) -> None:
        """Set it."""
        self._write("step_count", np.array([count]))

    # A step.

    def _check_params(self) -> None:
        """Refuse a parameter that lies elsewhere now, as a tensor can."""
        if not self._tensor_params or lie_at(self._tensor_params, self._tensor_places):
            return
        for state in self._states:
            param = state.param
            if has_data_ptr(param.owner) and param.owner.data_ptr() != param.address:
                raise ValueError(
                    f"{state.label} must keep the memory that it had when the optimizer was made"
                )

    def take_grads(self, grads: tuple[Any, ...], writable: bool) -> None:
        """Check parameters and gradients, and note where the gradients lie.

        Raises
        ------
        TypeError, ValueError
            If a gradient does not fit its parameter, shares memory, or is read-only
            where ``writable`` is asked for; if a parameter has been moved.
        """
        self._check_params()
        self._grads.take(grads, writable)

    def step(self, grads: tuple[Any, ...], zero_grad: bool) -> int:
        """Start the step; return its number, from 0.

        It writes parameters, state, step counts and, if asked, gradients, in the
        order of the stream on which the parameters' library works now.

        Raises
        ------
        TypeError, ValueError
            As `take_grads`.
        RuntimeError
            If the step goes into a graph that another cannot share the tables with.
        """
        with _device.context(self.device):
            self.take_grads(grads, zero_grad)
            number = self.step_count[0]
            with self._stream(limits=None) as (stream, graph):
                self._settle(stream, graph, result=0, limited=False)
                self._update(stream, graph, zero_grad)
                if graph == EAGER:
                    self.step_count.add(None)
        return number

    def limited_step(
        self,
        grads: tuple[Any, ...],
        zero_grad: bool,
        lr: float,  # noqa: ARG002
        max_grad_norm: float | None,
        nonfinite: str,
    ) -> StepResult:
        """Start a step whose norm, clipping and skipping the device sees to.

        Raises
        ------
        TypeError, ValueError, RuntimeError
            As `step`.
        FloatingPointError
            With ``nonfinite="raise"``, which waits for the device.
        """
        with _device.context(self.device):
            self.take_grads(grads, zero_grad)
            limits, lr_of = (max_grad_norm, nonfinite), self._scalars.lr_of()
            with self._stream(limits) as (stream, graph):
                if graph == CAPTURED:
                    slot = SLOTS
                    outcome = Outcome(lambda: self._replayed(lr_of), lasting=False)
                else:
                    slot = self._results.slot()
                self._settle(stream, graph, self._results.address(slot), limited=True)
                if graph == EAGER:
                    outcome = self._results.expect(slot, stream, lr_of)
                    if nonfinite == "raise":
                        self._raise_if_skipped(outcome, grads)
                self._update(stream, graph, zero_grad)
                if graph == EAGER:
                    self.step_count.add(outcome if nonfinite == "skip" else None)
        return PendingResult.of(outcome)

    def _replayed(self, lr_of: Callable[[int], float]) -> StepResult:
        with _device.context(self.device):
            _device.synchronize_all()
            return self._results.read(SLOTS, lr_of)

    def _raise_if_skipped(self, outcome: Outcome, grads: tuple[Any, ...]) -> None:
        if outcome.resolve().skipped:
            on_host = [
                None if grad is None else view(grad, label, writable=False).copy_to_host()
                for grad, label in zip(grads, self._labels, strict=True)
            ]
            raise FloatingPointError(
                find_nonfinite(
                    on_host, self._labels, self._scalars.inverse, math.inf, self._scalars.largest
                )
            )

    @contextlib.contextmanager
    def _stream(self, limits: Any) -> Iterator[tuple[int, int]]:
        """Bring the device's tables up to date; wait, on the device, for who else works there."""
        stream = current_stream(self._params[0])
        others = {current_stream(visitor) for visitor in self._grads.visitors} - {stream}
        graph = CAPTURED if _device.is_capturing(stream) else EAGER
        if graph == CAPTURED:
            self._check_graph(limits)
        for other in others:
            self._order.record(other)
            self._order.hold(stream)
        self._send(limits, stream, graph)
        yield stream, graph
        for other in others:
            self._order.record(stream)
            self._order.hold(other)

    def _check_graph(self, limits: Any) -> None:
        if limits is not None and limits[1] == "raise":
            raise RuntimeError("nonfinite='raise' waits for the device: not in a CUDA graph")
        if not self.step_count.replayed:
            self._graph_limited = limits is not None
            return
        if not np.array_equal(self._graph_places, self._grads.places):
            raise RuntimeError(
                "gradients must lie, for every CUDA graph that has a step of this optimizer,"
                " where they lay for the first"
            )

    def _send(self, limits: Any, stream: int, graph: int) -> None:
        """Send hyperparameters and the gradients' addresses, if they are not there already."""
        aside = self._side if graph == CAPTURED else stream
        self._send_hyper(limits, aside)
        if graph == CAPTURED:
            if not self.step_count.replayed:
                self._graph_places = self._grads.places.copy()
                self._grad_mail.send(self._graph_places, self._places["grads1"], aside)
            self.step_count.replayed = True
            # What is captured is run later; this must not be.
            _device.synchronize(aside)
        elif self._sent_places is not self._grads.places:
            if not np.array_equal(self._sent_places, self._grads.places):
                self._grad_mail.send(self._grads.places, self._places["grads0"], stream)
            self._sent_places = self._grads.places

    def _send_hyper(self, limits: Any, stream: int) -> None:
        scalars, start = self._scalars, _cuda.HYPER_TABLES
        size = scalars.rows.size
        words = self._hyper[: start + len(scalars.tables) * size]
        for k, table in enumerate(scalars.tables):
            words[start + k * size : start + (k + 1) * size] = table.reshape(-1)
        counts = words.view(np.int64)
        counts[_cuda.TABLE_COUNT], counts[_cuda.FIRST_COUNT] = len(scalars.tables), 0
        if len(scalars.tables) > 1:
            counts[_cuda.FIRST_COUNT] = scalars.first
        if limits is not None:
            max_grad_norm, nonfinite = limits
            words[_cuda.FACTOR] = scalars.inverse
            words[_cuda.MAX_NORM] = math.inf if max_grad_norm is None else max_grad_norm
            words[_cuda.MAY_SKIP] = nonfinite != "propagate"
        image = words.tobytes()
        if image != self._sent_hyper:
            self._sent_hyper = b""  # until it is on its way
            self._hyper_mail.send(words, self._places["hyper"], stream)
            self._sent_hyper = image

    def prepare_replay(self, max_grad_norm: float | None, nonfinite: str) -> None:
        """Bring the hyperparameters that a graph reads up to date.

        Raises
        ------
        RuntimeError
            If what the graph has been captured for is not what is asked for now.
        """
        if not self.step_count.replayed:
            raise RuntimeError("prepare_replay needs a step in a CUDA graph, got none captured")
        limited = max_grad_norm is not None or nonfinite != "propagate"
        if self._graph_limited != limited:
            raise RuntimeError(
                "max_grad_norm and nonfinite must be on or off as when the CUDA graph was captured"
            )
        with _device.context(self.device):
            limits = (max_grad_norm, nonfinite) if limited else None
            self._send_hyper(limits, current_stream(self._params[0]))

    def _context(self, graph: int, k: int) -> int:
        return self._places["contexts"] + 8 * _cuda.CONTEXT_SIZE * (graph * len(self.dtypes) + k)

    def _settle(self, stream: int, graph: int, result: int, *, limited: bool) -> None:
        first, threads = self._context(graph, 0), self._settle_threads
        settle_kernel = _cuda.settle_kernel(limited=limited)
        if limited:
            self._sum(stream, graph, again=False)
            if any(dtype.itemsize > 4 for dtype in self.dtypes):  # squares of others fit
                measure_kernel = _cuda.settle_kernel(limited=True, measure=True)
                measure_kernel.launch(1, threads, stream, first, 0)
                self._sum(stream, graph, again=True)
        settle_kernel.launch(1, threads, stream, first, result)

    def _sum(self, stream: int, graph: int, *, again: bool) -> None:
        for k, dtype in enumerate(self.dtypes):
            _cuda.sum_kernel(dtype).launch(
                self._part_counts[k], _cuda.SUM_THREADS, stream, self._context(graph, k), again
            )

    def _update(self, stream: int, graph: int, zero_grad: bool) -> None:
        for k, kernel in enumerate(self._update_kernels(zero_grad)):
            halvings = self._halvings[k]
            kernel.launch(
                self._chunk_counts[k] << halvings,
                _cuda.update_threads(self.dtypes[k]),
                stream,
                self._context(graph, k),
                halvings,
            )

    def _update_kernels(self, zero_grad: bool) -> list[_device.Kernel]:
        return [
            _cuda.update_kernel(
                dtype, amsgrad=self._amsgrad, average=self._average, zero_grad=zero_grad
            )
            for dtype in self.dtypes
        ]

    def rehearsals(self, zero_grad: bool, *, norm: bool) -> list[tuple[Any, tuple[Any, ...]]]:
        """Return calls that compile the kernels of a step."""
        kernels = [*self._update_kernels(zero_grad), _cuda.settle_kernel(limited=norm)]
        if norm:
            kernels += [_cuda.sum_kernel(dtype) for dtype in self.dtypes]
            if any(dtype.itemsize > 4 for dtype in self.dtypes):
                kernels.append(_cuda.settle_kernel(limited=True, measure=True))
        return [(self._prepare, (kernel,)) for kernel in kernels]

    def _prepare(self, kernel: _device.Kernel) -> None:
        with _device.context(self.device):
            kernel.prepare()
