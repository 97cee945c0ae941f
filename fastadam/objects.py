"""Objects with ``.data`` and ``.grad``: scalars of a hand-written autograd, or arrays."""

import math
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from .adam import Adam
from .adapter import Adapter
from .params.checks import as_float, is_real
from .params.names import Absent, check_attribute, check_keywords
from .params.types import Nonfinite
from .runtime import Unchanged, register_after_fork, signals_deferred
from .update.result import StepResult

__all__ = ["ObjectAdam", "from_objects"]

_T = TypeVar("_T")

# The constructor's options that no state_dict holds.
_KEPT = ("amsgrad", "schedule", "max_grad_norm", "nonfinite", "ema_decay")


def __dir__() -> list[str]:
    return sorted(__all__)


class _Forwarded(Generic[_T]):
    """An attribute of the optimizer inside, to be read and set from outside."""

    def __set_name__(self, _: type, name: str) -> None:
        self._name, self.__doc__ = name, getattr(Adam, name).__doc__

    def __get__(self, opt: "ObjectAdam | None", _: type | None = None) -> _T:
        return self if opt is None else getattr(opt.optimizer, self._name)  # type: ignore[return-value]

    def __set__(self, opt: "ObjectAdam", value: _T) -> None:
        setattr(opt.optimizer, self._name, value)


