"""What stands between the facade and a backend: addresses, checked, and the calls."""

import math
import sys
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import config

from ..params.arrays import address, check_param, dtype_mark, take_grad
from ..params.memory import Memory
from ..runtime import alone, in_one_go, parallel_works
from ..state.state_dict import ParamState, all_arrays
from ..update.limits import clip_coefficient, nonfinite_message
from ..update.result import StepResult
from ..update.scalars import Scalars
from ..update.tables import (
    CHUNK_TENSOR,
    DTYPE_MARK,
    GRAD,
    GROUP_COUNT,
    GROUPS,
    NDARRAY,
    NONE,
    ODD,
    ODD_COUNT,
    OWN_COUNT,
    OWN_MEMORY,
    PARAM,
    STEP,
    TENSOR_COUNT,
    TENSORS,
    Context,
    tensor_table,
)
from . import gradients, kernels

# Sums of squares between these are neither short of digits nor infinite.
_SMALL, _LARGE = 1e-280, 1e300


class Plan:
    """Where parameters and gradients lie, and the backend that updates them there.

    Parameters
    ----------
    states : sequence of ParamState
        The parameters.
    labels : sequence of str
        What each one's gradient is called in messages.
    steps : int64 array
        Steps that each has had.
    step_count : int
        Steps of the optimizer.
    scalars : Scalars
        The groups' hyperparameters, read in every step.

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
        scalars: Scalars,
    ) -> None:
        self._states, self._labels = states, labels
        # Counted where the parameters' own steps are, in the kernel: no signal comes between.
        self.step_count = np.array([step_count], dtype=np.int64)
        arrays = all_arrays(states)
        self._memory = Memory.of(arrays, address)
        # NumPy refuses to resize, and so to move, an array that has a weak reference.
        self._pins = [weakref.ref(array) for array in arrays.values()]

        dtypes = list(dict.fromkeys(state.param.dtype for state in states))
        self._tensors = tensor_table(states, dtypes, address)
        # The places of the gradients that the kernels leave to Python.
        self._odd = np.zeros(len(states), dtype=np.int64)
        self._scalars = scalars
        self.steps = steps
        shared = {
            TENSORS: address(self._tensors),
            TENSOR_COUNT: len(self._tensors),
            GROUPS: address(scalars.rows),
            GROUP_COUNT: len(scalars.rows),
            OWN_MEMORY: address(self._memory.blocks),
            OWN_COUNT: len(self._memory.blocks),
            NDARRAY: id(np.ndarray),
            NONE: id(None),
            ODD: address(self._odd),
        }
        # Only the first counts.
        uncounted = np.zeros_like(self.step_count)
        self.contexts = [
            Context(
                shared,
                self._tensors,
                k,
                dtype,
                uncounted if k else self.step_count,
                config.NUMBA_NUM_THREADS,
                kernels.SERIAL_BELOW if parallel_works() else sys.maxsize,
            )
            for k, dtype in enumerate(dtypes)
        ]
        # What the kernels are called with, the gradients' addresses being in the table.
        self._calls = [(each.address, 0) for each in self.contexts]
        self._context = self.contexts[0].address if self.contexts else 0
        self._reads = bool(self.contexts) and gradients.works()
        self._amsgrad = any(state.max_exp_avg_sq is not None for state in states)
        self._average = any(state.ema is not None for state in states)
        self.dtypes = dtypes
        self._doubles = np.dtype(np.float64) in dtypes
        self.choose_kernels()

    def choose_kernels(self) -> None:
        """Have other kernels looked for: in a forked child, the parent's may not run."""
        for context in self.contexts:
            context.parallel &= parallel_works()
        self._in_one_call = self._reads and [each.parallel for each in self.contexts] == [False]
        self._kernels: dict[bool, list[Any]] = {}
        self._tried: set[bool] = set()

    @property
    def steps(self) -> npt.NDArray[np.int64]:
        """Steps that each parameter has had, in the order of the parameters."""
        return self._tensors[:, STEP].copy()

    @steps.setter
    def steps(self, steps: npt.NDArray[np.int64]) -> None:
        self._tensors[:, STEP] = steps

    def counting(self, steps: npt.NDArray[np.int64], step_count: int) -> list[tuple[Any, ...]]:
        """Return calls, of functions in C, that set all counts of steps."""
        write = np.ndarray.__setitem__
        return [
            (write, self._tensors[:, STEP], ..., steps),
            (write, self.step_count, 0, step_count),
        ]

    def kernels(self, zero_grad: bool) -> list[Any]:
        """Return the update kernel for each dtype."""
        updates = self._kernels.get(zero_grad)
        if updates is None:
            updates = self._kernels[zero_grad] = [
                kernels.update_kernel(
                    context.dtype,
                    parallel=context.parallel,
                    amsgrad=self._amsgrad,
                    average=self._average,
                    zero_grad=zero_grad,
                )
                for context in self.contexts
            ]
        return updates

    def step(self, grads: tuple[Any, ...], zero_grad: bool) -> int:
        """Take the step; return its number, from 0.

        Writes parameters, state, step counts and, if asked, gradients. The
        caller keeps ``grads`` until then: nothing else keeps the arrays alive.

        Raises
        ------
        TypeError, ValueError
            As `take_grads`.
        """
        if self._in_one_call:
            kernel = self.kernels(zero_grad)[0]
            count = kernel(self._context, id(grads))
            if count != kernels.REFUSED:
                return count - 1  # type: ignore[no-any-return]
            grads = self._take_odd(grads, zero_grad)
        else:
            grads = self.take_grads(grads, zero_grad)
        return self.update(zero_grad)

    def take_grads(self, grads: tuple[Any, ...], writable: bool) -> tuple[Any, ...]:
        """Check the gradients and note where they lie.

        Returns them, with plain arrays in the place of what else can be read.

        Raises
        ------
        TypeError, ValueError
            If one does not fit its parameter, shares memory, or is read-only
            where ``writable`` is asked for; if a parameter has become so.
        """
        if self._reads and kernels.look_kernel(self._context, id(grads), writable):
            return grads
        return self._take_odd(grads, writable)

    def _take_odd(self, grads: tuple[Any, ...], writable: bool) -> tuple[Any, ...]:
        """Check in Python what was not plainly right: to say what is wrong, or that nothing is."""
        taken = list(grads)
        odd: Any = range(len(taken))
        if self._reads:
            odd = self._odd[: self.contexts[0].fields[ODD_COUNT]].tolist()
        for k in odd:
            state, row = self._states[k], self._tensors[k]
            check_param(state.param, state.label)
            now = address(state.param), state.param.shape, dtype_mark(state.param.dtype)
            if now != (row[PARAM], state.exp_avg.shape, row[DTYPE_MARK]):
                raise ValueError(
                    f"{state.label} must keep the memory, the shape and the dtype that it had"
                    f" when the optimizer was made"
                )
            if grads[k] is not None:
                taken[k] = take_grad(grads[k], state.param, self._labels[k], writable)
        plain = tuple(taken)
        # All over again: what other libraries ran meanwhile may have moved what was looked at.
        if self._reads and kernels.look_kernel(self._context, id(plain), writable):
            return plain
        found = np.array([address(grad) for grad in plain], dtype=np.int64)
        sizes = [0 if grad is None else grad.nbytes for grad in plain]
        self._memory.check_apart(self._labels, found, np.array(sizes, dtype=np.int64))
        if self._reads:
            raise RuntimeError("params and grads must not change while a step looks at them")
        self._tensors[:, GRAD] = found
        return plain

    def update(self, zero_grad: bool) -> int:
        """Take the step with the gradients that were taken last; return its number, from 0."""
        updates = self.kernels(zero_grad)
        with alone:
            if len(updates) == 1:
                return updates[0](*self._calls[0]) - 1  # type: ignore[no-any-return]
            if not updates:
                self.step_count += 1
            else:
                # What can fail, compiling and starting threads, must do so before the first write.
                if zero_grad not in self._tried:
                    for kernel, arguments in self._rehearsals(zero_grad, None):
                        kernel(*arguments)
                    self._tried.add(zero_grad)
                # Two dtypes are all there are. A signal is acted on after a call returns,
                # and nothing of Python's lies between the first return and the second call.
                (kernel, second_kernel), (arguments, second_arguments) = updates, self._calls
                try:
                    kernel(*arguments)
                finally:
                    second_kernel(*second_arguments)
            return int(self.step_count[0]) - 1

    def zero_grads(self, grads: tuple[Any, ...]) -> None:
        """Set gradients to 0, and leave all else."""
        arrays = [np.asarray(grad) for grad in grads if grad is not None]
        in_one_go([(np.ndarray.fill, array, 0) for array in arrays])

    def rehearsals(self, nonfinite: str | None) -> list[tuple[Any, tuple[Any, ...]]]:
        """Return calls of the kernels of all steps, each on nothing: to compile them.

        ``nonfinite`` is None where no norm is asked for.
        """
        return self._rehearsals(False, nonfinite) + self._rehearsals(True, None)

    def _rehearsals(
        self, zero_grad: bool, nonfinite: str | None
    ) -> list[tuple[Any, tuple[Any, ...]]]:
        calls: list[tuple[Any, tuple[Any, ...]]] = []
        norm = nonfinite is not None
        # What norm calls for, and whether a step is skipped.
        measured = [False, True] if self._doubles or nonfinite in ("skip", "raise") else [False]
        for context, kernel in zip(self.contexts, self.kernels(zero_grad), strict=True):
            for largest in measured if norm else []:
                sum_kernel = kernels.sum_kernel(
                    context.dtype, parallel=context.parallel, largest=largest
                )
                calls.append((sum_kernel, (context.nothing, 1.0)))
            calls.append((kernel, (context.nothing, 0)))
        if self._reads and not zero_grad and (norm or not self._in_one_call):
            calls.insert(0, (kernels.look_kernel, (self.contexts[0].nothing, 0, zero_grad)))
        return calls

    def limited_step(
        self,
        grads: tuple[Any, ...],
        zero_grad: bool,
        lr: float,
        max_grad_norm: float | None,
        nonfinite: str,
    ) -> StepResult:
        """Take a step whose gradients are measured first.

        Raises
        ------
        TypeError, ValueError
            As `take_grads`.
        FloatingPointError
            With ``nonfinite="raise"``, for a gradient that is not finite.
        """
        grads, scalars = self.take_grads(grads, zero_grad), self._scalars
        norm = self.norm(scalars.inverse)
        if nonfinite != "propagate":
            found = self._find_nonfinite(scalars.inverse, norm, scalars.largest)
            if found is not None and nonfinite == "raise":
                raise FloatingPointError(
                    nonfinite_message(grads[found], self._labels[found], scalars.inverse)
                )
            if found is not None:
                if zero_grad:
                    self.zero_grads(grads)
                return StepResult(int(self.step_count[0]), lr, norm, skipped=True)
        scalars.clip(clip_coefficient(norm, max_grad_norm))
        return StepResult(self.update(zero_grad), lr, norm)

    def prepare_replay(self, *_: Any) -> None:
        """Refuse: there are no graphs here."""
        raise RuntimeError("prepare_replay needs parameters on a CUDA device, got NumPy arrays")

    def norm(self, factor: float) -> float:
        """Return the global norm of the gradients that were taken last, times a factor > 0.

        The same bits on any number of threads. NaN or infinite where an
        element is, or where it is beyond float64.
        """
        total = self._measure(1.0)
        # Squares of float32 neither vanish nor leave the range of float64.
        if _SMALL < total < _LARGE or not self._doubles:
            return math.sqrt(total) * factor
        largest = self._measure(1.0, largest=True)
        if largest == 0.0 or not math.isfinite(largest):
            return largest
        # Squares that would be infinite, or subnormal: a power of 2 takes no digit away.
        scale = math.ldexp(1.0, min(-math.frexp(largest)[1], 1000))
        return math.sqrt(self._measure(scale)) * factor / scale

    def _find_nonfinite(self, factor: float, norm: float, largest: float) -> int | None:
        """Return the place of the first gradient that, times a factor, is not finite.

        ``norm`` is that of all of them, and ``largest`` what their dtypes hold.
        """
        # As a rule the norm tells. Where it does not, elements are looked at: near the
        # largest number it may be the factor's own rounding that leads beyond it.
        if norm <= 0.99 * largest or math.isfinite(self._measure(factor, largest=True)):
            return None
        first: list[int] = []
        for context in self.contexts:
            (chunks,) = np.nonzero(~np.isfinite(context.sums))
            first += context.chunks[chunks[:1], CHUNK_TENSOR].tolist()
        return min(first)

    def _measure(self, scale: float, *, largest: bool = False) -> float:
        """Sum the squares of the gradients, times a factor, or find the largest of them."""
        with alone:
            found = [
                kernels.sum_kernel(context.dtype, parallel=context.parallel, largest=largest)(
                    context.address, scale
                )
                for context in self.contexts
            ]
        if largest:
            return math.nan if any(map(math.isnan, found)) else max(found, default=0.0)
        return sum(found, 0.0)
