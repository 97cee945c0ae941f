"""Write an optimizer and its parameters to a file."""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..adam import Adam
from ..adapter import Adapter, adapter_of
from ..backends import as_host
from ..params import checks
from . import atomic_file, file_format
from .description import describe


def save(
    path: str | os.PathLike[str],
    opt: Adam | Adapter,
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
    path, keep = file_format.checked_path(path), checks.integer(keep, "keep", least=1)
    params = checks.flag(params, "params")
    if extra is not None and not isinstance(extra, Mapping):
        raise TypeError(f"extra must be a mapping, got {type(extra).__qualname__}")
    try:
        extra = _plain({} if extra is None else extra)
    except RecursionError:
        raise ValueError("extra must not be nested so deep, nor hold itself") from None
    adapter = adapter_of(opt)
    optimizer = adapter.optimizer
    with adapter._turn(), optimizer._turn():
        adapter._pull()
        states = optimizer._contents().states
        names = [str(state.key) for state in states]
        if len(set(names)) != len(names):
            raise ValueError("names must differ from the places of parameters without a name")
        "".join(names).encode()  # raises what safetensors would, later
        for state in states:
            if state.param.shape != state.shape:
                raise ValueError(
                    f"{state.label} must keep the shape that it had, {state.shape}, got"
                    f" {state.param.shape}"
                )
        tensors = {
            f"{kind}/{name}": as_host(array)
            for name, state in zip(names, states, strict=True)
            for kind, array in state.arrays(param=params).items()
        }
        description = {**describe(optimizer), "extra": extra}
        atomic_file.replace(path, lambda new: file_format.write(new, tensors, description), keep)


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
