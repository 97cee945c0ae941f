"""A step's scalars: what the groups ask for, checked, in float64, for the backend to cast."""

from collections.abc import Callable
from operator import is_, itemgetter
from typing import Any

import numpy as np

from . import _options
from ._groups import Groups

# The columns of a group's row: the arguments of `_formula.step_scalars` but the step.
LR, BETA1, BETA2, EPS, L2, WEIGHT_DECAY, GRAD_FACTOR = range(7)

_hyperparameters = itemgetter(*_options.NAMES)


class Scalars:
    """A row of float64 for each group, read again only when a hyperparameter differs."""

    def __init__(self, groups: Groups) -> None:
        self.rows = np.zeros((len(groups.options), GRAD_FACTOR + 1), dtype=np.float64)
        self._options = groups.options
        self._seen: list[Any] = [None] * len(groups.options)
        self._keys = [set(options) for options in groups.options]
        self._params = [options["params"] for options in groups.options]
        self._dtypes = groups.dtypes()
        # What every dtype of the group holds; the learning rate that leads beyond it.
        self._largest = [min(_limits("max", d), default=np.inf) for d in self._dtypes]
        self._largest_lr = list(self._largest)
        self._tiny = max(_limits("tiny", set().union(*self._dtypes)), default=0.0)

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
        inverse = 1.0
        if type(grad_scale) is not float or grad_scale != 1.0:
            inverse = self._invert(grad_scale)
        first = 0.0
        for k, options in enumerate(self._options):
            if not self._has_seen(k, options):  # by identity: True is not 1.0
                self._read(k, options)
            lr, _, _, _, _, maximize = self._seen[k]
            lr *= factor
            if not lr <= self._largest_lr[k]:
                raise ValueError(
                    f"lr * schedule({step}) must not exceed {self._largest_lr[k]:.4g}, where"
                    f" steps become infinite in the parameters' dtype, got {lr!r}"
                )
            self.rows[k, LR] = lr
            self.rows[k, GRAD_FACTOR] = -inverse if maximize else inverse
            first = first if k else lr
        return first

    def _has_seen(self, k: int, options: dict[str, Any]) -> bool:
        try:
            now = _hyperparameters(options)
        except KeyError as error:
            raise ValueError(f"param_groups[{k}] must have {error.args[0]!r}") from None
        if len(options) != len(self._keys[k]) or options.get("params") is not self._params[k]:
            raise ValueError(
                f"param_groups[{k}] must keep its keys and its 'params', got"
                f" {sorted(map(str, options.keys() ^ self._keys[k])) or 'other params'}"
            )
        seen = self._seen[k]
        return seen is not None and all(map(is_, now, seen))

    def _read(self, k: int, options: dict[str, Any]) -> None:
        label = f"param_groups[{k}]."
        self._seen[k] = None  # until the row is whole
        checked = _options.check_options(options, label)
        for dtype in self._dtypes[k]:
            _options.check_fits(checked, dtype, label)
        options.update(checked)
        decay, decoupled = checked["weight_decay"], checked["decoupled_weight_decay"]
        row = self.rows[k]
        row[BETA1], row[BETA2] = checked["betas"]
        row[EPS] = checked["eps"]
        row[L2], row[WEIGHT_DECAY] = (0.0, decay) if decoupled else (decay, 0.0)
        # step_size is at most lr/(1-beta1), and 1-decay is lr*weight_decay.
        self._largest_lr[k] = self._largest[k] * (1.0 - row[BETA1]) / max(1.0, row[WEIGHT_DECAY])
        self._seen[k] = _hyperparameters(checked)

    def _invert(self, grad_scale: float) -> float:
        inverse = 1.0 / _options.real(grad_scale, "grad_scale", open_low=True)
        largest = min(self._largest, default=np.inf)
        if not self._tiny <= inverse <= largest:
            raise ValueError(
                f"1/grad_scale must be in [{self._tiny:.4g}, {largest:.4g}], the normal numbers"
                f" of the parameters' dtype, got {grad_scale!r}"
            )
        return inverse


def _limits(name: str, dtypes: set[np.dtype[Any]]) -> list[float]:
    return [float(getattr(np.finfo(dtype), name)) for dtype in dtypes]
