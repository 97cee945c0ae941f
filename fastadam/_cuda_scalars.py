"""A step's scalars where the host does not know how many steps have been skipped."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from ._scalars import Scalars

# Counts of steps, and so tables, for which a schedule is asked at a time.
MOST_TABLES = 16


class DeviceScalars(Scalars):
    """A table of the groups for each count of steps that is possible.

    Attributes
    ----------
    tables : list of float64 array, shape (groups, GROUP_COLUMNS)
        One for the first possible count, one for the next, and so on.
    first : int
        That count.
    lrs : list of float
        The first group's learning rate in each table.
    """

    tables: list[npt.NDArray[np.float64]]
    first: int
    lrs: list[float]

    def refresh(
        self, step_count: Any, schedule: Callable[[int], float] | None, grad_scale: float
    ) -> float:
        """Bring the tables up to date, as `Scalars.refresh`; return the last one's rate."""
        # Without a schedule, one table does for whatever count it is.
        possible = [0] if schedule is None else step_count.possible()
        self.first, self.tables, self.lrs = possible[0], [], []
        for count in possible:
            self.lrs.append(super().refresh([count], schedule, grad_scale))
            self.tables.append(self.rows if len(possible) == 1 else self.rows.copy())
        return self.lrs[-1]

    def lr_of(self) -> Callable[[int], float]:
        """Return what tells the rate of a step by its number."""
        first, lrs = self.first, self.lrs
        return lambda step: lrs[min(max(step - first, 0), len(lrs) - 1)]
