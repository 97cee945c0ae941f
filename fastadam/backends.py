"""Where parameters may live, and what each such place must offer."""

import functools
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from .runtime import alone, undisturbed
from .update.result import StepResult


class Plan(Protocol):
    """What takes steps: the tables of one optimizer, made anew when a group is added.

    It is made of the states, the names of their gradients, the steps that each has
    had, the steps of the optimizer, and the scalars, which it reads in every step.
    """

    steps: npt.NDArray[np.int64]
    step_count: Any  # indexed by 0: the steps taken
    dtypes: list[np.dtype[Any]]

    def step(self, grads: tuple[Any, ...], zero_grad: bool) -> int:
        """Take a step; return its number."""

    def counting(self, steps: npt.NDArray[np.int64], step_count: int) -> list[tuple[Any, ...]]:
        """Return calls, as function and arguments, that set all counts of steps."""

    def choose_kernels(self) -> None:
        """Have other kernels looked for, in a forked child."""

    def limited_step(
        self,
        grads: tuple[Any, ...],
        zero_grad: bool,
        lr: float,
        max_grad_norm: float | None,
        nonfinite: str,
    ) -> StepResult:
        """Take a step for which the norm of the gradients is asked."""

    def prepare_replay(self, max_grad_norm: float | None, nonfinite: str) -> None:
        """Bring hyperparameters up to date for a captured step."""

    def rehearsals(self, nonfinite: str | None) -> list[tuple[Any, tuple[Any, ...]]]:
        """Return calls that compile the kernels of all steps; None where no norm is asked for."""


class Backend(Protocol):
    """The module of a place where arrays live: `_host`, or `_cuda_host` for CUDA devices."""

    Plan: Any
    Scalars: Any

    def take_param(self, array: Any, label: str) -> Any:
        """Check a parameter; return what stands for it: dtype, shape, size, nbytes."""

    def allocate(self, likes: Sequence[Any]) -> list[Any]:
        """Return zeros in the shape, dtype and memory order of each."""

    def assign(self, target: Any, source: Any) -> None:
        """Write what another array holds, this backend's or a NumPy array."""

    def writing(self, targets: list[Any], sources: list[Any]) -> Iterable[tuple[Any, ...]]:
        """Return calls, as function and arguments, that write NumPy arrays into these.

        A second go through them writes what is left, or all again.
        """

    def to_host(self, array: Any) -> npt.NDArray[Any]:
        """Return a copy as a NumPy array of the same memory order."""

    def check_copyable(self) -> None:
        """Refuse to copy or pickle an optimizer, where its arrays cannot be."""


# What an array has, that lives on a device or is another library's.
_INTERFACES = ("__cuda_array_interface__", "data_ptr", "__dlpack_device__", "__cuda_ndarray__")


def is_array(thing: Any) -> bool:
    """Whether something is one array, NumPy's or another library's, rather than many."""
    if isinstance(thing, np.ndarray):
        return True
    kind = type(thing)  # since an attribute of the thing itself may raise
    return any(hasattr(kind, name) for name in _INTERFACES)


def on_device(array: Any) -> bool:
    """Whether an array is on a CUDA device, told without what CUDA needs."""
    if isinstance(array, np.ndarray | np.generic) or not is_array(array):
        return False
    library = type(array).__module__.partition(".")[0]
    if library in ("jax", "jaxlib"):
        return False  # immutable, wherever it lies: the host's check says so
    if hasattr(type(array), "data_ptr"):
        return bool(getattr(array, "is_cuda", False))
    if hasattr(type(array), "__cuda_array_interface__"):
        return True
    if hasattr(type(array), "__dlpack_device__"):
        return int(array.__dlpack_device__()[0]) in (2, 13)  # kDLCUDA, kDLCUDAManaged
    return hasattr(type(array), "__cuda_ndarray__")  # as the CUDA simulator's arrays have alone


def of(array: Any) -> Backend:
    """Return the backend of the place where an array lives.

    Raises
    ------
    ImportError
        If it is a CUDA device, and what that needs is not installed.
    """
    return _imported(on_device(array))


@functools.cache
def _imported(device: bool) -> Backend:
    """Import a backend, and Numba with it, when it is first needed: that takes a while.

    A fork waits for it, since a child could never end what a thread of its parent
    has begun to import; and Ctrl-C, since Numba cannot be imported a second time.
    """
    backend: Any
    with alone, undisturbed():
        if device:
            from .cuda import backend
        else:
            from .cpu import backend
    return backend  # type: ignore[no-any-return]


def check_together(param: Any, label: str, first: Any, first_label: str) -> None:
    """Refuse two parameters that live in different places.

    Raises
    ------
    ValueError
        If they do.
    """
    places = [_place(each) for each in (param, first)]
    # An empty array may lie on any device.
    if places[0] != places[1] and (None in places or -1 not in places):
        names = [
            "in the host's memory" if at is None else f"on CUDA device {max(at, 0)}"
            for at in places
        ]
        raise ValueError(f"{label} must be {names[1]}, as {first_label} is, got one {names[0]}")


def _place(param: Any) -> int | None:
    """Return the number of a parameter's device, None for the host."""
    device: int | None = param.device if on_device(param) else None
    return device


def seen(value: Any) -> Any:
    """Return something with the shape and the dtype, NumPy's, of an array, wherever it lives.

    Raises
    ------
    TypeError, ValueError
        If it is no array that could be state.
    """
    return of(value).take_param(value, "array") if on_device(value) else np.asarray(value)


def as_host(value: Any) -> npt.NDArray[Any]:
    """Return an array, wherever it lives, as NumPy's."""
    return of(value).to_host(value) if on_device(value) else np.asarray(value)
