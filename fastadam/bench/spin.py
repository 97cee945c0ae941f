"""A process that keeps one CPU busy, and tells how much of it it got.

``python -m fastadam.bench.spin`` computes until its standard input is closed,
so also when the process that started it is gone. It answers each line there by
the seconds of CPU time that it has used.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from contextlib import ExitStack
from typing import Self

from fastadam.bench.child import Child

__all__ = ["Spinners"]

COMMAND = (sys.executable, "-m", "fastadam.bench.spin")


class Spinners:
    """Processes that keep CPUs busy during a ``with`` block.

    Parameters
    ----------
    number : int
        How many, at least 0.

    Examples
    --------
    >>> from fastadam.bench.spin import Spinners
    >>> with Spinners(1) as spinners:
    ...     (seconds,) = spinners.cpu_seconds()
    >>> seconds > 0
    True
    """

    def __init__(self, number: int) -> None:
        self._children = [Child(COMMAND) for _ in range(number)]
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:  # ends those that run if another cannot be started
            for child in self._children:
                stack.enter_context(child)
            self.cpu_seconds()  # returns once they all spin
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def cpu_seconds(self) -> list[float]:
        """Ask each how much CPU time it has used.

        Returns
        -------
        list of float
            Seconds, one for each process.

        Raises
        ------
        ChildError
            If one has ended.
        """
        return [float(child.ask(None)) for child in self._children]


def _answer() -> None:
    for _ in sys.stdin:
        sys.stdout.write(f"{time.process_time()}\n")
        sys.stdout.flush()
    os._exit(0)


def _main() -> None:
    threading.Thread(target=_answer, daemon=True).start()
    while True:
        pass


if __name__ == "__main__":
    _main()
