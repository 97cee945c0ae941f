"""The same step for who keeps parameters, state and counts of steps: lists of arrays, in place.

What engines stand on that keep all of that themselves: torch's optimizers, ZeRO, FSDP, Megatron.
"""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from . import backends
from .params import checks, hyperparameters
from .params.arrays import kind_of
from .params.kinds import is_array
from .params.types import Array, Betas, Nonfinite
from .runtime import register_after_fork
from .state import roles
from .update import layout
from .update.result import StepResult
from .update.settings import NAMES, Groups, Settings, is_listed

__all__ = ["adam"]


def __dir__() -> list[str]:
    return sorted(__all__)


# One value for all parameters, or one for each.
Reals: TypeAlias = float | Sequence[float] | npt.NDArray[np.floating[Any]]
Flags: TypeAlias = bool | Sequence[bool] | npt.NDArray[np.bool_]
Pairs: TypeAlias = Betas | Sequence[Betas]

_Given: TypeAlias = tuple[Any, ...]
_LISTS = ("params", "grads", *(role.argument for role in roles.ROLES))
_OPTIONAL = [role.argument for role in roles.ROLES if role.option is not None]


def adam(
    params: Sequence[Array],
    grads: Sequence[Array | None],
    exp_avgs: Sequence[Array],
    exp_avg_sqs: Sequence[Array],
    max_exp_avg_sqs: Sequence[Array] | None = None,
    averages: Sequence[Array] | None = None,
    *,
    steps: npt.NDArray[np.int64] | Sequence[Array],
    groups: Sequence[int] | None = None,
    lr: Reals = 1e-2,
    betas: Pairs = (0.9, 0.95),
    eps: Reals = 1e-8,
    weight_decay: Reals = 0.0,
    decoupled_weight_decay: Flags = False,
    maximize: Flags = False,
    ema_decay: Reals | None = None,
    grad_scale: float = 1.0,
    max_grad_norm: float | None = None,
    nonfinite: Nonfinite = "propagate",
    zero_grad: bool = False,
    num_threads: int | None = None,
) -> StepResult | None:
    """Take one step of Adam over lists of arrays, all updated in place.

    The arithmetic, and so every bit, is that of `Adam.step`. Nothing of yours is
    kept: what is remembered between calls is where arrays lie, of which shape
    and dtype. Where a call's arrays lie elsewhere, that is found out, at some
    hundred times the cost of looking.

    Parameters
    ----------
    params : sequence of array
        NumPy arrays, torch tensors on the CPU, which may require grad, or arrays
        on one CUDA device; of float32 or float64, of any shape, C- or
        Fortran-contiguous and writable.
    grads : sequence of array or None
        The gradient of each, of its shape, dtype and memory order. None leaves
        a parameter, its state and its count as they are.
    exp_avgs, exp_avg_sqs : sequence of array
        Both moments of each parameter, of its shape, dtype and memory order:
        zeros before the first step.
    max_exp_avg_sqs : sequence of array, optional
        The largest ``exp_avg_sq`` so far, zeros at first. Their presence turns
        AMSGrad on.
    averages : sequence of array, optional
        The moving averages of the parameters, copies of them at first; with
        ``ema_decay``.
    steps : numpy.ndarray of int64, shape (len(params),), or sequence of array
        Steps that each parameter has had. Each that has a gradient is counted
        up, in the array, by the same kernel that updates the parameter. Or an
        array for each parameter, of float32 or float64 and shape (), on the
        CPU: as torch's optimizers keep them, ``state_steps``. In float32 a
        count ends at 2**24, as torch's does.
    groups : sequence of int, optional
        For each parameter the place of its values in those hyperparameters that
        are sequences. By default each has its own.
    lr, eps, weight_decay, ema_decay : float, or sequence of float
        As in `Adam`, one value for all parameters, or one for each or for each
        group.
    betas : pair of float, or sequence of such pairs
        The same.
    decoupled_weight_decay, maximize : bool, or sequence of bool
        The same. A sequence may be a list, a tuple or a NumPy array. Values
        that do not differ cost least as one.
    grad_scale, zero_grad
        As in `Adam.step`.
    max_grad_norm, nonfinite
        As in `Adam`; the norm is that of all gradients of the call.
    num_threads
        As in `Adam`; it may be another in each call.

    Returns
    -------
    StepResult or None
        None, unless ``max_grad_norm`` or ``nonfinite`` asks for the norm. Its
        ``step`` is then ``steps[0]`` as it was, its ``lr`` that of the first
        parameter.

    Raises
    ------
    TypeError, ValueError
        For lists of different lengths, an array that cannot be updated where
        it lies, does not fit its parameter or shares memory with another, or a
        value out of range. The message names argument and place, such as
        ``exp_avgs[3]``. Nothing has then been changed.
    FloatingPointError
        With ``nonfinite="raise"``, for a gradient that holds NaN or infinity.
        Nothing has then been changed.

    Notes
    -----
    Calls may be made at once in several threads, over different arrays.

    Torch's autograd is not told that parameters change: no tensor of a graph
    that is still to be run backward may be updated.

    Examples
    --------
    >>> import numpy as np
    >>> from fastadam import functional
    >>> params = [np.ones((2, 2)), np.zeros(3)]
    >>> exp_avgs = [np.zeros_like(p) for p in params]
    >>> exp_avg_sqs = [np.zeros_like(p) for p in params]
    >>> steps = np.zeros(2, dtype=np.int64)
    >>> grads = [np.ones((2, 2)), None]
    >>> functional.adam(params, grads, exp_avgs, exp_avg_sqs, steps=steps, lr=0.5)
    >>> params[0].round(6), steps
    (array([[0.5, 0.5],
           [0.5, 0.5]]), array([1, 0]))
    """
    try:
        # Tuples of our own keep the arrays alive until the kernel has run.
        given: _Given = (
            tuple(params),
            tuple(grads),
            tuple(exp_avgs),
            tuple(exp_avg_sqs),
            None if max_exp_avg_sqs is None else tuple(max_exp_avg_sqs),
            None if averages is None else tuple(averages),
            steps if type(steps) is np.ndarray else tuple(steps),
        )
    except TypeError:
        _check_lists(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, averages)
        raise TypeError(
            f"steps must be a numpy.ndarray of int64, or a list of arrays of one float, got"
            f" {kind_of(steps)}"
        ) from None
    if (averages is None) is not (ema_decay is None):
        raise ValueError(
            "averages and ema_decay must be given together, got"
            f" {'averages' if ema_decay is None else 'ema_decay'} alone"
        )
    if zero_grad is not False:
        zero_grad = checks.flag(zero_grad, "zero_grad")
    limited = max_grad_norm is not None or nonfinite != "propagate"
    if limited:
        max_grad_norm = hyperparameters.check_max_grad_norm(max_grad_norm)
        nonfinite = hyperparameters.check_nonfinite(nonfinite)
    if num_threads is not None:
        num_threads = hyperparameters.check_num_threads(num_threads)
    values = (  # in the order of `settings.NAMES`
        lr,
        betas,
        eps,
        weight_decay,
        decoupled_weight_decay,
        maximize,
        ema_decay,
        grad_scale,
    )
    backend = backends.host()
    key = backend.find_tables(given)
    if key == 0:  # other libraries' arrays, or none
        backend = backends.of(given[0])
        _check_lists(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, averages)
        if not given[0]:
            settings = Settings([], _groups(values, groups, 0))
            settings.set(values)
            return StepResult(0, settings.lr, 0.0) if limited else None
        given = backend.take_lists(given)
        key = backend.find_tables(given)
    # Out of the dict while it is used: whoever comes meanwhile, another thread or a signal's
    # handler, makes another. Back at the end, so that the first are those not used for longest.
    tables = _tables.pop(key, None)
    if tables is None or not tables.stepper.fit(given, zero_grad):
        _check_lists(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, averages)
        rows = _groups(values, groups, len(given[0]))
        tables, given = _renewed(tables, backend, given, zero_grad, rows)
    try:
        # What is not the same object is checked. (To compare by == would let True pass for 1.0.)
        lr0, betas0, eps0, decay0, decoupled0, maximize0, ema0, scale0 = tables.settings.given
        same = (
            lr is lr0
            and betas is betas0
            and eps is eps0
            and weight_decay is decay0
            and decoupled_weight_decay is decoupled0
            and maximize is maximize0
            and ema_decay is ema0
            and grad_scale is scale0
        )
        if not (same or tables.settings.set_lr(values)):
            rows = _groups(values, groups, len(given[0]))
            if tables.settings.groups != rows:
                given = backend.take_lists(given)
                tables = _Tables(backend, given, zero_grad, rows)
            tables.settings.set(values)
        if num_threads is not tables.num_threads:
            tables.set_num_threads(num_threads)
        if limited:
            return tables.stepper.limited_step(given, zero_grad, max_grad_norm, nonfinite)
        tables.stepper.step(given, zero_grad)
        return None
    finally:
        _tables[key] = tables