class ObjectAdam(Adapter):
    """Adam over objects that carry their value and their gradient.

    Made by `from_objects`. ``optimizer`` is the `Adam` underneath.

    Examples
    --------
    >>> import fastadam
    >>> class Value:
    ...     def __init__(self, data):
    ...         self.data, self.grad = data, 0.0
    >>> x = Value(3.0)
    >>> opt = fastadam.from_objects([x], lr=0.1)
    >>> x.grad = 2 * x.data
    >>> opt.step()
    StepResult(step=0, lr=0.1, grad_norm=None, skipped=False)
    >>> round(x.data, 6), x.grad
    (2.9, 0.0)
    """

    optimizer: Adam

    if not TYPE_CHECKING:  # as in `Adam`

        def __setattr__(self, name: str, value: Any) -> None:
            if type(self) is ObjectAdam:
                check_attribute(ObjectAdam, name)
            super().__setattr__(name, value)

        zero_grad = Absent("step() resets every .grad to 0")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        **options: Any,
    ) -> None:
        super().__init__()
        if isinstance(params, Mapping | str | bytes) or not isinstance(params, Iterable):
            raise TypeError(
                f"params must be a sequence of objects with .data and .grad, got"
                f" {type(params).__qualname__}"
            )
        self._objects = list(params)
        first_seen: dict[int, int] = {}
        for k, thing in enumerate(self._objects):
            if not (hasattr(thing, "data") and hasattr(thing, "grad")):
                raise TypeError(
                    f"params[{k}] must have .data and .grad, got {type(thing).__qualname__}"
                )
            if first_seen.setdefault(id(thing), k) != k:
                raise ValueError(
                    f"params[{first_seen[id(thing)]}] and params[{k}] must be different objects"
                )
            try:
                thing.data, thing.grad = thing.data, thing.grad
            except (AttributeError, TypeError) as error:
                raise TypeError(f"params[{k}] must let .data and .grad be set, {error}") from None
        # Objects by place: numbers, of which each is a parameter of its own, since one without a
        # gradient this time keeps its own step count; and arrays.
        self._numbers = {
            k: thing
            for k, thing in enumerate(self._objects)
            if not isinstance(thing.data, np.ndarray)
        }
        self._arrays = {
            k: thing.data for k, thing in enumerate(self._objects) if k not in self._numbers
        }
        # The numbers and their gradients, in two arrays of float64, seen one by one.
        self._values = np.zeros(len(self._numbers))
        self._slopes = np.zeros(len(self._numbers))
        self._slope_of = dict(zip(self._numbers, _each(self._slopes), strict=True))
        self._pull()
        # The gradients of a step under way, and the count of steps before it.
        self._under_way: tuple[list[Any], int] | None = None
        register_after_fork(self)
        params = dict(zip(self._numbers, _each(self._values), strict=True)) | self._arrays
        self.optimizer = Adam([params[k] for k in range(len(params))], lr, betas, eps, **options)

    def _after_fork(self) -> None:
        """Be usable in a forked child, where a step that was under way does not go on.

        If another thread forked between the update of the arrays and that of the
        objects, write the objects here.
        """
        self._lock = threading.Lock()
        if self._under_way is not None:
            (grads, before), self._under_way = self._under_way, None
            if self.optimizer.step_count != before:
                self._write_step(grads)

    def step(self, *, grad_scale: float = 1.0) -> StepResult:
        """Read every ``.grad``, update every ``.data``, reset every ``.grad`` to 0.

        A scalar gets a new float as ``.data``; an array is updated in place,
        and its gradient zeroed in place. None leaves an object as it is.

        Parameters
        ----------
        grad_scale : float
            What the gradients had been multiplied by, > 0.

        Returns
        -------
        StepResult
            As `Adam.step`. After a skipped step too, gradients are reset.

        Raises
        ------
        TypeError, ValueError, FloatingPointError
            For a value or gradient of the wrong kind, or one that is not
            finite where that is refused, as `Adam.step`; if every ``.grad`` is
            None. No object has then been changed.
        RuntimeError
            If a step is under way, in another thread.

        Notes
        -----
        Ctrl-C waits for the end of the step. If an object's ``.data`` or ``.grad``
        cannot be set, all others are set before the error is raised.
        """
        with self._turn():
            self._read_numbers()
            grads = self._read_grads()
            # The user's own code, before signals are deferred.
            schedule, count = self.optimizer.schedule, self.optimizer.step_count
            factor = None if schedule is None else schedule(count)
            with signals_deferred():
                self._under_way = grads, count
                try:
                    result = self.optimizer._step_scheduled(grads, factor, grad_scale)
                    self._write_step(grads, skipped=result.skipped)
                finally:
                    self._under_way = None
            return result

    def _write_step(self, grads: list[Any], *, skipped: bool = False) -> None:
        """Write what a step with these gradients has computed, and reset the gradients."""
        errors: list[BaseException] = []
        if not skipped:
            moved = [k for k in self._numbers if grads[k] is not None]
            self._write_numbers(moved, errors)
        for thing, grad in zip(self._objects, grads, strict=True):
            # An object's own array the step itself has set to 0.
            if grad is not None and thing.grad is not grad:
                try:
                    thing.grad = 0.0
                except BaseException as error:
                    errors.append(error)
        if errors:
            raise errors[0]

    def _write_numbers(self, places: Iterable[int], errors: list[BaseException]) -> None:
        """Set ``.data`` of numbers to their values; note what a property raises, and go on."""
        values = dict(zip(self._numbers, self._values.tolist(), strict=True))
        for k in places:
            try:
                self._objects[k].data = values[k]
            except BaseException as error:
                errors.append(error)

    def _check(self) -> None:
        """Check that the arrays are where they were."""
        for k in self._arrays:
            self._check_array(k)

    def _pull(self) -> None:
        """Do the same, and read the numbers."""
        self._check()
        self._read_numbers()

    def _read_numbers(self) -> None:
        values = [thing.data for thing in self._numbers.values()]
        for k, value in zip(self._numbers, values, strict=True):
            if type(value) is not float:
                _check_real(value, f"params[{k}].data", "a real number or a numpy.ndarray")
        self._values[:] = values

    def _push(self) -> None:
        """Set every number to its value in the optimizer; the arrays are the optimizer's own."""
        errors: list[BaseException] = []
        self._write_numbers(self._numbers, errors)
        if errors:
            raise errors[0]

    def _check_array(self, k: int) -> None:
        if self._objects[k].data is not self._arrays[k]:
            raise ValueError(
                f"params[{k}].data must stay the array it was when the optimizer was made,"
                f" updated in place, got another one"
            )

    def _read_grads(self) -> list[npt.NDArray[Any] | None]:
        """Return the gradients as arrays, None where there is none."""
        grads = [thing.grad for thing in self._objects]
        slopes = []
        for k, slope in self._slope_of.items():
            grad = grads[k]
            if grad is None:
                slopes.append(0.0)
                continue
            if type(grad) is not float:
                _check_real(grad, f"params[{k}].grad", "a real number or None")
            slopes.append(grad)
            grads[k] = slope
        self._slopes[:] = slopes
        for k, array in self._arrays.items():
            grad = grads[k]
            if grad is not None:
                self._check_array(k)
            if grad is not None and not isinstance(grad, np.ndarray):
                # A gradient reset to the number 0, and nothing added to it since.
                _check_real(grad, f"params[{k}].grad", "a numpy.ndarray, a real number or None")
                with np.errstate(all="ignore"):  # infinite, if float32 has no such number
                    grads[k] = np.full_like(array, grad, subok=False)
        return grads

    @property
    def step_count(self) -> int:
        """Steps taken so far, without those skipped."""
        return self.optimizer.step_count

    lr = _Forwarded[float]()
    schedule = _Forwarded[Callable[[int], float] | None]()
    max_grad_norm = _Forwarded[float | None]()
    nonfinite = _Forwarded[Nonfinite]()
    num_threads = _Forwarded[int | None]()

    @property
    def param_groups(self) -> tuple[dict[str, Any], ...]:
        """The hyperparameters, as in `Adam.param_groups`."""
        return self.optimizer.param_groups

    @property
    def ema_params(self) -> list[Any]:
        """The averages of the objects' ``.data``, floats or live arrays, as `Adam.ema_params`."""
        averages = list(self.optimizer.ema_params)
        for k in self._numbers:
            averages[k] = float(averages[k])
        return averages

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of the state, by place, as `Adam.state_dict`."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over such a state, as `Adam.load_state_dict`."""
        self.optimizer.load_state_dict(state_dict)

    def _version(self) -> tuple[Any, ...]:
        """Return what is another one after each step and load; raise in the middle of one."""
        self._turn()
        return self.optimizer._version()

    def _copies(self, memo: Mapping[int, Any]) -> Iterable[tuple[Any, Any]]:
        """Return the objects' values, and what `copy.deepcopy` has made of them."""
        copied = [k for k, thing in enumerate(self._objects) if id(thing) in memo]
        kind = [float if k in self._numbers else np.asarray for k in copied]
        pairs = [(self._objects[k], memo[id(self._objects[k])]) for k in copied]
        return [
            (make(thing.data), make(twin.data))
            for make, (thing, twin) in zip(kind, pairs, strict=True)
        ]

    def __getstate__(self) -> dict[str, Any]:
        """Keep the objects and the state; the arrays are made anew, as views of their own."""
        unchanged = Unchanged(self)
        optimizer = self.optimizer
        return {
            "objects": self._objects,
            "options": {
                **{name: getattr(optimizer, name) for name in _KEPT},
                "num_threads": optimizer._num_threads,
            },
            "state": optimizer._export_state(),
            "unchanged": unchanged,  # to be copied last
        }

    def __setstate__(self, kept: dict[str, Any]) -> None:
        """Bind the copied objects."""
        ObjectAdam.__init__(self, kept["objects"], **kept["options"])
        self.load_state_dict(kept["state"])

    def __copy__(self) -> "ObjectAdam":
        raise TypeError("copy.copy would share the objects: use copy.deepcopy")

    def __repr__(self) -> str:
        return f"from_objects({self.optimizer!r})"


