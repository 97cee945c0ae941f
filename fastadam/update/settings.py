"""Hyperparameters that come with every call: read again only where a value is another."""

import sys
from collections.abc import Sequence
from itertools import repeat
from operator import is_
from typing import Any, TypeAlias

import numpy as np

from ..params import hyperparameters
from .layout import GRAD_FACTOR, GROUP_COLUMNS, LR, ONE_MINUS_EMA_DECAY
from .scalars import fill, invert, largest_lr, limits, sign_of

# For each parameter the place of its row: a range if each has its own, None if all have one.
Groups: TypeAlias = tuple[int, ...] | range | None

# In this order, and then the gradients' scale.
NAMES = (*hyperparameters.NAMES, "ema_decay")
# What cannot change while it is the same object.
_FIXED = {float, np.float64, int, bool, type(None)}
_UNKNOWN = (object(),) * (len(NAMES) + 1)


def is_listed(name: str, value: Any) -> bool:
    """Whether a value is one for each parameter."""
    if name == "betas" and isinstance(value, tuple | list):
        return bool(value) and isinstance(value[0], tuple | list)
    return isinstance(value, tuple | list | np.ndarray)


class Settings:
    """A row of float64 for all parameters, or for each group; to a stepper what `Scalars` is.

    Parameters
    ----------
    dtypes : sequence of dtype
        Of each parameter.
    groups : Groups
        None where no hyperparameter is listed.

    Attributes
    ----------
    given : tuple
        What the rows hold, by the names in `NAMES`, then the scale of the gradients.
        Whoever finds all of them the same objects need call nothing.
    rows, lr, inverse, largest
        As in `Scalars`.
    """

    def __init__(self, dtypes: Sequence[np.dtype[Any]], groups: Groups) -> None:
        self.groups = groups
        self._dtypes: list[set[np.dtype[Any]]] = [set(dtypes)]
        if groups is not None:
            self._dtypes = [set() for _ in range(max(groups, default=-1) + 1)]
            for dtype, group in zip(dtypes, groups, strict=True):
                self._dtypes[group].add(dtype)
        self.rows = np.zeros((len(self._dtypes), GROUP_COLUMNS), dtype=np.float64)
        # As messages call what has a row.
        self._whose = "param" if isinstance(groups, range) else "group"
        self._largest = [min(limits("max", each), default=np.inf) for each in self._dtypes]
        self.largest = min(self._largest, default=np.inf)
        self._tiny = max(limits("tiny", set(dtypes)), default=0.0)
        self._checked: list[Any] = [None] * len(self._dtypes)
        self._signs = np.ones(len(self._dtypes))
        self._largest_lr = -1.0
        # What the values in lists were, too, if that is known.
        self._items: list[Any] | None = None
        self.given: tuple[Any, ...] = _UNKNOWN
        self.lr, self.inverse = 0.0, 1.0

    def set_lr(self, given: tuple[Any, ...]) -> bool:
        """Do what `set` does, if the learning rate alone is another, as of a schedule."""
        lr = given[0]
        others_same = all(map(is_, given[1:], self.given[1:]))
        if others_same and type(lr) in (float, np.float64) and 0.0 <= lr <= self._largest_lr:
            self.rows[0, LR] = self.lr = float(lr)
            self._checked[0], self._items, self.given = None, None, given
            return True
        return False

    def set(self, given: tuple[Any, ...]) -> None:
        """Check hyperparameters and write them to the rows.

        Raises
        ------
        TypeError, ValueError
            For one out of range, or a list of another length.
        """
        items = [_items(value) for value in given]
        if self._items is not None and all(map(_same, items, self._items)):
            return
        self.given, self._largest_lr, self._items = _UNKNOWN, -1.0, None  # until all is whole
        self.inverse = invert(given[-1], self._tiny, self.largest)
        columns = [self._column(*pair) for pair in zip(NAMES, given[:-1], strict=True)]
        for k in range(len(self.rows)):
            values = tuple(map(next, columns))
            if values != self._checked[k]:
                self._write(k, values)
        self.rows[:, GRAD_FACTOR] = self.inverse * self._signs
        self.lr = float(self.rows[0, LR]) if len(self.rows) else 0.0
        if None not in items:
            self._items = items
            if self.groups is None and list not in map(type, given):  # a list can change unseen
                self._largest_lr = largest_lr(self.rows[0], self._largest[0])
                self.given = given

    def _column(self, name: str, value: Any) -> Any:
        """Return an iterator over what is checked of one hyperparameter."""
        check = hyperparameters.CHECKS.get(name, hyperparameters.check_ema_decay)
        if self.groups is None or not is_listed(name, value):
            return repeat(check(value, name))
        values = value.tolist() if isinstance(value, np.ndarray) else value
        # A group without parameters may have values.
        most = len(self.rows) if self._whose == "param" else sys.maxsize
        if not isinstance(values, list | tuple) or not len(self.rows) <= len(values) <= most:
            got = value.shape if isinstance(value, np.ndarray) else len(value)
            raise ValueError(
                f"{name} must be one value, or one for each of {len(self.rows)}"
                f" {self._whose}s, got {got}"
            )
        try:
            return iter([check(each, name) for each in values[: len(self.rows)]])
        except (TypeError, ValueError):
            return iter([check(each, f"{name}[{k}]") for k, each in enumerate(values)])

    def _write(self, k: int, values: tuple[Any, ...]) -> None:
        self._checked[k], row = None, self.rows[k]
        checked = dict(zip(NAMES, values, strict=True))
        label = "" if self.groups is None else f"for {self._whose}s[{k}], "
        for dtype in self._dtypes[k]:
            hyperparameters.check_fits(checked, dtype, label)
        fill(row, checked)
        largest = largest_lr(row, self._largest[k])
        if not checked["lr"] <= largest:
            raise ValueError(
                f"{label}lr must not exceed {largest:.4g}, where steps become infinite in the"
                f" parameters' dtype, got {checked['lr']!r}"
            )
        ema_decay = checked["ema_decay"]
        row[ONE_MINUS_EMA_DECAY] = 0.0 if ema_decay is None else 1.0 - ema_decay
        row[LR], self._signs[k] = checked["lr"], sign_of(checked)
        self._checked[k] = values


def _items(value: Any) -> tuple[Any, ...] | None:
    """Return what a value consists of, if it is of numbers, and they cannot change unseen."""
    if type(value) in _FIXED:
        return _UNKNOWN, value  # unlike a list of one
    if isinstance(value, tuple | list) and {*map(type, value)} <= _FIXED:
        return tuple(value)
    return None


def _same(items: tuple[Any, ...] | None, others: tuple[Any, ...]) -> bool:
    return items is not None and len(items) == len(others) and all(map(is_, items, others))
