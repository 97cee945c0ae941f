"""Takes the steps of one optimizer over NumPy arrays: chooses kernels, and calls them."""

import ctypes
import math
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from numba import config

from ..cpus import thread_count
from ..params.arrays import address
from ..runtime import kernel_lock, parallel_works
from ..update import layout
from ..update.limits import clip_coefficient, is_exact, scale_for
from ..update.result import StepResult
from ..update.rows import Rows
from ..update.scalars import Scalars
from ..update.settings import Settings
from . import intrinsics, kernels
from . import layout as field
from .context import Context


class Source(Protocol):
    """Where a step's gradients come from: `Gradients`, or `lists.Lists`."""

    fields: dict[int, int]
    compiled: bool

    def take(self, context: int, grads: tuple[Any, ...], writable: bool) -> tuple[Any, ...]:
        """Check the gradients and note where they are."""

    def take_unusual(
        self, context: int, grads: tuple[Any, ...], writable: bool
    ) -> tuple[Any, ...]:
        """Do the same where a kernel has refused some."""

    def nonfinite_message(self, grads: tuple[Any, ...], factor: float) -> str | None:
        """Return a message on the first element that, times a factor, is not finite."""


class Stepper:
    """Rows of parameters, and the kernels that update what is there.

    Parameters
    ----------
    rows : Rows
        Where parameters and state are. The kernels count steps in it.
    scalars : Scalars or Settings
        The groups' hyperparameters, read in every step.
    gradients : Source
        Notes where the gradients are.
    step_count : int
        Steps of the optimizer.

    Attributes
    ----------
    step_count : int64 array, shape (1,)
        Counted in the kernel, where the parameters' own steps are: no signal comes between.
    contexts : list of Context
        One for each dtype.
    num_threads : int
        At most so many threads take a step.
    """

    def __init__(
        self, rows: Rows, scalars: Scalars | Settings, gradients: Source, step_count: int
    ) -> None:
        self._rows, self._scalars, self._gradients = rows, scalars, gradients
        self.step_count = np.array([step_count], dtype=np.int64)
        place = address(rows.table) + 8 * layout.STEP
        self._counts = np.array([place, layout.TENSOR_COLUMNS, 0], dtype=np.int64)
        shared = {
            field.TENSORS: address(rows.table),
            field.TENSOR_COUNT: len(rows.table),
            field.GROUPS: address(scalars.rows),
            field.GROUP_COUNT: len(scalars.rows),
            field.COUNTS: address(self._counts),
            **gradients.fields,
        }
        # Only the first dtype's kernel counts the optimizer's step.
        uncounted = np.zeros_like(self.step_count)
        self.contexts = [
            Context(
                shared,
                rows,
                k,
                uncounted if k else self.step_count,
                config.NUMBA_NUM_THREADS,
                kernels.SERIAL_BELOW,
            )
            for k in range(len(rows.dtypes))
        ]
        self._context = self.contexts[0].address if self.contexts else 0
        self._doubles = np.dtype(np.float64) in rows.dtypes
        # One call of a kernel that holds the GIL: nobody can come in between.
        self._holds_gil = [context.large for context in self.contexts] == [False]
        self._in_one_call = gradients.compiled and self._holds_gil
        self.set_num_threads(None)

    def set_num_threads(self, asked: int | None) -> None:
        """Let steps take so many threads, or as many as `cpus.default_threads` says."""
        self.num_threads = thread_count(asked)
        self.choose_kernels()

    def choose_kernels(self) -> None:
        """Have other kernels looked for: in a forked child, the parent's may not run."""
        for context in self.contexts:
            context.set_threads(self.num_threads, parallel=parallel_works())
        self._updates: dict[bool, list[Any]] = {}

    @property
    def dtypes(self) -> list[np.dtype[Any]]:
        """The parameters' dtypes, each once."""
        return self._rows.dtypes

    @property
    def steps(self) -> npt.NDArray[np.int64]:
        """Steps that each parameter has had, in the order of the parameters."""
        return self._rows.table[:, layout.STEP].copy()

    @steps.setter
    def steps(self, steps: npt.NDArray[np.int64]) -> None:
        self._rows.table[:, layout.STEP] = steps

    def _update_kernels(self, zero_grad: bool) -> list[Any]:
        """Return the update kernel for each dtype."""
        updates = self._updates.get(zero_grad)
        if updates is None:
            updates = [
                intrinsics.entry_point(self._update_kernel(context, zero_grad))
                for context in self.contexts
            ]
            self._updates[zero_grad] = updates
        return updates

    def _update_kernel(self, context: Context, zero_grad: bool) -> Any:
        return kernels.update_kernel(
            context.dtype,
            parallel=context.parallel,
            roles=self._rows.roles,
            zero_grad=zero_grad,
            nogil=context.large and not context.parallel,
        )

    def _sum_kernel(self, context: Context, *, largest: bool) -> Any:
        return kernels.sum_kernel(
            context.dtype,
            parallel=context.parallel,
            largest=largest,
            nogil=context.large and not context.parallel,
        )

    def step(self, grads: tuple[Any, ...], zero_grad: bool) -> int:
        """Take the step; return its number, from 0.

        Writes parameters, state, step counts and, if asked, gradients. The
        caller keeps ``grads`` until then: nothing else keeps the arrays alive.

        Raises
        ------
        TypeError, ValueError
            As `Gradients.take`.
        """
        if self._in_one_call:
            kernel = self._update_kernels(zero_grad)[0]
            count = kernel(self._context, id(grads), 1.0)
            if count != kernels.REFUSED:
                return count - 1  # type: ignore[no-any-return]
            grads = self._gradients.take_unusual(self._context, grads, zero_grad)
        else:
            grads = self._gradients.take(self._context, grads, zero_grad)
        return self.update(zero_grad, 1.0)

    def take_grads(self, grads: tuple[Any, ...], writable: bool) -> tuple[Any, ...]:
        """Check the gradients and note where they are; see `Gradients.take`."""
        return self._gradients.take(self._context, grads, writable)

    def update(self, zero_grad: bool, clip: float) -> int:
        """Take the step with the gradients that were taken last; return its number, from 0.

        The gradients are multiplied by ``clip``.
        """
        updates = self._updates.get(zero_grad) or self._update_kernels(zero_grad)
        if self._holds_gil:
            return updates[0](self._context, 0, clip) - 1  # type: ignore[no-any-return]
        with kernel_lock:
            if len(updates) == 1:
                return updates[0](self._context, 0, clip) - 1  # type: ignore[no-any-return]
            if not updates:
                self.step_count += 1
                return int(self.step_count[0]) - 1
            # Two dtypes are all there are. A signal is acted on after a call returns, and
            # nothing of Python's lies between the first return and the second call.
            kernel, second_kernel = updates
            arguments, second_arguments = [(each.address, 0, clip) for each in self.contexts]
            try:
                kernel(*arguments)
            finally:
                second_kernel(*second_arguments)
            return int(self.step_count[0]) - 1

    def compilations(self, nonfinite: str | None) -> list[Callable[[], object]]:
        """Return calls that each make a kernel of the steps to come, compiled or loaded.

        ``nonfinite`` is None where no norm is asked for.
        """
        calls: list[Callable[[], object]] = []
        if self._gradients.compiled and (nonfinite is not None or not self._in_one_call):
            calls.append(kernels.look_kernel)
        if nonfinite is not None:
            # The largest gradient: where squares leave the range, or a step may be skipped.
            find_largest = self._doubles or nonfinite in ("skip", "raise")
            calls += [
                partial(self._sum_kernel, context, largest=largest)
                for context in self.contexts
                for largest in ((False, True) if find_largest else (False,))
            ]
        return calls + [
            partial(self._update_kernel, context, zero_grad)
            for zero_grad in (False, True)
            for context in self.contexts
        ]

    def limited_step(
        self,
        grads: tuple[Any, ...],
        zero_grad: bool,
        max_grad_norm: float | None,
        nonfinite: str,
    ) -> StepResult:
        """Take a step whose gradients are measured first.

        Raises
        ------
        TypeError, ValueError
            As `Gradients.take`.
        FloatingPointError
            With ``nonfinite="raise"``, for a gradient that is not finite.
        """
        scalars = self._scalars
        grads = self._gradients.take(self._context, grads, zero_grad)
        norm = self.norm(scalars.inverse)
        if nonfinite != "propagate" and self._is_nonfinite(norm):
            if nonfinite == "raise":
                message = self._gradients.nonfinite_message(grads, scalars.inverse)
                raise FloatingPointError(message)
            if zero_grad:
                self._zero_grads()
            return StepResult(int(self.step_count[0]), scalars.lr, norm, skipped=True)
        max_norm = math.inf if max_grad_norm is None else max_grad_norm
        step = self.update(zero_grad, clip_coefficient(norm, max_norm))
        return StepResult(step, scalars.lr, norm)

    def prepare_replay(self, max_grad_norm: float | None, nonfinite: str) -> None:  # noqa: ARG002
        """Refuse: there are no graphs here."""
        raise RuntimeError("prepare_replay needs parameters on a CUDA device, got NumPy arrays")

    def _zero_grads(self) -> None:
        """Set the gradients that were taken last to 0."""
        for row in self._rows.table[self._rows.table[:, layout.GRAD] != 0]:
            itemsize = self.dtypes[row[layout.DTYPE]].itemsize
            ctypes.memset(int(row[layout.GRAD]), 0, int(row[layout.SIZE]) * itemsize)

    def norm(self, factor: float) -> float:
        """Return the global norm of the gradients that were taken last, times a factor > 0.

        The same bits on any number of threads. NaN or infinite where an
        element is, or where it is beyond float64.
        """
        total = self._measure(1.0)
        # Squares of float32 neither vanish nor leave the range of float64.
        if is_exact(total) or not self._doubles:
            return math.sqrt(total) * factor
        largest = self._measure(1.0, largest=True)
        if largest == 0.0 or not math.isfinite(largest):
            return largest
        # Squares that would be infinite, or subnormal: a power of 2 takes no digit away.
        scale = scale_for(largest)
        return math.sqrt(self._measure(scale)) * factor / scale

    def _is_nonfinite(self, norm: float) -> bool:
        """Whether a gradient that was taken last, divided by grad_scale, is not finite.

        ``norm`` is that of all of them.
        """
        # As a rule the norm tells. Where it does not, elements are looked at: near the
        # largest number it may be the factor's own rounding that leads beyond it.
        scalars = self._scalars
        if norm <= 0.99 * scalars.largest:
            return False
        return not math.isfinite(self._measure(scalars.inverse, largest=True))

    def _measure(self, scale: float, *, largest: bool = False) -> float:
        """Sum the squares of the gradients, times a factor, or find the largest of them."""
        with kernel_lock:
            found = [
                self._sum_kernel(context, largest=largest)(context.address, scale)
                for context in self.contexts
            ]
        if largest:
            return math.nan if any(map(math.isnan, found)) else max(found, default=0.0)
        return sum(found, 0.0)
