"""What stands between the facade and a CUDA device: tables there, and the launches."""

import contextlib
import functools
import math
import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from ..update.result import Outcome, PendingResult, StepResult
from ..update.rows import Rows
from . import kernels, launch, layout
from .gradients import Gradients
from .messages import SLOTS, Mailbox, Results
from .scalars import MOST_TABLES, DeviceScalars, StepCount
from .tables import CAPTURED, EAGER, DeviceTables

# Blocks for each multiprocessor that are worth halving chunks for, and how often.
BLOCKS_EACH, MOST_HALVINGS = 8, 3


def take(calls: Iterable[Callable[[], object]]) -> None:
    """Make all of the calls.

    Without a step of Python's between one and the next, where a signal's
    handler could raise: what one has counted, the next must update.

    Raises
    ------
    RuntimeError
        If the driver has refused one.
    """
    for told in list(map(operator.call, calls)):
        if isinstance(told, tuple) and int(told[0]):  # the driver's own, as numba-cuda has none
            raise RuntimeError(f"the CUDA driver says {told[0]}")


class Stepper:
    """Rows of parameters on a device, and how a step is started there.

    Parameters
    ----------
    rows : Rows
        Where parameters and state are.
    scalars : DeviceScalars
        The groups' hyperparameters, read in every step.
    gradients : Gradients
        Notes where the gradients are.
    step_count : int
        Steps of the optimizer.
    device : int
        Where all of this is.
    """

    def __init__(
        self,
        rows: Rows,
        scalars: DeviceScalars,
        gradients: Gradients,
        step_count: int,
        device: int,
    ) -> None:
        self._scalars, self._gradients, self.device = scalars, gradients, device
        self.dtypes, self._roles, count = rows.dtypes, rows.roles, len(rows.table)
        self._doubles = any(dtype.itemsize > 4 for dtype in self.dtypes)
        self._compiled: set[tuple[bool, str | None]] = set()
        self._hyper = np.zeros(layout.HYPER_TABLES + MOST_TABLES * scalars.rows.size)
        with launch.context(device):
            self._tables = DeviceTables(
                rows, step_count, len(scalars.rows), self._hyper.size, device
            )
            self._hyper_mail, self._grad_mail = Mailbox(self._hyper.size), Mailbox(count)
            self._results, self._order = Results(device), launch.Event()
            self._side = launch.side_stream(device)
            enough = BLOCKS_EACH * launch.multiprocessors(device)
        self._halvings = [
            sum(each << k < enough for k in range(MOST_HALVINGS))
            for each in self._tables.chunk_counts
        ]
        most = max(count, *self._tables.part_counts)
        threads = kernels.SETTLE_THREADS if most > 256 else 256
        self._settle_threads = min(threads, launch.MOST_THREADS)
        self.step_count = StepCount(self, step_count)
        # What the device has been sent: hyperparameters, addresses; those of the graphs.
        self._sent_hyper = [b"", b""]
        self._sent_places = np.zeros(count, dtype=np.int64)
        self._graph_places = np.zeros(count, dtype=np.int64)
        self._graph_limited = False

    # What the facade reads and writes.

    @property
    def steps(self) -> npt.NDArray[np.int64]:
        """Steps that each parameter has had, in the order of the parameters."""
        return self._tables.steps

    @steps.setter
    def steps(self, steps: npt.NDArray[np.int64]) -> None:
        self._tables.steps = steps

    def choose_kernels(self) -> None:
        """Do nothing: the driver itself refuses to work in a forked child."""

    @contextlib.contextmanager
    def asking(self) -> Iterator[None]:
        """Be where events can be waited for: in any thread, a capture under way or not."""
        with launch.context(self.device), launch.relaxed():
            yield

    def is_capturing(self) -> bool:
        """Whether a step taken now would go into a graph."""
        with launch.context(self.device):
            return launch.is_capturing(self._gradients.current_stream())

    def read_count(self) -> int:
        """Return the device's own count of steps, once all its work is done."""
        return int(self._tables.read("step_count", 1)[0])

    def write_count(self, count: int) -> None:
        """Set it."""
        self._tables.write("step_count", np.array([count]))

    # A step.

    def step(self, grads: tuple[Any, ...], zero_grad: bool) -> int:
        """Start the step; return its number, from 0.

        It writes parameters, state, step counts and, if asked, gradients, in the
        order of the stream on which the parameters' library works now.

        Raises
        ------
        TypeError, ValueError
            As `Gradients.take`.
        RuntimeError
            If the step goes into a graph that another cannot share the tables with.
        """
        with launch.context(self.device):
            self._gradients.take(grads, zero_grad)
            self._compile(zero_grad, None)
            number = self.step_count[0]
            with self._stream(limits=None) as (stream, graph):
                calls = self._calls(stream, graph, zero_grad, result=0, limited=False)
                if graph == EAGER:
                    calls.append(self.step_count.counting(None, may_skip=False))
                take(calls)
        return number

    def limited_step(
        self,
        grads: tuple[Any, ...],
        zero_grad: bool,
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
        with launch.context(self.device):
            self._gradients.take(grads, zero_grad)
            self._compile(zero_grad, nonfinite)
            limits, lr_of = (max_grad_norm, nonfinite), self._scalars.lr_of()
            with self._stream(limits) as (stream, graph):
                self._sum(stream, graph)
                if graph == CAPTURED:
                    place = self._results.address(SLOTS)
                    take(self._calls(stream, graph, zero_grad, place, limited=True))
                    outcome = Outcome(lambda: self._replayed(lr_of), lasting=False)
                else:
                    slot, event, outcome = self._results.expect(lr_of)
                    place = self._results.address(slot)
                    if nonfinite == "raise":
                        self._settle(stream, graph, place, ask=True)()
                        event.record(stream)
                        self._raise_if_skipped(outcome, grads)
                    calls = self._calls(stream, graph, zero_grad, place, limited=True)
                    counting = self.step_count.counting(outcome, may_skip=nonfinite == "skip")
                    take([*calls, event.recording(stream), counting])
        result: Any = PendingResult(outcome)
        return result  # type: ignore[no-any-return]

    def _replayed(self, lr_of: Callable[[int], float]) -> StepResult:
        with launch.context(self.device):
            launch.synchronize_all()
            return self._results.read(SLOTS, lr_of)

    def _raise_if_skipped(self, outcome: Outcome, grads: tuple[Any, ...]) -> None:
        if outcome.resolve().skipped:
            raise FloatingPointError(
                self._gradients.nonfinite_message(grads, self._scalars.inverse)
            )

    @contextlib.contextmanager
    def _stream(self, limits: Any) -> Iterator[tuple[int, int]]:
        """Bring the device's tables up to date; wait, on the device, for who else works there."""
        stream = self._gradients.current_stream()
        named = {visitor() for visitor in self._gradients.visitors}
        graph = CAPTURED if launch.is_capturing(stream) else EAGER
        # An array that names no stream may be used in the default one, but not in a graph.
        others = {each or 0 for each in named if each is not None or graph == EAGER} - {stream}
        if graph == CAPTURED:
            self._check_graph(limits)
            if others:
                raise RuntimeError(
                    "a step in a CUDA graph needs parameters and gradients whose libraries work"
                    " on the one stream that is captured"
                )
            with launch.relaxed():
                self._send_for_graph(limits)
        else:
            for other in others:
                self._order.record(other)
                self._order.hold(stream)
            self._send(limits, stream)
        yield stream, graph
        for other in others:
            self._order.record(stream)
            self._order.hold(other)

    def _check_graph(self, limits: Any) -> None:
        if limits is not None and limits[1] == "raise":
            raise RuntimeError("nonfinite='raise' waits for the device: not in a CUDA graph")
        self._graph_limited = limits is not None
        if self.step_count.replayed and not np.array_equal(
            self._graph_places, self._gradients.places
        ):
            raise RuntimeError(
                "gradients must lie, for every CUDA graph that has a step of this optimizer,"
                " where they lay for the first"
            )

    def _send(self, limits: Any, stream: int) -> None:
        """Send hyperparameters and the gradients' addresses, if they are not there already."""
        self._send_hyper(limits, stream, EAGER)
        places = self._gradients.places
        if self._sent_places is not places:
            if not np.array_equal(self._sent_places, places):
                self._grad_mail.send(places, self._tables.places["grads0"], stream)
            self._sent_places = places

    def _send_for_graph(self, limits: Any) -> None:
        """Do the same at once, not when the graph is replayed."""
        self._send_hyper(limits, self._side, CAPTURED)
        if not self.step_count.replayed:
            self._graph_places = self._gradients.places.copy()
            self._grad_mail.send(self._graph_places, self._tables.places["grads1"], self._side)
        self.step_count.replayed = True
        launch.synchronize(self._side)

    def _send_hyper(self, limits: Any, stream: int, graph: int) -> None:
        scalars, start = self._scalars, layout.HYPER_TABLES
        size = scalars.rows.size
        words = self._hyper[: start + len(scalars.tables) * size]
        for k, table in enumerate(scalars.tables):
            words[start + k * size : start + (k + 1) * size] = table.reshape(-1)
        counts = words.view(np.int64)
        counts[layout.TABLE_COUNT] = len(scalars.tables)
        counts[layout.FIRST_COUNT] = scalars.first
        if limits is not None:
            max_grad_norm, nonfinite = limits
            words[layout.FACTOR] = scalars.inverse
            words[layout.MAX_NORM] = math.inf if max_grad_norm is None else max_grad_norm
            words[layout.MAY_SKIP] = nonfinite != "propagate"
        image = words.tobytes()
        if image != self._sent_hyper[graph]:
            self._sent_hyper[graph] = b""  # until it is on its way
            self._hyper_mail.send(words, self._tables.places[f"hyper{graph}"], stream)
            self._sent_hyper[graph] = image

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
        with launch.context(self.device):
            limits = (max_grad_norm, nonfinite) if limited else None
            self._send_hyper(limits, self._gradients.current_stream(), CAPTURED)

    def _sum(self, stream: int, graph: int) -> None:
        """Start what sums the squares of the gradients."""
        for again in (False, True) if self._doubles else (False,):
            if again:  # squares of float64 may be out of range, which others' are not
                self._settle(stream, graph, 0, measure=True)()
            for k, dtype in enumerate(self.dtypes):
                context, parts = self._tables.context(graph, k), self._tables.part_counts[k]
                kernel = kernels.sum_kernel(dtype)
                kernel.call(self.device, parts, kernels.SUM_THREADS, stream, context, again)()

    def _settle(
        self, stream: int, graph: int, result: int, *, limited: bool = True, **part: bool
    ) -> Callable[[], object]:
        kernel = kernels.settle_kernel(limited=limited, **part)
        first = self._tables.context(graph, 0)
        return kernel.call(self.device, 1, self._settle_threads, stream, first, result)

    def _calls(
        self, stream: int, graph: int, zero_grad: bool, result: int, *, limited: bool
    ) -> list[Callable[[], object]]:
        """Return the calls that take the step, to be made all or none of them."""
        calls = [self._settle(stream, graph, result, limited=limited)]
        for k, kernel in enumerate(self._update_kernels(zero_grad)):
            halvings, context = self._halvings[k], self._tables.context(graph, k)
            blocks = self._tables.chunk_counts[k] << halvings
            threads = kernels.update_threads(self.dtypes[k])
            calls.append(kernel.call(self.device, blocks, threads, stream, context, halvings))
        return calls

    def _update_kernels(self, zero_grad: bool) -> list[launch.Kernel]:
        return [
            kernels.update_kernel(dtype, roles=self._roles, zero_grad=zero_grad)
            for dtype in self.dtypes
        ]

    def _kernels(self, nonfinite: str | None) -> list[launch.Kernel]:
        """Return all beside the update; ``nonfinite`` is None where no norm is asked for."""
        needed = [kernels.settle_kernel(limited=nonfinite is not None)]
        if nonfinite is not None:
            needed += [kernels.sum_kernel(dtype) for dtype in self.dtypes]
            if self._doubles:
                needed.append(kernels.settle_kernel(limited=True, measure=True))
        if nonfinite == "raise":
            needed.append(kernels.settle_kernel(limited=True, ask=True))
        return needed

    def _compile(self, zero_grad: bool, nonfinite: str | None) -> None:
        """Compile what a step needs: what can fail must do so before anything is started."""
        if (zero_grad, nonfinite) not in self._compiled:
            for kernel in self._update_kernels(zero_grad) + self._kernels(nonfinite):
                kernel.prepare()
            self._compiled.add((zero_grad, nonfinite))

    def compilations(self, nonfinite: str | None) -> list[Callable[[], object]]:
        """Return calls that each compile a kernel of the steps to come.

        ``nonfinite`` is None where no norm is asked for.
        """
        updates = self._update_kernels(False) + self._update_kernels(True)
        needed = updates + self._kernels(nonfinite)
        return [functools.partial(self._prepare, kernel) for kernel in needed]

    def _prepare(self, kernel: launch.Kernel) -> None:
        with launch.context(self.device):
            kernel.prepare()
