"""Compile before the first step."""

from collections.abc import Callable, Iterable
from typing import Any

from .adam import Adam
from .adapter import Adapter, adapter_of


def compile(  # noqa: A001
    opt: Adam | Adapter, *, progress: bool | Callable[[int, int], object] = False
) -> None:
    """Prepare every kernel that an optimizer will need before its first step.

    Compiles for the optimizer's dtypes, options and sizes, with and without
    ``zero_grad``, or loads what an earlier process has left in the compile
    cache, and starts the threads. Parameters and state are not touched.

    Parameters
    ----------
    opt : Adam or what `from_objects` returned
        The optimizer. Options that bring kernels of their own, such as
        ``max_grad_norm``, should have been set.
    progress : bool or callable
        True shows a bar, for which rich must be installed; a callable is told
        how many kernels are ready, of how many.

    Raises
    ------
    TypeError
        If ``opt`` is no optimizer of fastadam's, or ``progress`` neither a
        bool nor callable.
    ImportError
        If ``progress`` is True and rich is not installed.

    Examples
    --------
    >>> import numpy as np, fastadam
    >>> opt = fastadam.Adam(np.zeros(1_000))
    >>> fastadam.compile(opt, progress=lambda done, total: print(done, "of", total))
    1 of 2
    2 of 2
    """
    optimizer = adapter_of(opt).optimizer
    if not isinstance(progress, bool) and not callable(progress):
        raise TypeError(f"progress must be True, False or callable, got {progress!r}")
    calls = optimizer._compilations()
    for done, make_ready in enumerate(_with_bar(calls) if progress is True else calls, 1):
        make_ready()
        if callable(progress):
            progress(done, len(calls))


def _with_bar(calls: list[Any]) -> Iterable[Any]:
    try:
        from rich.progress import track
    except ImportError as error:
        raise ImportError(
            "progress=True needs rich: pip install 'fastadam[demo]'", name="rich"
        ) from error
    return track(calls, description="compiling", transient=True)