def _each(array: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
    """Return the elements of an array as arrays without dimensions, over the same memory."""
    return [array[k : k + 1].reshape(()) for k in range(array.size)]


def _check_real(value: Any, label: str, rule: str) -> None:
    if not is_real(value):
        raise TypeError(f"{label} must be {rule}, got {value!r:.60}")
    if not isinstance(value, float | np.floating) and math.isinf(as_float(value)):
        raise ValueError(f"{label} must fit a float, got an integer of more digits")


@check_keywords(like=Adam)
def from_objects(
    params: Iterable[Any],
    lr: float = 1e-2,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    **options: Any,
) -> ObjectAdam:
    """Return an optimizer over objects with ``.data`` and ``.grad``.

    Its ``step()`` takes no gradients: it reads each object's ``.grad``,
    writes its ``.data`` and resets ``.grad`` to 0.

    Parameters
    ----------
    params : iterable of objects
        Each with ``.data``, a real number (computed with in float64) or a
        NumPy array of float32 or float64 (updated in place), and ``.grad``,
        of the same kind, or None. All are one group, known by their places.
    lr, betas, eps, **options
        As in `Adam`.

    Returns
    -------
    ObjectAdam
        With ``step()``, ``step_count``, ``lr``, ``schedule``,
        ``param_groups``, ``ema_params``, ``state_dict()``,
        ``load_state_dict()``.

    Raises
    ------
    TypeError
        If an object lacks ``.data`` or ``.grad``, or they are of no such kind.
    ValueError
        If an object comes twice, or a hyperparameter is out of range.

    Examples
    --------
    >>> import fastadam
    >>> class Value:
    ...     def __init__(self, data):
    ...         self.data, self.grad = data, 0.0
    >>> params = [Value(1.0), Value(-2.0)]
    >>> schedule = fastadam.schedules.cosine(100)
    >>> opt = fastadam.from_objects(params, lr=0.1, schedule=schedule)
    >>> for step in range(100):
    ...     for p in params:
    ...         p.grad += 2 * p.data
    ...     result = opt.step()
    >>> all(abs(p.data) < 0.1 for p in params)
    True
    """
    return ObjectAdam(params, lr, betas, eps, **options)
