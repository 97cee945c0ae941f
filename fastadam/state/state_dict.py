"""State storage: the moments of each parameter."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import index
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ..backends import as_host, seen
from ..params import hyperparameters

# What there may be of a parameter.
PARAM = "param"
KINDS = (PARAM, "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "ema")

# Bytes: a cache line, and the widest vector.
ALIGNMENT = 64


@dataclass(slots=True, eq=False)
class ParamState:
    """One parameter, the user's array, and its state, our arrays of the same layout."""

    key: int | str  # in state_dict: its name, or its place where it has none
    label: str  # in messages: params['wte']
    # Arrays of the backend: NumPy's, or a `DeviceArray`.
    param: Any
    group: int
    exp_avg: Any
    exp_avg_sq: Any
    max_exp_avg_sq: Any
    ema: Any

    def arrays(self, *, param: bool = False) -> dict[str, Any]:
        """Return the state's own arrays by the names they have in a state_dict.

        With ``param``, the parameter too.
        """
        named = {PARAM: self.param} if param else {}
        named |= {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
        if self.max_exp_avg_sq is not None:
            named["max_exp_avg_sq"] = self.max_exp_avg_sq
        if self.ema is not None:
            named["ema"] = self.ema
        return named


def all_arrays(states: Sequence[ParamState]) -> dict[str, Any]:
    """Return parameters and state by what they are called in messages."""
    arrays = {state.label: state.param for state in states}
    for state in states:
        arrays |= {f"{state.label}.{name}": array for name, array in state.arrays().items()}
    return arrays


def by_group(states: Sequence[ParamState], groups: int) -> list[list[ParamState]]:
    """Return the states of each group."""
    members: list[list[ParamState]] = [[] for _ in range(groups)]
    for state in states:
        members[state.group].append(state)
    return members


def allocate(likes: Sequence[npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
    """Return zeros in the shape, dtype and memory order of each, side by side in one buffer.

    Each begins with a cache line. One buffer, so that small arrays too come to
    lie in huge pages, for which NumPy asks the system from 4 MiB on. The
    system hands out its pages when they are first touched: those of zeros, as
    moments are at first, by the thread that updates them.
    """
    sizes = [-(-like.nbytes // ALIGNMENT) * ALIGNMENT for like in likes]
    buffer = np.zeros(sum(sizes) + ALIGNMENT, dtype=np.uint8)
    start = -buffer.ctypes.data % ALIGNMENT
    arrays = []
    for like, size in zip(likes, sizes, strict=True):
        order: Literal["C", "F"] = "C" if like.flags.c_contiguous else "F"
        part = buffer[start : start + like.nbytes].view(like.dtype)
        arrays.append(part.reshape(like.shape, order=order))
        start += size
    return arrays


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
    # Returns what else to call, as function and arguments.
    calls: Callable[[], Iterable[tuple[Any, ...]]] = tuple


def export_state(
    states: Sequence[ParamState],
    steps: npt.NDArray[np.int64],
    groups: Sequence[Mapping[str, Any]],
    step_count: int,
    to_host: Callable[[Any], npt.NDArray[Any]],
) -> dict[str, Any]:
    """Return copies of all state in PyTorch's form, the schedule's step beside it."""
    state = {
        s.key: {"step": int(step), **{name: to_host(a) for name, a in s.arrays().items()}}
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
) -> LoadedState:
    """Check a state_dict against an optimizer; change nothing.

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
    wrong = _state_mismatches(found, states) + group_mismatches(found_groups, states, len(groups))
    if not is_count(step_count):
        wrong.append(f"step_count must be an integer >= 0 and under 2**62, not {step_count!r}")
    if wrong:
        raise ValueError("state_dict must fit the optimizer: " + "; ".join(wrong))

    options = import_options(found_groups, states, "state_dict['param_groups']")
    # An optimizer's own live arrays, and views, must not be overwritten before they are read.
    live = {id(array) for s in states for array in s.arrays().values()}
    targets, sources = [], []
    for s in states:
        for name, target in s.arrays().items():
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


def _state_mismatches(found: Mapping[Any, Any], states: Sequence[ParamState]) -> list[str]:
    known = {s.key: s for s in states}
    wrong = [f"state has no {key!r}" for key in known if key not in found]
    wrong += [
        f"state has {key!r}, which the optimizer has not" for key in found if key not in known
    ]
    for key, own in known.items():
        if key in found:
            wrong += _mismatches(own, found[key])
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


def _mismatches(state: ParamState, found: Any) -> list[str]:
    if not isinstance(found, Mapping):
        return [f"state[{state.key!r}] is no mapping"]
    place = f"state[{state.key!r}]"
    wanted = state.arrays()
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
                array = seen(found[name])
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
