"""``state_dict``: what it holds, and whether one fits an optimizer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import index
from typing import Any

import numpy as np
import numpy.typing as npt

from ..params import hyperparameters
from .param_state import ParamState, by_group


@dataclass(slots=True)
class LoadedState:
    """What has been found to fit: what each array is to hold, all counts, hyperparameters."""

    targets: list[Any]
    sources: list[npt.NDArray[Any]]
    steps: npt.NDArray[np.int64]
    step_count: int
    # Of each group, and of the optimizer by the names of its attributes.
    options: list[dict[str, Any]]
    settings: dict[str, Any] = field(default_factory=dict)


def export_state(
    states: Sequence[ParamState],
    steps: npt.NDArray[np.int64],
    groups: Sequence[Mapping[str, Any]],
    step_count: int,
    to_host: Callable[[Any], npt.NDArray[Any]],
) -> dict[str, Any]:
    """Return copies of all state in PyTorch's form, the schedule's step beside it."""
    state = {
        s.key: {"step": int(step), **{name: to_host(a) for name, a in s.own.items()}}
        for s, step in zip(states, steps, strict=True)
    }
    param_groups = export_groups(groups, states)
    return {"state": state, "param_groups": param_groups, "step_count": step_count}


def export_groups(
    groups: Sequence[Mapping[str, Any]], states: Sequence[ParamState]
) -> list[dict[str, Any]]:
    """Return the hyperparameters of groups, with the keys of their parameters."""
    return [
        {
            **{name: group[name] for name in hyperparameters.NAMES},
            "params": [s.key for s in members],
        }
        for group, members in zip(groups, by_group(states, len(groups)), strict=True)
    ]


def import_state(
    state_dict: Mapping[str, Any],
    states: Sequence[ParamState],
    groups: Sequence[Mapping[str, Any]],
    as_host: Callable[[Any], npt.NDArray[Any]],
    as_array: Callable[[Any], Any],
) -> LoadedState:
    """Check a state_dict against an optimizer; change nothing.

    ``as_host`` makes any array NumPy's, ``as_array`` gives something with its shape
    and its NumPy dtype, or raises.

    Raises
    ------
    TypeError
        If its parts are of the wrong kind.
    ValueError
        If it does not fit; the message lists every mismatch.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict must be a mapping, got {type(state_dict).__qualname__}")
    for name, kinds, wanted in (
        ("state", Mapping, "a mapping"),
        ("param_groups", (list, tuple), "a list"),
    ):
        if not isinstance(state_dict.get(name), kinds):
            raise TypeError(
                f"state_dict[{name!r}] must be {wanted}, got {state_dict.get(name)!r:.60}"
            )
    found, found_groups = state_dict["state"], state_dict["param_groups"]
    step_count = state_dict.get("step_count")
    wrong = _state_mismatches(found, states, as_array) + group_mismatches(
        found_groups, states, len(groups)
    )
    if not is_count(step_count):
        wrong.append(f"step_count must be an integer >= 0 and under 2**62, not {step_count!r}")
    if wrong:
        raise ValueError("state_dict must fit the optimizer: " + "; ".join(wrong))

    options = import_options(found_groups, states, "state_dict['param_groups']")
    # An optimizer's own live arrays, and views, must not be overwritten before they are read.
    live = {id(array) for s in states for array in s.own.values()}
    targets, sources = [], []
    for s in states:
        for name, target in s.own.items():
            array = as_host(found[s.key][name])
            targets.append(target)
            sources.append(array if array.base is None and id(array) not in live else array.copy())
    steps = np.array([index(found[s.key]["step"]) for s in states], dtype=np.int64)
    return LoadedState(targets, sources, steps, index(step_count), options)  # type: ignore[arg-type]


def import_options(
    found: Sequence[Mapping[str, Any]], states: Sequence[ParamState], label: str
) -> list[dict[str, Any]]:
    """Check the hyperparameters of groups, as `hyperparameters.check_options`; return them."""
    options = []
    for k, (group, members) in enumerate(zip(found, by_group(states, len(found)), strict=True)):
        for name in hyperparameters.NAMES:
            if name not in group:
                raise ValueError(f"{label}[{k}] must have {name!r}")
        options.append(hyperparameters.check_options(group, f"{label}[{k}]."))
        for dtype in {s.param.dtype for s in members}:
            hyperparameters.check_fits(options[-1], dtype, f"{label}[{k}].")
    return options


def _state_mismatches(
    found: Mapping[Any, Any], states: Sequence[ParamState], as_array: Callable[[Any], Any]
) -> list[str]:
    known = {s.key: s for s in states}
    wrong = [f"state has no {key!r}" for key in known if key not in found]
    wrong += [
        f"state has {key!r}, which the optimizer has not" for key in found if key not in known
    ]
    for key, own in known.items():
        if key in found:
            wrong += _mismatches(own, found[key], as_array)
    return wrong


def group_mismatches(found: Sequence[Any], states: Sequence[ParamState], groups: int) -> list[str]:
    """Say in what the ``"param_groups"`` of a state_dict do not fit so many groups."""
    if len(found) != groups:
        return [f"param_groups has {len(found)} groups, not {groups}"]
    wrong = []
    for k, (group, own_states) in enumerate(zip(found, by_group(states, groups), strict=True)):
        wrong += _group_mismatches(k, group, own_states)
    return wrong


def _group_mismatches(k: int, group: Any, states: Sequence[ParamState]) -> list[str]:
    if not isinstance(group, Mapping):
        return [f"param_groups[{k}] is no mapping"]
    missing = [name for name in (*hyperparameters.NAMES, "params") if name not in group]
    if missing:
        return [f"param_groups[{k}] has no {', '.join(missing)}"]
    found, own = group["params"], [s.key for s in states]
    plain = isinstance(found, list | tuple) and all(isinstance(key, int | str) for key in found)
    # Named parameters may come in another order; sorting pairs them.
    if not plain or sorted(found, key=str) != sorted(own, key=str):
        return [f"param_groups[{k}] has other parameters: {found!r:.60}, not {own!r:.60}"]
    return []


def _mismatches(state: ParamState, found: Any, as_array: Callable[[Any], Any]) -> list[str]:
    if not isinstance(found, Mapping):
        return [f"state[{state.key!r}] is no mapping"]
    place = f"state[{state.key!r}]"
    wanted = state.own
    wrong = [f"{place} has no {name!r}" for name in ("step", *wanted) if name not in found]
    wrong += [
        f"{place} has {name!r}, which the optimizer has not"
        for name in found
        if name not in wanted and name != "step"
    ]
    if "step" in found and not is_count(found["step"]):
        wrong.append(
            f"{place}['step'] must be an integer >= 0 and under 2**62, not {found['step']!r}"
        )
    for name, own in wanted.items():
        if isinstance(own, np.ndarray) and not own.flags.writeable:
            wrong.append(f"{place}[{name!r}] of the optimizer's own is read-only")
        if name in found:
            try:
                array = as_array(found[name])
            except (TypeError, ValueError):
                wrong.append(f"{place}[{name!r}] is no array")
                continue
            if array.shape != own.shape or array.dtype != own.dtype:
                wrong.append(
                    f"{place}[{name!r}] is {array.dtype!r} {array.shape}, not"
                    f" {own.dtype!r} {own.shape}"
                )
    return wrong


def is_count(value: Any) -> bool:
    """Whether a value may be a count of steps."""
    try:
        return not isinstance(value, bool) and 0 <= index(value) < 2**62
    except TypeError:
        return False
