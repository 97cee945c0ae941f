"""Read a file into an optimizer and its parameters, or say what is in it."""

import os
from collections.abc import Mapping
from dataclasses import replace

from ..adam import Adam
from ..adapter import Adapter, adapter_of
from ..params import checks
from ..runtime import alone, undisturbed
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
    path = file_format.checked_path(path)
    adapter = adapter_of(opt)
    optimizer = adapter.optimizer
    with adapter._turn(), optimizer._turn():
        adapter._pull()  # so that what is not loaded stays what it is
        with file_format.opened(path) as reader:
            with file_format.blaming(path):
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
        with alone, undisturbed():
            optimizer._take_over(loaded)
            if params:
                adapter._push()
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
    path = file_format.checked_path(path)
    with file_format.opened(path) as reader:
        with file_format.blaming(path):
            checkpoint = parse(reader)
        for name in checkpoint.tensors if verify else ():
            reader.read(name)
    return checkpoint
