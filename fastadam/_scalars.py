"""A step's scalars: what the groups ask for, checked, in float64, for the backend to cast."""

from collections.abc import Callable
from operator import itemgetter
from typing import Any

import numpy as np

from . import _options
from ._groups import Groups

# The columns of a group's row: the arguments of `_formula.step_scalars` but the step.
LR, BETA1, BETA2, EPS, L2, WEIGHT_DECAY, GRAD_FACTOR = range(7)

_hyperparameters = itemgetter(*_options.NAMES)


class Scalars:
    """A row of float64 for each group, read again only when a hyperparameter differs.

    ``largest`` is the largest number that the parameters can hold.
    """

    def __init__(self, groups: Groups, largest: float) -> None:
        self.rows = np.zeros((len(groups.options), GRAD_FACTOR + 1), dtype=np.float64)
        self._groups, self._largest = groups, largest
        self._seen: list[Any] = [None] * len(groups.options)

    def refresh(
        self, step: int, schedule: Callable[[int], float] | None, grad_scale: float
    ) -> float:
        """Bring the rows up to date; return the first group's learning rate.

        Raises
        ------
        TypeError, ValueError
            For a hyperparameter, a factor or a scale that is out of range.
        """
        factor = 1.0
        if schedule is not None:
            factor = _options.real(schedule(step), f"schedule({step})")
        inverse = 1.0 if grad_scale == 1.0 else self._inverse(grad_scale)
        first = 0.0
        for k, options in enumerate(self._groups.options):
            if _hyperparameters(options) != self._seen[k]:
                self._read(k, options)
            lr, _, _, _, _, maximize = self._seen[k]
            lr *= factor
            if lr > self._largest:
                raise ValueError(
                    f"lr * schedule({step}) must not exceed {self._largest:.4g}, the largest"
                    f" number of the parameters' dtype, got {lr!r}"
                )
            self.rows[k, LR] = lr
            self.rows[k, GRAD_FACTOR] = -inverse if maximize else inverse
            first = first if k else lr
        return first

    def _read(self, k: int, options: dict[str, Any]) -> None:
        label = f"param_groups[{k}]."
        checked = _options.check_options(options, label)
        for dtype in self._groups.dtypes(k):
            _options.check_fits(checked, dtype, label)
        options.update(checked)
        decay, decoupled = checked["weight_decay"], checked["decoupled_weight_decay"]
        row = self.rows[k]
        row[BETA1], row[BETA2] = checked["betas"]
        row[EPS] = checked["eps"]
        row[L2], row[WEIGHT_DECAY] = (0.0, decay) if decoupled else (decay, 0.0)
        self._seen[k] = _hyperparameters(options)

    def _inverse(self, grad_scale: float) -> float:
        scale = _options.real(grad_scale, "grad_scale", open_low=True)
        if scale * self._largest < 1.0:
            raise ValueError(
                f"grad_scale must be at least {1.0 / self._largest:.4g}, so that its inverse"
                f" is finite in the parameters' dtype, got {grad_scale!r}"
            )
        return 1.0 / scale
