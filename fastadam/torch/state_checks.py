"""What is wrong with a state_dict of torch's or of ours, part by part, every part looked at."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..params import checks, hyperparameters

MAX_EXP_AVG_SQ = "max_exp_avg_sq"
# torch counts in float32, where adding 1 to this leaves it as it is.
_LAST_STEP = 2**24
# So that each hyperparameter is checked whatever the others are.
_VALID = {
    "lr": 0.0,
    "betas": (0.0, 0.0),
    "eps": 0.0,
    "weight_decay": 0.0,
    "decoupled_weight_decay": False,
    "maximize": False,
}


def moment_names(amsgrad: bool) -> tuple[str, ...]:
    """Return the names of a parameter's arrays, which torch and fastadam share."""
    return ("exp_avg", "exp_avg_sq", MAX_EXP_AVG_SQ) if amsgrad else ("exp_avg", "exp_avg_sq")


def split(state_dict: Any, label: str) -> tuple[Mapping[Any, Any], Sequence[Any]]:
    """Return "state" and "param_groups", or raise TypeError."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"{label} must be a mapping, got {type(state_dict).__qualname__}")
    state, groups = state_dict.get("state"), state_dict.get("param_groups")
    if not isinstance(state, Mapping):
        raise TypeError(f"{label}['state'] must be a mapping, got {state!r:.60}")
    if not isinstance(groups, list | tuple):
        raise TypeError(f"{label}['param_groups'] must be a list, got {groups!r:.60}")
    return state, groups


def members_of_groups(
    state: Mapping[Any, Any], groups: Sequence[Any], needed: Sequence[str], wrong: list[str]
) -> list[list[Any]]:
    """Return what the parameters of each group are called; note what is missing or too much."""
    members: list[list[Any]] = []
    for k, group in enumerate(groups):
        members.append([])
        if not isinstance(group, Mapping):
            wrong.append(f"param_groups[{k}] is no mapping")
            continue
        missing = [name for name in (*needed, "params") if name not in group]
        if missing:
            wrong.append(f"param_groups[{k}] has no {', '.join(missing)}")
        keys = group.get("params", [])
        if isinstance(keys, list | tuple) and all(isinstance(key, int | str) for key in keys):
            members[-1] += keys
        else:
            wrong.append(f"param_groups[{k}]['params'] is no list of places: {keys!r:.60}")
    flat = [key for keys in members for key in keys]
    known = set(flat)
    if len(known) != len(flat):
        twice = sorted((key for key, count in Counter(flat).items() if count > 1), key=str)
        wrong.append(f"param_groups has {twice[:5]} more than once")
    wrong += [f"state has {key!r}, which no group has" for key in state if key not in known]
    return members


def checked_options(group: Mapping[str, Any], k: int, wrong: list[str]) -> dict[str, Any]:
    """Return a group's hyperparameters as floats and bools; note those out of range."""
    checked = {}
    for name in hyperparameters.NAMES:
        if name in group:
            value = group[name]
            if isinstance(value, list | tuple):
                value = tuple(map(_as_number, value))
            try:
                options = {**_VALID, name: _as_number(value)}
                checked[name] = hyperparameters.check_options(options, f"param_groups[{k}].")[name]
            except (TypeError, ValueError) as error:
                wrong.append(str(error))
    return checked


def too_large_for_dtypes(
    options: Mapping[str, Any], states: Sequence[Mapping[str, Any]], k: int
) -> list[str]:
    """Return what the parameters' own dtypes cannot hold."""
    wrong = []
    for dtype in {state["exp_avg"].dtype for state in states}:
        try:
            hyperparameters.check_fits({**_VALID, **options}, dtype, f"param_groups[{k}].")
        except ValueError as error:
            wrong.append(str(error))
    return wrong


def pairing_mismatches(
    group: Mapping[str, Any], indices: Sequence[Any], keys: Sequence[Any], k: int
) -> list[str]:
    """Return what keeps a group's parameters from being paired by their order."""
    if len(indices) != len(keys):
        return [f"param_groups[{k}] has {len(indices)} parameters, not {len(keys)}"]
    names = group.get("param_names")
    if not isinstance(names, list | tuple):
        return []
    # Parameters of one shape, paired by their order, would silently change places.
    if list(names) != list(keys) and sorted(names, key=str) == sorted(keys, key=str):
        return [f"param_groups[{k}] has {names!r:.60} in another order than {keys!r:.60}"]
    return []


