"""Takes the steps of one optimizer over arrays on a CUDA device: tables there, and launches."""

import contextlib
import functools
import math
import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from ..update.result import StepResult
from ..update.rows import Rows
from ..update.scalars import Scalars
from . import kernels
from . import layout as field
from .compiler import Kernel, driver
from .context import CAPTURED, EAGER, Context
from .gradients import Gradients
from .results import Results
from .step_count import StepCount

# Blocks for each multiprocessor that are worth halving chunks for, and how often.
BLOCKS_EACH, MOST_HALVINGS = 8, 3

# What limits a step: `max_grad_norm` and `nonfinite`; None where no norm is asked for.
Limits = tuple[float | None, str] | None


def call_all(calls: Iterable[Callable[[], object]]) -> None:
    """Make all of the calls.

    Without a step of Python's between one and the next, where a signal's
    handler could raise: what one has counted, the next must update.

    Raises
    ------
    RuntimeError
        If the driver has refused one.
    """
    for returned in list(map(operator.call, calls)):
        if isinstance(returned, tuple) and int(returned[0]):  # of a function of the driver's
            raise RuntimeError(f"the CUDA driver says {returned[0]}")


class Stepper:
    """Rows of parameters on a device, and how a step is started there.

    Parameters
    ----------
    rows : Rows
        Where parameters and state are.
    scalars : Scalars
        The groups' hyperparameters, read in every step.
    gradients : Gradients
        Notes where the gradients are.
    step_count : int
        Steps of the optimizer.
    device : int
        Where all of this is.
    """

    def __init__(
        self, rows: Rows, scalars: Scalars, gradients: Gradients, step_count: int, device: int
    ) -> None:
        self._scalars, self._gradients, self.device = scalars, gradients, device
        self.dtypes, self._roles = rows.dtypes, rows.roles
        self._doubles = any(dtype.itemsize > 4 for dtype in self.dtypes)
        self._loaded: set[tuple[bool, str | None]] = set()
        self._hyper = np.zeros(field.HYPER_GROUPS + scalars.rows.size)
        with driver.context(device):
            self._context = Context(rows, step_count, self._hyper.size, device)
            self._results, self._order = Results(device), driver.Event()
            self._side = driver.side_stream(device)
            enough = BLOCKS_EACH * driver.multiprocessors(device)
        self._halvings = [
            sum(count << k < enough for k in range(MOST_HALVINGS))
            for count in self._context.chunk_counts
        ]
        self.step_count = StepCount(step_count, self._context, device, gradients.current_stream)
        # Of the step that was captured last: gradients, and whether it was limited.
        self._graph_places: npt.NDArray[np.int64] | None = None
        self._graph_limited = False

    # What the facade reads and writes.

    @property
    def steps(self) -> npt.NDArray[np.int64]:
        """Steps that each parameter has had, in the order of the parameters."""
        return self._context.steps

    @steps.setter
    def steps(self, steps: npt.NDArray[np.int64]) -> None:
        self._context.steps = steps

    num_threads = None

    def set_num_threads(self, asked: int | None) -> None:
        """Do nothing: the host's threads take no part."""

    def choose_kernels(self) -> None:
        """Do nothing: the driver itself refuses to work in a forked child."""

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
        with driver.context(self.device):
            self._gradients.take(grads, zero_grad)
            self._load_kernels(zero_grad, None)
            number = self.step_count[0]
            with self._stream(None) as (stream, graph):
                calls = self._calls(stream, graph, zero_grad)
                if graph == EAGER:
                    calls.append(self.step_count.counting())
                call_all(calls)
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
        with driver.context(self.device):
            self._gradients.take(grads, zero_grad)
            self._load_kernels(zero_grad, nonfinite)
            with self._stream((max_grad_norm, nonfinite)) as (stream, graph):
                self._sum_squares(stream, graph)
                if graph == CAPTURED:
                    place, result = self._results.expect_replays(self._scalars.lr)
                    call_all(self._calls(stream, graph, zero_grad, place))
                else:
                    place, event, result = self._results.expect(self._scalars.lr)
                    if nonfinite == "raise":
                        self._prepare(stream, graph, place, only_result=True)()
                        event.record(stream)
                        if result.skipped:
                            inverse = self._scalars.inverse
                            message = self._gradients.nonfinite_message(grads, inverse)
                            raise FloatingPointError(message)
                    calls = self._calls(stream, graph, zero_grad, place)
                    may_skip = nonfinite == "skip"
                    counting = self.step_count.counting(result, may_skip=may_skip)
                    call_all([*calls, event.recording(stream), counting])
        return result  # type: ignore[return-value]

    @contextlib.contextmanager
    def _stream(self, limits: Limits) -> Iterator[tuple[int, int]]:
        """Bring the device's tables up to date; wait, on the device, for who else works there.

        Gives the stream of the step, and whether it is captured.
        """
        stream = self._gradients.current_stream()
        named = {visitor() for visitor in self._gradients.visitors}
        graph = CAPTURED if driver.is_capturing(stream) else EAGER
        # An array that names no stream may be used in the default one, but not in a graph.
        others = {each or 0 for each in named if each is not None or graph == EAGER} - {stream}
        if graph == CAPTURED:
            self._check_graph(limits, others)
            with driver.allowed_in_capture():
                self._send_for_graph(limits)
        else:
            for other in others:
                self._order.record(other)
                self._order.block(stream)
            self._send_hyper(limits, stream, EAGER)
            self._context.send(f"grads{EAGER}", self._gradients.places, stream)
        yield stream, graph
        for other in others:
            self._order.record(stream)
            self._order.block(other)

    def _check_graph(self, limits: Limits, others: set[int]) -> None:
        if limits is not None and limits[1] == "raise":
            raise RuntimeError("nonfinite='raise' waits for the device: not in a CUDA graph")
        first = self._graph_places
        if first is not None and not np.array_equal(first, self._gradients.places):
            raise RuntimeError(
                "gradients must lie, for every CUDA graph that has a step of this optimizer,"
                " where they lay for the first"
            )
        if others:
            raise RuntimeError(
                "a step in a CUDA graph needs parameters and gradients whose libraries work"
                " on the one stream that is captured"
            )

    def _send_for_graph(self, limits: Limits) -> None:
        """Send what a graph reads at once, and not when it is replayed."""
        self._send_hyper(limits, self._side, CAPTURED)
        self._context.send(f"grads{CAPTURED}", self._gradients.places, self._side)
        self._graph_places = self._gradients.places.copy()
        self._graph_limited = limits is not None
        self.step_count.in_graph = True
        driver.synchronize(self._side)

    def _send_hyper(self, limits: Limits, stream: int, graph: int) -> None:
        words = self._hyper
        words[field.HYPER_GROUPS :] = self._scalars.rows.reshape(-1)
        if limits is not None:
            max_grad_norm, nonfinite = limits
            words[field.FACTOR] = self._scalars.inverse
            words[field.MAX_NORM] = math.inf if max_grad_norm is None else max_grad_norm
            words[field.MAY_SKIP] = nonfinite != "propagate"
        self._context.send(f"hyper{graph}", words, stream)

    def prepare_replay(self, max_grad_norm: float | None, nonfinite: str) -> None:
        """Bring the hyperparameters that a graph reads up to date.

        Raises
        ------
        RuntimeError
            If what the graph has been captured for is not what is asked for now.
        """
        if self._graph_places is None:
            raise RuntimeError("prepare_replay needs a step in a CUDA graph, got none captured")
        limited = max_grad_norm is not None or nonfinite != "propagate"
        if self._graph_limited != limited:
            raise RuntimeError(
                "max_grad_norm and nonfinite must be on or off as when the CUDA graph was captured"
            )
        with driver.context(self.device):
            limits = (max_grad_norm, nonfinite) if limited else None
            self._send_hyper(limits, self._gradients.current_stream(), CAPTURED)

    def _sum_squares(self, stream: int, graph: int) -> None:
        """Start what sums the squares of the gradients."""
        for again in (False, True) if self._doubles else (False,):
            if again:  # squares of float64 may be out of range, which others' are not
                self._prepare(stream, graph, 0, only_scale=True)()
            for k, dtype in enumerate(self.dtypes):
                parts, place = self._context.part_counts[k], self._context.address(graph, k)
                if parts:
                    kernel, threads = kernels.sum_kernel(dtype), kernels.SUM_THREADS
                    kernel.call(self.device, parts, threads, stream, place, again)()

    def _prepare(
        self, stream: int, graph: int, result: int, *, limited: bool = True, **part: bool
    ) -> Callable[[], object]:
        """Return the call that decides, and prepares the scalars; ``result`` may be 0."""
        kernel = kernels.prepare_kernel(limited=limited, **part)
        place, threads = self._context.address(graph, 0), kernels.PREPARE_THREADS
        return kernel.call(self.device, 1, threads, stream, place, result)

    def _calls(
        self, stream: int, graph: int, zero_grad: bool, result: int = 0
    ) -> list[Callable[[], object]]:
        """Return the calls that take the step, to be made all or none of them.

        ``result`` is where the device writes the step's result; 0 if no norm is needed.
        """
        calls = [self._prepare(stream, graph, result, limited=bool(result))]
        for k, kernel in enumerate(self._update_kernels(zero_grad)):
            halvings, place = self._halvings[k], self._context.address(graph, k)
            blocks = self._context.chunk_counts[k] << halvings
            threads = kernels.update_threads(self.dtypes[k])
            if blocks:
                calls.append(kernel.call(self.device, blocks, threads, stream, place, halvings))
        return calls

    # Kernels.

    def _update_kernels(self, zero_grad: bool) -> list[Kernel]:
        return [
            kernels.update_kernel(dtype, roles=self._roles, zero_grad=zero_grad)
            for dtype in self.dtypes
        ]

    def _kernels(self, zero_grad: bool, nonfinite: str | None) -> list[Kernel]:
        """Return all that a step needs; ``nonfinite`` is None where no norm is asked for."""
        limited = nonfinite is not None
        needed = [*self._update_kernels(zero_grad), kernels.prepare_kernel(limited=limited)]
        if limited:
            needed += [kernels.sum_kernel(dtype) for dtype in self.dtypes]
            if self._doubles:
                needed.append(kernels.prepare_kernel(limited=True, only_scale=True))
        if nonfinite == "raise":
            needed.append(kernels.prepare_kernel(limited=True, only_result=True))
        return needed

    def _load_kernels(self, zero_grad: bool, nonfinite: str | None) -> None:
        """Compile what a step needs: what can fail must do so before anything is started."""
        if (zero_grad, nonfinite) not in self._loaded:
            for kernel in self._kernels(zero_grad, nonfinite):
                kernel.load(self.device)
            self._loaded.add((zero_grad, nonfinite))

    def compilations(self, nonfinite: str | None) -> list[Callable[[], object]]:
        """Return calls that each compile a kernel of the steps to come.

        ``nonfinite`` is None where no norm is asked for.
        """
        needed = self._kernels(False, nonfinite) + self._kernels(True, nonfinite)
        return [functools.partial(kernel.load, self.device) for kernel in dict.fromkeys(needed)]
