"""Groups of parameters: what the user gave, read, checked and named."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from .. import backends
from ..state.state_dict import ParamState, by_group
from . import hyperparameters
from .containers import Container, FixedSequence, check_given, grads_hint
from .names import suggestion


class ParamGroup(dict[str, Any]):
    """A group's hyperparameters, which notes that something may have been written.

    Attributes
    ----------
    touched : bool
        Whether it has been since this was last set to False.
    """

    touched = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._write(super().__init__, *args, **kwargs)

    def _write(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # Afterwards too: a step may come in between, and one must not be missed.
        self.touched = True
        try:
            return method(*args, **kwargs)
        finally:
            self.touched = True

    def __setitem__(self, key: str, value: Any) -> None:
        self._write(super().__setitem__, key, value)

    def __missing__(self, key: Any) -> Any:
        raise KeyError(f"{key!r} is not in the group{suggestion(key, self)}")

    def __delitem__(self, key: str) -> None:
        self._write(super().__delitem__, key)

    def __ior__(self, other: Any) -> "ParamGroup":  # type: ignore[override,misc]
        self.update(other)
        return self

    def update(self, *args: Any, **kwargs: Any) -> None:
        """As dict."""
        self._write(super().update, *args, **kwargs)

    def setdefault(self, key: str, default: Any = None) -> Any:
        """As dict."""
        return self._write(super().setdefault, key, default)

    def pop(self, *args: Any) -> Any:
        """As dict."""
        return self._write(super().pop, *args)

    def popitem(self) -> tuple[str, Any]:
        """As dict."""
        item: tuple[str, Any] = self._write(super().popitem)
        return item

    def clear(self) -> None:
        """As dict."""
        self._write(super().clear)


class Groups:
    """The parameters of an optimizer in the order and the containers they came in.

    Attributes
    ----------
    options : list of dict
        The ``param_groups`` that the user sees.
    states : list of ParamState
        All parameters, group by group.
    labels : list of str
        What each parameter's gradient is called in messages.
    """

    def __init__(
        self, params: Any, defaults: Mapping[str, Any], *, amsgrad: bool, ema_decay: float | None
    ) -> None:
        self.defaults, self.amsgrad, self.ema_decay = dict(defaults), amsgrad, ema_decay
        self.containers: list[Container] = []
        self.options: list[ParamGroup] = []
        # What of each group must stay: its keys, and its 'params'.
        self.fixed: list[tuple[frozenset[str], Any]] = []
        self.states: list[ParamState] = []
        # A sequence of dicts is one of groups; any other container is a group itself.
        self.nested = isinstance(params, list | tuple) and any(
            isinstance(param, Mapping) for param in params
        )
        if isinstance(params, Mapping) and "params" in params:
            beside = set(params) - {"params"}
            if beside and beside <= set(hyperparameters.NAMES):
                raise TypeError("params must be a list of group dicts, got one that is in no list")
        for group in params if self.nested else [{"params": params}]:
            self._append(group)
        self._name()

    def extended(self, group: Any) -> "Groups":
        """Return these groups and one more; these stay as they are."""
        new = object.__new__(Groups)
        new.defaults, new.nested = self.defaults, True
        new.amsgrad, new.ema_decay = self.amsgrad, self.ema_decay
        new.containers, new.options = [*self.containers], [*self.options]
        new.fixed = [*self.fixed]
        new.states = [*self.states]
        new._append(group)
        new._name()
        return new

    def _append(self, given: Any) -> None:
        place = len(self.options)
        label = f"params[{place}]" if self.nested else "params"
        if not isinstance(given, Mapping) or "params" not in given:
            raise TypeError(
                f"{label} must be a dict with 'params', got {type(given).__qualname__}"
                f" {given!r:.60}"
            )
        unknown = sorted(set(given) - {"params", *hyperparameters.NAMES}, key=str)
        if unknown:
            raise ValueError(
                f"{label} must have 'params' and any of {', '.join(hyperparameters.NAMES)}, got"
                f" {unknown}{suggestion(unknown[0], hyperparameters.NAMES)}"
            )
        prefix = f"{label}." if self.nested else ""
        chosen = {name: given.get(name, self.defaults[name]) for name in hyperparameters.NAMES}
        options = ParamGroup(hyperparameters.check_options(chosen, prefix))
        inner = f"{label}['params']" if self.nested else label
        container = Container(given["params"], inner)
        first = len(self.states)
        keys: Iterable[int | str] = container.names or range(first, first + len(container.arrays))
        labels = container.labels(inner)
        params = self._take(container.arrays, labels)
        for param in params:
            hyperparameters.check_fits(options, param.dtype, prefix)
        for key, param, name, own in zip(
            keys, params, labels, self._new_state(params), strict=True
        ):
            self.states.append(ParamState(key, name, param, place, *own))
        options["params"] = tuple(container.arrays)
        if container.names is not None:
            options["param_names"] = tuple(container.names)
        self.containers.append(container)
        self.options.append(options)
        self.fixed.append((frozenset(options), options["params"]))

    def _take(self, arrays: Sequence[Any], labels: Sequence[str]) -> list[Any]:
        """Check parameters; return what stands for each in the backend that all share."""
        # With the first that is not empty, all others must share a device.
        own = [state for state in self.states if state.param.size] + self.states
        taken = [(state.param, state.label) for state in own[:1]]
        for array, label in zip(arrays, labels, strict=True):
            backend = backends.of(array)
            param = backend.take_param(array, label)
            if taken:
                first = next((each for each in taken if each[0].size), taken[0])
                backends.check_together(param, label, *first)
            taken.append((param, label))
        return [param for param, _ in taken[len(own[:1]) :]]

    @property
    def backend(self) -> backends.Backend:
        """What works where the parameters live."""
        return backends.of(self.states[0].param if self.states else None)

    def _name(self) -> None:
        keys = [state.key for state in self.states]
        if len(set(keys)) != len(keys):
            twice = [str(key) for key, count in Counter(keys).items() if count > 1]
            raise ValueError(f"names must differ between groups, got {twice[:5]} more than once")
        self.labels: list[str] = []
        for k, container in enumerate(self.containers):
            self.labels += container.labels(f"grads[{k}]" if self.nested else "grads")

    def _new_state(self, params: Sequence[Any]) -> Iterable[tuple[Any, Any, Any, Any]]:
        """Return the moments and averages of new parameters."""
        kinds = 2 + self.amsgrad + (self.ema_decay is not None)
        backend = backends.of(params[0] if params else None)
        places = backend.allocate(list(params) * kinds)
        columns = [places[k * len(params) : (k + 1) * len(params)] for k in range(kinds)]
        nothing = [None] * len(params)
        exp_avg, exp_avg_sq = columns[:2]
        largest = columns[2] if self.amsgrad else nothing
        ema = nothing if self.ema_decay is None else columns[-1]
        for average, param in zip(ema, params, strict=True):
            if average is not None:
                backend.assign(average, param)
        return zip(exp_avg, exp_avg_sq, largest, ema, strict=True)

    def rehouse(self) -> None:
        """Move the state, which unpickling has scattered, to memory placed as a new one's."""
        for members in by_group(self.states, len(self.options)):
            params = [state.param for state in members]
            for state, own in zip(members, self._new_state(params), strict=True):
                old = state.arrays()
                state.exp_avg, state.exp_avg_sq, state.max_exp_avg_sq, state.ema = own
                for name, array in state.arrays().items():
                    self.backend.assign(array, old[name])

    def wrap(self, arrays: Sequence[Any]) -> Any:
        """Return an array for each parameter in containers as the parameters came in."""
        left = iter(arrays)
        wrapped = [
            container.wrap([next(left) for _ in container.arrays]) for container in self.containers
        ]
        return FixedSequence(wrapped) if self.nested else wrapped[0]

    def flattener(self) -> Callable[[Any], tuple[Any, ...]]:
        """Return what puts gradients in the order of the parameters, in a tuple of our own.

        It raises TypeError or ValueError if they do not come in the containers
        of the parameters.
        """
        return self._flatten_groups if self.nested else self.containers[0].flatten

    def _flatten_groups(self, grads: Any) -> tuple[Any, ...]:
        check_given(grads, "grads")
        if (
            backends.is_array(grads)
            or isinstance(grads, Mapping | str)
            or not isinstance(grads, Iterable)
        ):
            raise TypeError(
                f"grads must be a sequence with one entry a group, got"
                f" {type(grads).__qualname__}{grads_hint(grads)}"
            )
        entries = list(grads)
        if len(entries) != len(self.containers):
            raise ValueError(
                f"grads must have one entry for each of {len(self.containers)} groups, got"
                f" {len(entries)}"
            )
        flat: tuple[Any, ...] = ()
        for k, (container, entry) in enumerate(zip(self.containers, entries, strict=True)):
            flat += container.flatten(entry, f"grads[{k}]")
        return flat

    def dtypes(self) -> list[set[np.dtype[Any]]]:
        """Return the dtypes of each group's parameters."""
        members = by_group(self.states, len(self.options))
        return [{state.param.dtype for state in states} for states in members]


def describe(options: Mapping[str, Any], params: Sequence[Any]) -> str:
    """Return one line on a group, for a repr."""
    chosen = ", ".join(f"{name}={options.get(name)!r}" for name in hyperparameters.NAMES)
    return f"{counted(len(params))}, {chosen}"


def counted(number: int) -> str:
    """Return how many parameters there are, for a repr."""
    return f"{number} parameter{'' if number == 1 else 's'}"