def own_mismatches(entry: Mapping[str, Any], names: Sequence[str], place: str) -> list[str]:
    """Return what keeps a parameter's state of fastadam's from being torch's."""
    wrong = [f"{place} has no {name!r}" for name in ("step", *names) if name not in entry]
    known = ("step", *names, "ema")
    wrong += [f"{place} has {name!r}, which Adam has not" for name in entry if name not in known]
    if "step" in entry:
        step = _as_step(entry["step"])
        if step is None:
            wrong.append(f"{place}['step'] must be an integer >= 0, not {entry['step']!r:.60}")
        elif step > _LAST_STEP:
            wrong.append(
                f"{place}['step'] must not exceed 2**24, where torch's count in float32 ends,"
                f" got {step}"
            )
    like = entry.get("exp_avg")
    for name in (name for name in names if name in entry):
        array = entry[name]
        if not isinstance(array, np.ndarray) or array.dtype not in (np.float32, np.float64):
            wrong.append(f"{place}[{name!r}] is no array of float32 or float64")
        elif isinstance(like, np.ndarray):
            wrong += _difference(array, like, f"{place}[{name!r}]")
    return wrong


def read_state(
    entry: Any, target: Mapping[str, Any] | None, amsgrad: bool, place: str, wrong: list[str]
) -> tuple[int, dict[str, npt.NDArray[Any]]]:
    """Return a parameter's step and moments out of torch's state; note what is wrong with it.

    ``target`` is the state of fastadam's that they are for, None where that is
    not known.
    """
    if not isinstance(entry, Mapping):
        wrong.append(f"{place} is no mapping")
        return 0, {}
    if not entry:
        return 0, {}  # no gradient yet
    names = ("step", *moment_names(amsgrad))
    wrong += [f"{place} has no {name!r}" for name in names if name not in entry]
    wrong += [f"{place} has {name!r}, which Adam has not" for name in entry if name not in names]
    step = _as_step(entry.get("step", 0))
    if step is None:
        wrong.append(
            f"{place}['step'] must be a whole number >= 0 and under 2**62, not"
            f" {entry['step']!r:.60}"
        )
    arrays = {}
    for name in names[1:]:
        if target is None or name not in target or name not in entry:
            continue
        different = _difference(entry[name], target[name], f"{place}[{name!r}]")
        wrong += different
        if not different:
            try:
                arrays[name] = _as_array(entry[name])
            except (RuntimeError, TypeError) as error:
                wrong.append(f"{place}[{name!r}] is no array in memory: {error!s:.60}")
    return step or 0, arrays


def _difference(value: Any, like: npt.NDArray[Any], label: str) -> list[str]:
    """Return how a tensor's dtype or shape is another than an array's."""
    if not (hasattr(value, "dtype") and hasattr(value, "shape")):
        return [f"{label} is no tensor"]
    # By its name, torch.float32, since NumPy has not all of torch's dtypes.
    dtype, shape = str(value.dtype).rpartition(".")[2], tuple(value.shape)
    if (dtype, shape) != (like.dtype.name, like.shape):
        return [f"{label} is {dtype} {shape}, not {like.dtype.name} {like.shape}"]
    return []


def _as_array(value: Any) -> npt.NDArray[Any]:
    if hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    return np.asarray(value)


def _as_number(value: Any) -> Any:
    """Return a tensor or array of one element as Python's number, anything else as it is."""
    if hasattr(value, "item") and math.prod(getattr(value, "shape", (0,))) == 1:
        try:
            return value.item()
        except RuntimeError:  # a tensor without memory: of torch's device "meta"
            return value
    return value


def _as_step(value: Any) -> int | None:
    """Return a count as an int, None for what is none."""
    number = _as_number(value)
    if checks.is_real(number) and 0 <= number < 2**62 and number == int(number):
        return int(number)
    return None
