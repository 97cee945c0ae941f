"""What is known of the gradients on a CUDA device, so that little is asked in every step."""

import functools
import sys
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
from numba import types

from ..cpu import intrinsics, numpy_structs
from ..params.arrays import address, check_alike
from ..params.memory import Memory
from ..state.param_state import ParamState, all_arrays
from ..update.limits import nonfinite_message
from .arrays import (
    OWN,
    DeviceArray,
    current_stream,
    glance,
    has_data_ptr,
    place_of,
    stream_key,
    stream_source,
    view,
)


@functools.cache
def _are_the_same() -> Any:
    return intrinsics.kernel(numpy_structs.are_the_same, (types.int64,) * 4)


@functools.cache
def _all_of(count: int) -> list[int]:
    return list(range(count))


def lie_at(tensors: list[Any], places: list[int]) -> bool:
    """Whether torch's tensors lie where they did."""
    torch = sys.modules.get("torch")
    at_once = getattr(getattr(torch, "_C", None), "_tensors_data_ptrs_at_indices_equal", None)
    if at_once is not None:  # only builds for CUDA have it
        return bool(at_once(tensors, places, _all_of(len(places))))
    return [tensor.data_ptr() for tensor in tensors] == places


class Gradients:
    """Where the gradients of the last step lay, and what told so.

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
        its own, what tells that stream.
    """

    def __init__(self, states: Sequence[ParamState], labels: Sequence[str]) -> None:
        self._states, self._labels = states, labels
        self._memory = Memory.of(all_arrays(states), place_of)
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
        # For each: what was told of it beside its address, when it was found to fit.
        self._traits: list[Any] = [None] * len(params)
        self._writable = False
        self._references: list[Any] = []
        self._reference_ids = np.zeros(len(params), dtype=np.int64)
        self._references_at = address(self._reference_ids)
        self._tensors: list[int] = []
        self._tensor_places: list[int] = []

    def take(self, grads: tuple[Any, ...], writable: bool) -> None:
        """Check the gradients, unless they are the last step's and lie where they lay.

        Raises
        ------
        TypeError, ValueError
            If one does not fit its parameter, or shares memory; if a parameter has
            been moved. Nothing is then remembered of them.
        """
        self._check_params()
        if not (self._writable or not writable) or not self._are_known(grads):
            self._look(grads, writable)

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

    def current_stream(self) -> int:
        """Return the stream on which the first parameter's library works now."""
        return current_stream(self._params[0])

    def nonfinite_message(self, grads: tuple[Any, ...], factor: float) -> str | None:
        """Return a message on the first element that, times a factor, is not finite."""
        for grad, label in zip(grads, self._labels, strict=True):
            if grad is not None:
                on_host = view(grad, label, writable=False).copy_to_host()
                message = nonfinite_message(on_host, label, factor)
                if message is not None:
                    return message
        return None

    def _are_known(self, grads: tuple[Any, ...]) -> bool:
        if not self._references or not numpy_structs.references_work():
            return False
        if not _are_the_same()(id(grads), self._references_at, len(grads), id(None)):
            return False
        # Not kept between steps, since that would keep their memory.
        tensors = [grads[k] for k in self._tensors]
        return not tensors or lie_at(tensors, self._tensor_places)

    def _look(self, grads: tuple[Any, ...], writable: bool) -> None:
        places = np.zeros_like(self.places)
        traits: list[Any] = [None] * len(grads)
        visitors = dict(self._visiting_params)
        known = self._traits if self._writable or not writable else traits
        for k, grad in enumerate(grads):
            if grad is None:
                continue
            place, trait = glance(grad)
            whole = place % self._params[k].dtype.itemsize == 0 and (place or not self._nbytes[k])
            if trait is None or trait != known[k] or not whole:
                found = self._view(k, grad, writable)
                place, key = found.address, stream_key(found)
                if key not in (self._own_key, OWN):
                    visitors.setdefault(key, stream_source(found))
                    trait = None  # to be found again, by the same way, in the next step
            # An empty array may lie at 0, which stands for None.
            places[k], traits[k] = place or 1, trait
        if not np.array_equal(places, self.places):
            present = places != 0
            self._memory.check_apart(self._labels, places, np.where(present, self._nbytes, 0))
        self._remember(grads, places, traits, writable)
        self.visitors = list(visitors.values())

    def _remember(
        self, grads: tuple[Any, ...], places: Any, traits: list[Any], writable: bool
    ) -> None:
        self._references = []  # until all the rest is of these gradients
        self.places, self._traits, self._writable = places, traits, writable
        self._tensors = [k for k, grad in enumerate(grads) if has_data_ptr(grad)]
        self._tensor_places = [grads[k].data_ptr() for k in self._tensors]
        try:
            references = [None if grad is None else weakref.ref(grad) for grad in grads]
        except TypeError:  # some objects take no weak references: they are looked at each time
            return
        self._reference_ids[:] = [0 if each is None else id(each) for each in references]
        self._references = references

    def _view(self, k: int, grad: Any, writable: bool) -> DeviceArray:
        label, param = self._labels[k], self._params[k]
        found = view(grad, label, writable=writable)
        check_alike(found, param, label)
        if found.order != param.order:
            names = {"C": "C", "F": "Fortran"}
            raise ValueError(
                f"{label} must be laid out in {names[param.order]} order, as its parameter is, got"
                f" {names[found.order]} order"
            )
        if found.size and found.device != param.device:
            raise ValueError(
                f"{label} must be on CUDA device {param.device}, as its parameter is, got device"
                f" {found.device}"
            )
        return found
