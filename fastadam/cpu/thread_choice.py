"""One thread or several: what a pass over many elements uses, chosen for each pass.

A parallel loop ends only when every thread has reported. Where other processes keep the
cores busy, a thread gets its turn milliseconds later, with nothing left to do, and the
loop waits for it. One thread computes the same bits and waits for nobody. So the process
keeps a balance: the time that several threads have saved, compared with one, less what
they have lost in waiting. While it is negative, passes use one thread, and each adds a
small part of its time. That part is the most that busy cores cost; on an idle machine the
balance stays positive. `fastadam bench --load` measures it.

These functions are compiled into the kernels: from Python they would cost a microsecond.
"""

from typing import Any

import numpy as np

from . import intrinsics

# Nanoseconds. The balance rises no higher than this, about a time slice of a scheduler: so a
# short interruption changes nothing, and a machine that becomes busy is noticed soon.
MOST_SAVED = 4e6
# One pass loses no more than this, so that a process that was stopped for minutes recovers.
MOST_LOST = 10e6
# The part of its time that a pass of one thread adds: what trying several threads may cost.
ADDED = 1 / 16

# What is known of one kind of pass: passes made, the next that takes one thread in any case,
# nanoseconds an element in one thread (0 while unknown).
PASSES, NEXT_SERIAL, SERIAL = range(3)
STATE_SIZE = 3

# Nanoseconds saved, less those lost. Only who holds `runtime.kernel_lock` writes here.
balance = np.zeros(1)


def new_state() -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return the state of a pass that has not been made.

    Its second pass uses one thread, to know how long that takes, and so do the 8th, 32nd,
    128th and so on, in case it was interrupted. (The first is the first to touch new memory.)
    """
    return np.array([0.0, 2.0, 0.0])


@intrinsics.inline
def use_several(state: Any, balance: Any) -> Any:
    """Count a pass; return whether it is to use several threads."""
    state[PASSES] += 1
    if state[PASSES] == state[NEXT_SERIAL]:
        state[NEXT_SERIAL] *= 4
        return False
    return balance[0] >= 0.0


@intrinsics.inline
def note(state: Any, balance: Any, several: Any, elements: Any, took: Any, waited: Any) -> None:
    """Learn from a pass over so many elements, which took so many nanoseconds.

    ``waited`` is how long the thread that was done first waited for the others. No more than
    that counts as lost: a pass may be slow for other reasons, such as denormal numbers.
    """
    if several:
        if state[SERIAL] > 0.0:
            balance[0] += max(state[SERIAL] * elements - took, -min(waited, MOST_LOST))
    else:
        balance[0] += ADDED * took
        if elements > 0:
            each = took / elements
            # Down at once, up slowly: an interruption only makes it longer.
            if state[SERIAL] > 0.0 and each > state[SERIAL]:
                each = state[SERIAL] + (each - state[SERIAL]) / 16
            state[SERIAL] = each
    balance[0] = min(balance[0], MOST_SAVED)