class _Tables:
    """What is remembered of the arrays of one call, for the next with the same.

    Attributes
    ----------
    stepper : ListStepper
    settings : Settings
    num_threads : int or None
        What was asked for.
    weight : int
        What it counts towards `_MOST`.
    """

    __slots__ = ("num_threads", "settings", "stepper", "weight")

    def __init__(
        self, backend: backends.Backend, given: _Given, zero_grad: bool, groups: Groups
    ) -> None:
        self.stepper, self.settings = backend.make_list_stepper(given, zero_grad, groups)
        self.num_threads: int | None = None
        self.weight = len(given[0]) + 20
        if not self.stepper.fit(given, zero_grad):
            raise RuntimeError("arrays must not change while a step looks at them")

    def set_num_threads(self, asked: int | None) -> None:
        """Let the steps to come take so many threads."""
        self.stepper.set_num_threads(asked)
        self.num_threads = asked


# By a number made of where parameters lie: an entry is not trusted before it has been compared
# with the arrays. At most of some 100,000 arrays, or 4,700 calls of one: 60 MB.
_tables: dict[int, _Tables] = {}
_MOST = 100_000


def _renewed(
    tables: _Tables | None,
    backend: backends.Backend,
    given: _Given,
    zero_grad: bool,
    groups: Groups,
) -> tuple[_Tables, _Given]:
    """Return tables that fit what is given, and that with the backend's own arrays."""
    given = backend.take_lists(given)
    if tables is None or not tables.stepper.fit(given, zero_grad):
        tables = _Tables(backend, given, zero_grad, groups)
        with contextlib.suppress(RuntimeError, KeyError):  # other threads may do the same
            while sum(each.weight for each in list(_tables.values())) > _MOST:
                del _tables[next(iter(_tables))]
    return tables, given


