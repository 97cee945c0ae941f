"""The gradients of a step on a CUDA device: each is checked, and its address noted."""

import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..params.arrays import check_alike
from ..params.memory import Memory
from ..state.param_state import ParamState, all_arrays
from ..update.limits import nonfinite_message
from .arrays import (
    OWN,
    DeviceArray,
    address,
    current_stream,
    has_data_ptr,
    place_and_layout,
    stream_key,
    stream_source,
    view,
)

_ORDERS = {"C": "C", "F": "Fortran"}


def lie_at(tensors: list[Any], places: list[int]) -> bool:
    """Whether torch's tensors lie where they did."""
    torch = sys.modules.get("torch")
    at_once = getattr(getattr(torch, "_C", None), "_tensors_data_ptrs_at_indices_equal", None)
    if at_once is not None:  # only builds for CUDA have it
        return bool(at_once(tensors, places, list(range(len(places)))))
    return [tensor.data_ptr() for tensor in tensors] == places


class _Known(NamedTuple):
    """What is known of a gradient that fits, and of the next one if it is alike.

    ``mark`` is its layout; or, where that takes long to find out, a weak reference to it: the
    same object has the same memory. ``key`` and ``source`` are its `stream_key` and
    `stream_source`.
    """

    mark: Any
    writable: bool
    key: Any
    source: Callable[[], int | None]


class Gradients:
    """Checks the gradients of each step, and knows where they are.

    Parameters
    ----------
    states : sequence of ParamState
        The parameters that they must fit.
    labels : sequence of str
        What each gradient is called in messages.

    Raises
    ------
    ValueError
        If parameters share memory.

    Attributes
    ----------
    places : int64 array
        The address of each, 0 for None.
    visitors : list of callable
        For each library, other than the first parameter's, that has a stream of
        its own, what returns that stream.
    """

    def __init__(self, states: Sequence[ParamState], labels: Sequence[str]) -> None:
        self._states, self._labels = states, labels
        self._memory = Memory.of(all_arrays(states), address)
        self._params: list[DeviceArray] = [state.param for state in states]
        params = self._params
        owners = [param.owner for param in params]
        self._tensor_params = [owner for owner in owners if has_data_ptr(owner)]
        self._tensor_param_places = [tensor.data_ptr() for tensor in self._tensor_params]
        self.places = np.zeros(len(params), dtype=np.int64)
        self._nbytes = np.array([param.nbytes for param in params], dtype=np.int64)
        self._own_key = stream_key(params[0])
        self._visiting_params = {stream_key(param): stream_source(param) for param in params}
        del self._visiting_params[self._own_key]
        self.visitors = list(self._visiting_params.values())
        self._known: list[_Known | None] = [None] * len(params)

    def take(self, grads: tuple[Any, ...], writable: bool) -> None:
        """Check the gradients, and note where they are.

        What fits as the last step's did is not looked at in detail: tensors and arrays of
        our own where their layout is the same, others where they are the same objects.

        Raises
        ------
        TypeError, ValueError
            If one does not fit its parameter, or shares memory; if a parameter has
            been moved. Nothing is then remembered of them.
        """
        self._check_params()
        places = np.zeros_like(self.places)
        known: list[_Known | None] = [None] * len(grads)
        visitors = dict(self._visiting_params)
        for k, grad in enumerate(grads):
            if grad is None:
                continue
            place, layout = place_and_layout(grad)
            if layout is None:
                place = int(self.places[k])
            last = self._known[k]
            if not (
                last is not None
                and (last.writable or not writable)
                and (_is_same(last.mark, grad) if layout is None else last.mark == layout)
                and self._has_memory(k, place)
            ):
                found = self._view(k, grad, writable)
                place, mark = found.address, layout or _reference(grad)
                last = _Known(mark, writable, stream_key(found), stream_source(found))
            known[k] = last
            places[k] = place or 1  # an empty array may lie at 0, which stands for None
            if last.key not in (self._own_key, OWN):
                visitors.setdefault(last.key, last.source)
        if not np.array_equal(places, self.places):
            self._memory.check_apart(self._labels, places, np.where(places != 0, self._nbytes, 0))
        self.places, self._known = places, known
        self.visitors = list(visitors.values())

    def _check_params(self) -> None:
        """Refuse a parameter that lies elsewhere now, as a tensor can."""
        if not self._tensor_params or lie_at(self._tensor_params, self._tensor_param_places):
            return
        for state in self._states:
            param = state.param
            if has_data_ptr(param.owner) and param.owner.data_ptr() != param.address:
                raise ValueError(
                    f"{state.label} must keep the memory that it had when the optimizer was made"
                )

    def _has_memory(self, k: int, place: int) -> bool:
        aligned = place % self._params[k].dtype.itemsize == 0
        return aligned and (place != 0 or not self._params[k].size)

    def _view(self, k: int, grad: Any, writable: bool) -> DeviceArray:
        label, param = self._labels[k], self._params[k]
        found = view(grad, label, writable=writable)
        check_alike(found, param, label)
        if found.order != param.order:
            raise ValueError(
                f"{label} must be laid out in {_ORDERS[param.order]} order, as its parameter is,"
                f" got {_ORDERS[found.order]} order"
            )
        if found.size and found.device != param.device:
            raise ValueError(
                f"{label} must be on CUDA device {param.device}, as its parameter is, got device"
                f" {found.device}"
            )
        return found

    def current_stream(self) -> int:
        """Return the stream on which the first parameter's library works now."""
        return current_stream(self._params[0])

    def nonfinite_message(self, grads: tuple[Any, ...], factor: float) -> str | None:
        """Return a message on the first element that, times a factor, is not finite."""
        on_host = (
            (view(grad, label, writable=False).copy_to_host(), label)
            for grad, label in zip(grads, self._labels, strict=True)
            if grad is not None
        )
        return nonfinite_message(on_host, factor)


def _reference(array: Any) -> Any:
    """Return a weak reference, which keeps no memory; None where an object takes none."""
    try:
        return weakref.ref(array)
    except TypeError:
        return None


def _is_same(reference: Any, array: Any) -> bool:
    return isinstance(reference, weakref.ref) and reference() is array
