"""Arrays on a device that come in lists with every call: `cpu.lists` for the device."""

from collections.abc import Callable
from typing import Any

import numpy as np

from ..cpu.lists import STEPS, Given, check_steps, label
from ..params.arrays import check_alike
from ..params.kinds import check_together
from ..params.memory import Memory
from ..state import roles
from ..state.param_state import ParamState
from ..update import layout
from ..update.result import StepResult
from ..update.rows import Rows
from ..update.settings import Groups, Settings
from .arrays import DeviceArray, address, has_data_ptr, place_and_layout, view
from .compiler import driver
from .gradients import Gradients
from .stepper import Stepper

# Parameters and state: what a step writes, and tables are made for.
_KEPT = [column for column in layout.ADDRESSES if column != layout.GRAD]


def find_tables(given: Given) -> int:
    """Return a number made of where the parameters lie, and the first of the state."""
    arrays = *given[layout.PARAM], *given[layout.EXP_AVG][:1]
    return hash(tuple(map(_place, arrays)))


def take_lists(given: Given) -> Given:
    """Return what is given: arrays are looked at where they are needed."""
    return given


def _place(array: Any) -> int:
    if has_data_ptr(array):
        return int(array.data_ptr())
    return view(array, "array", writable=True).address


def _look(array: Any, name: str) -> Any:
    """Return where an array lies, and all else that tables are made for."""
    place, traits = place_and_layout(array)
    if traits is None:
        found = view(array, name, writable=True)
        return found.address, (found.shape, found.order, found.dtype, found.device)
    return place, traits


def _counts(given: Given) -> Any:
    """Return a copy of the counts of steps, as integers."""
    return np.array([int(step) for step in given[STEPS]], dtype=np.int64)


class ListGradients(Gradients):
    """Gradients that come with all else, of which nothing is kept."""

    def __init__(self, states: list[ParamState], memory: Memory) -> None:
        super().__init__(states, [label(layout.GRAD, k) for k in range(len(states))])
        self._memory = memory
        # Whether parameters have moved, `ListStepper.fit` sees.
        self._tensor_params, self._tensor_param_places = [], []

    def take(self, grads: Given, writable: bool) -> None:
        """Check the gradients; see `Gradients.take`."""
        super().take(grads[layout.GRAD], writable)

    def nonfinite_message(self, grads: Given, factor: float) -> str | None:
        """Return a message on the first element that, times a factor, is not finite."""
        return super().nonfinite_message(grads[layout.GRAD], factor)


class ListStepper(Stepper):
    """A stepper over arrays that come with every call.

    The device counts steps itself. What the caller's array of counts holds is
    sent there only where it is not what the last step left in it.
    """

    def __init__(self, given: Given, groups: Groups) -> None:
        count = len(given[layout.PARAM])
        check_steps(given[STEPS], count)
        names = (roles.PARAM, None, *roles.NAMES)
        states = []
        for k in range(count):
            arrays: dict[str, DeviceArray] = {}
            for column in _KEPT:
                if given[column] is not None:
                    arrays[str(names[column])] = self._taken(given, column, k)
            param = arrays.pop(roles.PARAM)
            group = 0 if groups is None else groups[k]
            name = label(layout.PARAM, k)
            states.append(ParamState(k, name, param, group, param.shape, arrays))
        memory = Memory.of(
            {
                label(column, k): states[k].arrays(param=True)[str(names[column])]
                for column in _KEPT
                if given[column] is not None
                for k in range(count)
            },
            address,
        )
        self._seen = self._looks(given)
        self.settings = Settings([state.param.dtype for state in states], groups)
        steps = _counts(given)
        gradients = ListGradients(states, memory)
        device = max(0, *(state.param.device for state in states))
        rows = Rows.of(states, address, steps)
        super().__init__(rows, self.settings, gradients, int(steps[0]), device)  # type: ignore[arg-type]
        # The host's copies of the device's counts: each parameter's, and the steps of this.
        self._counts, self._count = steps, int(steps[0])
        self._first = states[0].param
        for state in states:  # nothing of the user's is kept
            for array in state.arrays(param=True).values():
                array.owner = None

    @staticmethod
    def _taken(given: Given, column: int, k: int) -> DeviceArray:
        """Return a stand-in for one array, or refuse it."""
        name, first = label(column, k), label(layout.PARAM, 0)
        found = view(given[column][k], name, writable=True)
        check_together(found, name, view(given[layout.PARAM][0], first, writable=True), first)
        if column != layout.PARAM:
            param = view(given[layout.PARAM][k], label(layout.PARAM, k), writable=True)
            check_alike(found, param, name)
            if found.order != param.order:
                raise ValueError(f"{name} must be laid out in memory as its parameter is")
        of = found.address, found.shape, found.dtype, found.order, found.device
        return DeviceArray(given[column][k], *of)

    @staticmethod
    def _looks(given: Given) -> list[Any]:
        return [
            None
            if given[column] is None
            else [_look(array, label(column, k)) for k, array in enumerate(given[column])]
            for column in _KEPT
        ]

    def fit(self, given: Given, writable: bool) -> bool:  # noqa: ARG002 - the step looks
        """Whether parameters and state are those that were seen first; take over the counts."""
        check_steps(given[STEPS], len(given[layout.PARAM]))
        if self._looks(given) != self._seen:
            return False
        steps = _counts(given)
        if not np.array_equal(steps, self._counts):
            self._counts = steps
            self.steps = self._counts
        if self._count != int(steps[0]):
            self._count = int(steps[0])
            self.step_count[0] = self._count
        return True

    def step(self, grads: Given, zero_grad: bool) -> int:
        """Start the step; count it in the caller's array too."""
        return int(self._counted(grads, super().step, grads, zero_grad))

    def limited_step(
        self, grads: Given, zero_grad: bool, max_grad_norm: float | None, nonfinite: str
    ) -> StepResult:
        """Do the same where the norm is needed; wait where it may be skipped."""
        limits = max_grad_norm, nonfinite
        result: StepResult = self._counted(grads, super().limited_step, grads, zero_grad, *limits)
        return result

    def _counted(self, given: Given, step: Callable[..., Any], *arguments: Any) -> Any:
        self._first.owner = given[layout.PARAM][0]  # of whose library the stream is
        try:
            if driver.is_capturing(self._gradients.current_stream()):
                raise RuntimeError(
                    "a step in a CUDA graph needs fastadam.Adam: functional.adam counts steps"
                    " on the host"
                )
            return step(*arguments)
        finally:
            if int(self.step_count[0]) != self._count:
                steps, present = given[STEPS], [grad is not None for grad in given[layout.GRAD]]
                if type(steps) is tuple:
                    for count, counted in zip(steps, present, strict=True):
                        count[...] += int(counted)
                else:
                    np.add(steps, present, steps)
                self._counts = _counts(given)
                self._count += 1
            self._first.owner = None
