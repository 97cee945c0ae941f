"""One thread or several: what a pass over many elements takes, chosen anew each time.

A parallel loop ends when every thread has come by. Where other processes keep the cores
busy, a thread comes a time slice of the scheduler late, milliseconds, with nothing left
to do. One thread computes the same bits and waits for nobody. So the process keeps an
account of the time that several threads have saved or lost. While it is overdrawn, passes
take one thread, and pay a small part of their time into it. That part is all that busy
cores can cost; an idle machine never overdraws. `fastadam bench --load` measures it.

These functions are compiled into the kernels: from Python they would cost a microsecond.
"""

from typing import Any

import numpy as np

from . import _jit

# Nanoseconds. Several threads may lose what they have saved, up to a time slice, before one
# takes over: an idle machine, too, has its interruptions.
MOST_SAVED = 4e6
# A process that was stopped for minutes has not lost minutes.
MOST_LOST = 10e6
# Passes of one thread pay this part of their time: what tries of several threads may lose.
PAID = 1 / 16

# What is known of one kind of pass: passes made, the next that takes one thread in any case,
# nanoseconds an element in one thread (0 while unknown).
PASSES, NEXT_SERIAL, SERIAL = range(3)
STATE_SIZE = 3

# Saved nanoseconds, less the lost ones. Only who holds `_threads.alone` writes here.
account = np.zeros(1)


def new_state() -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return the state of a pass that has not been made.

    Its second pass takes one thread, to know how long that takes, and the 8th, 32nd, 128th
    and so on, lest it was interrupted. (The first is the first to touch new memory.)
    """
    return np.array([0.0, 2.0, 0.0])


@_jit.inline
def several(state: Any, account: Any) -> Any:
    """Whether the next pass is to take several threads."""
    state[PASSES] += 1
    if state[PASSES] == state[NEXT_SERIAL]:
        state[NEXT_SERIAL] *= 4
        return False
    return account[0] >= 0.0


@_jit.inline
def note(state: Any, account: Any, several: Any, elements: Any, took: Any, waited: Any) -> None:
    """Take into account how many nanoseconds a pass over so many elements took.

    ``waited`` is how long the thread that was done first waited for the others: no more is
    lost, or a pass that is slow for other reasons, such as denormal numbers, would count.
    """
    if several:
        if state[SERIAL] > 0.0:
            account[0] += max(state[SERIAL] * elements - took, -min(waited, MOST_LOST))
    else:
        account[0] += PAID * took
        if elements > 0:
            each = took / elements
            # Down at once, up slowly: an interruption only makes it longer.
            if state[SERIAL] > 0.0 and each > state[SERIAL]:
                each = state[SERIAL] + (each - state[SERIAL]) / 16
            state[SERIAL] = each
    account[0] = min(account[0], MOST_SAVED)
