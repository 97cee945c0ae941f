"""What stands between the facade and a backend: addresses, checked, and the call."""

import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from . import _cpu, _reader
from ._arrays import address, check_grad, check_param
from ._memory import Memory
from ._state import ParamState
from ._tables import GRAD, STEP, Table


class Plan:
    """Where parameters and gradients lie, and the backend that updates them there.

    One table for each dtype.

    Raises
    ------
    ValueError
        If parameters share memory.
    """

    def __init__(
        self, states: Sequence[ParamState], steps: npt.NDArray[np.int64], step_count: int
    ) -> None:
        self._states = states
        # Counted where the parameters' own steps are, in the kernel: no signal comes between.
        self.step_count = np.array([step_count], dtype=np.int64)
        arrays = [(state.label, state.param) for state in states]
        for state in states:
            arrays += [(f"{state.label}.{n}", array) for n, array in state.arrays().items()]
        starts = np.array([address(array) for _, array in arrays], dtype=np.int64)
        sizes = np.array([array.nbytes for _, array in arrays], dtype=np.int64)
        self._memory = Memory([label for label, _ in arrays], starts, sizes)
        # NumPy refuses to resize, and so to move, an array that has a weak reference.
        self._pins = [weakref.ref(array) for _, array in arrays]

        self.tables = []
        for dtype in {state.param.dtype: None for state in states}:
            members = [k for k, state in enumerate(states) if state.param.dtype == dtype]
            self.tables.append(Table(states, members))
        self.steps = steps

        params = [state.param for state in states]
        self._dtypes = [param.dtype for param in params]  # keeps their ids their own
        self._expected = _reader.expect(params, starts[: len(states)])
        self._sizes = sizes[: len(states)]
        self._found = np.zeros(len(states), dtype=np.int64)
        self._stale = True
        self._reads = _reader.works(params, self._expected)

    @property
    def steps(self) -> npt.NDArray[np.int64]:
        """Steps that each parameter has had, in the order of the parameters."""
        steps = np.zeros(len(self._states), dtype=np.int64)
        for table in self.tables:
            steps[table.members] = table.tensors[:, STEP]
        return steps

    @steps.setter
    def steps(self, steps: npt.NDArray[np.int64]) -> None:
        for table in self.tables:
            table.tensors[:, STEP] = steps[table.members]

    def take_grads(self, grads: list[Any], labels: Sequence[str], *, writable: bool) -> None:
        """Check the gradients and note where they lie, for the kernel call that follows.

        Replaces NumPy scalars in the list by arrays. The caller keeps the
        list until the kernel has run: nothing else keeps the arrays alive.

        Raises
        ------
        TypeError, ValueError
            If one does not fit its parameter, shares memory, or is read-only
            where ``writable`` is asked for; if a parameter has become so.
        """
        found, status = self._found, _reader.ODD
        # Until what was found is known to be sound, and is in the tables.
        was_stale, self._stale = self._stale, True
        if self._reads:
            grad_ids = _reader.ids(grads)
            status = _reader.look(_reader.KINDS, self._expected, grad_ids, found, writable)
        if status == _reader.ODD:
            self._check_grads(grads, labels, writable)
            found[:] = [address(grad) for grad in grads]
        if status != _reader.SAME or was_stale:
            self._memory.check_apart(labels, found, np.where(found, self._sizes, 0))
            for table in self.tables:
                table.tensors[:, GRAD] = found[table.members]
        self._stale = False

    def _check_grads(self, grads: list[Any], labels: Sequence[str], writable: bool) -> None:
        """Check in Python what was not plainly right: to say what is wrong, or that nothing is."""
        for k, (state, label) in enumerate(zip(self._states, labels, strict=True)):
            check_param(state.param, state.label)
            _, start, dtype = self._expected[k]
            if (address(state.param), id(state.param.dtype)) != (start, dtype):
                raise ValueError(
                    f"{state.label} must keep the memory and the dtype that it had when the"
                    f" optimizer was made"
                )
            grad = grads[k]
            if isinstance(grad, np.generic):  # what arithmetic on 0-d arrays gives
                grads[k] = np.asarray(grad)
            if grad is not None:
                check_grad(grads[k], state.param, label)
                if writable and not (grad is grads[k] and grad.flags.writeable):
                    kind = "a read-only array" if grad is grads[k] else "a NumPy scalar"
                    raise ValueError(f"{label} must be writable for zero_grad=True, got {kind}")

    def update(self, groups: npt.NDArray[np.float64], *, amsgrad: bool, zero_grad: bool) -> None:
        """Take the step: write parameters, state, step counts and, if asked, gradients."""
        _cpu.update(self.tables, self.step_count, groups, amsgrad=amsgrad, zero_grad=zero_grad)
