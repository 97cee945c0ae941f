"""Groups of parameters: their containers and hyperparameters, read, checked and named."""

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from . import hyperparameters
from .containers import Container, FixedSequence, check_given, grads_hint
from .kinds import check_together, is_array, on_device
from .names import suggestion


class Backend(Protocol):
    """What groups ask of the place where their parameters live."""

    def take_param(self, array: Any, label: str) -> Any:
        """Check a parameter; return what stands for it: dtype, shape, size, nbytes."""

    def allocate(self, likes: Sequence[Any]) -> list[Any]:
        """Return zeros in the shape, dtype and memory order of each."""

    def assign(self, target: Any, source: Any) -> None:
        """Write what another array holds."""


class ParamGroup(dict[str, Any]):
    """A group's hyperparameters: a dict that notes that something may have been written.

    So a step asks one attribute a group, 0.03 us, and no value is missed that
    only compares equal, such as True for 1.0: comparing all by ``is`` takes
    0.4 us a group, a tenth of a small step.

    Attributes
    ----------
    touched : bool
        Whether something has been written since this was last set to False.
    """

    touched = True

    def __missing__(self, key: Any) -> Any:
        raise KeyError(f"{key!r} is not in the group{suggestion(key, self)}")


def _noting(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def write(group: ParamGroup, *args: Any, **kwargs: Any) -> Any:
        # Set again after the write: a step in between may have reset it.
        group.touched = True
        try:
            return method(group, *args, **kwargs)
        finally:
            group.touched = True

    return write


_OPERATORS = ("__init__", "__setitem__", "__delitem__", "__ior__")
for _name in (*_OPERATORS, "update", "setdefault", "pop", "popitem", "clear"):
    setattr(ParamGroup, _name, _noting(getattr(dict, _name)))


class Groups:
    """The parameters of an optimizer, in the order and the containers they were given in.

    They are made in two steps, since only the arrays tell which backend can
    check them: the constructor reads containers and hyperparameters, `take`
    checks the arrays and makes their state.

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
        self.states: list[Any] = []
        self._taken = 0  # groups of which there is state
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
        """Return a copy with one more group, whose arrays `take` has still to check."""
        new = object.__new__(Groups)
        new.defaults, new.nested = self.defaults, True
        new.amsgrad, new.ema_decay = self.amsgrad, self.ema_decay
        new.containers, new.options = [*self.containers], [*self.options]
        new.fixed = [*self.fixed]
        new.states, new._taken = [*self.states], self._taken
        new._append(group)
        new._name()
        return new

    def _append(self, given: Any) -> None:
        label, prefix, inner = self._labels(len(self.options))
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
        chosen = {name: given.get(name, self.defaults[name]) for name in hyperparameters.NAMES}
        options = ParamGroup(hyperparameters.check_options(chosen, prefix))
        container = Container(given["params"], inner)
        options["params"] = tuple(container.arrays)
        if container.names is not None:
            options["param_names"] = tuple(container.names)
        self.containers.append(container)
        self.options.append(options)
        self.fixed.append((frozenset(options), options["params"]))

    def _labels(self, group: int) -> tuple[str, str, str]:
        """Return what messages call a group, put before its hyperparameters, call its arrays."""
        if not self.nested:
            return "params", "", "params"
        label = f"params[{group}]"
        return label, f"{label}.", f"{label}['params']"

    @property
    def state_options(self) -> set[str]:
        """The options that ask for more state than every parameter has."""
        options = {"amsgrad": self.amsgrad, "ema_decay": self.ema_decay is not None}
        return {name for name, on in options.items() if on}

    @property
    def arrays(self) -> list[Any]:
        """All parameters as the user gave them, group by group."""
        return [array for container in self.containers for array in container.arrays]

    def take(self, backend: Backend, new: Callable[..., Any]) -> None:
        """Check the arrays that have no state yet, and make their state.

        ``new`` is `state.param_state.new_states`, which this folder does not know.

        Raises
        ------
        TypeError, ValueError
            For an array that cannot be updated in place, one that lives
            elsewhere than the others, or a hyperparameter that does not fit
            its dtype.
        """
        for k in range(self._taken, len(self.containers)):
            container, (_, prefix, inner) = self.containers[k], self._labels(k)
            labels = container.labels(inner)
            params = self._checked(backend, container.arrays, labels)
            for param in params:
                hyperparameters.check_fits(self.options[k], param.dtype, prefix)
            start = len(self.states)
            keys: Iterable[int | str] = container.names or range(start, start + len(params))
            self.states += new(keys, labels, params, k, self.state_options, backend)
        self._taken = len(self.containers)
        self._check_keys()

    def _checked(
        self, backend: Backend, arrays: Sequence[Any], labels: Sequence[str]
    ) -> list[Any]:
        """Return what the backend makes of each array, if all are on the same device."""
        # With the first that is not empty, all others must share a device.
        own = [state for state in self.states if state.param.size] + self.states
        taken = [(state.param, state.label) for state in own[:1]]
        params = []
        for array, label in zip(arrays, labels, strict=True):
            param = array
            if not taken or on_device(array) == on_device(taken[0][0]):
                param = backend.take_param(array, label)
            if taken:
                check_together(param, label, *next((e for e in taken if e[0].size), taken[0]))
            taken.append((param, label))
            params.append(param)
        return params

    def _check_keys(self) -> None:
        keys = [state.key for state in self.states]
        if len(set(keys)) != len(keys):
            twice = [str(key) for key, count in Counter(keys).items() if count > 1]
            raise ValueError(f"names must differ between groups, got {twice[:5]} more than once")

    def _name(self) -> None:
        self.labels: list[str] = []
        for k, container in enumerate(self.containers):
            self.labels += container.labels(f"grads[{k}]" if self.nested else "grads")

    def wrap(self, arrays: Sequence[Any]) -> Any:
        """Return one array for each parameter, in the same containers as the parameters."""
        left = iter(arrays)
        wrapped = [
            container.wrap([next(left) for _ in container.arrays]) for container in self.containers
        ]
        return FixedSequence(wrapped) if self.nested else wrapped[0]

    def flattener(self) -> Callable[[Any], tuple[Any, ...]]:
        """Return the function that puts gradients in a tuple, in the order of the parameters.

        It raises TypeError or ValueError if their containers are not those of
        the parameters.
        """
        return self._flatten_groups if self.nested else self.containers[0].flatten

    def _flatten_groups(self, grads: Any) -> tuple[Any, ...]:
        check_given(grads, "grads")
        if is_array(grads) or isinstance(grads, Mapping | str) or not isinstance(grads, Iterable):
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
        flat: list[Any] = []
        for k, (container, entry) in enumerate(zip(self.containers, entries, strict=True)):
            flat += container.flatten(entry, k)
        return tuple(flat)

    def dtypes(self) -> list[set[np.dtype[Any]]]:
        """Return the dtypes of each group's parameters."""
        found: list[set[np.dtype[Any]]] = [set() for _ in self.options]
        for state in self.states:
            found[state.group].add(state.param.dtype)
        return found


def describe(options: Mapping[str, Any], params: Sequence[Any]) -> str:
    """Return one line on a group, for a repr."""
    chosen = ", ".join(f"{name}={options.get(name)!r}" for name in hyperparameters.NAMES)
    return f"{counted(len(params))}, {chosen}"


def counted(number: int) -> str:
    """Return how many parameters there are, for a repr."""
    return f"{number} parameter{'' if number == 1 else 's'}"
