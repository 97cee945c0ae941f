"""The state of each parameter: which arrays there are, and what they begin as."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .roles import PARAM, Role


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


def new_state(
    params: Sequence[Any],
    roles: Sequence[Role],
    allocate: Callable[[Sequence[Any]], list[Any]],
    assign: Callable[[Any, Any], None],
) -> list[dict[str, Any]]:
    """Return the state of new parameters, arrays by name for each.

    ``allocate`` and ``assign`` are the backend's. Arrays of one role lie side by side.
    """
    arrays = iter(allocate(list(params) * len(roles)))
    columns = {role.name: [next(arrays) for _ in params] for role in roles}
    for role in roles:
        if role.starts_as == "param":
            for array, param in zip(columns[role.name], params, strict=True):
                assign(array, param)
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
