"""The scalars of a step: each group's hyperparameters, checked, in float64."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..params import checks, hyperparameters
from ..params.groups import Groups, ParamGroup
from ..params.names import suggestion
from .layout import (
    BETA1,
    BETA2,
    EPS,
    GRAD_FACTOR,
    GROUP_COLUMNS,
    L2,
    LR,
    ONE_MINUS_EMA_DECAY,
    WEIGHT_DECAY,
)


class Scalars:
    """A row of float64 for each group, made anew only where a hyperparameter may have changed.

    The backend casts them to the dtype of the parameters.
    """

    def __init__(self, groups: Groups) -> None:
        self.rows = np.zeros((len(groups.options), GROUP_COLUMNS), dtype=np.float64)
        if groups.ema_decay is not None:
            self.rows[:, ONE_MINUS_EMA_DECAY] = 1.0 - groups.ema_decay
        self._options = groups.options
        for options in self._options:
            options.touched = True
        self._fixed = groups.fixed
        self._dtypes = groups.dtypes()
        # Of each group: the largest number of its smallest dtype, and the largest learning
        # rate that leads to no larger step.
        self._largest = [min(limits("max", d), default=np.inf) for d in self._dtypes]
        self._largest_lr = list(self._largest)
        # The largest number of the smallest dtype of all groups.
        self.largest = min(self._largest, default=np.inf)
        self._tiny = max(limits("tiny", set().union(*self._dtypes)), default=0.0)
        self._lrs, self._signs = [0.0] * len(self._options), [1.0] * len(self._options)
        # What the rows were last made for: factor on lr, factor on the gradients.
        self._made_for: tuple[float, float] | None = None
        # The first group's learning rate in the step for which the rows were last brought up to
        # date, and 1/grad_scale.
        self.lr = 0.0
        self.inverse = 1.0

    def refresh(
        self,
        step_count: Sequence[int] | npt.NDArray[np.int64],
        schedule: Callable[[int], float] | None,
        grad_scale: float,
    ) -> float:
        """Bring the rows up to date; return the first group's learning rate.

        ``step_count``, of length 1, holds what the schedule is asked for. It is not read
        without a schedule: a CUDA device may have to be waited for.

        Raises
        ------
        TypeError, ValueError
            For a hyperparameter, a factor or a scale that is out of range.
        """
        factor = inverse = 1.0
        if schedule is not None:
            step = int(step_count[0])
            factor = checks.real(schedule(step), f"schedule({step})")
        if type(grad_scale) is not float or grad_scale != 1.0:
            inverse = invert(grad_scale, self._tiny, self.largest)
        self.inverse = inverse
        for options in self._options:
            if options.touched:
                self._made_for = None
        if self._made_for != (factor, inverse):
            self._make(factor, inverse, step_count)
        return self.lr

    def _make(self, factor: float, inverse: float, step_count: Any) -> None:
        self._made_for = None  # until all rows are done
        for k, options in enumerate(self._options):
            if options.touched:
                options.touched = False  # first, so that a write from now on is not missed
                try:
                    self._read(k, options)
                except BaseException:
                    options.touched = True
                    raise
            lr = self._lrs[k] * factor
            if not lr <= self._largest_lr[k]:
                raise ValueError(
                    f"lr * schedule({int(step_count[0])}) must not exceed"
                    f" {self._largest_lr[k]:.4g}, where steps become infinite in the parameters'"
                    f" dtype, got {lr!r}"
                )
            self.rows[k, LR] = lr
            self.rows[k, GRAD_FACTOR] = inverse * self._signs[k]
        self.lr = float(self.rows[0, LR]) if self._options else 0.0
        self._made_for = factor, inverse

    def _read(self, k: int, options: ParamGroup) -> None:
        missing = [name for name in hyperparameters.NAMES if name not in options]
        if missing:
            raise ValueError(f"param_groups[{k}] must have {missing[0]!r}")
        keys, params = self._fixed[k]
        if options.keys() != keys or options["params"] is not params:
            other = sorted(map(str, options.keys() ^ keys))
            raise ValueError(
                f"param_groups[{k}] must keep its keys and its 'params', got"
                f" {other or 'other params'}{suggestion(other[0], keys) if other else ''}"
            )
        label = f"param_groups[{k}]."
        checked = hyperparameters.check_options(options, label)
        for dtype in self._dtypes[k]:
            hyperparameters.check_fits(checked, dtype, label)
        self._lrs[k], self._signs[k] = checked["lr"], sign_of(checked)
        fill(self.rows[k], checked)
        self._largest_lr[k] = largest_lr(self.rows[k], self._largest[k])
        if type(options["betas"]) is not tuple:  # a list could change unnoticed
            options["betas"] = checked["betas"]


def sign_of(checked: Mapping[str, Any]) -> float:
    """Return what gradients are multiplied by, to step down or up."""
    return -1.0 if checked["maximize"] else 1.0


def fill(row: npt.NDArray[np.float64], checked: Mapping[str, Any]) -> None:
    """Write what does not differ from step to step; see `layout`."""
    decay = checked["weight_decay"]
    row[BETA1], row[BETA2] = checked["betas"]
    row[EPS] = checked["eps"]
    row[L2], row[WEIGHT_DECAY] = (
        (0.0, decay) if checked["decoupled_weight_decay"] else (decay, 0.0)
    )


def largest_lr(row: npt.NDArray[np.float64], largest: float) -> float:
    """Return the learning rate that leads beyond the largest number of the parameters' dtype."""
    # step_size is at most lr/(1-beta1), and 1-decay is lr*weight_decay.
    return float(largest * (1.0 - row[BETA1]) / max(1.0, row[WEIGHT_DECAY]))


def invert(grad_scale: float, tiny: float, largest: float) -> float:
    """Return what the gradients are multiplied by, or raise.

    ``tiny`` and ``largest`` are the ends of the normal numbers of the parameters' dtypes.
    """
    inverse = 1.0 / checks.real(grad_scale, "grad_scale", "finite and > 0")
    if not tiny <= inverse <= largest:
        raise ValueError(
            f"1/grad_scale must be in [{tiny:.4g}, {largest:.4g}], the normal"
            f" numbers of the parameters' dtype, got {grad_scale!r}"
        )
    return inverse


def limits(name: str, dtypes: Iterable[np.dtype[Any]]) -> list[float]:
    """Return the smallest normal number, "tiny", or the largest, "max", of each dtype."""
    return [float(getattr(np.finfo(dtype), name)) for dtype in dtypes]
