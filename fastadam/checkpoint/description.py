"""What a checkpoint holds beside its tensors: to JSON, and back, checked."""

import math
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from ..adam import Adam
from ..params import checks, hyperparameters
from ..schedules.base import Schedule
from ..schedules.plain import from_plain, to_plain
from ..state.roles import KINDS
from ..state.state_dict import export_groups, import_options, is_count
from ..version import __version__
from .file_format import Reader

# What a parameter is called: its name, or its place where it has none.
Key: TypeAlias = int | str


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a checkpoint says, apart from its tensors' values.

    Attributes
    ----------
    version : str
        Of the fastadam that wrote it.
    step_count : int
        Steps that the optimizer had taken.
    steps : dict
        Steps that each parameter had had, by name, or by place (int) where it
        had no name.
    param_groups : list of dict
        The hyperparameters of each group, as in ``Adam.param_groups``, with the
        names as ``"params"``.
    schedule : callable, str or None
        One of `fastadam.schedules`; of another callable, which no file holds,
        the repr.
    max_grad_norm : float or None
        As `Adam.max_grad_norm`.
    nonfinite : str
        As `Adam.nonfinite`.
    ema_decay : float or None
        As `Adam.ema_decay`.
    amsgrad : bool
        As `Adam.amsgrad`.
    extra : dict
        What `save` was given as ``extra``.
    tensors : dict
        The dtype and the shape of each tensor by its name in the file.
    loaded : tuple
        Of what `load` returned, the names or places of the optimizer's
        parameters that it was loaded into.
    """

    version: str
    step_count: int
    steps: dict[Key, int] = field(repr=False)
    param_groups: list[dict[str, Any]] = field(repr=False)
    schedule: Schedule | str | None
    max_grad_norm: float | None
    nonfinite: str
    ema_decay: float | None
    amsgrad: bool
    extra: dict[str, Any]
    tensors: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = field(repr=False)
    loaded: tuple[Key, ...] = field(default=(), compare=False)


def describe(opt: Adam) -> dict[str, Any]:
    """Return, made of what JSON has, all that tensors do not tell; `parse` reads it."""
    contents = opt._contents()
    try:
        schedule = to_plain(opt.schedule)
    except TypeError:
        schedule = {"repr": repr(opt.schedule)}
    norm = opt.max_grad_norm
    options = import_options(contents.options, contents.states, "param_groups")
    return {
        "version": __version__,
        "step_count": opt.step_count,
        "params": [state.key for state in contents.states],
        "steps": contents.steps.tolist(),
        "groups": export_groups(options, contents.states),
        "amsgrad": opt.amsgrad,
        "ema_decay": opt.ema_decay,
        "max_grad_norm": "inf" if norm == math.inf else norm,
        "nonfinite": opt.nonfinite,
        "schedule": schedule,
    }


def parse(reader: Reader) -> Checkpoint:
    """Return what a file says, each part checked; raise whatever comes up."""
    said = reader.description
    keys = [checked_key(key) for key in said["params"]]
    steps = dict(zip(keys, map(_count, said["steps"]), strict=True))
    names = {str(key) for key in keys}
    if len(names) != len(keys):
        raise ValueError("two parameters have one name")
    groups = [
        {
            **hyperparameters.check_options(group),
            "params": [checked_key(key) for key in group["params"]],
        }
        for group in said["groups"]
    ]
    if [key for group in groups for key in group["params"]] != keys:
        raise ValueError("the parameters of the groups are not all parameters")
    for name in reader.layout:
        kind, _, param = name.partition("/")
        if kind not in KINDS or param not in names:
            raise ValueError(f"{name!r:.60} is no tensor of a parameter")
    schedule, norm = said["schedule"], said["max_grad_norm"]
    if schedule is not None and "repr" in schedule:
        schedule = str(schedule["repr"])
    else:
        schedule = from_plain(schedule)
    return Checkpoint(
        version=str(said["version"]),
        step_count=_count(said["step_count"]),
        steps=steps,
        param_groups=groups,
        schedule=schedule,
        max_grad_norm=hyperparameters.check_max_grad_norm(math.inf if norm == "inf" else norm),
        nonfinite=hyperparameters.check_nonfinite(said["nonfinite"]),
        ema_decay=hyperparameters.check_ema_decay(said["ema_decay"]),
        amsgrad=checks.flag(said["amsgrad"], "amsgrad"),
        extra=dict(said["extra"]),
        tensors=dict(sorted(reader.layout.items())),
    )


def checked_key(key: Any) -> Key:
    """Return what may be a parameter's name or place, or raise TypeError."""
    if isinstance(key, bool) or not isinstance(key, int | str):
        raise TypeError(f"a parameter's name must be str, or int for a place, got {key!r:.60}")
    return key


def _count(value: Any) -> int:
    if not is_count(value):
        raise ValueError(f"a count of steps must be under 2**62, got {value!r:.60}")
    return int(value)
