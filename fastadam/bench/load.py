"""What else runs on this machine: with company, times of several threads mean nothing."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Self

__all__ = ["BUSY", "Others", "crowds"]

STAT = Path("/proc/stat")
# CPUs kept busy by others that count: less may be the system's own housekeeping.
BUSY = 0.15


class Others:
    """Count the CPUs that other processes, or other virtual machines, keep busy.

    Parameters
    ----------
    stat : pathlib.Path
        Where Linux counts what its CPUs have done.

    Attributes
    ----------
    cpus : float or None
        How many, on average over the ``with`` block, which must wait for the
        child processes it starts; None where nothing tells.

    Examples
    --------
    >>> from fastadam.bench.load import Others
    >>> with Others() as others:
    ...     total = sum(range(1000))
    >>> others.cpus is None or others.cpus >= 0
    True
    """

    def __init__(self, stat: Path = STAT) -> None:
        self.stat, self.cpus = stat, None  # type: tuple[Path, float | None]

    def __enter__(self) -> Self:
        self._before = self._sample()
        return self

    def __exit__(self, *_: object) -> None:
        seconds, busy, own = (
            None if new is None or old is None else new - old
            for new, old in zip(self._sample(), self._before, strict=True)
        )
        if busy is not None and seconds and own is not None:
            self.cpus = max(0.0, busy - own) / seconds

    def _sample(self) -> tuple[float, float | None, float]:
        """Return seconds: now, all CPUs' busy time, that of this process and its children."""
        times = os.times()
        own = times.user + times.system + times.children_user + times.children_system
        try:
            line = self.stat.read_text(encoding="utf-8").partition("\n")[0]
            # cpu user nice system idle iowait irq softirq steal
            user, nice, system, _, _, irq, softirq, steal = map(int, line.split()[1:9])
        except (OSError, ValueError):
            return time.monotonic(), None, own
        busy = user + nice + system + irq + softirq + steal
        return time.monotonic(), busy / os.sysconf("SC_CLK_TCK"), own


def crowds(others: float, needed: int) -> bool:
    """Return whether other processes keep CPUs busy that so many threads need.

    Parameters
    ----------
    others : float
        CPUs that others keep busy.
    needed : int
        Threads.

    Returns
    -------
    bool
        A thread that must share a CPU holds up all that wait for it.

    Examples
    --------
    >>> from fastadam.bench.load import crowds
    >>> crowds(1.0, 100_000), crowds(1.0, 0)
    (True, False)
    """
    return needed > 0 and others > BUSY and others + needed > (os.cpu_count() or 1) + BUSY
