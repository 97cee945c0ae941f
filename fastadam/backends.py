"""Where parameters may live, what each such place must offer, and the choice between them."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from .params.kinds import on_device
from .runtime import kernel_lock, signals_deferred
from .state.param_state import ParamState
from .update.result import StepResult
from .update.scalars import Scalars
from .update.settings import Groups, Settings


class Stepper(Protocol):
    """Takes the steps of one optimizer; made anew when a group is added.

    There are two: `cpu.stepper.Stepper` and `cuda.stepper.Stepper`.
    """

    steps: npt.NDArray[np.int64]
    """Steps that each parameter has had, in the order of the parameters."""

    @property
    def num_threads(self) -> int | None:
        """At most so many threads take a step; None on a device."""

    @property
    def step_count(self) -> Any:
        """Steps of the optimizer: an array of one, or what gives one number by ``[0]``."""

    @property
    def dtypes(self) -> list[np.dtype[Any]]:
        """The parameters' dtypes, each once."""

    def step(self, grads: tuple[Any, ...], zero_grad: bool) -> int:
        """Take a step, with a gradient or None for each parameter; return its number."""

    def limited_step(
        self,
        grads: tuple[Any, ...],
        zero_grad: bool,
        max_grad_norm: float | None,
        nonfinite: str,
    ) -> StepResult:
        """Take a step for which the norm of the gradients is needed."""

    def set_num_threads(self, asked: int | None) -> None:
        """Let steps take so many threads, None for the default; do nothing on a device."""

    def choose_kernels(self) -> None:
        """Have other kernels looked for, in a forked child."""

    def prepare_replay(self, max_grad_norm: float | None, nonfinite: str) -> None:
        """Bring hyperparameters up to date for a captured step."""

    def compilations(self, nonfinite: str | None) -> list[Callable[[], object]]:
        """Return calls that each make ready a kernel of the steps to come.

        ``nonfinite`` is None where no norm is asked for.
        """


class ListStepper(Protocol):
    """Takes steps of arrays that come with each of them, as long as they are the same.

    They are given as a tuple: for parameters, gradients and each of `state.roles.ROLES` a
    tuple of arrays, or None; then the array of step counts.
    """

    def set_num_threads(self, asked: int | None) -> None:
        """Let steps take so many threads, None for the default; do nothing on a device."""

    def fit(self, given: tuple[Any, ...], writable: bool) -> bool:
        """Note where gradients and counts lie, if all else is as it was; say whether."""

    def step(self, grads: tuple[Any, ...], zero_grad: bool) -> int:
        """Take a step with what has been noted last."""

    def limited_step(
        self,
        grads: tuple[Any, ...],
        zero_grad: bool,
        max_grad_norm: float | None,
        nonfinite: str,
    ) -> StepResult:
        """Take a step for which the norm of the gradients is needed."""


class Backend(Protocol):
    """The module of a place where arrays are: `cpu.backend`, or `cuda.backend`.

    Arrays are NumPy's in the one, and `cuda.arrays.DeviceArray` in the other.
    """

    def take_param(self, array: Any, label: str) -> Any:
        """Check a parameter; return what stands for it: dtype, shape, size, nbytes."""

    def allocate(self, likes: Sequence[Any]) -> list[Any]:
        """Return zeros in the shape, dtype and memory order of each."""

    def assign(self, target: Any, source: Any) -> None:
        """Write what another array holds, this backend's or a NumPy array."""

    def to_host(self, array: Any) -> npt.NDArray[Any]:
        """Return a copy as a NumPy array of the same memory order."""

    def check_copyable(self) -> None:
        """Refuse to copy or pickle an optimizer, where its arrays cannot be."""

    def make_stepper(
        self,
        states: Sequence[ParamState],
        labels: Sequence[str],
        steps: npt.NDArray[np.int64],
        step_count: int,
        scalars: Scalars,
    ) -> Stepper:
        """Return what takes the steps of these parameters.

        ``labels`` is what their gradients are called in messages, ``steps`` how many steps
        each has had.
        """

    def find_tables(self, given: tuple[Any, ...]) -> int:
        """Return a number made of where the parameters lie; 0 if lists must be taken first."""

    def take_lists(self, given: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return the same with what stands for each array in this backend."""

    def make_list_stepper(
        self, given: tuple[Any, ...], writable: bool, groups: Groups
    ) -> tuple[ListStepper, Settings]:
        """Return what takes steps of such arrays, and its hyperparameters."""


def of(params: Sequence[Any]) -> Backend:
    """Return the backend of the place where parameters live: where the first does.

    Raises
    ------
    ImportError
        If it is a CUDA device, and what that needs is not installed.
    """
    return _imported(bool(params) and on_device(params[0]))


@functools.cache
def host() -> Backend:
    """Return the backend of NumPy's arrays."""
    return _imported(False)


@functools.cache
def _imported(device: bool) -> Backend:
    """Import a backend, and Numba with it, when it is first needed: that takes a while.

    A fork waits for it, since a child could never end what a thread of its parent
    has begun to import; and Ctrl-C, since Numba cannot be imported a second time.
    """
    with kernel_lock, signals_deferred():
        if device:
            from .cuda import backend as cuda_backend

            return cuda_backend
        from .cpu import backend as cpu_backend

        return cpu_backend


def as_array(value: Any) -> Any:
    """Return something with the shape and the NumPy dtype of an array, wherever it lives.

    Raises
    ------
    TypeError, ValueError
        If it is no array that could be state.
    """
    return of([value]).take_param(value, "array") if on_device(value) else np.asarray(value)


def as_host(value: Any) -> npt.NDArray[Any]:
    """Return an array, wherever it lives, as NumPy's."""
    return of([value]).to_host(value) if on_device(value) else np.asarray(value)
