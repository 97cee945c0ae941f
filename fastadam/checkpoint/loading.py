"""Read a file into an optimizer and its parameters, or say what is in it."""

import os
from collections.abc import Mapping
from dataclasses import replace

from ..adam import Adam
from ..adapter import Adapter, adapter_of
from ..params import checks
from ..runtime import kernel_lock, signals_deferred
from ..state.state_dict import LoadedState
from . import file_format
from .description import Checkpoint, parse
from .file_format import CheckpointError
from .fit import Fit, Rename


def load(
    path: str | os.PathLike[str],
    opt: Adam | Adapter,
    *,
    params: bool = True,
    state: bool = True,
    hyperparameters: bool = True,
    rename: Rename = None,
    partial: bool = False,
) -> Checkpoint:
    """Set an optimizer and its parameters to what they were at a `save`.

    Everything is checked, checksums included, before anything is changed.
    Arrays are written in place. The file's tensors are in memory first; each is
    freed as soon as it has been copied.

    Parameters
    ----------
    path : path
        What `save` wrote, with this or an earlier version.
    opt : Adam or what `from_objects` returned
        The optimizer, made with the same names, shapes, dtypes and groups, and
        with the same ``amsgrad`` and ``ema_decay``. It is modified.
    params : bool
        Whether to load the parameters.
    state : bool
        Whether to load moments, averages and step counts. If not,
        hyperparameters are not loaded either.
    hyperparameters : bool
        Whether to load the groups' hyperparameters, ``schedule``,
        ``max_grad_norm`` and ``nonfinite``. If not, the optimizer keeps its own, and
        its groups may differ from the file's. A schedule that the file cannot hold
        must be given to the optimizer.
    rename : mapping or callable, optional
        From a parameter's name in the file, or place (int) if it has none, to
        its name in the optimizer, or to None if it is not to be loaded. Names
        that a mapping does not contain stay as they are.
    partial : bool
        Load only the parameters that both have; the others keep their values and
        state. Hyperparameters and ``step_count``, and so the place in the schedule,
        stay the optimizer's own. Averages that the optimizer does not keep are
        left out; those that the file does not have begin as the loaded parameters.

    Returns
    -------
    Checkpoint
        What the file says, ``extra`` included; ``loaded`` names those of the
        optimizer's parameters that were loaded.

    Raises
    ------
    CheckpointError
        If the file is no checkpoint, is damaged, or does not fit the optimizer;
        the message lists every mismatch. The optimizer is then unchanged.
    TypeError, ValueError
        For arguments of the wrong kind, or an object of `from_objects` that is
        not what it was.
    OSError
        If the file does not exist, or cannot be read.
    ImportError
        If safetensors is not installed.
    RuntimeError
        During a step of the optimizer.

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
    path = file_format.checked_path(path)
    adapter = adapter_of(opt)
    optimizer = adapter.optimizer
    with adapter._turn(), optimizer._turn():
        adapter._check()
        with file_format.opened(path) as reader:
            with file_format.as_checkpoint_error(path):
                checkpoint = parse(reader)
            fit = Fit(
                checkpoint,
                optimizer,
                rename,
                params=params,
                state=state,
                hyperparameters=hyperparameters,
                partial=partial,
            )
            if fit.wrong:
                wrong = "; ".join(fit.wrong)
                raise CheckpointError(f"{path} must fit the optimizer: {wrong}{fit.hint}")
            if not params or len(fit.keys) < len(optimizer._contents().states):
                adapter._pull()  # so that what is not loaded stays what it is
            sources = [reader.read(name) for _, name in fit.tensors]
        contents, step_count = optimizer._contents(), optimizer.step_count
        steps = contents.steps
        if state:
            for place, own in enumerate(contents.states):
                if own.key in fit.keys:
                    steps[place] = checkpoint.steps[fit.keys[own.key]]
            step_count = step_count if partial else checkpoint.step_count
        targets = [target for target, _ in fit.tensors]
        loaded = LoadedState(targets, sources, steps, step_count, fit.options, fit.settings)
        with kernel_lock, signals_deferred():
            optimizer._take_over(loaded)
            if params:
                adapter._push()
    return replace(checkpoint, loaded=tuple(fit.keys))


def inspect(path: str | os.PathLike[str], *, verify: bool = True) -> Checkpoint:
    """Return what a checkpoint says, without its tensors' values.

    Parameters
    ----------
    path : path
        What `save` wrote, with this or an earlier version.
    verify : bool
        Whether to read all tensors, one at a time, to verify their checksums.

    Returns
    -------
    Checkpoint

    Raises
    ------
    CheckpointError
        If the file is no checkpoint, or is damaged.
    OSError
        If it does not exist, or cannot be read.
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
    path = file_format.checked_path(path)
    with file_format.opened(path) as reader:
        with file_format.as_checkpoint_error(path):
            checkpoint = parse(reader)
        for name in checkpoint.tensors if verify else ():
            reader.read(name)
    return checkpoint
