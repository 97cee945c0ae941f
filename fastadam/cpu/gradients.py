"""The gradients of a step: each is checked, and its address noted in the parameter's row."""

import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..params.arrays import address, check_param, dtype_mark, take_grad
from ..params.memory import Memory
from ..state.param_state import ParamState, all_arrays
from ..update import layout
from ..update.limits import nonfinite_message
from ..update.rows import Rows
from . import kernels, numpy_structs
from . import layout as field


class Gradients:
    """What the gradients of an optimizer over NumPy arrays must fit.

    Parameters
    ----------
    states : sequence of ParamState
        The parameters.
    labels : sequence of str
        What each one's gradient is called in messages.
    rows : Rows
        Where the addresses are noted, in the column ``GRAD``.

    Raises
    ------
    ValueError
        If parameters share memory.

    Attributes
    ----------
    fields : dict
        What a kernel's context must hold, for it to look at gradients itself.
    compiled : bool
        Whether kernels can, NumPy's structures being the known ones.
    """

    def __init__(self, states: Sequence[ParamState], labels: Sequence[str], rows: Rows) -> None:
        self._states, self._labels, self._rows = states, labels, rows
        arrays = all_arrays(states)
        self._memory = Memory.of(arrays, address)
        # NumPy refuses to resize, and so to move, an array that has a weak reference.
        self._pins = [weakref.ref(array) for array in arrays.values()]
        # Any array of ours has the shape and the memory order that the parameter had.
        models = [next(iter(state.own.values())) for state in states]
        self._seen, self._shapes = numpy_structs.new_seen(models)
        self._seen[:, field.OBJECT] = [id(state.param) for state in states]
        self._odd = np.zeros(len(states) + 1, dtype=np.int64)
        self.fields = {
            field.SEEN: address(self._seen),
            field.OWN_MEMORY: address(self._memory.blocks),
            field.OWN_COUNT: len(self._memory.blocks),
            field.NDARRAY: id(np.ndarray),
            field.NONE: id(None),
            field.ODD: address(self._odd),
        }
        self.compiled = bool(states) and numpy_structs.works()

    def take(self, context: int, grads: tuple[Any, ...], writable: bool) -> tuple[Any, ...]:
        """Check the gradients and note where they are.

        Returns them, with plain arrays in the place of what else can be read.
        ``context`` is the address of a `Context` that has `fields`.

        Raises
        ------
        TypeError, ValueError
            If one does not fit its parameter, shares memory, or is read-only
            where ``writable`` is asked for; if a parameter has become so.
        """
        if self.compiled and kernels.look_kernel()(context, id(grads), writable):
            return grads
        return self.take_unusual(context, grads, writable)

    def take_unusual(
        self, context: int, grads: tuple[Any, ...], writable: bool
    ) -> tuple[Any, ...]:
        """Do the same where a kernel has refused some, and has noted which.

        Only those are checked in Python: to say what is wrong, or that nothing is.
        """
        taken = list(grads)
        count = int(self._odd[0])
        odd: Any = self._odd[1 : count + 1].tolist() if self.compiled else range(len(taken))
        for k in odd:
            self._check_param(k)
            if grads[k] is not None:
                taken[k] = take_grad(grads[k], self._states[k].param, self._labels[k], writable)
        plain = tuple(taken)
        # All over again: what other libraries ran meanwhile may have moved what was looked at.
        if self.compiled and kernels.look_kernel()(context, id(plain), writable):
            return plain
        found = np.array([address(grad) for grad in plain], dtype=np.int64)
        sizes = [0 if grad is None else grad.nbytes for grad in plain]
        self._memory.check_apart(self._labels, found, np.array(sizes, dtype=np.int64))
        if self.compiled:
            raise RuntimeError("params and grads must not change while a step looks at them")
        self._rows.table[:, layout.GRAD] = found
        return plain

    def _check_param(self, k: int) -> None:
        state = self._states[k]
        param = state.param
        check_param(param, state.label)
        now = address(param), param.shape, dtype_mark(param.dtype)
        then = self._rows.table[k, layout.PARAM], state.shape, self._seen[k, field.DTYPE_MARK]
        if now != then:
            raise ValueError(
                f"{state.label} must keep the memory, the shape and the dtype that it had"
                f" when the optimizer was made"
            )

    def nonfinite_message(self, grads: tuple[Any, ...], factor: float) -> str | None:
        """Return a message on the first element that, times a factor, is not finite."""
        return nonfinite_message(zip(grads, self._labels, strict=True), factor)
