"""Checkpoints: an optimizer and its parameters in one safetensors file."""

import math
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from ..adam import Adam, take_turn
from ..backends import as_host
from ..objects import ObjectAdam
from ..params import checks, hyperparameters
from ..schedules.base import Schedule, integer
from ..schedules.plain import from_plain, to_plain
from ..state.state_dict import KINDS, LoadedState, export_groups, import_options, is_count
from . import atomic_file, file_format
from .file_format import CheckpointError, Reader
from .fit import Fit, Key, Rename, checked_key

__all__ = ["Checkpoint", "CheckpointError", "inspect", "load", "save"]


def __dir__() -> list[str]:
    return sorted(__all__)


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


def save(
    path: str | os.PathLike[str],
    opt: Adam | ObjectAdam,
    *,
    params: bool = True,
    keep: int = 1,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write an optimizer and its parameters to a file from which `load` goes on.

    The file is a safetensors file, which other libraries read too: tensors
    ``param/<name>``, ``exp_avg/<name>``, ``exp_avg_sq/<name>`` and, where they
    are kept, ``max_exp_avg_sq/<name>`` and ``ema/<name>``, a parameter without a
    name being called by its place. All else is in the metadata, with checksums.
    (safetensors writes metadata in any order: two files of one state may differ.)

    It is written beside the file at ``path``, flushed to disk, and then put in
    its place: whatever happens meanwhile, there is the old file or the new one.
    Arrays are written from where they lie; only those in Fortran order, or on
    a device, are copied before.

    Parameters
    ----------
    path : path
        The file, commonly ``*.safetensors``, in a folder that exists.
    opt : Adam or what `from_objects` returned
        The optimizer. Nothing may write to its parameters meanwhile.
    params : bool
        Whether to write the parameters too.
    keep : int
        How many files to have, > 0: this one at ``path``, and those before it at
        ``name.1.suffix``, ``name.2.suffix`` and so on, from new to old. Files with
        higher numbers are left alone.
    extra : mapping, optional
        Whatever else a run needs to go on, made of dict with keys of str, list,
        str, int, float, bool and None: `load` returns it. Tuples come back as
        lists, and NumPy's numbers as Python's.

    Raises
    ------
    TypeError, ValueError
        For arguments of the wrong kind.
    OSError
        If the system refuses: no such folder, no space. The file at ``path`` is
        then what it was.
    ImportError
        If safetensors is not installed.
    RuntimeError
        If a step is under way.

    Examples
    --------
    >>> import numpy as np, fastadam, os, tempfile
    >>> path = os.path.join(tempfile.mkdtemp(), "run.safetensors")
    >>> w = np.zeros(3)
    >>> opt = fastadam.Adam({"w": w}, lr=0.1)
    >>> _ = opt.step({"w": np.ones(3)})
    >>> fastadam.save(path, opt, extra={"epoch": 1})
    >>> again = np.zeros(3)
    >>> new = fastadam.Adam({"w": again})
    >>> fastadam.load(path, new).extra
    {'epoch': 1}
    >>> new.step_count, new.lr, bool((again == w).all())
    (1, 0.1, True)
    """
    file_format.need_safetensors()
    path, keep = _path(path), integer("keep", keep, least=1)
    params = checks.flag(params, "params")
    if extra is not None and not isinstance(extra, Mapping):
        raise TypeError(f"extra must be a mapping, got {type(extra).__qualname__}")
    try:
        extra = _plain({} if extra is None else extra)
    except RecursionError:
        raise ValueError("extra must not be nested so deep, nor hold itself") from None
    adam, outer = _unwrapped(opt)
    with take_turn(outer), take_turn(adam._lock):
        if isinstance(opt, ObjectAdam):
            opt._check_arrays()
            opt._read_values()
        states = adam._groups.states
        names = [str(state.key) for state in states]
        if len(set(names)) != len(names):
            raise ValueError("names must differ from the places of parameters without a name")
        "".join(names).encode()  # raises what safetensors would, later
        for state in states:
            if state.param.shape != state.exp_avg.shape:
                raise ValueError(
                    f"{state.label} must keep the shape that it had, {state.exp_avg.shape}, got"
                    f" {state.param.shape}"
                )
        tensors = {
            f"{kind}/{name}": as_host(array)
            for name, state in zip(names, states, strict=True)
            for kind, array in state.arrays(param=params).items()
        }
        description = {**_describe(adam), "extra": extra}
        atomic_file.replace(path, lambda new: file_format.write(new, tensors, description), keep)


def load(
    path: str | os.PathLike[str],
    opt: Adam | ObjectAdam,
    *,
    params: bool = True,
    state: bool = True,
    hyperparameters: bool = True,
    rename: Rename = None,
    partial: bool = False,
) -> Checkpoint:
    """Make an optimizer and its parameters what they were at a `save`.

    Everything is checked, checksums included, before anything is changed.
    Arrays are written in place. It takes memory for the file's tensors, each
    let go as it is taken over.

    Parameters
    ----------
    path : path
        What `save` wrote, with this or an earlier version.
    opt : Adam or what `from_objects` returned
        The optimizer, made with the same names, shapes, dtypes and groups, and
        with the same ``amsgrad`` and ``ema_decay``. Modified.
    params : bool
        Whether to load the parameters.
    state : bool
        Whether to load moments, averages and counts of steps. Without them,
        hyperparameters are not loaded either.
    hyperparameters : bool
        Whether to load the groups' hyperparameters, ``schedule``,
        ``max_grad_norm`` and ``nonfinite``, or leave the optimizer's own, whose
        groups may then differ. A schedule that the file could not hold must be
        the optimizer's own.
    rename : mapping or callable, optional
        From a parameter's name in the file, or place (int) where it has none, to
        that in the optimizer, or to None for one that is to be left out; what a
        mapping does not have keeps its name.
    partial : bool
        Load only the parameters that are in both, and neither hyperparameters
        nor ``step_count``, so that the optimizer's own schedule begins where it
        is; the others keep their state. Averages that the optimizer does not
        keep are left out, those that the file does not have begin as the
        parameters loaded.

    Returns
    -------
    Checkpoint
        What the file says, ``extra`` included, and in ``loaded`` which of the
        optimizer's parameters it was loaded into.

    Raises
    ------
    CheckpointError
        If the file is no checkpoint, is damaged, or does not fit the optimizer,
        with every mismatch in the message. The optimizer is then as it was.
    TypeError
        For arguments of the wrong kind.
    OSError
        If the file is not there, or cannot be read.
    ImportError
        If safetensors is not installed.
    RuntimeError
        If a step is under way.

    Examples
    --------
    >>> import numpy as np, fastadam, os, tempfile
    >>> path = os.path.join(tempfile.mkdtemp(), "run.safetensors")
    >>> opt = fastadam.Adam({"w": np.zeros(3)})
    >>> opt.step({"w": np.ones(3)}).step
    0
    >>> fastadam.save(path, opt)
    >>> new = fastadam.Adam({"weight": np.zeros(3)})
    >>> fastadam.load(path, new, rename={"w": "weight"}).step_count
    1
    """
    params, state = checks.flag(params, "params"), checks.flag(state, "state")
    partial = checks.flag(partial, "partial")
    hyperparameters = checks.flag(hyperparameters, "hyperparameters") and state and not partial
    if rename is not None and not (isinstance(rename, Mapping) or callable(rename)):
        raise TypeError(f"rename must be a mapping or callable, got {rename!r:.60}")
    path = _path(path)
    adam, outer = _unwrapped(opt)
    with take_turn(outer), take_turn(adam._lock):
        if isinstance(opt, ObjectAdam):
            opt._check_arrays()
        with file_format.opened(path) as reader:
            with file_format.blaming(path):
                checkpoint = _parse(reader)
            fit = Fit(
                checkpoint,
                adam,
                rename,
                params=params,
                state=state,
                hyperparameters=hyperparameters,
                partial=partial,
            )
            if fit.wrong:
                wrong = "; ".join(fit.wrong)
                raise CheckpointError(f"{path} must fit the optimizer: {wrong}{fit.hint}")
            sources = [reader.read(name) for _, name in fit.tensors]
        steps, step_count = adam._plan.steps, adam.step_count
        if state:
            for place, own in enumerate(adam._groups.states):
                if own.key in fit.keys:
                    steps[place] = checkpoint.steps[fit.keys[own.key]]
            step_count = step_count if partial else checkpoint.step_count
        targets = [target for target, _ in fit.tensors]
        loaded = LoadedState(targets, sources, steps, step_count, fit.options, fit.settings)
        if isinstance(opt, ObjectAdam) and params:
            loaded.calls = opt._value_writes
        adam._take_over(loaded)
    return replace(checkpoint, loaded=tuple(fit.keys))


def inspect(path: str | os.PathLike[str], *, verify: bool = True) -> Checkpoint:
    """Return what a checkpoint says, apart from its tensors' values.

    Parameters
    ----------
    path : path
        What `save` wrote, with this or an earlier version.
    verify : bool
        Whether to read all tensors, one at a time, for their checksums.

    Returns
    -------
    Checkpoint

    Raises
    ------
    CheckpointError
        If the file is no checkpoint, or is damaged.
    OSError
        If it is not there, or cannot be read.
    ImportError
        If safetensors is not installed.

    Examples
    --------
    >>> import numpy as np, fastadam, os, tempfile
    >>> path = os.path.join(tempfile.mkdtemp(), "run.safetensors")
    >>> opt = fastadam.Adam({"w": np.zeros((2, 3))})
    >>> fastadam.save(path, opt)
    >>> for name, (dtype, shape) in fastadam.checkpoint.inspect(path).tensors.items():
    ...     print(name, dtype, shape)
    exp_avg/w float64 (2, 3)
    exp_avg_sq/w float64 (2, 3)
    param/w float64 (2, 3)
    """
    path = _path(path)
    with file_format.opened(path) as reader:
        with file_format.blaming(path):
            checkpoint = _parse(reader)
        for name in checkpoint.tensors if verify else ():
            reader.read(name)
    return checkpoint


def _path(path: Any) -> Path:
    try:
        return Path(path)
    except TypeError:
        swapped = isinstance(path, Adam | ObjectAdam)
        hint = "; it comes first, then the optimizer" if swapped else ""
        kind = type(path).__qualname__
        raise TypeError(f"path must be str or os.PathLike, got {kind}{hint}") from None


def _plain(value: Any, label: str = "extra") -> Any:
    """Return what JSON has, of NumPy's numbers too; refuse what it would make text of."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{label} must have keys of str, got {key!r:.60}")
        return {key: _plain(item, f"{label}[{key!r}]") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{label}[{k}]") for k, item in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(
        f"{label} must be made of dict, list, str, int, float, bool and None, got"
        f" {type(value).__qualname__}"
    )


def _unwrapped(opt: Any) -> tuple[Adam, threading.Lock]:
    """Return the `Adam` that an optimizer is, or has underneath, and the lock of what is above."""
    if isinstance(opt, ObjectAdam):
        return opt.optimizer, opt._lock
    if isinstance(opt, Adam):
        return opt, threading.Lock()
    raise TypeError(f"opt must be an optimizer of fastadam's, got {type(opt).__qualname__}")


def _describe(opt: Adam) -> dict[str, Any]:
    """Return, made of what JSON has, all that tensors do not tell; `_parse` reads it."""
    groups = opt._groups
    try:
        schedule = to_plain(opt.schedule)
    except TypeError:
        schedule = {"repr": repr(opt.schedule)}
    norm = opt.max_grad_norm
    options = import_options(groups.options, groups.states, "param_groups")
    return {
        "version": import_module("fastadam").__version__,
        "step_count": opt.step_count,
        "params": [state.key for state in groups.states],
        "steps": opt._plan.steps.tolist(),
        "groups": export_groups(options, groups.states),
        "amsgrad": opt.amsgrad,
        "ema_decay": opt.ema_decay,
        "max_grad_norm": "inf" if norm == math.inf else norm,
        "nonfinite": opt.nonfinite,
        "schedule": schedule,
    }


def _parse(reader: Reader) -> Checkpoint:
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


def _count(value: Any) -> int:
    if not is_count(value):
        raise ValueError(f"a count of steps must be under 2**62, got {value!r:.60}")
    return int(value)
