"""The state of each parameter: which arrays there are, and what they begin as."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from . import roles
from .roles import PARAM


@dataclass(slots=True, eq=False)
class ParamState:
    """One parameter, the user's array, and its state, our arrays of the same layout.

    Attributes
    ----------
    key : int or str
        In ``state_dict``: its name, or its place where it has none.
    label : str
        In messages, such as ``params['wte']``.
    param : array
        The backend's: NumPy's, or a `DeviceArray`.
    group : int
        The place of its group.
    shape : tuple of int
        That of the parameter when the optimizer was made.
    own : dict
        Its state: arrays by the names of their roles.
    """

    key: int | str
    label: str
    param: Any
    group: int
    shape: tuple[int, ...]
    own: dict[str, Any]

    def arrays(self, *, param: bool = False) -> dict[str, Any]:
        """Return the state's own arrays by name; with ``param``, the parameter too."""
        return {PARAM: self.param, **self.own} if param else dict(self.own)


class Allocator(Protocol):
    """What state needs of a backend."""

    def allocate(self, likes: Sequence[Any]) -> list[Any]:
        """Return zeros in the shape, dtype and memory order of each."""

    def assign(self, target: Any, source: Any) -> None:
        """Write what another array holds."""


def new_states(
    keys: Iterable[int | str],
    labels: Sequence[str],
    params: Sequence[Any],
    group: int,
    options: Iterable[str],
    backend: Allocator,
) -> list[ParamState]:
    """Return the state of a group's parameters before their first step.

    ``options`` are those of the optimizer that ask for arrays; see `roles.ROLES`.
    """
    return [
        ParamState(key, label, param, group, param.shape, own)
        for key, label, param, own in zip(
            keys, labels, params, _new_arrays(params, options, backend), strict=True
        )
    ]


def rehouse(states: Sequence[ParamState], options: Iterable[str], backend: Allocator) -> None:
    """Move a group's state, which unpickling has scattered, to memory placed as a new one's."""
    params = [state.param for state in states]
    for state, own in zip(states, _new_arrays(params, options, backend), strict=True):
        for name, array in own.items():
            backend.assign(array, state.own[name])
        state.own = own


def _new_arrays(
    params: Sequence[Any], options: Iterable[str], backend: Allocator
) -> list[dict[str, Any]]:
    """Return new state, arrays by name for each parameter; those of a role side by side."""
    kept = roles.kept(options)
    arrays = iter(backend.allocate(list(params) * len(kept)))
    columns = {role.name: [next(arrays) for _ in params] for role in kept}
    for role in kept:
        if role.starts_as == "param":
            for array, param in zip(columns[role.name], params, strict=True):
                backend.assign(array, param)
    return [{name: column[k] for name, column in columns.items()} for k in range(len(params))]


def all_arrays(states: Sequence[ParamState]) -> dict[str, Any]:
    """Return parameters and state by what they are called in messages."""
    arrays = {state.label: state.param for state in states}
    for state in states:
        arrays |= {f"{state.label}.{name}": array for name, array in state.own.items()}
    return arrays


def by_group(states: Sequence[ParamState], groups: int) -> list[list[ParamState]]:
    """Return the states of each group."""
    members: list[list[ParamState]] = [[] for _ in range(groups)]
    for state in states:
        members[state.group].append(state)
    return members
