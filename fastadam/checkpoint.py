"""Checkpoints: an optimizer and its parameters in one safetensors file."""

import contextlib
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from . import _atomic_file, _checkpoint_file, _options
from ._backend import as_host
from ._checkpoint_file import CheckpointError, Reader
from ._schedule_base import Schedule, integer
from ._schedule_plain import from_plain, to_plain
from ._state import (
    KINDS,
    PARAM,
    LoadedState,
    by_group,
    group_mismatches,
    import_options,
    is_count,
    state_mismatches,
)
from .adam import Adam, take_turn
from .interop.objects import ObjectAdam

__all__ = ["Checkpoint", "CheckpointError", "inspect", "load", "save"]

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
    """

    version: str
    step_count: int
    steps: dict[Key, int]
    param_groups: list[dict[str, Any]]
    schedule: Schedule | str | None
    max_grad_norm: float | None
    nonfinite: str
    ema_decay: float | None
    amsgrad: bool
    extra: dict[str, Any]
    tensors: dict[str, tuple[np.dtype[Any], tuple[int, ...]]]


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
        Whatever else a run needs to go on, made of what JSON has: `load` returns
        it, tuples as lists. Keys are str.

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
    _checkpoint_file.need_safetensors()
    keep = integer("keep", keep, least=1)
    params = _options.flag(params, "params")
    if extra is not None and not isinstance(extra, Mapping):
        raise TypeError(f"extra must be a mapping, got {type(extra).__qualname__}")
    _check_keys(extra)
    with _turn(opt) as adam:
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
        description = {**_describe(adam), "extra": dict(extra or {})}
        _atomic_file.replace(
            Path(path), lambda new: _checkpoint_file.write(new, tensors, description), keep
        )


def load(
    path: str | os.PathLike[str],
    opt: Adam | ObjectAdam,
    *,
    params: bool = True,
    hyperparameters: bool = True,
    rename: Mapping[Any, Any] | Callable[[Any], Any] | None = None,
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
        Whether to load the parameters too.
    hyperparameters : bool
        Whether to load the groups' hyperparameters, ``schedule``,
        ``max_grad_norm`` and ``nonfinite`` too, or leave the optimizer's own.
        A schedule that the file could not hold must be the optimizer's own.
    rename : mapping or callable, optional
        From a parameter's name in the file, or place (int) where it has none, to
        that in the optimizer; what a mapping does not have keeps its name.
    partial : bool
        Load only the parameters that are in both, and no hyperparameters; the
        others keep their state, and groups may differ.

    Returns
    -------
    Checkpoint
        What the file says, ``extra`` included.

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
    params, partial = _options.flag(params, "params"), _options.flag(partial, "partial")
    hyperparameters = _options.flag(hyperparameters, "hyperparameters") and not partial
    if rename is not None and not (isinstance(rename, Mapping) or callable(rename)):
        raise TypeError(f"rename must be a mapping or callable, got {rename!r:.60}")
    path = Path(path)
    with _turn(opt) as adam:
        if isinstance(opt, ObjectAdam):
            opt._check_arrays()
        with _checkpoint_file.opened(path) as reader:
            with _checkpoint_file.blaming(path):
                checkpoint = _parse(reader)
            own = {key: _renamed(key, rename) for key in checkpoint.steps}
            groups = adam._groups
            present = set(own.values())
            states = [s for s in groups.states if not partial or s.key in present]
            with _checkpoint_file.blaming(path):
                found = _state(checkpoint, own, params)
            if partial:
                known = {state.key for state in states}
                found = {key: entry for key, entry in found.items() if key in known}

            wrong = [f"two parameters are {key!r}" for key in _twice(own.values())]
            wrong += state_mismatches(found, states, param=params)
            options: list[dict[str, Any]] = []
            settings: dict[str, Any] = {}
            if hyperparameters:
                given = [
                    {**group, "params": [own[key] for key in group["params"]]}
                    for group in checkpoint.param_groups
                ]
                wrong += group_mismatches(given, states, len(groups.options))
                settings, more = _settings(checkpoint, adam)
                wrong += more
            if not wrong and hyperparameters:
                try:
                    options = import_options(given, states, "param_groups")
                except ValueError as error:  # not in the range of the parameters' dtype
                    wrong.append(str(error))
            if wrong:
                raise CheckpointError(f"{path} must fit the optimizer: {'; '.join(wrong)}")

            names = {key: name for name, key in own.items()}
            targets, sources = [], []
            for state in states:
                for kind, target in state.arrays(param=params).items():
                    targets.append(target)
                    sources.append(reader.read(f"{kind}/{names[state.key]}"))
        steps = adam._plan.steps
        for place, state in enumerate(groups.states):
            if state.key in names:
                steps[place] = checkpoint.steps[names[state.key]]
        loaded = LoadedState(targets, sources, steps, checkpoint.step_count, options, settings)
        if isinstance(opt, ObjectAdam) and params:
            loaded.calls = opt._value_writes
        adam._take_over(loaded)
    return checkpoint


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
    path = Path(path)
    with _checkpoint_file.opened(path) as reader:
        with _checkpoint_file.blaming(path):
            checkpoint = _parse(reader)
        for name in checkpoint.tensors if verify else ():
            reader.read(name)
    return checkpoint


def _check_keys(extra: Any) -> None:
    """Refuse keys that JSON has not, and would make text of."""
    if isinstance(extra, Mapping):
        for key in extra:
            if not isinstance(key, str):
                raise TypeError(f"extra must have keys of str, got {key!r:.60}")
        extra = extra.values()
    elif not isinstance(extra, list | tuple):
        return
    for value in extra:
        _check_keys(value)


@contextlib.contextmanager
def _turn(opt: Any) -> Iterator[Adam]:
    """Keep others from stepping an optimizer; give the `Adam` that it is, or has underneath."""
    if isinstance(opt, ObjectAdam):
        with take_turn(opt._lock), take_turn(opt.optimizer._lock):
            yield opt.optimizer
    elif isinstance(opt, Adam):
        with take_turn(opt._lock):
            yield opt
    else:
        raise TypeError(f"opt must be an optimizer of fastadam's, got {type(opt).__qualname__}")


def _describe(opt: Adam) -> dict[str, Any]:
    """Return, made of what JSON has, all that tensors do not tell; `_parse` reads it."""
    groups = opt._groups
    try:
        schedule = to_plain(opt.schedule)
    except TypeError:
        schedule = {"repr": repr(opt.schedule)}
    norm = opt.max_grad_norm
    return {
        "version": import_module("fastadam").__version__,
        "step_count": opt.step_count,
        "params": [state.key for state in groups.states],
        "steps": opt._plan.steps.tolist(),
        "groups": [
            {
                **options,
                "params": [state.key for state in members],
            }
            for options, members in zip(
                import_options(groups.options, groups.states, "param_groups"),
                by_group(groups.states, len(groups.options)),
                strict=True,
            )
        ],
        "amsgrad": opt.amsgrad,
        "ema_decay": opt.ema_decay,
        "max_grad_norm": "inf" if norm == math.inf else norm,
        "nonfinite": opt.nonfinite,
        "schedule": schedule,
    }


def _parse(reader: Reader) -> Checkpoint:
    """Return what a file says, each part checked; raise whatever comes up."""
    said = reader.description
    keys = [_key(key) for key in said["params"]]
    steps = dict(zip(keys, map(_count, said["steps"]), strict=True))
    names = {str(key) for key in keys}
    if len(names) != len(keys):
        raise ValueError("two parameters have one name")
    groups = [
        {**_options.check_options(group), "params": [_key(key) for key in group["params"]]}
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
        max_grad_norm=_options.check_max_grad_norm(math.inf if norm == "inf" else norm),
        nonfinite=_options.check_nonfinite(said["nonfinite"]),
        ema_decay=_options.check_ema_decay(said["ema_decay"]),
        amsgrad=_options.flag(said["amsgrad"], "amsgrad"),
        extra=dict(said["extra"]),
        tensors=dict(sorted(reader.layout.items())),
    )


def _key(key: Any) -> Key:
    if isinstance(key, bool) or not isinstance(key, int | str):
        raise TypeError(f"a parameter's name must be str, or int for a place, got {key!r:.60}")
    return key


def _count(value: Any) -> int:
    if not is_count(value):
        raise ValueError(f"a count of steps must be under 2**62, got {value!r:.60}")
    return int(value)


def _renamed(key: Key, rename: Mapping[Any, Any] | Callable[[Any], Any] | None) -> Key:
    if rename is None:
        return key
    return _key(rename.get(key, key) if isinstance(rename, Mapping) else rename(key))


def _twice(keys: Iterable[Key]) -> list[Key]:
    return [key for key, count in Counter(keys).items() if count > 1]


def _state(checkpoint: Checkpoint, own: Mapping[Key, Key], params: bool) -> dict[Key, Any]:
    """Return what is as the ``"state"`` of a state_dict, but its arrays have no memory."""
    state: dict[Key, Any] = {own[key]: {"step": step} for key, step in checkpoint.steps.items()}
    by_name = {str(key): key for key in checkpoint.steps}
    for name, (dtype, shape) in checkpoint.tensors.items():
        kind, _, param = name.partition("/")
        if kind != PARAM or params:
            state[own[by_name[param]]][kind] = np.broadcast_to(np.zeros((), dtype), shape)
    return state


def _settings(checkpoint: Checkpoint, opt: Adam) -> tuple[dict[str, Any], list[str]]:
    """Return what to set of an optimizer's attributes, and what does not fit those that stay."""
    settings: dict[str, Any] = {
        "_max_grad_norm": checkpoint.max_grad_norm,
        "_nonfinite": checkpoint.nonfinite,
    }
    wrong = []
    if not isinstance(checkpoint.schedule, str):
        settings["_schedule"] = checkpoint.schedule
    elif opt.schedule is None:
        wrong.append(f"schedule was {checkpoint.schedule:.60}, which the optimizer must be given")
    if checkpoint.ema_decay != opt.ema_decay and None not in (checkpoint.ema_decay, opt.ema_decay):
        wrong.append(f"ema_decay is {checkpoint.ema_decay!r}, not {opt.ema_decay!r}")
    return settings, wrong