def _groups(values: tuple[Any, ...], groups: Sequence[int] | None, count: int) -> Groups:
    """Return the place of each parameter's hyperparameters; None if all have the same."""
    if not any(map(is_listed, NAMES, values)):
        return None
    if groups is None:
        return range(count)
    if len(groups) != count or not all(type(k) is int and k >= 0 for k in groups):
        raise ValueError(
            f"groups must be an int >= 0 for each of {count} params, got {groups!r:.60}"
        )
    return tuple(groups)


def _check_lists(*lists: Any) -> None:
    """Refuse what is no list of arrays, and lists of different lengths."""
    for name, arrays in zip(_LISTS, lists, strict=True):
        if arrays is None and name in _OPTIONAL:
            continue
        try:
            wrong = is_array(arrays) or isinstance(arrays, Mapping | str)
            len(arrays)
        except TypeError:
            wrong = True
        if wrong:
            raise TypeError(f"{name} must be a list of arrays, got {kind_of(arrays)}")
        if len(arrays) != len(lists[layout.PARAM]):
            raise ValueError(
                f"{name} must have one array for each of {len(lists[layout.PARAM])} params, got"
                f" {len(arrays)}"
            )


class _AfterFork:
    """In a forked child other kernels may be needed: all tables are made again."""

    def _after_fork(self) -> None:
        _tables.clear()


_after_fork = _AfterFork()
register_after_fork(_after_fork)
