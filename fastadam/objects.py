"""Objects with ``.data`` and ``.grad``: scalars of a hand-written autograd, or arrays."""

import math
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, compress, repeat, starmap
from operator import call
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .adam import Adam, take_turn
from .params.checks import as_float, is_real
from .params.names import Absent, check_attribute, check_keywords
from .params.types import Nonfinite
from .runtime import Unchanged, each_alone, register
from .update.result import StepResult

__all__ = ["ObjectAdam", "from_objects"]

_drain = deque[Any](maxlen=0).extend

# The constructor's options that no state_dict holds.
_KEPT = ("amsgrad", "schedule", "max_grad_norm", "nonfinite", "ema_decay")


def __dir__() -> list[str]:
    return sorted(__all__)


class ObjectAdam:
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
        if isinstance(params, Mapping | str | bytes) or not isinstance(params, Iterable):
            raise TypeError(
                f"params must be a sequence of objects with .data and .grad, got"
                f" {type(params).__qualname__}"
            )
        self._objects = list(params)
        self._scalars: list[int] = []
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
            if not isinstance(thing.data, np.ndarray):
                self._scalars.append(k)
        # All the scalars lie in one array of float64, each a parameter of its own:
        # one without a gradient this time keeps its own step count.
        self._values = np.zeros(len(self._scalars))
        self._slopes = np.zeros(len(self._scalars))
        self._arrays: list[npt.NDArray[Any]] = [thing.data for thing in self._objects]
        self._grads: list[npt.NDArray[Any] | None] = [None] * len(self._objects)
        self._views = {}
        for place, k in enumerate(self._scalars):
            self._arrays[k] = self._values[place : place + 1].reshape(())
            self._views[k] = self._slopes[place : place + 1].reshape(())
        self._read_values()
        self._lock = threading.Lock()
        # Of a step under way: the count of steps, what it was before, what is to be written.
        # (A list, since each step writes to it, which `__setattr__` would make slow.)
        self._unwritten: list[tuple[Any, int, Iterator[Any]]] = []
        register(self)
        self.optimizer = Adam(self._arrays, lr, betas, eps, **options)

    def _after_fork(self) -> None:
        """Be usable in a forked child: no thread that was in a step is there to end it."""
        self._lock = threading.Lock()
        for count, before, writes in self._unwritten:
            if count[0] != before:
                _drain(writes)
        del self._unwritten[:]

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
        Ctrl-C, and an object whose ``.data`` cannot be set, leave the other
        objects and the optimizer's state those of one step.
        """
        with take_turn(self._lock):
            self._read_values()
            grads = [self._read_grad(k, thing) for k, thing in enumerate(self._objects)]
            count = self.optimizer._stepper.step_count
            before = count[0]
            # Ready before the step: no signal's handler runs between it and their being made.
            writes = starmap(call, self._writes(grads))
            self._unwritten[:] = [(count, before, writes)]  # no call: no signal comes in between
            try:
                result = self.optimizer.step(grads, grad_scale=grad_scale, zero_grad=True)
            finally:
                if count[0] != before:
                    try:
                        _drain(writes)
                    except BaseException:  # in a property of the user's, from it or from a signal
                        each_alone(self._writes(grads))
                        del self._unwritten[:]
                        raise
                del self._unwritten[:]
            if result.skipped:
                _drain(starmap(call, self._resets(grads)))
            return result

    def _writes(self, grads: Sequence[Any]) -> Iterator[tuple[Any, ...]]:
        """Return what a step will write to objects: iterators in C, read when it is done."""
        chosen = [grads[k] is not None for k in self._scalars]
        return chain(compress(self._value_writes(), chosen), self._resets(grads))

    def _value_writes(self) -> Iterator[tuple[Any, ...]]:
        """Return calls that set the ``.data`` of all scalars to what will then be their values."""
        objects = [self._objects[k] for k in self._scalars]
        values = chain.from_iterable(map(call, [self._values.tolist]))
        return zip(repeat(setattr), objects, repeat("data"), values)

    def _resets(self, grads: Sequence[Any]) -> Iterator[tuple[Any, ...]]:
        things = [
            thing
            for thing, grad in zip(self._objects, grads, strict=True)
            if grad is not None and thing.grad is not grad  # no array of the object's own
        ]
        return zip(repeat(setattr), things, repeat("grad"), repeat(0.0))

    def _read_values(self) -> None:
        scalars = [self._objects[k].data for k in self._scalars]
        for k, value in zip(self._scalars, scalars, strict=True):
            if type(value) is not float:
                _check_real(value, f"params[{k}].data", "a real number or a numpy.ndarray")
        self._values[:] = scalars

    def _check_arrays(self) -> None:
        for k, thing in enumerate(self._objects):
            if k not in self._views:
                self._check_array(k, thing)

    def _check_array(self, k: int, thing: Any) -> None:
        if thing.data is not self._arrays[k]:
            raise ValueError(
                f"params[{k}].data must stay the array it was when the optimizer was made,"
                f" updated in place, got another one"
            )

    def _read_grad(self, k: int, thing: Any) -> npt.NDArray[Any] | None:
        grad = thing.grad
        if grad is None:
            return None
        view = self._views.get(k)
        if view is not None:
            if type(grad) is not float:
                _check_real(grad, f"params[{k}].grad", "a real number or None")
            view[()] = grad
            return view
        self._check_array(k, thing)
        if isinstance(grad, np.ndarray):
            return grad
        # A gradient reset to the number 0, and nothing added to it since.
        _check_real(grad, f"params[{k}].grad", "a numpy.ndarray, a real number or None")
        with np.errstate(all="ignore"):  # infinite, if float32 has no such number
            return np.full_like(self._arrays[k], grad, subok=False)

    @property
    def step_count(self) -> int:
        """Steps taken so far, without those skipped."""
        return self.optimizer.step_count

    @property
    def lr(self) -> float:
        """The learning rate before the schedule; can be set."""
        return self.optimizer.lr

    @lr.setter
    def lr(self, lr: float) -> None:
        self.optimizer.lr = lr

    @property
    def schedule(self) -> Callable[[int], float] | None:
        """The factor on ``lr`` as a function of the step, or None; can be set."""
        return self.optimizer.schedule

    @schedule.setter
    def schedule(self, schedule: Callable[[int], float] | None) -> None:
        self.optimizer.schedule = schedule

    @property
    def max_grad_norm(self) -> float | None:
        """As `Adam.max_grad_norm`; can be set."""
        return self.optimizer.max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, max_grad_norm: float | None) -> None:
        self.optimizer.max_grad_norm = max_grad_norm

    @property
    def nonfinite(self) -> Nonfinite:
        """As `Adam.nonfinite`; can be set."""
        return self.optimizer.nonfinite

    @nonfinite.setter
    def nonfinite(self, nonfinite: Nonfinite) -> None:
        self.optimizer.nonfinite = nonfinite

    @property
    def param_groups(self) -> tuple[dict[str, Any], ...]:
        """The hyperparameters, as in `Adam.param_groups`."""
        return self.optimizer.param_groups

    @property
    def ema_params(self) -> list[Any]:
        """The averages of the objects' ``.data``, floats or live arrays, as `Adam.ema_params`."""
        averages = list(self.optimizer.ema_params)
        for k in self._scalars:
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
        take_turn(self._lock)
        return self.optimizer._version()

    def _copies(self, memo: Mapping[int, Any]) -> Iterable[tuple[Any, Any]]:
        """Return the objects' values, and what `copy.deepcopy` has made of them."""
        copied = [k for k, thing in enumerate(self._objects) if id(thing) in memo]
        kind = [float if k in self._views else np.asarray for k in copied]
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
            "options": {name: getattr(optimizer, name) for name in _KEPT},
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
